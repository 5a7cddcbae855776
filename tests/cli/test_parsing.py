"""A verb's record of options as its command line: lists, switches, YAML files, help and errors."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml

from gpdit_lightning.cli import main, record_of
from gpdit_lightning.cli.parsing import parse
from gpdit_lightning.cli.recipe_cli import parse_recipe
from gpdit_lightning.errors import InputError
from gpdit_lightning.options.inspect import InspectOptions
from gpdit_lightning.options.prepare import PrepareOptions
from gpdit_lightning.options.shared import RecipeOptions


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network."""

    path: str
    """Its file."""
    pool: int = 2
    """Pixels that are averaged."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Shared options."""

    seeds: Sequence[int] = (0,)
    """Seeds."""
    cache: bool = True
    """Keep keys and values."""


@dataclass(frozen=True, kw_only=True)
class Options(Shared):
    """Own options."""

    POSITIONAL = "place"

    place: str
    """A place."""
    names: Sequence[str] = ()
    """Names."""
    levels: tuple[float, float] = (0.0, 1.0)
    """A range."""
    out: Path = Path("out.mp4")
    """A file."""
    kind: Literal["fast", "slow"] | None = None
    """A kind."""
    mark: bool = False
    """Mark it."""
    network: Network | None = None
    """A network."""


def read(*arguments: str) -> Options:
    return parse("verb", "Do something.", Options, arguments)


def test_lists_switches_and_a_first_word_need_no_quotes() -> None:
    options = read(
        "here", "--names", "a b", "c,d", "1", "--mark", "--no_cache", "--seeds", "3", "4", "--levels", "-0.5", "1"
    )
    assert options == Options(
        place="here", names=("a b", "c,d", "1"), mark=True, cache=False, seeds=(3, 4), levels=(-0.5, 1.0)
    )


def test_values_are_written_as_yaml_too() -> None:
    options = read("--place=here", "--names", "[a, b]", "--mark", "false", "--out", "x/y.mp4", "--network.path", "f")
    assert options == Options(place="here", names=("a", "b"), out=Path("x/y.mp4"), network=Network(path="f"))


def test_later_files_and_options_override_earlier_ones(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(yaml.safe_dump({"place": "first", "seeds": [1], "network": {"path": "f", "pool": 3}}))
    second.write_text(yaml.safe_dump({"base": "first.yaml", "place": "second", "network": {"pool": 5}}))
    assert read("--config", str(second), "--seeds", "2") == Options(
        place="second", seeds=(2,), network=Network(path="f", pool=5)
    )


def test_what_is_printed_is_a_config_of_the_same_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read("here", "--mark", "--seeds", "1", "2", "--print_config")
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert read("--config", str(path)) == Options(place="here", mark=True, seeds=(1, 2))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["here", "--nmaes", "a"], ["--nmaes", "did you mean --names?"]),
        (["here", "there"], ["'there' is not an option: every option begins with --"]),
        (["here", "--kind", "slwo"], ["kind is slwo", "one of fast, slow"]),
        (["here", "--seeds", "x"], ["seeds", "x"]),
        (["here", "--mark=perhaps"], ["mark is perhaps", "true or false"]),
        ([], ["--place is missing"]),
        (["--config"], ["--config has no file"]),
        (["here", "--network.pool", "x", "--network.path", "f"], ["pool is x", "a whole number"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml does not exist in "]),
        (["--config", "gpdit:stage2_mixd"], ["did you mean gpdit:stage2_mixed"]),
    ],
)
def test_an_error_is_one_sentence_that_names_option_and_value(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(InputError) as failure:
        read(*arguments)
    text = str(failure.value)
    assert "\n" not in text
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("verb", "option"),
    [("prepare", "--videos"), ("sample", "--context"), ("evaluate", "--seeds"), ("fit", "--data_dir")],
)
def test_a_list_that_a_later_one_overrides_is_named(verb: str, option: str, messages: pytest.LogCaptureFixture) -> None:
    """Those who give a folder after each of several `--videos` lose all but the last."""
    assert main([verb, "--config=nowhere.yaml", option, "1", f"{option}=2"]) == 2
    assert main([verb, "--config=nowhere.yaml", option, "1", "2"]) == 2
    (warning,) = [message for message in messages.messages if "is given" in message]
    assert warning == f"warning: {option} is given 2 times, and only the last is used: for all values give {option} A B"


def test_help_groups_options_by_the_record_that_declares_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read("--help")
    text = capsys.readouterr().out
    assert text.index("Shared options:") < text.index("--seeds") < text.index("Own options:") < text.index("--names")
    assert "{fast,slow}" in text
    assert "(default: out.mp4)" in text
    assert "type:" not in text
    assert "null" not in text


@dataclass(frozen=True, kw_only=True)
class WithRecipe(RecipeOptions):
    """Own options."""

    devices: int = 1
    """Devices."""
    sizes: Sequence[str] = ()
    """Sizes."""
    check: bool = False
    """Check first."""


