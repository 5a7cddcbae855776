"""Every verb with a record of options: `--help` is fast and lists all options; `--print_config` can be read back."""

import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from gpdit_lightning.cli import VERBS, main, record_of
from gpdit_lightning.cli.parsing import is_required, option_names, parse
from gpdit_lightning.errors import InputError
from gpdit_lightning.options.shared import RecipeOptions
from gpdit_lightning.version import __version__

# The options of the other verbs are those of a recipe; see test_fit_help.py.
WITH_OPTIONS = [verb for verb in VERBS if option_names(record_of(verb))]
SLOW_TO_IMPORT = {"torch", "lightning", "numpy", "av", "PIL", "sklearn", "matplotlib"}
HELP_OF_ALL = f"""
import contextlib, io, sys
from gpdit_lightning.cli import main
for verb in {list(VERBS)}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main([verb, "--help"])
    print(verb, *({SLOW_TO_IMPORT} & set(sys.modules)))
"""


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit):
        main(arguments)
    return capsys.readouterr().out


def least_arguments(record: type[Any]) -> list[str]:
    """The required options of a record, with some value each."""
    hints = get_type_hints(record)
    required = [field.name for field in dataclasses.fields(record) if is_required(field)]
    return [f"--{name}={1 if hints[name] is int else 'some'}" for name in required]


def test_help_imports_nothing_that_takes_long() -> None:
    lines = subprocess.run([sys.executable, "-c", HELP_OF_ALL], capture_output=True, text=True, check=True).stdout
    for verb, *imported in (line.split() for line in lines.splitlines()):
        assert not imported, f"{verb} --help imports {imported}"


@pytest.mark.parametrize("verb", WITH_OPTIONS)
def test_help_explains_every_option(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, verb, "--help")
    record = record_of(verb)
    for name in option_names(record):
        (entry,) = re.findall(rf"\n  --{name}\b(.*?)(?=\n  --|\n\n|\Z)", text, flags=re.DOTALL)
        assert len(entry.split()) > 4, entry
    for noise in ("type:", "null", "NoneType", "Sequence[", "%(default)s", "==SUPPRESS=="):
        assert noise not in text


@pytest.mark.parametrize("verb", [verb for verb in WITH_OPTIONS if not issubclass(record_of(verb), RecipeOptions)])
def test_a_printed_config_gives_the_same_options(verb: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    record = record_of(verb)
    given = least_arguments(record)
    (tmp_path / "printed.yaml").write_text(shown(capsys, verb, *given, "--print_config"))
    printed = parse(verb, "", record, [f"--config={tmp_path / 'printed.yaml'}"])
    assert printed == parse(verb, "", record, given)


def test_abbreviated_options_are_refused() -> None:
    for verb in WITH_OPTIONS:
        record = record_of(verb)
        names = option_names(record)
        if not issubclass(record, RecipeOptions):  # else unknown options belong to the recipe
            for abbreviation in sorted({name[:-1] for name in names} - set(names))[::10]:
                with pytest.raises(InputError, match=rf"--{abbreviation}.*; did you mean --{abbreviation}"):
                    parse(verb, "", record, [*least_arguments(record), f"--{abbreviation}", "1"])


def test_misspelled_verbs_and_options_are_corrected(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in VERBS:
        assert main([f"{verb}z"]) == 2
        assert capsys.readouterr().err == f"error: there is no verb '{verb}z': did you mean '{verb}'?\n"
    for verb in WITH_OPTIONS:
        record = record_of(verb)
        if not issubclass(record, RecipeOptions):  # else unknown options belong to the recipe
            for name in sorted(option_names(record))[::10]:
                with pytest.raises(InputError, match=rf"--{name}z.*; did you mean --{name}\?$"):
                    parse(verb, "", record, [*least_arguments(record), f"--{name}z", "1"])


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "chain", "estimate"])
def test_a_missing_recipe_is_reported_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no recipe is given: ")
    assert f"--config gpdit:{'chain_gpdit_h' if verb == 'chain' else 'stage2_mixed'}" in error


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gpdit_lightning {__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_is_a_function_of_its_record(verb: str) -> None:
    module, _, name = VERBS[verb].function.partition(":")
    function = getattr(importlib.import_module(f"gpdit_lightning.cli.{module}"), name)
    parameters = inspect.signature(function).parameters.values()
    (argument,) = (parameter for parameter in parameters if parameter.default is parameter.empty)
    assert get_type_hints(function)[argument.name] is record_of(verb)
