"""Recipes that build on one another."""

from pathlib import Path

import pytest

from gpdit_lightning.cli.recipe_files import read_yaml, with_bases
from gpdit_lightning.errors import InputError


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_bases_come_before_the_recipes_that_name_them(tmp_path: Path) -> None:
    (tmp_path / "size").mkdir()
    write(tmp_path, ground="x: 1", stage="base: [ground.yaml, size/big.yaml]", mine="base: stage.yaml", overlay="x: 2")
    write(tmp_path / "size", big="base: ../ground.yaml")
    arguments = [
        "--trainer.max_steps=3",
        "--config",
        str(tmp_path / "mine.yaml"),
        f"--config={tmp_path / 'overlay.yaml'}",
    ]
    names = [argument.replace(str(tmp_path), "") for argument in with_bases(arguments)]
    assert names == [
        "--trainer.max_steps=3",
        "--config=/ground.yaml",
        "--config=/size/../ground.yaml",
        "--config=/size/big.yaml",
        "--config=/stage.yaml",
        "--config=/mine.yaml",
        "--config=/overlay.yaml",
    ]


def test_a_circle_of_bases_is_refused(tmp_path: Path) -> None:
    write(tmp_path, one="base: two.yaml", two="base: one.yaml")
    with pytest.raises(InputError, match=r"one\.yaml is a base of itself: remove it from the `base` of .*two\.yaml"):
        with_bases(["--config", str(tmp_path / "one.yaml")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", r"broken\.yaml is not valid YAML \("),
        ("- 1", r"broken\.yaml has no fields"),
        ("", "has no fields"),
        ("a: 1\nb: {c: 1, d: 2, c: 3}", "the key 'c' in line 2 is there already: keep one of the two"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, broken=text)
    with pytest.raises(InputError, match=message):
        read_yaml(tmp_path / "broken.yaml")


def test_a_missing_base_is_named_with_the_recipe_that_needs_it(tmp_path: Path) -> None:
    write(tmp_path, mine="base: gone.yaml")
    with pytest.raises(InputError, match=r"gone\.yaml \(the base of .*mine\.yaml\) cannot be read"):
        with_bases([f"--config={tmp_path / 'mine.yaml'}"])
