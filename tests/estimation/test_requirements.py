"""Estimated FLOPs and memory of runs, against counted FLOPs and measured bytes."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
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
from gpdit_lightning.estimation.memory import STRATEGIES, activation_bytes, parameter_count
from gpdit_lightning.estimation.requirements import (
    RunSettings,
    least_gpus_that_fit,
    memory,
    nearest_that_fits,
    overrides,
    step_flops,
    with_smaller_micro_batches,
)
from gpdit_lightning.estimation.time import traffic
from tests.conftest import MadeOnce
from tests.estimation import memory_runs

GIB = 2**30


def bucket(*lengths: int, width: int = 8) -> PlannedBucket:
    """Return a bucket with eight samples for each length."""
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
        PlannedSource("images", (bucket(1), bucket(1, width=12)), SourceConfig(batch_size=4)),
        PlannedSource("videos", (bucket(2, 3),), SourceConfig(batch_size=8, micro_batches=2)),
    ),
)
MEASURED = RunSettings(
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
            SourceConfig(
                batch_size=memory_runs.MICRO_BATCHES * memory_runs.RANKS, micro_batches=memory_runs.MICRO_BATCHES
            ),
        ),
    ),
)
PRECISIONS = ("32-true", "bf16-mixed")
CASES = [(option, precision) for option in ("auto", "zero2", "zero3", "fsdp2") for precision in PRECISIONS]
H = replace(
    MEASURED,
    backbone=GPDiTConfig.preset("H", activation_checkpointing=True),
    max_ranks=64,
    sources=(PlannedSource("videos", (PlannedBucket((64,), (5,), 24, 40),), SourceConfig(batch_size=64)),),
)


@pytest.mark.parametrize(("batch", "classes"), [({"batch_size": 8}, 0), ({"tokens": 768}, 0), ({"tokens": 768}, 10)])
def test_step_flops_equal_those_of_the_micro_batches(
    batch: dict[str, int], classes: int, write_shards: Callable[..., Manifest], tmp_path: Path
) -> None:
    """Counted by torch over four steps, in which every size and length is used equally often."""
    images, videos = MIXED.sources
    backbone = MIXED.backbone.replaced(classes=classes)
    run = replace(
        MIXED,
        backbone=backbone,
        sources=(images, replace(videos, config=replace(videos.config, **{"batch_size": 0} | batch))),
    )
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


def test_requirements_of_a_loss_on_targets() -> None:
    """Half of the four sequences have context on average, and at least one in each part of two."""
    sequences = PlannedSource("sequences", (bucket(6),), SourceConfig(batch_size=4, loss_frames="targets"))
    run = replace(MIXED, sources=(sequences,))
    flops = [training_flops(run.backbone, PassShape(4, context, 6, 8, 8, 2, (1, 3, 5))) for context in (4, 0)]
    assert step_flops(run) == {part: sum(counts[part] for counts in flops) / 2 for part in flops[0]}
    assert memory(run)["activations"] == activation_bytes(
        run.backbone, PassShape(4, 2, 6, 8, 8, 2, (1, 3, 5)), run.bytes_per_value
    )
    everything = replace(run, sources=(replace(sequences, config=SourceConfig(batch_size=4)),))
    assert memory(run)["activations"] < memory(everything)["activations"]


@pytest.fixture(scope="module")
def images(write_shards: Callable[..., Manifest], made_once: MadeOnce) -> str:
    counts = {("train", "image", (1, 8, 8)): 8}
    return str(made_once("eight_images", lambda folder: write_shards(folder, counts)))


@pytest.fixture(scope="module")
def measured(images: str, made_once: MadeOnce) -> Path:
    """A folder with a file of measured bytes for each run and rank."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    return made_once("measured_memory", lambda folder: measure(folder, images))


