"""Runs under ZeRO and FSDP2 on two processes that are killed, stopped or damaged resume and end bit-equal."""

import functools
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from gpdit_lightning.checkpoints.files import TRAINING, checkpoint_path, damage_of, last_checkpoint, mark_path
from gpdit_lightning.checkpoints.parts import part_name
from gpdit_lightning.cli import main
from gpdit_lightning.files import partial_path
from tests.cli.test_chain import damage_last_of
from tests.cli.test_resume import STEPS, recipe
from tests.cli.test_sharded_runs import WITH_ZERO2, WITH_ZERO3
from tests.cli.test_stopped_runs import Run, assert_same_result

pytestmark = pytest.mark.slow


class ShardedRun(Run):
    """A run whose logs, checkpoints and validations come at different steps, so that each has to be made up for."""

    def __init__(self, folder: Path, shards: Path, strategy: str) -> None:
        super().__init__(folder, shards)
        self.settings = recipe(shards, self.run_dir, max_ranks=2)
        self.settings["trainer"] |= {"devices": 2, "strategy": strategy, "log_every_n_steps": 3}
        self.settings["checkpoint"] = {"every_steps": 2, "keep_last": 3}

    def resume(self) -> int:
        """Run the same command in separate processes."""
        self.start("PauseAt", step=STEPS)
        return self.status(within=120)


NewRun = Callable[[str], ShardedRun]


@pytest.fixture
def new_run(tiny_shards: Path, tmp_path: Path) -> Iterator[NewRun]:
    """`new_run(strategy)`: a run that is not started; its processes are killed after the test."""
    runs: list[ShardedRun] = []

    def new(strategy: str) -> ShardedRun:
        runs.append(ShardedRun(tmp_path, tiny_shards, strategy))
        return runs[-1]

    yield new
    for process in (process for run in runs for process in run.running_processes()):
        os.kill(process, signal.SIGKILL)


