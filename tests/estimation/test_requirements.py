"""What a run is estimated to need, against the FLOPs of its micro-batches and the bytes of real runs."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.data.datamodule import LatentDataModule, SourceConfig
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.plan import PlannedBucket, PlannedSource
from gpdit_lightning.errors import InputError
from gpdit_lightning.estimation import memory as memory_module
from gpdit_lightning.estimation.flops import PassShape, training_flops
from gpdit_lightning.estimation.memory import STRATEGIES, activation_bytes
from gpdit_lightning.estimation.requirements import (
    RunSettings,
    least_gpus_that_fit,
    memory,
    nearest_that_fits,
    overrides,
    step_flops,
    with_smaller_micro_batches,
)
from tests.estimation import memory_runs

GIB = 2**30


def bucket(*lengths: int, width: int = 8) -> PlannedBucket:
    """Eight samples of each length."""
    return PlannedBucket((8 * len(lengths),), lengths, 8, width)


BY_OPTION = {strategy.option: strategy for strategy in STRATEGIES}
MIXED = RunSettings(
    backbone=GPDiTConfig(size="tiny", layers=2, latent_channels=4),
    precision="bf16-mixed",
    strategy=BY_OPTION["auto"],
    gpus=1,
    max_ranks=2,
    context_dropout=0.5,
    noise_draws=2,
    max_steps=1,
    sources=(
        PlannedSource("images", (bucket(1), bucket(1, width=12)), batch_size=4),
        PlannedSource("videos", (bucket(2, 3),), batch_size=8, micro_batches=2),
    ),
)
COUNTED = RunSettings(
    backbone=memory_runs.CONFIG,
    precision="bf16-mixed",
    strategy=BY_OPTION["auto"],
    gpus=1,
    max_ranks=memory_runs.RANKS,
    context_dropout=0.0,
    noise_draws=1,
    max_steps=memory_runs.STEPS,
    sources=(
        PlannedSource(
            "images",
            (bucket(1),),
            batch_size=memory_runs.MICRO_BATCHES * memory_runs.RANKS,
            micro_batches=memory_runs.MICRO_BATCHES,
        ),
    ),
)
PRECISIONS = ("32-true", "bf16-mixed")
CASES = [(option, precision) for option in ("auto", "zero2", "zero3", "fsdp2") for precision in PRECISIONS]
H = replace(
    COUNTED,
    backbone=GPDiTConfig.preset("H", activation_checkpointing=True),
    max_ranks=64,
    sources=(PlannedSource("videos", (PlannedBucket((64,), (5,), 24, 40),), batch_size=64),),
)


@pytest.mark.parametrize(("batch", "classes"), [({"batch_size": 8}, 0), ({"tokens": 768}, 0), ({"tokens": 768}, 10)])
def test_flops_of_a_mixed_step_are_those_of_its_micro_batches(
    batch: dict[str, int], classes: int, write_shards: Callable[..., Manifest], tmp_path: Path
) -> None:
    """The forward passes of four steps, in which every size and length comes equally often, as torch counts them."""
    images, videos = MIXED.sources
    backbone = MIXED.backbone.replaced(classes=classes)
    run = replace(MIXED, backbone=backbone, sources=(images, replace(videos, **{"batch_size": 0} | batch)))
    counts = {("train", "image", (1, 8, 8)): 8, ("train", "image", (1, 8, 12)): 8, ("train", "video", (3, 8, 8)): 16}
    shards = [str(write_shards(tmp_path, counts).directory)]
    data = LatentDataModule(
        images=SourceConfig(shards, batch_size=4),
        videos=SourceConfig(shards, micro_batches=2, frames=3, least_frames=2, **batch),  # type: ignore[arg-type]
        max_ranks=MIXED.max_ranks,
        context_dropout=MIXED.context_dropout,
        noise_draws=MIXED.noise_draws,
    )
    with torch.device("meta"):
        model = GPDiT(backbone)
    steps, counter = 4, FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), torch.device("meta"), counter:
        for number in range(steps * data.micro_batches_per_step):
            planned = data.plan.micro_batch(number)
            source = data.plan.sources[planned.source]
            bucket = data.buckets["train"][source.name][planned.bucket]
            shape = (planned.frames, 4, bucket.height, bucket.width)
            draws = MIXED.noise_draws if source.name == "videos" else 1
            rows = draws * len(planned.samples)
            clean = torch.zeros(int(planned.context.sum()), *shape)
            model(torch.zeros(rows, *shape), torch.zeros(rows, shape[0]), clean, draws=draws)
    assert sum(step_flops(run).values()) == pytest.approx(3 * counter.get_total_flops() / steps, rel=1e-9)


def test_a_loss_on_targets_alone_is_less_work() -> None:
    """On the average half of the four sequences have context; of each part of two at least one has."""
    sequences = PlannedSource("sequences", (bucket(6),), batch_size=4, loss_frames="targets")
    run = replace(MIXED, sources=(sequences,))
    flops = [training_flops(run.backbone, PassShape(4, context, 6, 8, 8, 2, (1, 3, 5))) for context in (4, 0)]
    assert step_flops(run) == {part: sum(counts[part] for counts in flops) / 2 for part in flops[0]}
    assert memory(run)["activations"] == activation_bytes(
        run.backbone, PassShape(4, 2, 6, 8, 8, 2, (1, 3, 5)), run.bytes_per_value
    )
    everything = replace(run, sources=(replace(sequences, loss_frames="all"),))
    assert memory(run)["activations"] < memory(everything)["activations"]


@pytest.fixture(scope="module")
def images(write_shards: Callable[..., Manifest], tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_shards(tmp_path_factory.mktemp("shards"), {("train", "image", (1, 8, 8)): 8}).directory)


@pytest.fixture(scope="module")
def counted(images: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with its bytes for each run and rank."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    folder = tmp_path_factory.mktemp("counted")
    runs = [{"name": "-".join(case), "strategy": case[0], "precision": case[1], "shards": images} for case in CASES]
    (folder / "runs.json").write_text(json.dumps(runs))
    done = subprocess.run(
        [sys.executable, memory_runs.__file__, str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def assert_as_counted(run: RunSettings, found: dict[str, int]) -> None:
    """Every part on this rank, and the most that a micro-batch and an optimizer step took."""
    needed = memory(run)
    for part in ("weights", "optimizer", "average"):
        assert found[part] == pytest.approx(needed[part], rel=0.01), part
    # In float32 ZeRO-2 keeps whole the gradients of a matrix that the ranks share.
    matrix = 4 * run.backbone.width * run.backbone.mlp_width
    shared = matrix if run.strategy.option == "zero2" and run.precision == "32-true" else 0
    assert found["gradients"] == pytest.approx(needed["gradients"], rel=0.01, abs=shared)
    # Buckets that stay after the backward pass.
    buckets = {"zero3": 4 * memory_runs.BUCKET, "auto": needed["buffers"]}.get(run.strategy.option, 0)
    assert found["others"] == pytest.approx(buckets, rel=0.01, abs=1e5)
    parts = sum(needed[part] for part in ("weights", "gradients", "optimizer", "average"))
    buffers = needed["buffers"] if run.strategy.stage else 0  # Python learns of DDP's when they are reduced
    assert found["backward"] == pytest.approx(parts + buffers + needed["activations"], rel=0.05)
    assert found["step"] == pytest.approx(parts + buckets + needed["step"], rel=0.02)


@pytest.mark.parametrize("rank", range(memory_runs.RANKS))
@pytest.mark.parametrize(("option", "precision"), CASES)
def test_what_each_of_two_ranks_holds(
    option: str, precision: str, rank: int, counted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_module, "REDUCE_BUCKET", memory_runs.BUCKET)
    found = json.loads((counted / f"{option}-{precision}-{rank}.json").read_text())
    run = replace(COUNTED, gpus=memory_runs.RANKS, strategy=BY_OPTION[option], precision=precision)
    assert_as_counted(run, found)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_one_process_holds(precision: str, images: str) -> None:
    found, _ = memory_runs.train({"shards": images, "precision": precision}, "auto", 1)
    assert_as_counted(replace(COUNTED, precision=precision), found)


def test_gpus_must_divide_the_ranks_of_the_plan() -> None:
    with pytest.raises(InputError, match=r"3 GPUs do not divide data\.max_ranks = 64"):
        replace(H, gpus=3)


def test_the_larger_of_step_and_activations_counts() -> None:
    needed = memory(H)
    held = sum(needed[part] for part in ("weights", "gradients", "optimizer", "average", "buffers"))
    assert needed["total"] - held == max(needed["step"], needed["activations"]) + 2 * GIB


@pytest.mark.parametrize(
    ("fields", "capacity", "expected"),
    [
        ({"gpus": 1}, 64, "--data.videos.micro_batches="),
        ({"gpus": 64, "backbone": GPDiTConfig.preset("H")}, 62, "activation_checkpointing=true"),
        ({"gpus": 64}, 40, "--trainer.strategy=zero2"),
        ({"gpus": 64}, 8, "--trainer.strategy=zero3"),
        ({"gpus": 1}, 24, "--trainer.strategy=zero2_offload"),
    ],
)
def test_the_nearest_setting(fields: dict[str, Any], capacity: float, expected: str) -> None:
    run = replace(H, **fields)
    wanted = nearest_that_fits(run, capacity * GIB)
    assert memory(run)["total"] > capacity * GIB
    assert wanted is not None
    assert memory(wanted)["total"] <= capacity * GIB
    assert expected in overrides(run, wanted)


def test_a_token_budget_is_cut_until_a_rank_has_one_clip_of_the_longest() -> None:
    """At 16 tokens a frame each of two ranks has 384: 24, 12 and 8 clips of one, two and three frames."""
    run = replace(MIXED, gpus=2, sources=(PlannedSource("videos", (bucket(1, 2, 3),), tokens=768),))
    candidates = list(with_smaller_micro_batches(run))
    assert [candidate.sources[0].micro_batches for candidate in candidates] == list(range(1, 9))
    needed = [memory(candidate)["activations"] for candidate in candidates]
    assert needed == sorted(needed, reverse=True)
    ends = candidates[0], candidates[-1]
    sizes = [[shape.samples for shape in end.micro_batch_shapes(end.sources[0])] for end in ends]
    assert sizes == [[48, 24, 16], [6, 2, 2]]
    assert overrides(run, candidates[2]) == "--data.videos.micro_batches=3"


def test_fsdp2_is_kept_and_never_proposed() -> None:
    for gpus in (1, 8, 64):
        for capacity in (6, 8, 12, 24, 40, 62, 80):
            wanted = nearest_that_fits(replace(H, gpus=gpus), capacity * GIB)
            assert wanted is None or wanted.strategy.option != "fsdp2"
    own = replace(H, gpus=8, strategy=BY_OPTION["fsdp2"])
    wanted = nearest_that_fits(own, 20 * GIB)
    assert wanted is not None
    assert wanted.strategy == own.strategy


def test_more_gpus_instead_of_offloading() -> None:
    wanted = least_gpus_that_fit(H, 24 * GIB)
    assert wanted is not None
    assert wanted.gpus > 1
    assert not wanted.strategy.offload
    fewer = nearest_that_fits(replace(H, gpus=wanted.gpus // 2), 24 * GIB)
    assert fewer is None or fewer.strategy.offload
