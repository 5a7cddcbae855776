import math
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from gpdit_lightning import GPDiTConfig
from gpdit_lightning.data import batches
from gpdit_lightning.data.batches import LatentBatch, LatentDataset, TimedLoader
from gpdit_lightning.data.datamodule import LatentDataModule, SourceConfig
from gpdit_lightning.estimation.flops import PassShape, training_flops
from gpdit_lightning.stages import GPDiTStage
from gpdit_lightning.training.callbacks import throughput
from gpdit_lightning.training.callbacks.ema import EMA
from gpdit_lightning.training.callbacks.health import Health
from gpdit_lightning.training.callbacks.metrics import MetricsLogger
from gpdit_lightning.training.callbacks.throughput import Pace, Throughput, peak_memory_gib

Fit = Callable[..., Trainer]

TRAINING, ELSEWHERE = 5.0, 1000.0  # seconds


class Clock:
    """A clock that advances only by `now`."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    process_time = perf_counter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The library's clock; reading micro-batch n takes n + 1 seconds."""
    clock = Clock()
    monkeypatch.setattr(batches, "time", clock)
    monkeypatch.setattr(throughput, "time", clock)
    read = LatentDataset.__getitem__

    def slow_read(dataset: LatentDataset, number: int) -> LatentBatch:
        clock.now += number + 1
        return read(dataset, number)

    monkeypatch.setattr(LatentDataset, "__getitem__", slow_read)
    return clock


class SlowStage(GPDiTStage):
    """Every micro-batch takes TRAINING seconds, validation ELSEWHERE."""

    clock: Clock

    def training_step(self, batch: LatentBatch, batch_idx: int) -> dict[str, Any]:
        self.clock.now += TRAINING
        return super().training_step(batch, batch_idx)

    def on_validation_end(self) -> None:
        self.clock.now += ELSEWHERE


class SlowCheckpoint(Callback):
    """Takes ELSEWHERE seconds after every micro-batch."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.clock.now += ELSEWHERE


class Written:
    """A logger that stores scalars by step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scalars: dict[int, dict[str, float]] = {}

        def write(trainer: Trainer, module: LightningModule, scalars: dict[str, float], _: str) -> None:
            self.scalars.setdefault(trainer.global_step, {}).update(scalars)

        monkeypatch.setattr("gpdit_lightning.training.callbacks.metrics.log_scalars", write)