@pytest.fixture(scope="module")
def uninterrupted(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`uninterrupted(strategy)`: the run folder of an uninterrupted run. Do not change it."""

    @functools.cache
    def train(strategy: str) -> Path:
        run = ShardedRun(tmp_path_factory.mktemp("uninterrupted"), tiny_shards, strategy)
        assert run.resume() == 0, run.printed
        return run.run_dir

    return train


@pytest.mark.parametrize("strategy", [WITH_ZERO2, WITH_ZERO3, "fsdp2"])
def test_a_run_resumes_after_all_ranks_were_killed_during_a_step(
    strategy: str, new_run: NewRun, uninterrupted: Callable[[str], Path]
) -> None:
    """Step 3 is logged and not saved; in step 4 the first rank waits for the second."""
    run = new_run(strategy)
    run.start("PauseAt", step=3, rank=1, sleep=600)
    run.wait_until(run.reached.exists)
    os.killpg(run.process.pid, signal.SIGKILL)
    assert run.has_ended(within=10)
    assert last_checkpoint(run.run_dir, verify=True) == checkpoint_path(run.run_dir, 2)
    assert run.resume() == 0, run.printed
    assert_same_result(run.run_dir, uninterrupted(strategy))


# Checkpoints that are written while the training continues. That of step 4 takes ever so long, or fails.


@pytest.mark.parametrize(
    ("strategy", "rank", "moment", "kill"),
    [
        ("fsdp2", 0, "half", os.killpg),
        ("fsdp2", 1, "half", os.kill),
        ("fsdp2", 1, "written", os.killpg),
        ("fsdp2", 0, "publish", os.kill),
        ("fsdp2", 0, "mark", os.killpg),
        ("fsdp2", 0, "marked", os.kill),
        pytest.param("zero2", 1, "half", os.killpg, marks=WITH_ZERO2.marks),
        pytest.param("zero3", 0, "written", os.kill, marks=WITH_ZERO3.marks),
    ],
)
def test_a_run_resumes_after_a_kill_while_a_checkpoint_was_written(
    strategy: str,
    rank: int,
    moment: str,
    kill: Callable[[int, int], None],
    new_run: NewRun,
    uninterrupted: Callable[[str], Path],
) -> None:
    """Of all processes or of the first rank, in step 5. The link is set after the checkpoint is complete."""
    run = new_run(strategy)
    run.start("SlowDisk", step=4, rank=rank, moment=moment)
    run.wait_until(run.reached.exists)
    kill(run.process.pid, signal.SIGKILL)
    assert run.has_ended(within=10)
    folder = checkpoint_path(run.run_dir, 4)
    assert partial_path(folder).exists() == (moment in ("half", "written", "publish"))
    assert mark_path(folder).exists() == (moment == "marked")
    assert last_checkpoint(run.run_dir, verify=True) == checkpoint_path(run.run_dir, 2)
    assert run.resume() == 0, run.printed
    assert not partial_path(folder).exists()
    assert_same_result(run.run_dir, uninterrupted(strategy))


@pytest.mark.parametrize(("strategy", "rank", "moment"), [("fsdp2", 1, "half"), ("fsdp2", 0, "mark")])
def test_a_full_disk_ends_all_ranks_after_their_step(
    strategy: str, rank: int, moment: str, new_run: NewRun, uninterrupted: Callable[[str], Path]
) -> None:
    run = new_run(strategy)
    run.start("SlowDisk", step=4, rank=rank, moment=moment, full=True)
    assert run.status(within=60) == 2
    assert run.has_ended(within=10)
    path = checkpoint_path(run.run_dir, 4)
    assert run.printed.splitlines()[-1] == (
        f"error: the checkpoint of step 4 could not be written to {path} (No space left on device): check that there "
        "is free space and permission to write; step-2.ckpt is complete and the same command resumes from it."
    )
    assert not partial_path(path).exists()
    assert run.resume() == 0, run.printed
    assert_same_result(run.run_dir, uninterrupted(strategy))


def test_a_signal_and_the_next_checkpoint_wait_for_the_one_that_is_written(
    new_run: NewRun, uninterrupted: Callable[[str], Path]
) -> None:
    """The signal arrives in step 5, while the checkpoint of step 4 is being written."""
    run = new_run("fsdp2")
    run.start("SlowDisk", step=4, rank=1, moment="half", seconds=3.0)
    run.wait_until(run.reached.exists)
    run.process.terminate()
    assert run.status(within=60) == 143
    assert "the checkpoint of step 5 waits for that of step 4" in run.printed
    assert run.printed.count("stopped at step 5, which is saved: the same command resumes.") == 1
    assert "Traceback" not in run.printed
    assert [damage_of(checkpoint_path(run.run_dir, step), verify=True) for step in (2, 4, 5)] == [""] * 3
    assert last_checkpoint(run.run_dir, verify=True) == checkpoint_path(run.run_dir, 5)
    assert run.resume() == 0, run.printed
    assert_same_result(run.run_dir, uninterrupted("fsdp2"))


@pytest.mark.parametrize("strategy", [WITH_ZERO3, "fsdp2"])
@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["to-the-first-rank", "to-all-processes"])
def test_a_signal_stops_both_ranks_after_the_same_step(
    send: Callable[[int, int], None], strategy: str, new_run: NewRun, uninterrupted: Callable[[str], Path]
) -> None:
    run = new_run(strategy)
    run.start("PauseAt", step=2, sleep=2.0)
    run.wait_until(run.reached.exists)
    send(run.process.pid, signal.SIGTERM)
    assert run.status(within=60) == 143
    assert run.has_ended(within=30)
    assert run.printed.count("stopped at step 3, which is saved: the same command resumes.") == 1
    assert "Traceback" not in run.printed
    assert last_checkpoint(run.run_dir, verify=True) == checkpoint_path(run.run_dir, 3)
    assert run.resume() == 0, run.printed
    assert_same_result(run.run_dir, uninterrupted(strategy))


@pytest.mark.parametrize("strategy", [WITH_ZERO3, "fsdp2"])
def test_a_second_signal_ends_both_ranks_at_once(strategy: str, new_run: NewRun) -> None:
    run = new_run(strategy)
    run.start("PauseAt", step=2, rank=1, sleep=600)
    run.wait_until(run.reached.exists)
    run.process.terminate()
    run.wait_until(lambda: "a second signal stops at once" in run.printed)
    run.process.terminate()
    assert run.status(within=5) == 143
    assert run.has_ended(within=10)
    assert last_checkpoint(run.run_dir, verify=True) == checkpoint_path(run.run_dir, 2)


@pytest.mark.parametrize("strategy", [WITH_ZERO3, "fsdp2"])
def test_a_run_resumes_from_the_last_intact_checkpoint(
    strategy: str, new_run: NewRun, uninterrupted: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A byte of the last one is changed and the one before is truncated; then all three are truncated."""
    run = new_run(strategy)
    shutil.copytree(uninterrupted(strategy), run.run_dir, symlinks=True)
    assert damage_last_of(run.run_dir) == checkpoint_path(run.run_dir, 6)
    os.truncate(checkpoint_path(run.run_dir, 4) / part_name(1, 2), 1000)
    assert run.resume() == 0, run.printed
    assert "step-6.ckpt/training.ckpt has another sha256 than when it was written" in run.printed
    assert f"using {checkpoint_path(run.run_dir, 2)}" in run.printed
    assert_same_result(run.run_dir, uninterrupted(strategy))

    for step in (2, 4, 6):
        os.truncate(checkpoint_path(run.run_dir, step) / TRAINING, 1000)
    (run.folder / "recipe.yaml").write_text(yaml.safe_dump(run.settings))
    assert main(["fit", f"--config={run.folder / 'recipe.yaml'}"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "step-6.ckpt/training.ckpt has 1000 bytes instead of" in message
    assert "there is no other checkpoint" in message
