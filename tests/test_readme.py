"""The commands in README, docs and the heads of recipes are accepted by the command line, and their files exist.

Nothing is run: the options are parsed. In a command, words like MODEL or MY_VIDEOS stand for a user's files, and
RECIPE.yaml for a recipe.
"""

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpdit_lightning.cli import VERBS, fit, record_of
from gpdit_lightning.cli.chain import stages_of
from gpdit_lightning.cli.parsing import parse
from gpdit_lightning.cli.recipe_files import recipe_path
from gpdit_lightning.errors import InputError
from gpdit_lightning.options.chain import ChainOptions
from gpdit_lightning.options.shared import RecipeOptions

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BASH_BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
PYTHON_BLOCK = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)
# The commands of docs/extending.md are run, by test_extending.py.
DOCUMENTS = [ROOT / "README.md", *sorted({*(ROOT / "docs").glob("*.md")} - {ROOT / "docs" / "extending.md"})]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
VERB_OF_SCRIPT = {
    "data_prep/shard_latents.py": "prepare",
    "data_prep/build_few_shot.py": "prepare-pairs",
    "data_prep/inspect_shards.py": "inspect",
}
FOLDERS = ("recipes/", "data_prep/", "constraints/")


def code_of(document: Path) -> Iterator[str]:
    """The code in a document: blocks in backticks or indented, and commands inside sentences; of a recipe its head."""
    text = document.read_text(encoding="utf-8")
    if document.suffix == ".yaml":
        yield "\n".join(re.findall(r"^#   +(.*)", text, flags=re.MULTILINE))
        return
    yield from re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    yield "\n".join(re.findall(r"^    (.*)", text, flags=re.MULTILINE))
    for sentence_part in re.findall(r"`([^`]+)`", text):
        yield " ".join(sentence_part.split())


def words_of(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # a sentence with an apostrophe
        return []


def commands_in(document: Path) -> Iterator[list[str]]:
    """The commands of this package in a document, each as its words from the verb or script on."""
    for code in code_of(document):
        code = code.replace("\\\n", " ")
        for name, value in re.findall(r"^for (\w+) in (\w+)", code, flags=re.MULTILINE):
            code = code.replace(f"${name}", value)
        for line in code.splitlines():
            words = words_of(line)
            for place, word in enumerate(words):
                module = word == "gpdit_lightning" and (place == 0 or words[place - 1] in ("-m", "&&"))
                script = word in VERB_OF_SCRIPT and place and words[place - 1] != "-m"
                if script:
                    yield [VERB_OF_SCRIPT[word], *words[place + 1 :]]
                elif module and words[place + 1 :] and not words[place + 1].startswith("VERB"):
                    yield words[place + 1 :]


COMMANDS = sorted({tuple(command): None for path in (*DOCUMENTS, *RECIPES) for command in commands_in(path)})


def check(verb: str, arguments: list[str]) -> None:
    """Parse the options of a verb as the command line does; raises InputError for one that it refuses."""
    record = record_of(verb)
    if record is not None:
        options = parse(verb, "", record, arguments)
        if isinstance(options, ChainOptions):
            chain, *overlays = options.config
            for recipe in stages_of(recipe_path(chain)):
                fit.parse("fit", [*(f"--config={path}" for path in (recipe, *overlays)), *options.overrides])
        elif isinstance(options, RecipeOptions):
            fit.parse(verb, options.fit_arguments)
    elif "--help" not in arguments:
        fit.parse(verb, arguments)


def test_there_are_commands_of_most_verbs() -> None:
    assert {command[0] for command in COMMANDS} >= {"fit", "chain", "sample", "transform", "evaluate", "probe"}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_command_line_accepts(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    verb, *arguments = (re.sub(r"^[A-Z_]+\.yaml$", "recipes/stage2_mixed.yaml", word) for word in command)
    monkeypatch.chdir(ROOT)
    assert verb in VERBS
    for word in arguments:
        path = word.partition("=")[2] or word
        if path.startswith(FOLDERS):
            assert Path(path).is_file(), path
    if arguments:
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):  # --help, --print_config
            check(verb, arguments)


@pytest.mark.parametrize(
    "command", ["fit --config recipes/stage2_mixed.yaml --trainer.max_stepz 3", "export --out x", "estimate --gpus x"]
)
def test_a_wrong_command_would_be_found(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    verb, *arguments = command.split()
    with pytest.raises(InputError):
        check(verb, arguments)


def test_it_opens_with_two_command_lines() -> None:
    demo, test = (block.strip() for block in BASH_BLOCKS[:2])
    assert "\n" not in demo + test
    assert demo.endswith("python -m gpdit_lightning demo")
    assert test.endswith("pytest -n 2")


def test_ci_types_the_same() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    install, test = BASH_BLOCKS[1].strip().split(" && ")[-2:]
    assert install.replace("pip install", "pip install -q") in script
    assert re.search(rf"^ *{test}$", script, flags=re.MULTILINE)


def test_benchmarks_that_are_named_exist() -> None:
    for document in DOCUMENTS:
        for name in re.findall(r"python -m benchmarks\.(\w+)", document.read_text(encoding="utf-8")):
            assert (ROOT / "benchmarks" / f"{name}.py").is_file(), f"{document.name}: {name}"


def test_the_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_the_python_example_runs() -> None:
    assert PYTHON_BLOCK is not None
    names: dict[str, object] = {}
    exec(compile(PYTHON_BLOCK[1], "README.md", "exec"), names)
    assert names["velocity"].shape == (2, 16, 24, 40)  # type: ignore[attr-defined]
    assert set(names["features"]) == {2, 4}  # type: ignore[call-overload]
