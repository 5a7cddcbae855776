"""Two ranks on gloo: bit-equal after a resume, and with the data order of one rank."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpdit_lightning.cli import main
from gpdit_lightning.files import remove
from tests.checkpoints.content import read_checkpoint
from tests.conftest import MadeOnce

STEPS = 6
RECORDER = '''
import atexit, json, os
from pathlib import Path
from lightning import Callback


class Recorder(Callback):
    """Writes the samples of each rank, and its threads at exit."""

    def __init__(self, path):
        self.path = path
        atexit.register(self.write_threads)

    def write_threads(self):
        names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        Path(f"{self.path}.threads-{os.environ.get('LOCAL_RANK', 0)}").write_text(" ".join(names))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with open(f"{self.path}-{trainer.global_rank}", "a") as file:
            sums = batch.noise.double().sum(dim=(1, 2, 3, 4)).tolist()
            samples = list(zip(batch.keys, sums, batch.t.tolist()))
            file.write(json.dumps([trainer.global_step, batch_idx, batch.context, samples]) + "\\n")
'''


@pytest.fixture(scope="module")
def recorder(made_once: MadeOnce) -> Iterator[Path]:
    """The folder of the recorder's module, from which this process can import it too."""
    folder = made_once("recorder", lambda folder: (folder / "recording.py").write_text(RECORDER))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


def train(
    folder: Path, shards: Path, recorder: Path, ranks: int, log: str, steps: int = STEPS, strategy: str = "ddp"
) -> "subprocess.Popen[str]":
    """Start `fit` in `folder`; its ranks write their samples to `folder/log-RANK`."""
    return subprocess.Popen(
        [sys.executable, "-m", "gpdit_lightning", "fit", write_recipe(folder, shards, ranks, log, steps, strategy)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(recorder)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def train_alone(folder: Path, shards: Path, log: str) -> None:
    """Train on one rank in this process, as :func:`train` does in others."""
    assert main(["fit", write_recipe(folder, shards, 1, log)]) == 0


def write_recipe(folder: Path, shards: Path, ranks: int, log: str, steps: int = STEPS, strategy: str = "ddp") -> str:
    """Write the recipe of a run to `folder/log.yaml`; return the option that names it."""
    recipe: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {
            "class_path": "MixedStage",
            "init_args": {
                "backbone": {
                    "size": "tiny", "layers": 2, "width": 24, "heads": 2, "mlp_width": 48, "latent_channels": 4
                },
                "optimizer": {"learning_rate": 3e-3, "warmup_steps": 3, "decay": "cosine"},
            },
        },
        "data": {
            "seed": 5,
            "max_ranks": 2,
            "context_dropout": 0.25,
            "images": {"manifests": [str(shards)], "batch_size": 4},
            "videos": {"manifests": [str(shards)], "batch_size": 8, "micro_batches": 2},
            "validation_batches": 1,
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": ranks,
            "strategy": strategy if ranks > 1 else "auto",
            "max_steps": steps,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 2,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "recording.Recorder", "init_args": {"path": str(folder / log)}}],
        },
        "validate_every_steps": 3,
        "ema": {"decay": 0.9},
        "checkpoint": {"every_steps": 1, "keep_every_steps": 1},
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / f"{log}.yaml").write_text(yaml.safe_dump(recipe))
    return f"--config={folder / log}.yaml"


def finish(process: "subprocess.Popen[str]") -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def recorded_samples(folder: Path, log: str) -> dict[tuple[int, int], tuple[int, list[Any]]]:
    """Return, for each (step, micro-batch), the clips with context and the samples with their noise, over all ranks."""
    found: dict[tuple[int, int], tuple[int, list[Any]]] = {}
    for path in folder.glob(f"{log}-*"):
        for line in path.read_text().splitlines():
            step, number, context, samples = json.loads(line)
            before, others = found.get((step, number), (0, []))
            found[step, number] = (before + context, sorted(others + samples))
    return found


