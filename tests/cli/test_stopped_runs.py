"""Processes that are stopped, killed or fail: their messages and exit statuses, and that the same command resumes."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpdit_lightning.checkpoints.files import last_checkpoint
from gpdit_lightning.cli import main
from tests.checkpoints.content import read_checkpoint
from tests.cli.test_resume import assert_same, fit, logged_scalars, recipe

# Callbacks for `trainer.callbacks`, in a module that the processes find on PYTHONPATH.
CALLBACKS = '''
import errno
import functools
import io
import os
import time
from pathlib import Path

import torch
from lightning import Callback

from gpdit_lightning.checkpoints import distributed, files
from gpdit_lightning.data.shards import ShardReader
from gpdit_lightning.errors import InputError


class PauseAt(Callback):
    """Creates the file REACHED at an optimizer step on a rank, then sleeps or fails."""

    def __init__(self, step: int, rank: int = 0, sleep: float = 0.0, fail: bool = False) -> None:
        self.step, self.rank, self.sleep, self.fail = step, rank, sleep, fail
        self.waits = True

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.waits and (trainer.global_step, trainer.global_rank) == (self.step, self.rank):
            self.waits = False
            Path(os.environ["REACHED"]).touch()
            time.sleep(self.sleep)
            if self.fail:
                raise InputError(f"rank {self.rank} of the test fails here.")


class FailingDisk(Callback):
    """Writes half of a checkpoint; then the disk is full, or the write never ends."""

    def __init__(self, step: int, full: bool = False) -> None:
        self.step, self.full, self.save = step, full, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and self.save is None:
            self.save, torch.save = torch.save, self.half

    def half(self, content, file):
        buffer = io.BytesIO()
        self.save(content, buffer)
        file.write(buffer.getvalue()[: buffer.tell() // 2])
        file.flush()
        if self.full:
            torch.save = self.save
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        Path(os.environ["REACHED"]).touch()
        time.sleep(600)


class SlowDisk(Callback):
    """At a moment of writing the checkpoint of a step, a rank waits for some seconds, or its disk is full.

    The file REACHED exists when training is at the step after it, while the checkpoint is still being written.
    """

    def __init__(self, step: int, rank: int, moment: str, seconds: float = 600.0, full: bool = False) -> None:
        self.step, self.rank, self.moment, self.seconds, self.full = step, rank, moment, seconds, full
        self.begun = self.patched = False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step - 1 and trainer.global_rank == self.rank and not self.patched:
            self.patched = True
            place, name = {
                "half": (distributed, "write_part"),
                "written": (distributed, "write_part"),
                "publish": (files, "publish"),
                "mark": (files, "write_mark"),
                "marked": (files, "write_mark"),
            }[self.moment]
            call = getattr(place, name)
            setattr(place, name, functools.partial(self.slow, call))
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            while not self.begun:
                time.sleep(0.01)
            Path(os.environ["REACHED"]).touch()

    def slow(self, call, *arguments):
        if self.begun:
            return call(*arguments)
        if self.moment in ("half", "written", "marked"):
            result = call(*arguments)
        if self.moment == "half":
            os.truncate(arguments[0], os.path.getsize(arguments[0]) // 2)
        self.begun = True
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        time.sleep(self.seconds)
        return result if self.moment in ("written", "marked") else call(*arguments)


class StuckDisk(Callback):
    """Reads of shards never return from a micro-batch on, as those of a file server that does not respond."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch:
            ShardReader.read_arrays = self.hang

    def hang(self, *_):
        Path(os.environ["REACHED"]).touch()
        while True:
            time.sleep(600)
