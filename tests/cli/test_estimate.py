"""What a recipe needs, said without running it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.cli import main
from gpdit_lightning.cli.estimate import (
    GIB,
    least_gpus_that_fit,
    memory,
    nearest_that_fits,
    overrides,
    read,
    step_flops,
)
from gpdit_lightning.data.datamodule import LatentDataModule, SourceConfig
from gpdit_lightning.data.manifest import Manifest

RECIPES = Path(__file__).parents[2] / "recipes"
STAGE2 = f"--config={RECIPES / 'stage2_mixed.yaml'}"
DATA: dict[str, Any] = {"max_ranks": 2, "context_dropout": 0.5, "noise_draws": 2}
SOURCES: dict[str, dict[str, Any]] = {
    "images": {"batch_size": 4},
    "videos": {"batch_size": 8, "micro_batches": 2, "frames": 3, "least_frames": 2},
}


@pytest.fixture
def mixed(write_shards: Callable[..., Manifest], tmp_path: Path) -> tuple[Path, Path]:
    """A recipe that mixes images of two sizes with clips of two lengths, and its shards."""
    counts = {("train", "image", (1, 8, 8)): 8, ("train", "image", (1, 8, 12)): 8, ("train", "video", (3, 8, 8)): 16}
    shards = write_shards(tmp_path / "shards", counts).directory
    backbone = {"size": "tiny", "layers": 2, "latent_channels": 4}
    recipe = {
        "model": {"class_path": "MixedStage", "init_args": {"backbone": backbone}},
        "data": DATA | {name: source | {"manifests": [str(shards)]} for name, source in SOURCES.items()},
    }
    (tmp_path / "mixed.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "mixed.yaml", shards


def test_flops_of_a_mixed_step_are_those_of_its_micro_batches(mixed: tuple[Path, Path]) -> None:
    """The forward passes of four steps, in which every size and length comes equally often, as torch counts them."""
    recipe, shards = mixed
    sources = {name: SourceConfig(manifests=[str(shards)], **source) for name, source in SOURCES.items()}
    data = LatentDataModule(**sources, **DATA)
    config = GPDiTConfig(size="tiny", layers=2, latent_channels=4)
    with torch.device("meta"):
        model = GPDiT(config)
    steps, counter = 4, FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), torch.device("meta"), counter:
        for number in range(steps * data.micro_batches_per_step):
            batch = data.plan.micro_batch(number)
            source = data.plan.sources[batch.source]
            bucket = data.buckets["train"][source.name][batch.bucket]
            shape = (batch.frames, 4, *bucket.readers[0].entry.shape[2:])
            draws = DATA["noise_draws"] if source.name == "videos" else 1
            rows = draws * len(batch.samples)
            clean = torch.zeros(int(batch.context.sum()), *shape)
            model(torch.zeros(rows, *shape), torch.zeros(rows, shape[0]), clean, draws=draws)
    run = read([f"--config={recipe}"], gpus=1, sizes={})
    assert sum(step_flops(run).values()) == pytest.approx(3 * counter.get_total_flops() / steps, rel=1e-9)


def test_prepared_data_give_the_shapes(mixed: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", f"--config={mixed[0]}", "--gpus=2", "--trainer.max_steps=500"]) == 0
    text = capsys.readouterr().out
    assert "images: 4 a step, 2 at a time on a GPU, latent frames 1, 64x64, 64x96 (as prepared)" in text
    assert "videos: 8 a step, 2 at a time on a GPU, latent frames 2 to 3, 64x64 (as prepared)" in text
    assert "for 500 steps" in text


def test_h_is_estimated_without_being_built(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", STAGE2, "--gpus", "64"]) == 0
    text = capsys.readouterr().out
    assert "2,284,305,984 parameters" in text
    assert "256x256, 320x192 (assumed)" in text
    assert re.search(r"The recipe fits: it needs \d+\.\d of 80 GiB", text)
    assert re.search(r"\n> DDP .* fits\n.*ZeRO-1", text)
    assert "a third as much again to recompute" in text


@pytest.mark.parametrize(
    ("gpus", "capacity", "options", "expected"),
    [
        (8, 80, ["--model.init_args.backbone.activation_checkpointing=false"], "micro_batches"),
        (64, 62, ["--model.init_args.backbone.activation_checkpointing=false"], "activation_checkpointing=true"),
        (64, 40, [], "--trainer.strategy=zero2"),
        (64, 8, ["--data.max_ranks=64"], "--trainer.strategy=zero3"),
        (1, 24, [], "--data.max_ranks=1 --trainer.strategy=zero2_offload"),
    ],
)
def test_the_nearest_setting_fits(gpus: int, capacity: float, options: list[str], expected: str) -> None:
    """And its options, given back, make the recipe that setting."""
    run = read([STAGE2, *options], gpus, {})
    assert memory(run)["total"] > capacity * GIB
    wanted = nearest_that_fits(run, capacity * GIB)
    assert wanted is not None
    assert expected in overrides(run, wanted)
    changed = read([STAGE2, *options, *overrides(run, wanted).split()], gpus, {})
    assert changed == wanted
    assert memory(changed)["total"] <= capacity * GIB


def test_more_gpus_instead_of_offloading(capsys: pytest.CaptureFixture[str]) -> None:
    run = read([STAGE2], 1, {})
    wanted = least_gpus_that_fit(run, 24 * GIB)
    assert wanted is not None
    assert wanted.gpus == 4
    assert main(["estimate", STAGE2, "--gpu_memory", "24"]) == 0
    text = capsys.readouterr().out
    assert "zero2_offload\nWithout offloading, with" in text
    assert f"GiB on each of 4 GPUs:\n  {overrides(run, wanted)}" in text


def test_what_no_setting_makes_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", STAGE2, "--gpu_memory", "1"]) == 0
    assert "No setting makes it fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--gpus=3"], "3 GPUs do not divide data.max_ranks = 64"),
        (["--gpu=K20"], "'K20' is not known"),
        (["--mfu=2"], "--mfu is 2.0"),
        (["--video_sizes", "100x100"], "multiples of 16 pixels"),
        (["--trainer.strategy=fsdp"], "trainer.strategy is fsdp"),
        (["--trainer.precision=16-mixed"], "trainer.precision is 16-mixed"),
        (["--data.images.micro_batches=7"], "cannot be cut into 7"),
        (["--data.images.batch_size=0", "--data.videos.batch_size=0"], "no source of data"),
        (["--data.no_such_option=1"], "no_such_option"),
    ],
)
def test_what_cannot_be_estimated(options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", STAGE2, *options]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert "Traceback" not in error


def test_samples_that_are_too_short(mixed: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", f"--config={mixed[0]}", "--data.videos.frames=5", "--data.videos.least_frames=5"]) == 2
    assert "asks for 5 latent frames, but some samples have 3" in capsys.readouterr().err
