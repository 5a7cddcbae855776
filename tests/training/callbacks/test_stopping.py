"""Recording of stop signals until the end of the step; for whole processes see tests/cli/test_stopped_runs.py."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning import Callback, LightningModule, Trainer

from gpdit_lightning import GPDiTConfig
from gpdit_lightning.checkpoints.files import last_checkpoint
from gpdit_lightning.data.datamodule import LatentDataModule, SourceConfig
from gpdit_lightning.signals import REPEATED, SIGNALS
from gpdit_lightning.stages import GPDiTStage
from gpdit_lightning.training.callbacks.ema import EMA
from gpdit_lightning.training.callbacks.run_checkpoint import RunCheckpoint
from gpdit_lightning.training.callbacks.stopping import Stopped, StopSignals


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in handlers.items():
        if handler == signal.SIG_IGN:  # SIGHUP under nohup
            signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    signals = StopSignals(True, 0.5, lambda: False, lambda number: Stopped(0, number, True))
    signals.install()
    yield signals
    signals.restore()


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit statuses of `os._exit`, which does not end the process."""
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    return statuses


def printed_within(seconds: float, text: str, capfd: Any) -> bool:
    printed, deadline = "", time.monotonic() + seconds
    while text not in printed and time.monotonic() < deadline:
        time.sleep(0.01)
        printed += capfd.readouterr().err
    return text in printed


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_recorded_and_the_second_ends_the_process(
    signals: StopSignals, exits: list[int], number: signal.Signals, capfd: Any
) -> None:
    assert signals.received == 0
    os.kill(os.getpid(), number)
    assert signals.received == number
    second = "; a second signal stops at once" * (number in REPEATED)
    assert printed_within(10, f"{number.name}: finishing the step and saving{second}", capfd)
    if number not in REPEATED:  # a shell repeats SIGHUP, and SLURM sends SIGTERM after SIGUSR1
        for repeated in (number, signal.SIGTERM):
            os.kill(os.getpid(), repeated)
            time.sleep(0.2)
    assert exits == []
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    assert exits == [143]
    assert signals.received == number


def test_signals_at_the_same_time_count_once(signals: StopSignals, exits: list[int], capfd: Any) -> None:
    """`timeout` signals a process and then its group."""
    for _ in range(3):
        signal.raise_signal(signal.SIGTERM)
    assert printed_within(10, "a second signal", capfd)
    assert exits == []


def test_other_signals_are_ignored(signals: StopSignals, exits: list[int], capfd: Any) -> None:
    """As when a loader process ends."""
    before = signal.signal(signal.SIGCHLD, lambda *_: None)
    for _ in range(3):
        signal.raise_signal(signal.SIGCHLD)
        time.sleep(0.2)
    signal.signal(signal.SIGCHLD, before)
    assert (signals.received, exits, capfd.readouterr().err) == (0, [], "")


class SignalAt(Callback):
    """Sends this process a signal in the middle of an optimizer step."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        self.step, self.number = step, number

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("validate_every", [2, 3])
def test_a_signal_ends_the_training_after_its_step_is_saved(
    tiny_shards: Path,
    tiny_config: GPDiTConfig,
    fit: Callable[..., Trainer],
    tmp_path: Path,
    number: signal.Signals,
    validate_every: int,
) -> None:
    """After the validation of that step; then the previous handlers are restored."""
    before = [signal.getsignal(other) for other in SIGNALS]
    assert signal.set_wakeup_fd(-1) == -1
    data = LatentDataModule(videos=SourceConfig([str(tiny_shards)], batch_size=4, micro_batches=2))
    validation = {"val_check_interval": 2 * validate_every, "limit_val_batches": 1}
    callbacks = [SignalAt(2, number), EMA(), RunCheckpoint(every_steps=2)]
    with pytest.raises(Stopped) as caught:
        fit(GPDiTStage(tiny_config), data, tmp_path, 6, callbacks, **validation)
    assert caught.value.code == 128 + number
    assert last_checkpoint(tmp_path, verify=True) == tmp_path / "checkpoints/step-3.ckpt"
    assert [signal.getsignal(other) for other in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
