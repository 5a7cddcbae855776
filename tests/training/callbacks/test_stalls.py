"""A rank that hangs ends the run with a sentence that names it; slow ranks do not."""

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout

from gpdit_lightning.errors import InputError
from gpdit_lightning.training.callbacks.health import Health
from gpdit_lightning.training.callbacks.stalls import (
    BETWEEN,
    LEAST_START_SECONDS,
    LOADING,
    LONG,
    PHASES,
    STEP,
    Position,
    StallDetector,
    StallWatch,
    watch_ranks,
)

T = 10.0  # seconds


class Ranks:
    """Three ranks that report to a detector, each with its counter and position."""

    def __init__(self) -> None:
        self.detector, self.now, self.beats = StallDetector(range(3), T, 0.0), 0.0, [0, 0, 0]
        self.positions = [Position(), Position(), Position()]

    def pass_time(self, seconds: float, stopped: tuple[int, ...] = ()) -> tuple[list[int], list[int]]:
        """Return the ranks that are silent and slow after some seconds in which the others send heartbeats."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.5
            self.detector.advance(self.now, longest=2.0)
            for rank in {0, 1, 2} - set(stopped):
                self.beats[rank] += 1
                self.detector.report(rank, self.beats[rank], self.positions[rank])
        return self.detector.silent()[0], self.detector.slow()[0]

    def move(self, progress: int, phase: str, *ranks: int) -> None:
        for rank in ranks:
            self.positions[rank] = Position(progress, PHASES.index(phase), step=progress)


def test_a_rank_without_a_sign_of_life_hangs_in_any_phase() -> None:
    ranks = Ranks()
    ranks.move(4, BETWEEN, 0, 1, 2)
    assert ranks.pass_time(3) == ([], [])
    assert ranks.pass_time(T - 1, stopped=(2,)) == ([], [])
    assert ranks.pass_time(2, stopped=(2,)) == ([2], [])
    assert ranks.detector.silent()[1] == f"no heartbeat for 10 s, {BETWEEN.format(step=4)}"


def test_the_rank_that_the_others_wait_for_hangs() -> None:
    """It waits for data of step 5, for which the others have theirs; long work between steps is no hang."""
    ranks = Ranks()
    ranks.move(4, LOADING, 1)
    ranks.move(5, STEP, 0, 2)
    assert ranks.pass_time(T) == ([], [])
    assert ranks.pass_time(1) == ([], [1])
    assert ranks.detector.slow()[1] == "no progress for 10 s, while it waited for the data of step 5"
    ranks.move(4, BETWEEN, 1)
    assert ranks.pass_time(LONG * T - 1) == ([], [])
    assert ranks.pass_time(2) == ([], [1])


def test_the_start_and_a_suspension_of_all_processes_are_no_hang() -> None:
    ranks = Ranks()
    assert ranks.pass_time(LEAST_START_SECONDS - 2, stopped=(1,)) == ([], [])
    assert ranks.pass_time(3, stopped=(1,)) == ([1], [])
    ranks = Ranks()
    ranks.move(4, STEP, 0, 1, 2)
    ranks.pass_time(5)
    ranks.now += 3600  # Ctrl-Z and fg
    assert ranks.pass_time(3) == ([], [])


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_ends_the_others(tmp_path: Path, stopped: int) -> None:
    """The survivor exits with status 2 after the time-out, although its main thread waits for the other rank."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    pids = [_fork(lambda rank=rank: _run_rank(rank, port, stopped, tmp_path / f"{rank}")) for rank in (0, 1)]
    survivor = pids[1 - stopped]
    deadline = time.monotonic() + 60
    while (ended := os.waitpid(survivor, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in set(pids) - {ended[0]}:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(ended[1]) == 2
    prefix = "" if stopped else "[rank 1] "
    assert (tmp_path / f"{1 - stopped}").read_text() == (
        f"{prefix}error: rank {stopped} hangs: no heartbeat for 1 s, in optimizer step 8 (health.stall_minutes is "
        "0.0166667): all ranks are ended; the same command resumes from the last checkpoint, if there is one.\n"
    )


def _fork(run: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            run()
        finally:
            os._exit(1)
    return pid


def _run_rank(rank: int, port: int, stopped: int, output: Path) -> None:
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 2)
    watch = StallWatch(minutes=1 / 60)
    environment = SimpleNamespace(main_address="127.0.0.1", main_port=port)
    strategy = SimpleNamespace(launcher=None, cluster_environment=environment, _timeout=default_pg_timeout)
    trainer = SimpleNamespace(
        world_size=2, global_rank=rank, is_global_zero=rank == 0, strategy=strategy, callbacks=[watch], global_step=7
    )
    with watch_ranks(trainer):  # type: ignore[arg-type]
        assert strategy._timeout.total_seconds() == 60 + LEAST_START_SECONDS
        for number in range(600):
            watch.on_train_batch_start(trainer, None)  # type: ignore[arg-type]
            time.sleep(0.1)
            if number == 30 and rank == stopped:
                os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize("minutes", [-1.0, float("nan"), float("inf")])
def test_a_time_out_that_is_none_is_refused(minutes: float) -> None:
    with pytest.raises(InputError, match=r"health\.stall_minutes is"):
        Health(stall_minutes=minutes)