def test_what_is_not_a_records_own_option_overrides_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("run_dir: runs/a\ndevices: 3\n")
    Path("b.yaml").write_text("check: true\n")
    words = ["-c", "a.yaml", "--sizes", "1x1", "2x2", "--trainer.max_steps", "5", "--config=b.yaml"]
    words += ["--data.seed=1", "--devices", "2", "--print_config"]
    options = parse("verb", "Do something.", WithRecipe, words)
    assert options == WithRecipe(
        config=("a.yaml", "b.yaml"),
        overrides=("--trainer.max_steps", "5", "--data.seed=1", "--print_config"),
        devices=2,
        sizes=("1x1", "2x2"),
        check=True,
    )
    assert options.fit_arguments == ["--config=a.yaml", "--config=b.yaml", *options.overrides]


def test_values_from_python_override_the_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "it's a: run"
    overrides = {
        **{"run_dir": folder, "runs": str(tmp_path), "trainer.max_steps": 7, "trainer.max_time": None},
        **{"trainer.detect_anomaly": True, "data.images.manifests": [tmp_path / "a", "b"]},
    }
    options = RecipeOptions(config="gpdit:stage1_image_warmup", overrides=overrides)
    recipe = parse_recipe("fit", options.fit_arguments)
    assert (recipe.run_dir, recipe.trainer.max_steps, recipe.trainer.max_time) == (str(folder), 7, None)
    assert recipe.trainer.detect_anomaly is True
    assert recipe.data.images.manifests == [f"{tmp_path}/a", "b"]


def test_names_that_a_recipe_cannot_store_are_refused() -> None:
    folder = os.fsdecode(b"runs/caf\xe9")
    for arguments in ([f"--run_dir={folder}"], ["--run_dir", folder]):
        with pytest.raises(
            InputError, match="is not UTF-8, but the files of a run record it: rename that file or folder"
        ):
            parse("fit", "Train.", RecipeOptions, arguments)


def test_help_of_a_verb_with_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("verb", "Do something.", WithRecipe, ["--help"])
    text = capsys.readouterr().out
    assert "--config RECIPE" in text
    assert "fit --help" in text
    assert "--overrides" not in text
    assert "--sizes+" not in text


def test_a_single_recipe_in_python_is_a_list_of_one() -> None:
    assert WithRecipe(config="a.yaml").fit_arguments == ["--config=a.yaml"]


@pytest.mark.parametrize(
    "name",
    [
        *("o: {1}", "123", "true", "1e3", "[x]", "[1,2]", "a#b", "'q'", "-dash", "~", "*", "!x", "&a", "@f", "?", "|"),
        *(
            "caf\udce9",
            "a\u2028b",
            "a\nb",
            "{a: b}",
            "key=value",
            "=",
            "${x}",
            "2026-11-29",
            " lead ",
            "\x1b[31m",
            "%03d",
        ),
    ],
)
def test_any_name_of_a_file_is_an_option_value(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).touch()
    words = ["--videos", "other", name, "--out", name]
    options = parse("prepare", "", PrepareOptions, words)
    assert (options.videos, options.out) == ((Path("other"), Path(name)), Path(name))
    assert parse("prepare", "", PrepareOptions, ["--videos", name, "--out=x"]).videos == (Path(name),)
    inspection = parse("inspect", "", InspectOptions, [name, "--why", name])
    assert (inspection.folder, inspection.why) == (Path(name), name)


@pytest.mark.parametrize(
    ("verb", "arguments", "option", "condition"),
    [
        ("sample", ["--checkpoint=m", "--start=0"], "start", "without --context"),
        ("sample", ["--checkpoint=m", "--context_frames=5"], "context_frames", "without --context"),
        ("sample", ["--checkpoint=m", "--side_by_side"], "side_by_side", "without --context"),
        ("inspect", ["--folder=f", "--out=a.png"], "out", "without --show"),
        ("inspect", ["--folder=f", "--codec_source=c"], "codec_source", "without --show"),
        ("inspect", ["--folder=f", "--show=3", "--workers=2"], "workers", "without --verify"),
        ("inspect", ["--folder=f", "--show=3", "--samples=2"], "samples", "with --verify, --show or --why, which "),
        ("plan", ["--data_dir=d", "--gpus=0", "--gpu=A100"], "gpu", "with --gpus 0"),
        ("plan", ["--data_dir=d", "--gpus=0", "--gpu_memory=40"], "gpu_memory", "with --gpus 0"),
        ("estimate", ["--config=r.yaml", "--measure", "--gpu=A100"], "gpu", "with --measure"),
        ("estimate", ["--config=r.yaml", "--tflops=3", "--mfu=0.5"], "mfu", "with --tflops"),
        ("evaluate", ["--checkpoint=m", "--out=o", "--fvd_frames=generated"], "fvd_frames", "without --video_network"),
        ("evaluate", ["--checkpoint=m", "--out=o", "--reference=r", "--count=9"], "count", "with --reference"),
        (
            "evaluate",
            ["--checkpoint=m", "--out=o", "--no_labels", "--sample_labels=data"],
            "sample_labels",
            "with --no_",
        ),
    ],
)
def test_an_option_without_effect_is_refused_unless_it_has_its_default(
    verb: str, arguments: list[str], option: str, condition: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("run_dir: r")
    record = record_of(verb)
    with pytest.raises(InputError, match=f"^--{option} has no effect {condition}.*, or leave --{option} out"):
        parse(verb, "Does something.", record, arguments)
    of_default = InspectOptions(folder=Path("f"), out=Path("sheet.png"), samples=512, verify=True)
    assert of_default.out == Path("sheet.png")