def measure(folder: Path, images: str) -> None:
    runs = [{"name": "-".join(case), "strategy": case[0], "precision": case[1], "shards": images} for case in CASES]
    (folder / "runs.json").write_text(json.dumps(runs))
    completed = subprocess.run(
        [sys.executable, memory_runs.__file__, str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr


def assert_matches(run: RunSettings, measured: dict[str, int]) -> None:
    """Compare the estimate with measured bytes: every part, and the peaks of the backward pass and optimizer step."""
    needed = memory(run)
    for part in ("weights", "optimizer", "average"):
        assert measured[part] == pytest.approx(needed[part], rel=0.01), part
    # In float32, ZeRO-2 keeps the full gradient of a matrix that is divided between ranks.
    matrix = 4 * run.backbone.width * run.backbone.mlp_width
    shared = matrix if run.strategy.option == "zero2" and run.precision == "32-true" else 0
    assert measured["gradients"] == pytest.approx(needed["gradients"], rel=0.01, abs=shared)
    # Buckets that are not freed after the backward pass.
    buckets = {"zero3": 4 * memory_runs.BUCKET, "auto": needed["buffers"]}.get(run.strategy.option, 0)
    assert measured["others"] == pytest.approx(buckets, rel=0.01, abs=1e5)
    parts = sum(needed[part] for part in ("weights", "gradients", "optimizer", "average"))
    buffers = needed["buffers"] if run.strategy.stage else 0  # the collector lists DDP's only after the reduction
    assert measured["backward"] == pytest.approx(parts + buffers + needed["activations"], rel=0.05)
    assert measured["step"] == pytest.approx(parts + buckets + needed["step"], rel=0.02)


@pytest.mark.parametrize("rank", range(memory_runs.RANKS))
@pytest.mark.parametrize(("option", "precision"), CASES)
def test_memory_of_each_of_two_ranks(
    option: str, precision: str, rank: int, measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_module, "REDUCE_BUCKET", memory_runs.BUCKET)
    bytes_of_rank = json.loads((measured / f"{option}-{precision}-{rank}.json").read_text())
    run = replace(MEASURED, gpus=memory_runs.RANKS, strategy=BY_OPTION[option], precision=precision)
    assert_matches(run, bytes_of_rank)


OPERATORS = {"gather": "_allgather_base_", "scatter": "_reduce_scatter_base_", "reduce": "allreduce_"}


@pytest.mark.parametrize(("option", "precision"), CASES)
def test_communication_of_two_ranks(option: str, precision: str, measured: Path) -> None:
    """Bytes of collectives in the last micro-batch and the update; norms and parameters that are not sharded aside."""
    counted = json.loads((measured / f"{option}-{precision}-0.json").read_text())
    run = replace(MEASURED, gpus=memory_runs.RANKS, strategy=BY_OPTION[option], precision=precision)
    expected = Counter[str]()
    for part in traffic(run):
        phase = "step" if part.phase == "update" else "backward"
        expected[f"{phase} {OPERATORS[part.collective]}"] += part.size
    few = 0.02 * parameter_count(run.backbone)
    names = {name for name in counted if name.rpartition(" ")[2] in OPERATORS.values()} | set(expected)
    assert {n: counted.get(n, 0) for n in names} == {n: pytest.approx(expected[n], rel=0.01, abs=few) for n in names}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_memory_of_one_process(precision: str, images: str) -> None:
    measured, _ = memory_runs.train({"shards": images, "precision": precision}, "auto", 1)
    assert_matches(replace(MEASURED, precision=precision), measured)


def test_gpus_must_divide_max_ranks() -> None:
    with pytest.raises(InputError, match=r"3 GPUs do not divide data\.max_ranks = 64"):
        replace(H, gpus=3)


def test_the_total_includes_the_larger_of_step_and_activations() -> None:
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
def test_the_nearest_settings_that_fit(fields: dict[str, Any], capacity: float, expected: str) -> None:
    run = replace(H, **fields)
    proposed = nearest_that_fits(run, capacity * GIB)
    assert memory(run)["total"] > capacity * GIB
    assert proposed is not None
    assert memory(proposed)["total"] <= capacity * GIB
    assert expected in overrides(run, proposed)


def test_a_token_budget_is_divided_down_to_one_longest_clip_per_rank() -> None:
    """With 16 tokens per frame, 768 tokens are 48, 24 and 16 clips of one, two and three frames on two ranks."""
    run = replace(MIXED, gpus=2, sources=(PlannedSource("videos", (bucket(1, 2, 3),), SourceConfig(tokens=768)),))
    candidates = list(with_smaller_micro_batches(run))
    assert [candidate.sources[0].config.micro_batches for candidate in candidates] == list(range(1, 9))
    needed = [memory(candidate)["activations"] for candidate in candidates]
    assert needed == sorted(needed, reverse=True)
    ends = candidates[0], candidates[-1]
    sizes = [[shape.samples for shape in end.micro_batch_shapes(end.sources[0])] for end in ends]
    assert sizes == [[48, 24, 16], [6, 2, 2]]
    assert overrides(run, candidates[2]) == "--data.videos.micro_batches=3"


def test_fsdp2_is_kept_and_never_proposed() -> None:
    for gpus in (1, 8, 64):
        for capacity in (6, 8, 12, 24, 40, 62, 80):
            proposed = nearest_that_fits(replace(H, gpus=gpus), capacity * GIB)
            assert proposed is None or proposed.strategy.option != "fsdp2"
    fsdp_run = replace(H, gpus=8, strategy=BY_OPTION["fsdp2"])
    proposed = nearest_that_fits(fsdp_run, 20 * GIB)
    assert proposed is not None
    assert proposed.strategy == fsdp_run.strategy


def test_least_gpus_without_offloading() -> None:
    proposed = least_gpus_that_fit(H, 24 * GIB)
    assert proposed is not None
    assert proposed.gpus > 1
    assert not proposed.strategy.offload
    fewer = nearest_that_fits(replace(H, gpus=proposed.gpus // 2), 24 * GIB)
    assert fewer is None or fewer.strategy.offload
