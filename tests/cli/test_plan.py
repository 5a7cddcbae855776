"""`plan`: recipes for simulated machines, and one that trains."""

import os
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from gpdit_lightning.cli import main, plan_trial
from gpdit_lightning.cli import plan as plan_module
from gpdit_lightning.cli.auto_recipe import planned_recipe
from gpdit_lightning.cli.estimated_recipe import read_recipe
from gpdit_lightning.cli.plan import plan, planned_machine
from gpdit_lightning.cli.recipe_cli import parse_recipe
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.devices import Machine, available_cores, this_machine
from gpdit_lightning.errors import InputError
from gpdit_lightning.estimation.requirements import RunSettings, memory
from gpdit_lightning.options.plan import PlannedMachineOptions, PlanOptions
from gpdit_lightning.options.shared import RecipeOptions
from gpdit_lightning.planning import rules
from gpdit_lightning.planning.rules import Choice, memory_limit
from gpdit_lightning.specs import CodecSpec

GIB = 2**30
PCA = CodecSpec("pca", None, 16, 8, 4, mean=(0.0,) * 16, std=(1.0,) * 16, fingerprint="0123456789abcdef")
MACHINES = {
    "cpu": Machine("cpu", 1, "cpu", 8 * GIB, 2, 8 * GIB, bf16=False),
    "1x24": Machine("cuda", 1, "NVIDIA GeForce RTX 4090", 24 * GIB, 16, 64 * GIB, bf16=True),
    "8x80": Machine("cuda", 8, "NVIDIA A100-SXM4-80GB", 80 * GIB, 96, 1000 * GIB, bf16=True),
}
STAGES = {
    "images": "ImageWarmupStage",
    "videos": "LongVideoStage",
    "clips of one length": "GPDiTStage",
    "both": "MixedStage",
}