'''


class Run:
    """`fit` in separate processes, with its output in a file.

    Attributes:
        run_dir: the run folder.
        settings: the recipe, without the callback that disturbs the run.
    """

    def __init__(self, folder: Path, shards: Path) -> None:
        self.folder, self.run_dir, self.reached = folder, folder / "run", folder / "reached"
        self.settings = recipe(shards, self.run_dir)
        self.marker = f"marker={uuid.uuid4()}"
        self.process: Any = None
        (folder / "events.py").write_text(CALLBACKS)

    def start(self, callback: str, *options: str, **settings: Any) -> None:
        given = self.settings | {"trainer": dict(self.settings["trainer"])}
        given["trainer"]["callbacks"] = [{"class_path": f"events.{callback}", "init_args": settings}]
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(given))
        name, value = self.marker.split("=")
        more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.folder), "REACHED": str(self.reached), name: value}
        with (self.folder / "printed").open("w") as printed:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gpdit_lightning", "fit", f"--config={self.folder / 'recipe.yaml'}", *options],
                env=os.environ | more,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def printed(self) -> str:
        return (self.folder / "printed").read_text()

    def wait_until(self, condition: Any) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, self.printed
            assert time.monotonic() < deadline, self.printed
            time.sleep(0.01)

    def status(self, within: float) -> int:
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the process has not ended: {self.printed}")

    def running_processes(self) -> list[int]:
        """Return the ids of the processes of this run, by the marker in their environment."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.marker.encode() in (process / "environ").read_bytes():
                    found.append(int(process.name))
        return found

    def has_ended(self, within: float) -> bool:
        deadline = time.monotonic() + within
        while self.running_processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        return not self.running_processes()

    def resume(self) -> int:
        time.sleep(1)  # TensorBoard orders event files by the second in their names
        return fit(self.folder / "recipe.yaml", self.settings)


TWO_RANKS = ("--trainer.devices=2", "--trainer.strategy=ddp", "--data.max_ranks=2")


@pytest.fixture
def run(tiny_shards: Path, tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path, tiny_shards)
    yield run
    for process in run.running_processes():
        os.kill(process, signal.SIGKILL)


@pytest.fixture(scope="module")
def uninterrupted(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted run."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    assert fit(directory / "recipe.yaml", recipe(tiny_shards, directory / "run")) == 0
    return directory / "run"


def assert_same_result(run_dir: Path, uninterrupted: Path) -> None:
    """Weights, optimizer state, and the logged scalars of all steps."""
    assert_same(read_checkpoint(run_dir), read_checkpoint(uninterrupted))
    assert logged_scalars(run_dir) == logged_scalars(uninterrupted)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_to_all_processes_stops_the_run_after_the_step(
    run: Run, uninterrupted: Path, number: int, status: int
) -> None:
    """As a terminal and a scheduler send it, to the loader's processes too. A validation comes after step 4."""
    run.start("PauseAt", "--data.workers=2", step=3, sleep=1.5)
    run.wait_until(run.reached.exists)
    os.killpg(run.process.pid, number)
    assert run.status(within=60) == status
    assert "finishing the step and saving; a second signal stops at once" in run.printed
    assert "stopped at step 4, which is saved: the same command resumes." in run.printed
    assert "Traceback" not in run.printed
    assert last_checkpoint(run.run_dir, verify=True) == run.run_dir / "checkpoints/step-4.ckpt"
    assert run.has_ended(within=10)
    assert run.resume() == 0
    assert_same_result(run.run_dir, uninterrupted)


@pytest.mark.parametrize(("batch", "saved"), [(8, True), pytest.param(10, False, marks=pytest.mark.slow)])
def test_sigterm_ends_a_run_that_waits_for_data(run: Run, uninterrupted: Path, batch: int, saved: bool) -> None:
    """Step 3 ends with micro-batch 8. It is saved unless a part of step 4 was computed; step 2 was saved before."""
    run.start("StuckDisk", "--checkpoint.every_steps=2", "--checkpoint.keep_every_steps=2", batch=batch)
    run.wait_until(run.reached.exists)
    run.process.terminate()
    assert run.status(within=30) == 143
    state = "is saved" if saved else "is not saved, while it waited for data"
    assert run.printed.endswith(f"stopped at step 3, which {state}: the same command resumes.\n")
    assert last_checkpoint(run.run_dir, verify=True) == run.run_dir / f"checkpoints/step-{3 if saved else 2}.ckpt"
    assert run.resume() == 0
    assert_same_result(run.run_dir, uninterrupted)


def test_a_killed_worker_ends_the_run_with_one_sentence(run: Run, uninterrupted: Path) -> None:
    run.start("PauseAt", "--data.workers=2", step=2, sleep=2.0)
    run.wait_until(run.reached.exists)
    workers = [process for process in run.running_processes() if process != run.process.pid]
    os.kill(workers[0], signal.SIGKILL)
    assert run.status(within=60) == 2
    assert re.search(
        r"error: a worker process .* was killed by the signal Killed, .* run the same command again\.\n$", run.printed
    )
    assert "Traceback" not in run.printed
    assert run.resume() == 0
    assert_same_result(run.run_dir, uninterrupted)


@pytest.mark.slow
def test_a_second_signal_ends_both_ranks_at_once(run: Run) -> None:
    """While the first rank, which alone receives the signals, waits for the other in a reduction."""
    run.start("PauseAt", *TWO_RANKS, step=1, rank=1, sleep=600)
    run.wait_until(run.reached.exists)
    time.sleep(1)
    run.process.terminate()
    run.wait_until(lambda: "a second signal stops at once" in run.printed)
    run.process.terminate()
    assert run.status(within=5) == 143
    assert last_checkpoint(run.run_dir, verify=True) == run.run_dir / "checkpoints/step-1.ckpt"
    assert run.has_ended(within=10)


def test_a_signal_to_the_first_rank_stops_both_after_the_same_step(run: Run) -> None:
    run.start("PauseAt", *TWO_RANKS, step=2, sleep=1.0)
    run.wait_until(run.reached.exists)
    run.process.terminate()
    assert run.status(within=60) == 143
    assert run.has_ended(within=30)
    assert last_checkpoint(run.run_dir, verify=True) == run.run_dir / "checkpoints/step-3.ckpt"
    assert run.printed.count("stopped at step 3") == 1
    assert "Traceback" not in run.printed


def test_a_run_that_is_killed_while_it_writes_a_checkpoint_resumes_from_the_previous_one(
    run: Run, uninterrupted: Path
) -> None:
    """The validation of step 4, which was being saved, is repeated."""
    run.start("FailingDisk", step=3)
    run.wait_until(run.reached.exists)
    os.killpg(run.process.pid, signal.SIGKILL)
    run.process.wait()
    half = run.run_dir / "checkpoints/step-4.ckpt.partial"
    assert (half / "training.ckpt").stat().st_size > 0
    assert last_checkpoint(run.run_dir, verify=True) == half.with_name("step-3.ckpt")
    assert run.resume() == 0
    assert not half.exists()
    assert_same_result(run.run_dir, uninterrupted)


def test_a_full_disk_is_reported_and_the_run_resumes(
    run: Run, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(run.folder)
    trainer = run.settings["trainer"] | {
        "callbacks": [{"class_path": "events.FailingDisk", "init_args": {"step": 3, "full": True}}]
    }
    assert fit(run.folder / "recipe.yaml", run.settings | {"trainer": trainer}) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: the checkpoint of step 4 could not be written to")
    assert "(No space left on device): check that there is free space" in message
    assert "step-3.ckpt is complete and the same command resumes from it" in message
    assert run.resume() == 0
    assert_same_result(run.run_dir, uninterrupted)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_all_ranks_end_when_one_fails(run: Run, rank: int) -> None:
    """The other rank waits in a reduction."""
    run.start("PauseAt", *TWO_RANKS, step=2, rank=rank, fail=True)
    assert run.status(within=60) != 0
    assert f"{'[rank 1] ' if rank else ''}error: rank {rank} of the test fails here." in run.printed
    assert "Traceback" not in run.printed
    assert run.has_ended(within=10)


@pytest.mark.slow
def test_the_second_rank_ends_if_the_first_is_killed_at_the_start(run: Run) -> None:
    """Before the ranks are connected."""
    run.start("PauseAt", *TWO_RANKS, step=0)
    run.wait_until(lambda: len(run.running_processes()) == 2)
    run.process.send_signal(signal.SIGKILL)
    assert run.status(within=10) == -signal.SIGKILL
    assert run.has_ended(within=60)  # it checks after its imports


def test_a_run_folder_that_cannot_be_created(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a file").write_text("")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(tiny_shards, tmp_path / "a file" / "run")))
    assert main(["fit", f"--config={path}"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ")
    assert "Not a directory" in message
    assert str(tmp_path / "a file") in message
