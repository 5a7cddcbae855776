"""Runs under ZeRO and FSDP2, on two processes, that are killed, stopped or damaged end as if they had not been."""

import functools
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from gpdit_lightning.checkpoints.files import AVERAGE, TRAINING, checkpoint_path, last_checkpoint
from gpdit_lightning.cli import main
from tests.cli.test_chain import damage_last_of
from tests.cli.test_resume import STEPS, recipe
from tests.cli.test_sharded_runs import WITH_ZERO2, WITH_ZERO3
from tests.cli.test_stopped_runs import Run, assert_ended_alike

pytestmark = pytest.mark.slow


class ShardedRun(Run):
    """Curves, checkpoints and validations come at different steps, so that each has something to make up for."""

    def __init__(self, folder: Path, shards: Path, strategy: str) -> None:
        super().__init__(folder, shards)
        self.settings = recipe(shards, self.run_dir, max_ranks=2)
        self.settings["trainer"] |= {"devices": 2, "strategy": strategy, "log_every_n_steps": 3}
        self.settings["checkpoint"] = {"every_steps": 2, "keep_last": 3}

    def resume(self) -> int:
        """The same command, in processes of its own."""
        self.start("At", step=STEPS)
        return self.status(within=120)


Begin = Callable[[str], ShardedRun]


@pytest.fixture
def begin(tiny_shards: Path, tmp_path: Path) -> Iterator[Begin]:
    """`begin(strategy)`: a run, not started, of which nothing outlives the test."""
    runs: list[ShardedRun] = []

    def new(strategy: str) -> ShardedRun:
        runs.append(ShardedRun(tmp_path, tiny_shards, strategy))
        return runs[-1]

    yield new
    for process in (process for run in runs for process in run.alive()):
        os.kill(process, signal.SIGKILL)


@pytest.fixture(scope="module")
def whole(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`whole(strategy)`: the run folder of an uninterrupted run. Do not change it."""

    @functools.cache
    def train(strategy: str) -> Path:
        run = ShardedRun(tmp_path_factory.mktemp("whole"), tiny_shards, strategy)
        assert run.resume() == 0, run.printed
        return run.run_dir

    return train


@pytest.mark.parametrize("strategy", [WITH_ZERO2, WITH_ZERO3, "fsdp2"])
def test_all_ranks_are_killed_in_the_middle_of_a_step(
    strategy: str, begin: Begin, whole: Callable[[str], Path]
) -> None:
    """The curves of step 3 are drawn and not saved; the second rank has not begun step 4, in which the first waits."""
    run = begin(strategy)
    run.start("At", step=3, rank=1, sleep=600)
    run.wait_until(run.reached.exists)
    os.killpg(run.process.pid, signal.SIGKILL)
    assert run.are_gone(within=10)
    assert last_checkpoint(run.run_dir, verify=True) == checkpoint_path(run.run_dir, 2)
    assert run.resume() == 0, run.printed
    assert_ended_alike(run.run_dir, whole(strategy))


@pytest.mark.parametrize("strategy", [WITH_ZERO3, "fsdp2"])
def test_the_first_rank_is_killed_in_the_middle_of_writing(
    strategy: str, begin: Begin, whole: Callable[[str], Path]
) -> None:
    run = begin(strategy)
    run.start("BadDisk", step=3)
    run.wait_until(run.reached.exists)
    run.process.kill()
    assert run.are_gone(within=10)
    half = checkpoint_path(run.run_dir, 4).with_suffix(".ckpt.partial")
    assert (half / TRAINING).stat().st_size > 0
    assert last_checkpoint(run.run_dir, verify=True) == checkpoint_path(run.run_dir, 2)
    assert run.resume() == 0, run.printed
    assert not half.exists()
    assert_ended_alike(run.run_dir, whole(strategy))


@pytest.mark.parametrize("strategy", [WITH_ZERO3, "fsdp2"])
@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["to-the-first-rank", "to-all-processes"])
def test_a_signal(send: Callable[[int, int], None], strategy: str, begin: Begin, whole: Callable[[str], Path]) -> None:
    """Both ranks finish the same step."""
    run = begin(strategy)
    run.start("At", step=2, sleep=2.0)
    run.wait_until(run.reached.exists)
    send(run.process.pid, signal.SIGTERM)
    assert run.status(within=60) == 143
    assert run.are_gone(within=30)
    assert run.printed.count("stopped at step 3, which is saved: the same command resumes.") == 1
    assert "Traceback" not in run.printed
    assert last_checkpoint(run.run_dir, verify=True) == checkpoint_path(run.run_dir, 3)
    assert run.resume() == 0, run.printed
    assert_ended_alike(run.run_dir, whole(strategy))


@pytest.mark.parametrize("strategy", [WITH_ZERO3, "fsdp2"])
def test_a_second_signal_ends_both_ranks_at_once(strategy: str, begin: Begin) -> None:
    run = begin(strategy)
    run.start("At", step=2, rank=1, sleep=600)
    run.wait_until(run.reached.exists)
    run.process.terminate()
    run.wait_until(lambda: "a second signal stops at once" in run.printed)
    run.process.terminate()
    assert run.status(within=5) == 143
    assert run.are_gone(within=10)
    assert last_checkpoint(run.run_dir, verify=True) == checkpoint_path(run.run_dir, 2)


@pytest.mark.parametrize("strategy", [WITH_ZERO3, "fsdp2"])
def test_damaged_checkpoints(
    strategy: str, begin: Begin, whole: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A byte changed in the last one and the one before cut off: it goes on from the first, if that is whole."""
    run = begin(strategy)
    shutil.copytree(whole(strategy), run.run_dir, symlinks=True)
    assert damage_last_of(run.run_dir) == checkpoint_path(run.run_dir, 6)
    os.truncate(checkpoint_path(run.run_dir, 4) / AVERAGE, 1000)
    assert run.resume() == 0, run.printed
    assert "step-6.ckpt/training.ckpt has another sha256 than when it was written" in run.printed
    assert f"using {checkpoint_path(run.run_dir, 2)}" in run.printed
    assert_ended_alike(run.run_dir, whole(strategy))

    for step in (2, 4, 6):
        os.truncate(checkpoint_path(run.run_dir, step) / TRAINING, 1000)
    (run.folder / "recipe.yaml").write_text(yaml.safe_dump(run.settings))
    assert main(["fit", f"--config={run.folder / 'recipe.yaml'}"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "step-6.ckpt/training.ckpt has 1000 bytes instead of" in message
    assert "there is no other checkpoint" in message
