"""Lookup by registered names and import paths."""

from pathlib import Path

import pytest
import torch

from gpdit_lightning.errors import InputError
from gpdit_lightning.imports import did_you_mean, import_path, report_custom_errors, resolve

REGISTRY = {"rotation": dict, "tangent": list}


@pytest.fixture(autouse=True)
def _user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules on the import path."""
    (tmp_path / "user_module.py").write_text("class Ordered(dict): pass\nNUMBER = 3\n", encoding="utf-8")
    (tmp_path / "broken_module.py").write_text("1 / 0\n", encoding="utf-8")
    (tmp_path / "invalid_module.py").write_text("def f(:\n", encoding="utf-8")
    (tmp_path / "needs_more.py").write_text("import a_package_that_does_not_exist\n", encoding="utf-8")
    (tmp_path / "user_folder").mkdir()
    (tmp_path / "user_package").mkdir()
    (tmp_path / "user_package" / "__init__.py").write_text(
        "from user_package.ordered import ordered\n", encoding="utf-8"
    )
    (tmp_path / "user_package" / "ordered.py").write_text("class ordered(dict): pass\n", encoding="utf-8")
    (tmp_path / "user_folder" / "parts.py").write_text("class Ordered(dict): pass\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)


def test_resolve_a_registered_name() -> None:
    assert resolve("tangent", REGISTRY, "sampler") is list


def test_a_class_may_have_the_name_of_its_module() -> None:
    assert resolve("user_package.ordered", REGISTRY, "sampler", base=dict).__module__ == "user_package.ordered"


def test_resolve_an_import_path() -> None:
    resolved = resolve("user_module.Ordered", REGISTRY, "sampler", base=dict)
    assert (resolved.__module__, resolved.__name__) == ("user_module", "Ordered")


@pytest.mark.parametrize(
    ("name", "base", "message"),
    [
        ("rotaton", None, r"sampler 'rotaton' is not known \(did you mean 'rotation'\?\): choose one of rotation, tan"),
        ("xyz", None, r"sampler 'xyz' is not known: choose .*, or give an import path"),
        ("no_such_module.Ordered", None, r"'no_such_module.Ordered' cannot be imported \(No module named 'no_such_m"),
        ("needs_more.Ordered", None, "No module named 'a_package_that_does_not_exist'"),
        ("user_module.Orderd", None, r"user_module.py\) has no 'Orderd' \(did you mean 'Ordered'\?\)"),
        ("user_module.NUMBER", None, "is of type int; it must be callable"),
        ("user_module.NUMBER", dict, "is not a subclass of builtins.dict"),
        ("user_module.Ordered", list, "is not a subclass of builtins.list"),
        ("user_module..Ordered", None, "is not known"),
        ("user_folder.parts", dict, r"is a module: give the import path .*, such as user_folder\.parts\.NAME\.$"),
    ],
)
def test_unresolvable_names_are_reported(name: str, base: type | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve(name, REGISTRY, "sampler", base)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "broken_module.Ordered",
            r"cannot be imported \(ZeroDivisionError: division by zero in .*_module.py, line 1\)",
        ),
        ("invalid_module.Ordered", r"cannot be imported \(SyntaxError: .*invalid_module.py, line 1\)"),
    ],
)
def test_an_error_inside_the_module_is_reported_with_its_line(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve(name, REGISTRY, "sampler")


def test_errors_of_custom_code_are_reported_in_one_sentence() -> None:
    def fail(error: Exception) -> None:
        with report_custom_errors("sampler", import_path(test_did_you_mean), "it must not fail"):
            raise error

    with pytest.raises(InputError, match=r"test_did_you_mean' failed \(TypeError: a b in .*, line \d+\): it m"):
        fail(TypeError("a\nb"))
    for error in (InputError("x"), MemoryError("x"), torch.OutOfMemoryError("x")):
        with pytest.raises(type(error), match=r"^x$"):
            fail(error)


def test_did_you_mean() -> None:
    assert did_you_mean("evalute", ["evaluate", "fit"]) == " (did you mean 'evaluate'?)"
    assert did_you_mean("xyz", ["evaluate", "fit"]) == ""