def logged_scalars(run_dir: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("system/")]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint = read_checkpoint(run_dir)
    assert checkpoint["global_step"] == STEPS
    optimizer_state = {
        f"{place}.{name}": value
        for place, state in checkpoint["optimizer_states"][0]["state"].items()
        for name, value in state.items()
    }
    average = {f"ema.{name}": value for name, value in checkpoint["ema"]["weights"].items()}
    return {name: value.clone() for name, value in (checkpoint["state_dict"] | average | optimizer_state).items()}


@pytest.fixture(scope="module")
def one_rank(tiny_shards: Path, recorder: Path, made_once: MadeOnce) -> Path:
    return made_once("one_rank", lambda folder: train_alone(folder, tiny_shards, "uninterrupted"))


@pytest.fixture(scope="module")
def two_ranks(tiny_shards: Path, recorder: Path, made_once: MadeOnce) -> Path:
    return made_once("two_ranks", lambda folder: finish(train(folder, tiny_shards, recorder, 2, "uninterrupted")))


def copy_run_at_step(folder: Path, uninterrupted: Path, step: int) -> None:
    """Copy a run folder without the checkpoints after a step."""
    shutil.copytree(uninterrupted / "run", folder / "run", symlinks=True)
    for path in (folder / "run" / "checkpoints").glob("step-*"):
        if int(path.name.split("-")[1].split(".")[0]) > step:
            remove(path)
    last = folder / "run" / "checkpoints" / "last.ckpt"
    last.unlink()
    last.symlink_to(f"step-{step}.ckpt")


@pytest.mark.skipif(sys.platform != "linux", reason="reads the names of threads from /proc")
def test_ranks_exit_without_threads_of_their_process_group(two_ranks: Path) -> None:
    """A thread that releases a tensor while Python shuts down aborts the process."""
    for rank in (0, 1):
        names = (two_ranks / f"uninterrupted.threads-{rank}").read_text()
        assert "python" in names, names
        assert "gloo" not in names, names


def test_two_ranks_train_like_one(one_rank: Path, two_ranks: Path) -> None:
    """The same samples, steps and noise; results differ by rounding."""
    assert recorded_samples(one_rank, "uninterrupted") == recorded_samples(two_ranks, "uninterrupted")
    assert len(recorded_samples(one_rank, "uninterrupted")) == STEPS * 3
    expected = weights(one_rank / "run")
    for name, value in weights(two_ranks / "run").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    assert logged_scalars(one_rank / "run").keys() == logged_scalars(two_ranks / "run").keys()
    for tag, values in logged_scalars(one_rank / "run").items():
        assert logged_scalars(two_ranks / "run")[tag] == pytest.approx(values, rel=1e-4, abs=1e-6), tag


@pytest.mark.parametrize(("before", "after"), [pytest.param(1, 2, marks=pytest.mark.slow), (2, 1)])
def test_a_run_resumes_with_another_number_of_ranks_in_the_same_order(
    before: int, after: int, one_rank: Path, two_ranks: Path, tiny_shards: Path, recorder: Path, tmp_path: Path
) -> None:
    uninterrupted = {1: one_rank, 2: two_ranks}[before]
    copy_run_at_step(tmp_path, uninterrupted, 2)
    if after == 1:
        train_alone(tmp_path, tiny_shards, "rest")
    else:
        finish(train(tmp_path, tiny_shards, recorder, after, "rest"))
    rest = {at: samples for at, samples in recorded_samples(uninterrupted, "uninterrupted").items() if at[0] >= 2}
    assert recorded_samples(tmp_path, "rest") == rest
    expected = weights(uninterrupted / "run")
    for name, value in weights(tmp_path / "run").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_two_ranks_that_are_killed_resume_and_end_bit_equal(
    two_ranks: Path, tiny_shards: Path, recorder: Path, tmp_path: Path
) -> None:
    """Rank 0 is killed, and rank 1 ends by itself."""
    process = train(tmp_path, tiny_shards, recorder, 2, "killed")
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoints" / "step-2.ckpt").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)  # ends when all of its processes have closed the pipe
    finish(train(tmp_path, tiny_shards, recorder, 2, "rest"))
    expected = weights(two_ranks / "run")
    found = weights(tmp_path / "run")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    assert logged_scalars(tmp_path / "run") == logged_scalars(two_ranks / "run")
