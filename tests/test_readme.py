"""The command line accepts the commands in README, docs and heads of recipes, and their files exist.

Options are parsed, but nothing is run. In the commands, words like MODEL or MY_VIDEOS are placeholders for files of a
user, and RECIPE.yaml for a recipe.
"""

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpdit_lightning.cli import VERBS, record_of
from gpdit_lightning.cli.chain import stages_of
from gpdit_lightning.cli.parsing import parse
from gpdit_lightning.cli.recipe_cli import parse_recipe
from gpdit_lightning.cli.recipe_files import AUTO, recipe_path
from gpdit_lightning.errors import InputError
from gpdit_lightning.options.chain import ChainOptions
from gpdit_lightning.options.shared import RecipeOptions

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# The commands of docs/extending.md are run, by test_extending.py.
DOCUMENTS = [ROOT / "README.md", *sorted({*(ROOT / "docs").rglob("*.md")} - {ROOT / "docs" / "extending.md"})]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
VERB_OF_SCRIPT = {
    "data_prep/shard_latents.py": "prepare",
    "data_prep/build_few_shot.py": "prepare-pairs",
    "data_prep/inspect_shards.py": "inspect",
}
FOLDERS = ("recipes/", "data_prep/", "constraints/")


def bash_blocks(text: str) -> list[str]:
    """Return the code blocks of a shell in Markdown."""
    return re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)


BASH_BLOCKS = bash_blocks(README)


def code_in(document: Path) -> Iterator[str]:
    """Yield the code in a document: code blocks, indented and inline code; of a recipe, the indented comments."""
    text = document.read_text(encoding="utf-8")
    if document.suffix == ".yaml":
        yield "\n".join(re.findall(r"^#   +(.*)", text, flags=re.MULTILINE))
        return
    yield from bash_blocks(text)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    yield "\n".join(re.findall(r"^    (.*)", text, flags=re.MULTILINE))
    for inline in re.findall(r"`([^`]+)`", text):
        yield " ".join(inline.split())


def split_words(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # a sentence with an apostrophe
        return []


def commands_in(document: Path) -> Iterator[list[str]]:
    """Yield the commands of this package in a document, as lists of words that begin with the verb."""
    for code in code_in(document):
        code = code.replace("\\\n", " ")
        variables = re.findall(r"^for (\w+) in (\w+)", code, flags=re.MULTILINE)
        variables += re.findall(r'^([A-Z]+)="([^"]*)"', code, flags=re.MULTILINE)
        for name, value in variables:
            code = code.replace(f"${name}", value)
        for line in code.splitlines():
            words = split_words(line)
            for i, word in enumerate(words):
                is_module = word == "gpdit_lightning" and (i == 0 or words[i - 1] in ("-m", "&&"))
                is_script = word in VERB_OF_SCRIPT and i and words[i - 1] != "-m"
                if is_script:
                    yield [VERB_OF_SCRIPT[word], *words[i + 1 :]]
                elif is_module and words[i + 1 :] and not words[i + 1].startswith("VERB"):
                    yield words[i + 1 :]


COMMANDS = sorted({tuple(command): None for path in (*DOCUMENTS, *RECIPES) for command in commands_in(path)})


def parse_options(verb: str, arguments: list[str]) -> None:
    """Parse the options of a verb as the command line does; raises InputError for invalid ones."""
    arguments = ["gpdit:stage2_mixed" if word == AUTO else word for word in arguments]  # the data do not exist
    options = parse(verb, "", record_of(verb), arguments)
    if isinstance(options, ChainOptions):
        chain, *overlays = options.config
        for recipe in stages_of(recipe_path(chain)):
            parse_recipe("fit", [*(f"--config={path}" for path in (recipe, *overlays)), *options.overrides])
    elif isinstance(options, RecipeOptions):
        parse_recipe(verb, options.fit_arguments)


def test_most_verbs_occur() -> None:
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
            parse_options(verb, arguments)


@pytest.mark.parametrize(
    "command", ["fit --config recipes/stage2_mixed.yaml --trainer.max_stepz 3", "export --out x", "estimate --gpus x"]
)
def test_an_invalid_command_would_be_found(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    verb, *arguments = command.split()
    with pytest.raises(InputError):
        parse_options(verb, arguments)


def test_readme_begins_with_the_commands_for_demo_and_tests() -> None:
    demo, test = (block.strip() for block in BASH_BLOCKS[:2])
    assert "\n" not in demo + test
    assert demo.endswith("python -m gpdit_lightning demo")
    assert test.endswith("pytest -n 2")


def test_ci_runs_the_same_commands() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    install, test = BASH_BLOCKS[1].strip().split(" && ")[-2:]
    assert install.replace("pip install", "pip install -q") in script
    assert re.search(rf"^ *{test}$", script, flags=re.MULTILINE)


def test_benchmarks_in_commands_exist() -> None:
    for document in DOCUMENTS:
        for name in re.findall(r"python -m benchmarks\.(\w+)", document.read_text(encoding="utf-8")):
            files = (ROOT / "benchmarks" / f"{name}.py", ROOT / "benchmarks" / name / "__main__.py")
            assert any(file.is_file() for file in files), f"{document.name}: {name}"


def test_links_are_valid() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_the_example_of_the_network_runs() -> None:
    text = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "new_cache" in block]
    names: dict[str, object] = {}
    exec(compile(example, "generation.md", "exec"), names)
    assert names["velocity"].shape == (2, 16, 24, 40)  # type: ignore[attr-defined]
    assert set(names["features"]) == {2, 4}  # type: ignore[call-overload]