def test_rates_exclude_validation_and_checkpoints(
    fit: Fit, tiny_config: GPDiTConfig, tiny_shards: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three micro-batches in a step: 4 images of 16 tokens, twice 2 clips of 48 of which one in all has no context."""
    images = SourceConfig([str(tiny_shards)], batch_size=4)
    videos = SourceConfig([str(tiny_shards)], batch_size=4, micro_batches=2)
    data = LatentDataModule(images, videos, context_dropout=0.25, validation_batches=1)
    stage, health, ema, written = SlowStage(tiny_config), Health(), EMA(), Written(monkeypatch)
    stage.clock = clock
    monkeypatch.setattr(throughput, "peak_bf16_flops", {"cpu": 1e9}.get)
    callbacks = [health, ema, MetricsLogger(health, ema, tiny_config, every_steps=2), SlowCheckpoint(clock)]
    fit(stage, data, tmp_path, 4, callbacks, limit_val_batches=1.0, val_check_interval=3)
    assert clock.now > 12 * ELSEWHERE
    assert sorted(written.scalars) == [1, 2, 3, 4]
    assert not any(tag.startswith("system/") for step in (1, 3) for tag in written.scalars[step])
    for step, first in ((2, 2), (4, 3)):  # the first step of a process is left out
        scalars, steps = written.scalars[step], step - first + 1
        reading = sum(range(3 * first - 2, 3 * step + 1))
        seconds = reading + 3 * steps * TRAINING
        assert scalars["system/steps_per_s"] == pytest.approx(steps / seconds)
        assert scalars["system/clips_per_s"] == pytest.approx(steps * 8 / seconds)
        assert scalars["system/tokens_per_s"] == pytest.approx(steps * (4 * 16 + 4 * 48) / seconds)
        assert scalars["system/data_wait"] == pytest.approx(reading / seconds)
        flops = 0
        for number in range((first - 1) * 3, step * 3):
            batch = data.trainer.train_dataloader.dataset[number]  # type: ignore[union-attr]
            clips, frames, _, height, width = batch.latents.shape
            flops += sum(training_flops(tiny_config, PassShape(clips, batch.context, frames, height, width)).values())
        assert scalars["system/tflops_per_s"] == pytest.approx(flops / seconds / 1e12)
        assert scalars["system/mfu"] == pytest.approx(flops / seconds / 1e9)
    # After step 2: two steps like it, with validation and checkpoints. After the last step: nothing.
    step_seconds = sum(range(4, 7)) + 3 * TRAINING + 4 * ELSEWHERE + sum(range(1, 4))  # reading validation batches
    assert written.scalars[2]["system/hours_left"] == pytest.approx(2 * step_seconds / 3600)
    assert written.scalars[4]["system/hours_left"] == 0


def batch_of(clips: int, draws: int = 1, context: int = 0, frames: tuple[int, ...] | None = None) -> LatentBatch:
    noisy = 3 if frames is None else len(frames)
    latents, noise = torch.zeros(clips, 3, 4, 8, 8), torch.zeros(clips * draws, noisy, 4, 8, 8)
    keys = [str(clip) for clip in range(clips)]
    return LatentBatch(latents, noise, torch.zeros(clips * draws, noisy), context, 1.0, "videos", keys, frames=frames)


def trainer_of(world_size: int, others: Tensor) -> Any:
    """A trainer of several ranks, one of which measured `others`."""

    def reduce(values: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "max"
        return torch.maximum(values, others)

    strategy = SimpleNamespace(reduce=reduce, root_device=torch.device("cpu"))
    return SimpleNamespace(strategy=strategy, world_size=world_size)


def test_rates_are_sums_and_the_data_wait_the_maximum_over_ranks(clock: Clock, tiny_config: GPDiTConfig) -> None:
    window = Throughput(tiny_config)
    loader: Any = SimpleNamespace(request_time=0.0, wait_seconds=1.0)
    clock.now = 10.0
    window.add(batch_of(2), loader, ends_step=True)
    figures = window.rates(trainer_of(4, others=torch.tensor([0.5, 1e6])))
    assert figures["steps_per_s"] == pytest.approx(0.1)
    assert figures["clips_per_s"] == pytest.approx(4 * 2 / 10)
    assert figures["tokens_per_s"] == pytest.approx(4 * 2 * 48 / 10)
    assert figures["tflops_per_s"] == pytest.approx(
        sum(training_flops(tiny_config, PassShape(2, 0, 3, 8, 8)).values()) / 10e12
    )
    assert (figures["data_wait"], figures["peak_memory_gib"]) == (0.5, 1e6)
    assert "mfu" not in figures


def test_noisy_copies_count_as_tokens_and_flops_but_not_as_clips(clock: Clock, tiny_config: GPDiTConfig) -> None:
    window = Throughput(tiny_config)
    clock.now = 1.0
    window.add(batch_of(4, draws=3, context=2), SimpleNamespace(request_time=0.0, wait_seconds=0.0), ends_step=True)  # type: ignore[arg-type]
    assert (window.clips, window.tokens) == (4, 3 * 4 * 48)
    assert window.flops == sum(training_flops(tiny_config, PassShape(4, 2, 3, 8, 8, draws=3)).values())


def test_tokens_and_flops_count_noisy_frames(clock: Clock, tiny_config: GPDiTConfig) -> None:
    window, loader = Throughput(tiny_config), SimpleNamespace(request_time=0.0, wait_seconds=0.0)
    window.add(batch_of(4, draws=2, context=3, frames=(1,)), loader, ends_step=True)  # type: ignore[arg-type]
    assert (window.clips, window.tokens) == (4, 2 * 4 * 16)
    assert window.flops == sum(training_flops(tiny_config, PassShape(4, 3, 3, 8, 8, 2, (1,))).values())


# The loader


class Sleepy(torch.utils.data.Dataset[int]):
    def __getitem__(self, number: int) -> int:
        time.sleep(0.03)
        return number

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_measures_waiting_times(workers: int) -> None:
    """Without workers a request waits for the reading; a worker reads between requests."""
    loader = TimedLoader(Sleepy(), num_workers=workers)  # type: ignore[arg-type]
    waits, iterator = [], iter(loader)
    assert len(multiprocessing.active_children()) == workers  # they begin to read at once
    for place, number in enumerate(iterator):
        assert number == place
        assert loader.request_time + loader.wait_seconds <= time.perf_counter()
        waits.append(loader.wait_seconds)
        time.sleep(0.2)
    assert len(waits) == 3
    if workers == 0:
        assert min(waits) >= 0.03
    assert min(waits[1:]) < 0.2  # without the time between requests
    if workers == 1:
        assert min(waits[1:]) < 0.03


# Memory


def test_peak_memory_is_that_of_the_process() -> None:
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    assert peak_memory_gib(torch.device("cpu")) == pytest.approx(peak / 2**20, rel=0.02)
    assert math.isfinite(peak)


def trainer_at(step: int, max_steps: int = 100, callbacks: list[Any] | None = None) -> Any:
    return SimpleNamespace(global_step=step, max_steps=max_steps, callbacks=callbacks or [])


def add_steps(pace: Pace, clock: Clock, count: int, seconds: float, between: float = 0.0) -> None:
    for _ in range(count):
        clock.now += seconds + between
        pace.add(seconds, 8)


def test_the_time_left_follows_the_last_steps_and_includes_the_time_between_them(clock: Clock) -> None:
    """Of a process that resumes at step 50: a slow first step, then 10 steps of 2 s, then many of 4 s."""
    pace = Pace()
    assert pace.seconds_left(trainer_at(50)) is None
    add_steps(pace, clock, 1, seconds=60.0)
    assert pace.seconds_left(trainer_at(51)) == pytest.approx(49 * 60.0)
    add_steps(pace, clock, 10, seconds=2.0, between=1.0)
    assert pace.seconds_left(trainer_at(61)) == pytest.approx(39 * (2.0 + 1.0))
    assert pace.clips_per_s == pytest.approx(4.0)
    add_steps(pace, clock, 400, seconds=4.0, between=1.0)
    assert pace.seconds_left(trainer_at(61)) == pytest.approx(39 * (4.0 + 1.0), rel=0.01)
    assert pace.seconds_left(trainer_at(100)) == 0
    assert pace.seconds_left(trainer_at(61, max_steps=-1)) is None
    timer = SimpleNamespace(time_remaining=lambda: 7.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "Timer", SimpleNamespace)
        assert pace.seconds_left(trainer_at(61, callbacks=[timer])) == 7.0
