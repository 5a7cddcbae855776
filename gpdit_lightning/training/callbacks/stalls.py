"""The end of a run in which a rank hangs: a stopped process, a lost machine, a file server that does not respond.

Collective operations wait for all ranks, so without this a run with such a rank would wait, often for hours. Each rank
publishes its position in a store of torch, with a counter that a thread of it raises. Rank 0, which holds the store,
compares all ranks; the others observe rank 0. Durations are measured by the monotonic clock of the observer.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

from lightning import LightningModule, Trainer
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.callbacks import Callback
from torch.distributed import PrefixStore, Store, TCPStore

from gpdit_lightning.training.callbacks.run_checkpoint import RunCheckpoint
from gpdit_lightning.training.callbacks.stopping import kill_other_ranks, launcher_of_rank
from gpdit_lightning.training.internals import has_processes, launched_processes, set_process_group_timeout

log = logging.getLogger(__name__)

# Phases, as clauses for messages, in their order within a micro-batch.
STARTING, STEP, VALIDATION = "while it started", "in optimizer step {next}", "in the validation after step {step}"
BETWEEN = "after step {step}, when checkpoints, previews and scores are written"
LOADING = "while it waited for the data of step {next}"
PHASES = (STARTING, STEP, VALIDATION, BETWEEN, LOADING)
# A rank that sends heartbeats may take `LONG` times the time-out in these.
LONG_PHASES, LONG = (STARTING, BETWEEN), 4

LEAST_START_SECONDS = 120.0  # for the start of all ranks, also with a shorter time-out
LONGEST_INTERVAL = 5.0  # seconds between two heartbeats
GRACE_SECONDS = 2.0
VERDICT = "verdict"
STATUS = 2  # exit status
MAX_NAMES = 8


class Position(NamedTuple):
    """The position of a rank in the training.

    Attributes:
        progress: number of micro-batches and validation batches that it has begun.
        phase: index in `PHASES`.
        step: its finished optimizer steps.
    """

    progress: int = 0
    phase: int = PHASES.index(STARTING)
    step: int = 0

    def __str__(self) -> str:
        return PHASES[self.phase].format(step=self.step, next=self.step + 1)


@dataclass
class _Observed:
    """What an observer knows of a rank.

    Attributes:
        seen_at: the time at which its counter changed.
        progressed_at: the time at which its position changed.
        position: its last position; None before it has connected.
        beat: its last counter.
    """

    seen_at: float
    progressed_at: float
    position: Position | None = None
    beat: int = -1


class StallDetector:
    """Decides from the reports of ranks which of them hang.

    Args:
        ranks: the observed ranks.
        seconds: the time-out.
        now: the present time in seconds.
    """

    def __init__(self, ranks: Collection[int], seconds: float, now: float) -> None:
        self.seconds, self._now = seconds, now
        self._observed = {rank: _Observed(now, now) for rank in ranks}

    def report(self, rank: int, beat: int, position: Position) -> None:
        """Record the counter and the position that a rank has published."""
        observed = self._observed[rank]
        if beat != observed.beat:
            observed.beat, observed.seen_at = beat, self._now
        if position != observed.position:
            observed.position, observed.progressed_at = position, self._now

    def advance(self, now: float, longest: float) -> None:
        """Set the present time.

        If more than `longest` seconds have passed, this process was stopped itself, as all processes of a terminal are
        by Ctrl-Z, and the time does not count.
        """
        passed = now - self._now
        lost = passed if passed > longest else 0.0
        for observed in self._observed.values():
            observed.seen_at += lost
            observed.progressed_at += lost
        self._now = now

    def silent(self) -> tuple[list[int], str]:
        """Return the ranks that send no heartbeat, and a clause on the first of them."""
        silent = {
            rank: seen.position
            for rank, seen in self._observed.items()
            if self._now - seen.seen_at > (self.seconds if seen.position else self._limit(Position()))
        }
        position = next(iter(silent.values()), None) or "before it has connected to the first rank"
        return list(silent), f"no heartbeat for {_duration(self.seconds)}, {position}"

    def slow(self) -> tuple[list[int], str]:
        """Return the ranks that make no progress while the others wait for them, and a clause on their position."""
        positions = {rank: seen.position for rank, seen in self._observed.items() if seen.position is not None}
        if len(positions) < len(self._observed):  # a rank has not connected yet
            return [], ""
        last = min(positions.values())
        slow = [
            rank
            for rank, position in positions.items()
            if position[:2] == last[:2] and self._now - self._observed[rank].progressed_at > self._limit(last)
        ]
        return slow, f"no progress for {_duration(self._limit(last))}, {last}"

    def _limit(self, position: Position) -> float:
        """Return the seconds that a rank which sends heartbeats may stay in a position."""
        phase = PHASES[position.phase]
        limit = self.seconds * (LONG if phase in LONG_PHASES else 1)
        return max(limit, LEAST_START_SECONDS) if phase == STARTING else limit


class StallWatch(Callback):
    """Records the position of this rank, and ends the run if a rank hangs; the first of all callbacks.

    Args:
        minutes: the time-out; 0 for none.
    """

    def __init__(self, minutes: float) -> None:
        self.seconds = minutes * 60
        self._progress, self._phase = 0, STARTING
        self._ended, self._found = threading.Event(), threading.Event()  # the training; a rank that hangs

    # --- the position of this rank

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Begin a micro-batch."""
        self._begin(STEP)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """End a micro-batch; the next callbacks write checkpoints, previews and scores."""
        self._phase = BETWEEN

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Begin a batch of a validation."""
        self._begin(VALIDATION)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a validation."""
        self._phase = BETWEEN

    def _begin(self, phase: str) -> None:
        self._progress += 1
        self._phase = phase

    def position(self, trainer: Trainer) -> Position:
        """Return the position of this rank; called in another thread."""
        waits = self._phase == BETWEEN and bool(getattr(trainer.train_dataloader, "waiting", False))
        return Position(self._progress, PHASES.index(LOADING if waits else self._phase), trainer.global_step)

    # --- the observation of others

    @contextmanager
    def watching(self, trainer: Trainer) -> Iterator[None]:
        """Watch the ranks within the block, if there are several; it contains the start and the end of the training."""
        if trainer.world_size == 1 or not self.seconds or not has_processes(trainer.strategy):
            yield
            return
        # Collective operations fail by themselves only after any time-out of this callback.
        set_process_group_timeout(
            trainer.strategy, timedelta(seconds=60 + max(LONG * self.seconds, LEAST_START_SECONDS))
        )
        connect = _connection(trainer, self.seconds)
        reports: dict[int, tuple[int, Position]] = {}
        threads = [
            threading.Thread(target=self._exchange, args=(trainer, connect, reports), daemon=True),
            threading.Thread(target=self._watch, args=(trainer, reports, launcher_of_rank()), daemon=True),
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ended.set()
            threads[0].join(GRACE_SECONDS)  # frees the store

    @property
    def interval(self) -> float:
        """Seconds between two heartbeats."""
        return min(LONGEST_INTERVAL, self.seconds / 10)

    def _exchange(
        self, trainer: Trainer, connect: Callable[[], Store], reports: dict[int, tuple[int, Position]]
    ) -> None:
        """Publish the position of this rank and read those of the observed ranks, until the training ends."""
        rank, beat = trainer.global_rank, 0
        try:
            store = connect()
            while not self._ended.is_set():
                beat += 1
                store.set(str(rank), " ".join(map(str, (beat, *self.position(trainer)))))
                for other in _observed_by(trainer):
                    if store.check([str(other)]):
                        number, *position = map(int, store.get(str(other)).split())
                        reports[other] = number, Position(*position)
                if rank and store.check([VERDICT]):
                    os._exit(STATUS)
                if self._found.is_set():
                    store.set(VERDICT, "")
                    return
                self._found.wait(self.interval)
        except (RuntimeError, OSError) as error:
            # The first rank has ended: its launcher ends the others, or their next operation fails.
            log.debug("rank %d no longer watches the first rank: %s", rank, error)
            self._ended.set()

    def _watch(self, trainer: Trainer, reports: dict[int, tuple[int, Position]], launcher: int | None) -> None:
        """End the run if a rank hangs."""
        detector = StallDetector(_observed_by(trainer), self.seconds, time.monotonic())
        while not self._ended.wait(self.interval):
            detector.advance(time.monotonic(), longest=2 + 4 * self.interval)
            for rank, report in list(reports.items()):
                detector.report(rank, *report)
            ranks, clause = detector.silent()
            if not ranks and trainer.is_global_zero:  # only the first rank knows the positions of all
                ranks, clause = detector.slow()
            if ranks:
                self._end(trainer, f"{_names(ranks)}: {clause}", launcher)

    def _end(self, trainer: Trainer, reason: str, launcher: int | None) -> None:
        """Print which ranks hang, end the processes that no launcher would end, and end this one.

        The main thread waits for the rank that hangs, so no exception could be raised in it.
        """
        rank = trainer.global_rank
        if rank > 1:  # one rank prints
            time.sleep(GRACE_SECONDS)
        saved = next((call.saved_step for call in trainer.callbacks if isinstance(call, RunCheckpoint)), 0)  # type: ignore[attr-defined]
        which = f"the checkpoint of step {saved}" if saved else "the last checkpoint, if there is one"
        line = (
            f"error: {reason} (health.stall_minutes is {self.seconds / 60:g}): all ranks are ended; the same command "
        )
        line = f"{f'[rank {rank}] ' * (rank > 0)}{line}resumes from {which}.\n"
        # The file of the output may be on the same server that does not respond.
        writer = threading.Thread(target=os.write, args=(2, line.encode()), daemon=True)
        if rank <= 1:
            writer.start()
            writer.join(GRACE_SECONDS)
        if rank == 0:
            self._found.set()
            if processes := launched_processes(trainer.strategy):
                kill_other_ranks(processes)
            else:
                time.sleep(GRACE_SECONDS + self.interval)  # the others read the verdict
        elif launcher is not None:
            os.kill(launcher, signal.SIGKILL)  # the first rank, which may be stopped; this rank ends with it
        os._exit(STATUS)


def watch_ranks(trainer: Trainer) -> AbstractContextManager[None]:
    """Return the context manager of the trainer's `StallWatch`; without one, a context manager without effect."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    watches = [callback.watching(trainer) for callback in callbacks if isinstance(callback, StallWatch)]
    return watches[0] if watches else nullcontext()


def _observed_by(trainer: Trainer) -> Collection[int]:
    """Return the ranks that this one observes."""
    return range(trainer.world_size) if trainer.is_global_zero else (0,)


def _connection(trainer: Trainer, seconds: float) -> Callable[[], Store]:
    """Return a function that connects to the store of the first rank, or serves it.

    The store shares the address, and in the first rank the server, with the one by which torch connects the ranks. With
    torchrun the server is in another process, and remains when the ranks are started again.
    """
    global _number_of_watches
    _number_of_watches += 1  # the stages of a chain may share a server
    environment: ClusterEnvironment = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
    address, port = environment.main_address, environment.main_port
    serves = trainer.is_global_zero and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    prefix = f"stalls/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{_number_of_watches}"

    def connect() -> Store:
        store = TCPStore(
            address,
            port,
            is_master=serves,
            timeout=timedelta(seconds=max(seconds, LEAST_START_SECONDS)),
            wait_for_workers=False,
            multi_tenant=True,
        )
        return PrefixStore(prefix, store)

    return connect


_number_of_watches = 0


def _names(ranks: Sequence[int]) -> str:
    """Return `rank 3 hangs` or `ranks 3, 4 hang`, with at most `MAX_NAMES` numbers."""
    numbers = ", ".join(map(str, ranks[:MAX_NAMES])) + (
        f" and {len(ranks) - MAX_NAMES} more" * (len(ranks) > MAX_NAMES)
    )
    return f"rank {numbers} hangs" if len(ranks) == 1 else f"ranks {numbers} hang"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:g} min" if seconds >= 60 else f"{seconds:g} s"
