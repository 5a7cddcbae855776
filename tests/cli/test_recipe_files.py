"""Recipes that build on one another."""

import os
from pathlib import Path

import pytest

from gpdit_lightning.cli import main
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
        "--config=/ground.yaml",  # again, since the second base builds on it too
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
        ("a: !!python/object/apply:os.getpid []", "line 1 has the tag .*os.getpid, which a recipe cannot have"),
        ("a: !!timestamp abc", "has the tag"),
        ("a: 1\nb: &b {c: *b}", r"\*b in line 2 contains itself"),
        (
            "a0: &a0 [1, 1]" + "".join(f"\na{n}: &a{n} [{f'*a{n - 1},' * 9}]" for n in range(1, 20)),
            "beyond 50000 values",
        ),
        ("a: " + "[" * 100 + "]" * 100, "line 1 is nested deeper than 32 levels"),
        ("a: " + "9" * 5000, "a number of 5000 digits"),
        ("a: 0x" + "F" * 5000, "a number of 5002 digits"),
        ("a: -0b" + "1" * 5000, "a number of 5003 digits"),
        ("a: 1" + ":59" * 3000, "a number of 9001 digits"),
        ("".join(f"k{n}: 1\n" for n in range(1001)), "a mapping of more than 1000 keys"),
        ("a: " + "x" * 2**20, "bytes, more than the 1048576"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, broken=text)
    with pytest.raises(InputError, match=message):
        read_yaml(tmp_path / "broken.yaml")


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "UTF-16"])
def test_what_is_no_text_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "recipe.yaml"
    make = {"pipe": os.mkfifo, "folder": Path.mkdir, "device": lambda path: path.symlink_to("/dev/zero")}
    make.get(kind, lambda path: path.write_text("a: 1", encoding="utf-16"))(path)
    with pytest.raises(
        InputError, match="save it as UTF-8" if kind == "UTF-16" else "not a regular file|it is an empty folder"
    ):
        read_yaml(path)


def test_bases_are_bounded(tmp_path: Path) -> None:
    """A chain of 200 files; 30 files, each of which names the one before twice; a circle through a link."""
    write(tmp_path, deep0="x: 1", twice0="x: 1", circle="base: link.yaml")
    write(tmp_path, **{f"deep{n}": f"base: deep{n - 1}.yaml" for n in range(1, 200)})
    write(tmp_path, **{f"twice{n}": f"base: [twice{n - 1}.yaml, twice{n - 1}.yaml]" for n in range(1, 30)})
    (tmp_path / "link.yaml").symlink_to("circle.yaml")
    for name, message in [("deep199", "more than 100 files"), ("twice29", "more than 100"), ("circle", "of itself")]:
        with pytest.raises(InputError, match=message):
            with_bases(["--config", str(tmp_path / f"{name}.yaml")])


def test_values_of_options_have_the_bounds_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    for option in (f"--ema={tmp_path / 'pipe'}", "--ema=/dev/zero", "--ema=&e {decay: *e}", "--ema=" + "[" * 5000):
        assert main(["fit", "--config=gpdit:tiny", "--model=MixedStage", option]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        assert len(message) < 1500


def test_a_missing_base_is_named_with_the_recipe_that_needs_it(tmp_path: Path) -> None:
    write(tmp_path, mine="base: gone.yaml")
    with pytest.raises(InputError, match=r"gone\.yaml \(the base of .*mine\.yaml\) does not exist"):
        with_bases([f"--config={tmp_path / 'mine.yaml'}"])


BOMB = "[&a0 [1, 1]" + "".join(f", &a{n} [{f'*a{n - 1},' * 9}]" for n in range(1, 20)) + "]"


@pytest.mark.parametrize("text", [BOMB, "[" * 5000, "0x" + "F" * 5000, "1" + ":59" * 3000, "9" * 5000, "9" * 310])
@pytest.mark.parametrize("option", ["trainer.max_steps", "trainer.gradient_clip_val", "data.context_dropout"])
def test_text_that_is_no_value_of_its_option_is_loaded_within_the_same_bounds(
    option: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The quoted text of a recipe is no YAML until an option of another type makes it so."""
    write(tmp_path, quoted=f"{option}: '{text}'")
    assert main(["fit", "--config=gpdit:tiny", f"--config={tmp_path / 'quoted.yaml'}"]) == 2
    assert f"{option} is {text[:20]}" in capsys.readouterr().err
