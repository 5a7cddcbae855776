"""ZeRO and FSDP2 on several processes equal one process: gloo on the CPU, several runs per launch."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.checkpoints.content import read_checkpoint
from tests.conftest import MadeOnce
from tests.evaluation.scripted import ScriptedInception
from tests.evaluation.scripted import saved as saved_network
from tests.model.dtypes import MIXED_BF16
from tests.training.callbacks.test_previews import make_shards
from tests.training.strategies import sharded_runs

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

Run = dict[str, Any]

CLIP = 0.2  # below the gradients' norms
MIXED = {"micro_batches": (2, 2), "clip": CLIP}
RUNS: dict[str, Run] = {
    "zero2": {"strategy": "zero2", "optimizer": "sgd", "previews": True, **MIXED},
    "zero3": {"strategy": "zero3", "optimizer": "adamw", "previews": True, "recompute": True, **MIXED},
    "zero3-broken": {"strategy": "zero3", "optimizer": "sgd", "broken_loss": 6, **MIXED},
    "zero3-rest": {"strategy": "zero3", "optimizer": "adamw", "resume": "zero3", **MIXED},
    "bf16": {"strategy": "zero2", "optimizer": "adamw", "precision": "bf16-mixed", "previews": True, **MIXED},
    "bf16-rest": {"strategy": "zero2", "optimizer": "adamw", "precision": "bf16-mixed", "resume": "bf16", **MIXED},
    "fsdp2": {"strategy": "fsdp2", "optimizer": "adamw", "previews": True, "recompute": True, **MIXED},
    "fsdp2-broken": {"strategy": "fsdp2", "optimizer": "sgd", "broken_loss": 5, **MIXED},
    "fsdp2-rest": {"strategy": "fsdp2", "optimizer": "adamw", "resume": "fsdp2", **MIXED},
    "fsdp2-bf16": {"strategy": "fsdp2", "optimizer": "adamw", "precision": "bf16-mixed", "recompute": True, **MIXED},
    "zero3-bf16": {"strategy": "zero3", "optimizer": "adamw", "precision": "bf16-mixed", **MIXED},
    "ddp-bf16": {"strategy": "ddp", "optimizer": "adamw", "precision": "bf16-mixed", **MIXED},
}
# Their weights do not change, so their scores must have the digits of those of one process.
SCORED = {
    f"scores-{strategy}": {
        "strategy": strategy, "optimizer": "adamw", "learning_rate": 1e-30, "random_weights": True, **MIXED
    }
    for strategy in ("ddp", "zero3", "fsdp2")
}  # fmt: skip
ALIKE = ["zero2", "zero3", "fsdp2", "zero3-broken", "fsdp2-broken"]  # those that one process does too
SLOW_RUNS: dict[str, Run] = {
    f"{strategy}-{optimizer}-{sum(parts)}": {
        "strategy": strategy, "optimizer": optimizer, "micro_batches": parts, "clip": CLIP if sum(parts) < 4 else None
    }
    for strategy in ("zero2", "zero3") for optimizer in ("sgd", "adamw") for parts in ((0, 1), (1, 1), (2, 2))
} | {
    "fsdp2-sgd": {"strategy": "fsdp2", "optimizer": "sgd", "micro_batches": (0, 1)},
    "fsdp2-accumulated": {"strategy": "fsdp2", "optimizer": "sgd", **MIXED},
    "fsdp2-broken_gradient": {"strategy": "fsdp2", "optimizer": "adamw", "broken_gradient": 6, **MIXED},
    "zero2_offload": {"strategy": "zero2_offload", "optimizer": "adamw", **MIXED},
    "zero3_offload": {"strategy": "zero3_offload", "optimizer": "adamw", **MIXED},
    "zero2-broken": {"strategy": "zero2", "optimizer": "adamw", "broken_loss": 5, **MIXED},
    "zero2-broken_gradient": {"strategy": "zero2", "optimizer": "adamw", "broken_gradient": 5, **MIXED},
    "zero3-broken_gradient": {"strategy": "zero3", "optimizer": "adamw", "broken_gradient": 6, **MIXED},
    "zero2_offload-broken": {"strategy": "zero2_offload", "optimizer": "adamw", "broken_loss": 5, **MIXED},
    "zero3_offload-broken": {"strategy": "zero3_offload", "optimizer": "adamw", "broken_gradient": 5, **MIXED},
}  # fmt: skip
SLOW_OTHERS: dict[str, Run] = {
    "zero2": RUNS["zero2"],
    "zero2-rest": {"strategy": "zero2", "optimizer": "sgd", "resume": "zero2", **MIXED},
    "zero3-bf16": {"strategy": "zero3", "optimizer": "adamw", "precision": "bf16-mixed", **MIXED},
    "zero3-bf16-rest": RUNS["bf16-rest"] | {"strategy": "zero3", "resume": "zero3-bf16"},
    "offload-bf16": {"strategy": "zero3_offload", "optimizer": "adamw", "precision": "bf16-mixed", **MIXED},
    "offload-bf16-rest": RUNS["bf16-rest"] | {"strategy": "zero3_offload", "resume": "offload-bf16"},
}  # fmt: skip


THREE_RANKS: dict[str, Run] = {  # most parameters do not divide by three: parts are padded
    "zero2": {"strategy": "zero2", "optimizer": "adamw", "ranks": 3, **MIXED},
    "zero3": {"strategy": "zero3", "optimizer": "sgd", "ranks": 3, **MIXED},
    "zero3-bf16": {"strategy": "zero3", "optimizer": "adamw", "precision": "bf16-mixed", "ranks": 3, **MIXED},
    "zero3-bf16-rest": RUNS["bf16-rest"] | {"strategy": "zero3", "ranks": 3, "resume": "zero3-bf16"},
    "fsdp2": {"strategy": "fsdp2", "optimizer": "adamw", "ranks": 3, **MIXED},
}


def launch(folder: Path, shards: str, runs: dict[str, Run]) -> Path:
    """Train all runs, one after another, on two processes."""
    for run in runs.values():
        if "resume" in run:
            run |= {"resume": str(folder / run["resume"] / "checkpoints" / "step-2.ckpt")}
    (folder / "runs.json").write_text(
        json.dumps([run | {"name": name, "shards": shards} for name, run in runs.items()])
    )
    done = subprocess.run(
        [sys.executable, "-m", sharded_runs.__name__, str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def shards(made_once: MadeOnce) -> str:
    return str(made_once("shards_of_previews", make_shards))


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    image = saved_network(ScriptedInception(), tmp_path_factory.mktemp("networks"))
    return {"video_network": {"kind": "tests.evaluation.scripted.ClipColours"}, "image_network": asdict(image)}


@pytest.fixture(scope="module")
def folder(shards: str, networks: dict[str, Run], made_once: MadeOnce) -> Path:
    scored = {name: run | {"scores": networks} for name, run in SCORED.items()}
    runs = {name: dict(run) for name, run in RUNS.items()} | scored
    return made_once("sharded_runs", lambda folder: launch(folder, shards, runs))


@pytest.fixture(scope="module")
def slow_folder(shards: str, made_once: MadeOnce) -> Path:
    runs = {name: dict(run) for name, run in SLOW_RUNS.items()}
    return made_once("slow_runs", lambda folder: launch(folder, shards, runs))


@pytest.fixture(scope="module")
def others(shards: str, made_once: MadeOnce) -> Path:
    runs = {name: dict(run) for name, run in SLOW_OTHERS.items()}
    return made_once("slow_others", lambda folder: launch(folder, shards, runs))


def seen(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / name / "seen.pt", weights_only=True)


def saved(folder: Path, name: str, step: int = 4) -> dict[str, Any]:
    return read_checkpoint(folder / name / "checkpoints" / f"step-{step}.ckpt")


def assert_as_one_process(found: Path, one: Path, name: str) -> None:
    """Results differ by rounding, since sums have another order."""
    mine, other = seen(found, name), seen(one, name)
    assert mine.pop("dtypes") == [["torch.float32"], ["torch.float32"], "torch.float32"]
    mine.pop("gradients", None)
    assert mine.pop("precisions") == other.pop("precisions")
    for what, values in mine.items():
        if what == "norms" and "zero" in name:  # whose norm of a broken gradient is infinite
            other[what] = [norm if math.isfinite(norm) else math.inf for norm in other[what]]
        torch.testing.assert_close(values, other[what], rtol=1e-4, atol=1e-5, equal_nan=True)
    for step in (2, 4):
        mine, other = saved(found, name, step), saved(one, name, step)
        assert mine.keys() == other.keys()
        for what in ("state_dict", "ema", "optimizer_states"):
            torch.testing.assert_close(mine[what], other[what], rtol=1e-4, atol=2e-5)
        for what in ("gpdit", "LatentDataModule", "lr_schedulers", "global_step"):
            assert mine[what] == other[what]


def assert_goes_on(folder: Path, name: str) -> None:
    """The rest of a run is bit-equal to that of the uninterrupted run."""
    whole, rest = seen(folder, name), seen(folder, f"{name}-rest")
    per_step = len(whole["losses"]) // 4
    assert rest["losses"] == whole["losses"][2 * per_step :]
    assert rest["norms"] == whole["norms"][2:]
    for what in ("features", "rollout"):
        torch.testing.assert_close(rest[what], whole[what], rtol=0, atol=0)
    for what in ("state_dict", "ema", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(
            saved(folder, f"{name}-rest")[what], saved(folder, name)[what], rtol=0, atol=0, msg=what
        )


@pytest.mark.parametrize("name", ALIKE)
def test_two_ranks_train_like_one_process(name: str, folder: Path, shards: str, tmp_path: Path) -> None:
    """Losses, gradient norms, clipping, skips, weights, optimizer state, averages, validation, features, rollouts."""
    sharded_runs.train(tmp_path, RUNS[name] | {"name": name, "shards": shards}, "auto", 1)
    assert_as_one_process(folder, tmp_path, name)
    assert seen(folder, name)["skipped"] == ("broken" in name)
    assert min(seen(folder, name)["norms"]) > CLIP
    for image in (tmp_path / name / "previews").glob("*.png"):
        mine, other = (np.asarray(Image.open(at / name / "previews" / image.name)) for at in (folder, tmp_path))
        assert np.abs(mine.astype(int) - other).max() <= 2


@pytest.mark.parametrize("name", ["zero3", "bf16", "fsdp2"])
def test_a_resumed_sharded_run_ends_bit_equal(name: str, folder: Path) -> None:
    assert_goes_on(folder, name)


@pytest.mark.parametrize("name", ["bf16", "fsdp2-bf16"])
def test_bf16_keeps_master_weights_optimizer_state_average_and_reduction_in_float32(name: str, folder: Path) -> None:
    mine, exact = seen(folder, name), seen(folder, "zero3")
    assert mine["gradients"] == ["torch.float32"]
    assert mine["dtypes"] == [["torch.bfloat16"], ["torch.float32"], "torch.float32"]
    torch.testing.assert_close(mine["first"], exact["first"], rtol=0, atol=0)  # not rounded
    assert mine["losses"] != exact["losses"]
    assert mine["losses"] == pytest.approx(exact["losses"], rel=0.02)
    assert mine["norms"] == pytest.approx(exact["norms"], rel=0.05)


@pytest.fixture(scope="module")
def scores_in_one_process(
    shards: str, networks: dict[str, Run], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, float]:
    folder, run = tmp_path_factory.mktemp("one"), SCORED["scores-ddp"] | {"name": "one", "shards": shards}
    sharded_runs.train(folder, run | {"scores": networks}, "auto", 1)
    return seen(folder, "one")["scores"]


@pytest.mark.parametrize("name", SCORED)
def test_ranks_that_share_the_clips_compute_the_scores_of_one_process(
    name: str, folder: Path, scores_in_one_process: dict[str, float]
) -> None:
    assert len(scores_in_one_process) == 9
    assert seen(folder, name)["scores"] == scores_in_one_process


@pytest.fixture(scope="module")
def bf16_in_one_process(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder, run = tmp_path_factory.mktemp("one"), RUNS["ddp-bf16"] | {"name": "one", "shards": shards}
    sharded_runs.train(folder, run, "auto", 1)
    return seen(folder, "one")


@pytest.mark.parametrize("name", ["ddp-bf16", "bf16", "zero3-bf16", "fsdp2-bf16"])
def test_bf16_is_the_same_under_every_strategy(name: str, folder: Path, bf16_in_one_process: Run) -> None:
    """In training, validation and previews. ZeRO and FSDP2 have equal losses, since both compute with bf16 weights."""
    mine, one, zero2 = seen(folder, name), bf16_in_one_process, seen(folder, "bf16")
    expected = MIXED_BF16 | {"loss": {"float32"}}
    assert {what: set(dtypes) for what, dtypes in mine["precisions"].items()} == expected
    assert mine["precisions"] == one["precisions"]
    assert mine["losses"] == pytest.approx(one["losses"], rel=5e-4)
    if name != "ddp-bf16":
        assert mine["losses"] == pytest.approx(zero2["losses"], rel=1e-6)


@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp2"])
def test_one_process_resumes_from_the_checkpoint_of_two(name: str, folder: Path, shards: str, tmp_path: Path) -> None:
    resume = str(folder / name / "checkpoints" / "step-2.ckpt")
    sharded_runs.train(tmp_path, RUNS[name] | {"name": name, "shards": shards, "resume": resume}, "auto", 1)
    whole = saved(folder, name)
    for what in ("state_dict", "ema", "optimizer_states"):
        torch.testing.assert_close(saved(tmp_path, name)[what], whole[what], rtol=1e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_RUNS)
def test_every_stage_optimizer_and_accumulation(name: str, slow_folder: Path, shards: str, tmp_path: Path) -> None:
    sharded_runs.train(tmp_path, SLOW_RUNS[name] | {"name": name, "shards": shards}, "auto", 1)
    assert_as_one_process(slow_folder, tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero3-bf16", "offload-bf16"])
def test_every_stage_resumes(name: str, others: Path) -> None:
    assert_goes_on(others, name)


@pytest.mark.slow
def test_three_ranks(shards: str, tmp_path: Path) -> None:
    found, one = tmp_path / "found", tmp_path / "one"
    found.mkdir()
    launch(found, shards, {name: dict(run) for name, run in THREE_RANKS.items()})
    for name in ("zero2", "zero3", "fsdp2"):
        sharded_runs.train(one, THREE_RANKS[name] | {"name": name, "shards": shards}, "auto", 1)
        assert_as_one_process(found, one, name)
    assert_goes_on(found, "zero3-bf16")
    assert seen(found, "zero3-bf16")["gradients"] == ["torch.float32"]