@pytest.fixture(scope="module")
def folders(write_shards: Callable[..., Manifest], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Prepared data of each kind; the latents are random."""
    images = {("train", "image", (1, 8, 8)): 12, ("validation", "image", (1, 8, 8)): 2}
    videos = {
        ("train", "video", (7, 8, 8)): 12,
        ("train", "video", (5, 8, 8)): 4,
        ("validation", "video", (7, 8, 8)): 2,
    }
    short = {("train", "video", (3, 8, 8)): 12}
    counts = {"images": images, "videos": videos, "clips of one length": short, "both": images | videos}
    root = tmp_path_factory.mktemp("latents")
    return {
        kind: write_shards(root / kind.replace(" ", "-"), samples, codec=PCA).directory
        for kind, samples in counts.items()
    }


def plan_for(machine: Machine, monkeypatch: pytest.MonkeyPatch, data_dir: Path, out: Path, **options: object) -> Choice:
    monkeypatch.setattr(plan_module, "this_machine", lambda: machine)
    return plan(PlanOptions(data_dir=[str(data_dir)], out=out, trial=False, **options))  # type: ignore[arg-type]


def without_paths(run: RunSettings) -> RunSettings:
    sources = tuple(replace(source, config=replace(source.config, manifests=[])) for source in run.sources)
    return replace(run, sources=sources)


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("machine", MACHINES)
def test_the_written_recipe_is_the_choice(
    machine: str, kind: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read as the run that was chosen, whose estimate fits in the memory it was planned for."""
    here, recipe = MACHINES[machine], tmp_path / "recipe.yaml"
    choice = plan_for(here, monkeypatch, folders[kind], recipe)
    read = read_recipe([f"--config={recipe}"], choice.run.gpus)
    assert without_paths(read.run) == without_paths(choice.run)
    assert memory(read.run)["total"] <= memory_limit(here)
    content = yaml.safe_load(recipe.read_text())
    assert content["model"]["class_path"] == STAGES[kind]
    assert content["trainer"]["accelerator"] == here.accelerator
    assert (content["validate_every_steps"] == 0) == (kind == "clips of one length")  # none are held out
    for line in recipe.read_text().splitlines():
        assert len(line) <= 128 or "estimate --config" in line or str(tmp_path) in line


def test_larger_machines_get_sharding_and_the_estimate_of_the_head_is_that_of_estimate(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rules, "MAX_EPOCHS", 10**9)  # as if there were many data
    recipe = tmp_path / "recipe.yaml"
    choice = plan_for(MACHINES["8x80"], monkeypatch, folders["both"], recipe, size="H", hours=30, run_dir="runs/h")
    capsys.readouterr()
    text = recipe.read_text()
    (command,) = re.findall(r"gpdit_lightning (estimate .*?) +# after an edit", text)
    assert main(shlex.split(command)) == 0
    estimated = capsys.readouterr().out
    gib, seconds = re.findall(r"# Memory: ([\d.]+) of|# Time: (.*?) per step", text)
    assert f"it needs {gib[0]} of 80 GiB" in estimated
    assert f"a step takes {seconds[1]}, and {choice.run.max_steps:,} steps" in estimated
    content = yaml.safe_load(text)
    assert content["trainer"]["strategy"] == choice.run.strategy.option == "zero2"
    assert content["run_dir"] == "runs/h"


def test_an_existing_recipe_is_kept(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("mine")
    with pytest.raises(InputError, match="exists: give another --out, or --overwrite"):
        plan_for(MACHINES["cpu"], monkeypatch, folders["images"], recipe)
    assert recipe.read_text() == "mine"
    plan_for(MACHINES["cpu"], monkeypatch, folders["images"], recipe, overwrite=True)
    assert "ImageWarmupStage" in recipe.read_text()


def test_options_describe_another_machine(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def machine(here: str, **options: object) -> Machine:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
        return plan_for(MACHINES[here], monkeypatch, folders["images"], out, **options).machine

    assert machine("cpu", gpus=8) == Machine("cuda", 8, "H100", 80 * GIB, 64, 512 * GIB, bf16=True)
    assert machine("cpu", gpu="L4", gpu_memory=24.0, cores=4) == Machine("cuda", 1, "L4", 24 * GIB, 4, 64 * GIB, True)
    old = replace(MACHINES["1x24"], name="NVIDIA GeForce GTX 1080", bf16=False)
    assert planned_machine(PlannedMachineOptions(gpu="L4"), old) == replace(old, name="L4", bf16=True)
    assert machine("8x80", gpus=2) == replace(MACHINES["8x80"], devices=2)
    assert machine("1x24", gpus=0) == Machine("cpu", 1, "cpu", 64 * GIB, 16, 64 * GIB, bf16=False)
    with pytest.raises(InputError, match="--gpu is Foo, whose peak"):
        machine("cpu", gpu="Foo")


def test_data_that_cannot_be_planned_for(
    write_shards: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = write_shards(tmp_path / "pairs", {("train", "sequence", (6, 8, 8)): 3}).directory
    with pytest.raises(InputError, match="no images or videos for training: few-shot sequences fine-tune"):
        plan_for(MACHINES["cpu"], monkeypatch, pairs, tmp_path / "recipe.yaml")
    with pytest.raises(
        InputError, match=r"which has no manifest\.json, since it does not exist: make some with .*prepare"
    ):
        plan_for(MACHINES["cpu"], monkeypatch, tmp_path / "nothing", tmp_path / "recipe.yaml")


def test_labels_and_custom_sizes_are_in_the_recipe(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labelled = replace(Manifest.load(folders["videos"]), labels=("run", "walk"))
    labelled.save()
    recipe = tmp_path / "recipe.yaml"
    plan_for(MACHINES["1x24"], monkeypatch, folders["videos"], recipe, size="S")
    settings = parse_recipe("fit", [f"--config={recipe}"])
    backbone = settings.model.init_args.backbone
    assert (backbone.layers, backbone.width, backbone.heads, backbone.classes) == (12, 384, 6, 2)
    assert settings.data.labels


def test_this_machine_is_described() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert 2**28 < machine.memory <= machine.host_memory < 2**50


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "10000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({}, 8),
    ],
)
def test_cores_are_those_of_the_quota_of_a_container(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr("gpdit_lightning.devices.CGROUP", tmp_path)
    assert available_cores() == cores


def test_gpus_of_this_machine_are_described_by_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = [SimpleNamespace(name="NVIDIA A100", total_memory=gib * GIB) for gib in (80, 40)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties[device])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    machine = this_machine()
    assert (machine.accelerator, machine.devices, machine.name) == ("cuda", 2, "NVIDIA A100")
    assert (machine.memory, machine.bf16) == (40 * GIB, True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: GIB // 2)
    machine = this_machine()
    assert (machine.accelerator, machine.devices, machine.memory, machine.bf16) == ("mps", 1, GIB // 2, False)


# The latents are random: no codec can decode them.
FIT = ["fit", "--preview.every_steps=0", "--validate_every_steps=2"]


def averaged_weights(run_dir: str) -> bytes:
    return Path(run_dir, "checkpoints", "last.ckpt", "ema.safetensors").read_bytes()


def test_a_planned_recipe_trains_and_resumes(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The speed is measured in a trial, which leaves no files and does not change the training after it.

    `gpdit:auto` trains as the recipe that it has planned, which it keeps once the run has a checkpoint.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan_trial, "MAX_STEPS", 3)
    data_dir = str(folders["both"])
    assert main(["plan", "--data_dir", data_dir, "--gpus", "0", "--run_dir", "runs/plan"]) == 0
    assert "GFLOP/s per device, measured in a trial of this recipe" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    auto = [*FIT, "--config", "gpdit:auto", "--data_dir", data_dir]
    assert main([*auto, "--trainer.max_steps=2"]) == 0
    planned = Path("runs/both/planned.yaml")
    first = planned.read_text()
    assert "trial: training for up to 20 s" in capsys.readouterr().out
    assert main([*auto, "--trainer.max_steps=3"]) == 0
    text = capsys.readouterr().out
    assert "finished at step 3: runs/both/checkpoints/last.ckpt" in text
    assert "trial" not in text
    assert planned.read_text() == first
    assert main([*FIT, f"--config={planned}", "--run_dir=runs/again", "--trainer.max_steps=3"]) == 0
    assert averaged_weights("runs/again") == averaged_weights("runs/both")


def test_a_trial_without_two_steps_says_that_the_time_is_assumed(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan_trial, "MAX_SECONDS", 0.0)  # is over after the first step
    monkeypatch.setattr("gpdit_lightning.cli.plan.can_measure", lambda *_: True)
    assert main(["plan", "--data_dir", str(folders["both"]), "--gpus", "0"]) == 0
    text = capsys.readouterr().out
    assert "assumed without a measurement" in text
    for shown in (text, Path("recipe.yaml").read_text().replace("\n# ", " ")):
        assert "No measurement: the trial ended after 20 s with less than two steps" in shown


def test_a_failed_start_of_gpdit_auto_leaves_nothing_and_is_refused_before_the_trial(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data_dir = str(folders["both"])
    auto = ["fit", "--config", "gpdit:auto", "--data_dir", data_dir]

    def refusal(*words: str, verb: str = "fit") -> str:
        assert main([verb, *auto[1:], *words]) == 2
        output = capsys.readouterr()
        assert "trial" not in output.out
        assert not list(tmp_path.iterdir())
        return output.err

    assert "--hours is an option of `plan`, not of `fit`: write a recipe" in refusal("--hours=3")
    assert "--trail is an option of" not in refusal("--trail=3")
    assert "learning_rat" in refusal("--model.init_args.optimizer.learning_rat=3")
    assert "runs/both has no checkpoint to validate: run `fit` first" in refusal(verb="validate")
    monkeypatch.setattr(plan_trial, "MAX_STEPS", 2)
    assert main([*auto, "--trainer.max_steps=0"]) == 2  # refused after the trial
    assert not list(tmp_path.iterdir())


def test_gpdit_auto_does_not_replace_the_recipe_of_another_run(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The refusal names a command that resumes the run."""
    monkeypatch.chdir(tmp_path)
    data_dir = ["--data_dir", str(folders["both"])]
    assert main(["plan", "--gpus=0", "--no_trial", *data_dir]) == 0
    steps = [*FIT, "--run_dir=runs/both", "--trainer.max_steps=2"]
    assert main([*steps, "--config=recipe.yaml"]) == 0
    assert main([*steps, "--config=gpdit:auto", *data_dir]) == 2
    error = capsys.readouterr().err
    assert "the run in runs/both was not planned by gpdit:auto: give --config runs/both/config.yaml" in error
    assert main([*steps, "--config=runs/both/config.yaml"]) == 0
    assert "already finished at step 2" in capsys.readouterr().out


def test_gpdit_auto_needs_data_and_is_planned_in_one_process(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "gpdit:auto"]) == 2
    assert "give --data_dir, such as --data_dir latents/mine" in capsys.readouterr().err
    assert main(["estimate", "--config", "gpdit:auto"]) == 2
    assert "gpdit:auto is a recipe of fit, validate and test only" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = RecipeOptions(config="gpdit:auto", overrides={"data_dir": [str(folders["both"])]})
    with (
        pytest.raises(InputError, match="plans a recipe in one process, but several were started"),
        planned_recipe(options),
    ):
        pass
