"""The estimates in the heads of recipes and in docs/scaling.md are those of `estimate`."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from gpdit_lightning.cli.estimate import described_cluster
from gpdit_lightning.cli.estimated_recipe import read_recipe
from gpdit_lightning.estimation.requirements import RunSettings, memory, step_flops
from gpdit_lightning.estimation.time import step_time
from gpdit_lightning.estimation.units import GIB
from gpdit_lightning.options.estimate import HardwareOptions

ROOT = Path(__file__).parents[1]
RECIPES = ("stage1_image_warmup", "stage2_mixed", "stage3_long_video", "stage4_few_shot", "ucf101_b")
STAGES = RECIPES[:4]
ACDIT = (
    *(f"acdit/imagenet_{size}" for size in ("b", "l", "xl", "h", "xl_full_sequence")),
    *(f"acdit/ucf101_{size}" for size in ("xl", "h", "xl_full_sequence")),
    *("acdit/imagenet_xl_classification", "acdit/ucf101_xl_classification"),
    *("vidgpt/ucf101", "vidgpt/ucf101_full_sequence"),
)
SECONDS = {"hour": 3600, "minute": 60}


def head_of(recipe: str) -> str:
    """Return the comments at the top of a recipe as one line."""
    text = (ROOT / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")
    return " ".join(re.sub(r"^#\s*", "", line) for line in text.splitlines() if line.startswith("#"))


def as_stated(value: float, text: str) -> str:
    """Return a number with as many decimals as a text has."""
    return f"{value:.{len(text.partition('.')[2])}f}"


def seconds_on_h100(run: RunSettings) -> float:
    return run.max_steps * step_time(run, described_cluster(HardwareOptions())).total


@pytest.mark.parametrize("recipe", [*RECIPES, *ACDIT, "labels/ucf101"])
def test_the_head_of_a_recipe_has_the_memory_and_time_of_its_command(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    head = head_of(recipe)
    stated = re.search(r"Memory: ([\d.]+) GiB per GPU.*?\(estimated: python -m gpdit_lightning estimate ([^;)]+)", head)
    assert stated
    options = dict(re.findall(r"--(gpus|codec|video_sizes|image_sizes) (\S+)", stated[2]))
    sizes = {f"{kind}s": [options[f"{kind}_sizes"]] for kind in ("video", "image") if f"{kind}_sizes" in options}
    files = [f"--config={path}" for path in re.findall(r"--config (\S+)", stated[2])]
    run = read_recipe(files, int(options["gpus"]), sizes, options.get("codec", "wan")).run
    assert as_stated(memory(run)["total"] / GIB, stated[1]) == stated[1]
    if recipe not in (*RECIPES, *ACDIT):
        return  # its time is relative to that of another recipe
    time = re.search(r"Time: (?:at least )?([\d.]+) (hour|minute)s? on (\w+) H100.*?([\d.]+) PFLOP per step", head)
    assert time
    assert time[3].replace("one", "1") == str(run.gpus)
    assert as_stated(seconds_on_h100(run) / SECONDS[time[2]], time[1]) == time[1]
    assert f"{sum(step_flops(run).values()) / 1e15:.2g}" == time[4]


def test_the_head_of_the_overlay_for_one_gpu_has_the_memory_and_time_of_every_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    runs = [read_recipe([f"--config=recipes/{stage}.yaml", "--config=recipes/size/b.yaml"]).run for stage in STAGES]
    gib = [f"{memory(run)['total'] / GIB:.0f}" for run in runs]
    assert f"Memory: {', '.join(gib[:3])} and {gib[3]} GiB for the four stages" in head_of("size/b")
    hours = [f"{seconds_on_h100(run) / 3600:.0f}" for run in runs[:3]]
    assert f"Time: {', '.join(hours)} hours and {seconds_on_h100(runs[3]):.0f} s" in head_of("size/b")


@pytest.mark.parametrize("name", ["what_fits", "scaling", "long_clips"])
def test_the_tables_of_estimates_are_up_to_date(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [name])
    importlib.import_module(f"benchmarks.{name}").main()
    assert capsys.readouterr().out in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8"), (
        f"an estimate changed: python -m benchmarks.{name}"
    )
