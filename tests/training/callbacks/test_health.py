import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from gpdit_lightning import GPDiTConfig
from gpdit_lightning.data.batches import LatentBatch
from gpdit_lightning.data.datamodule import LatentDataModule, SourceConfig
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.diffusion import DenoisingLoss
from gpdit_lightning.errors import InputError
from gpdit_lightning.stages import GPDiTStage
from gpdit_lightning.training.callbacks.ema import EMA
from gpdit_lightning.training.callbacks.health import DamagedDataError, Health, NonFiniteError
from gpdit_lightning.training.callbacks.run_checkpoint import RunCheckpoint
from gpdit_lightning.training.optimizer import OptimizerConfig
from tests.checkpoints.content import read_checkpoint
from tests.data.damage import damage

Fit = Callable[..., Trainer]

NAN, INF = math.nan, math.inf
LEARNING_RATE = 0.01
MICRO_BATCHES = 2


class History(Callback):
    """Records the samples of each optimizer step, and weights and optimizer state before each and after the last."""

    def __init__(self) -> None:
        self.keys: list[list[str]] = []
        self.weights: list[Tensor] = []
        self.optimizer_state: list[list[Tensor]] = []
        self.rates: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.optimizer = trainer.optimizers[0]
        self.module = pl_module

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.keys.append([])
            self.note_state()
        self.keys[-1] += batch.keys

    def note_state(self) -> None:
        self.weights.append(torch.nn.utils.parameters_to_vector(self.module.parameters()).detach().clone())
        self.optimizer_state.append([m.clone() for state in self.optimizer.state.values() for m in state.values()])

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def same_state(self, one: int, other: int) -> bool:
        mine, theirs = ([self.weights[place], *self.optimizer_state[place]] for place in (one, other))
        return len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))


class Plant(Callback):
    """Multiplies the second clip of some micro-batches by a factor."""

    def __init__(self, factor: float, *numbers: int, rank: int = 0) -> None:
        self.factor, self.numbers, self.rank = factor, numbers, rank
        self.keys: list[str] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx in self.numbers and trainer.global_rank == self.rank:
            self.keys.append(batch.keys[1])
            batch.latents[1] *= self.factor


class BreakGradient(Callback):
    """Changes a value of one gradient after a micro-batch's backward pass."""

    def __init__(self, number: int, value: float) -> None:
        self.number, self.value = number, value
        self.micro_batches = 0

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.micro_batches == self.number:
            gradient = next(p.grad for p in pl_module.parameters() if p.grad is not None)
            gradient.view(-1)[0] = self.value
        self.micro_batches += 1


class GradientNorms(Callback):
    """Records the gradient norm of each optimizer step before and after clipping."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        gradients = [p.grad.flatten().double() for p in pl_module.parameters() if p.grad is not None]
        self.norms.append(torch.cat(gradients).norm().item())


def named(message: str) -> list[str]:
    """Return the samples in the message of a skipped step."""
    found = re.search(r"for the samples ([\w, -]+)", message)
    assert found
    return found[1].strip().split(", ")


@pytest.fixture
def data(tiny_shards: Path) -> LatentDataModule:
    """Two micro-batches of two clips in every optimizer step."""
    return LatentDataModule(videos=SourceConfig([str(tiny_shards)], batch_size=4, micro_batches=MICRO_BATCHES))


@pytest.fixture
def stage(tiny_config: GPDiTConfig) -> GPDiTStage:
    torch.manual_seed(0)
    return GPDiTStage(tiny_config, optimizer=OptimizerConfig(LEARNING_RATE, warmup_steps=5))


# A step that is not finite


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("micro_batch", [2, 3])
def test_a_non_finite_loss_names_its_clip_and_stops_the_run_before_the_update(
    fit: Fit, stage: GPDiTStage, data: LatentDataModule, tmp_path: Path, value: float, micro_batch: int
) -> None:
    history, plant = History(), Plant(value, micro_batch)
    with pytest.raises(NonFiniteError, match="stopped at optimizer step 2: the loss is not finite") as caught:
        fit(stage, data, tmp_path, 4, [Health(), history, plant, EMA(), RunCheckpoint(every_steps=1)])
    history.note_state()
    assert not torch.equal(history.weights[1], history.weights[0])  # the first step was taken
    assert history.same_state(2, 1)  # the second was not
    assert named(str(caught.value)) == plant.keys
    assert len(set(history.keys[1])) > 1
    saved = read_checkpoint(tmp_path)
    assert saved["global_step"] == 1
    saved_weights = [saved["state_dict"][name].flatten() for name, _ in stage.named_parameters()]
    assert torch.equal(torch.cat(saved_weights), history.weights[1])


@pytest.mark.parametrize("value", [NAN, -INF])
@pytest.mark.parametrize("micro_batch", [2, 3])
def test_a_non_finite_gradient_names_all_samples_of_the_step(
    fit: Fit, stage: GPDiTStage, data: LatentDataModule, tmp_path: Path, value: float, micro_batch: int
) -> None:
    history = History()
    with pytest.raises(NonFiniteError, match="stopped at optimizer step 2: the gradient \\(but no") as caught:
        fit(stage, data, tmp_path, 4, [Health(), history, BreakGradient(micro_batch, value)])
    history.note_state()
    assert history.same_state(2, 1)
    assert named(str(caught.value)) == history.keys[1]
    assert len(history.keys[1]) == 4


class InfiniteStage(GPDiTStage):
    """The loss of the second clip overflows in step 2, and no gradient does."""

    def objective(self, batch: LatentBatch) -> DenoisingLoss:
        loss = super().objective(batch)
        if self.trainer.global_step != 1:
            return loss
        loss.per_clip[1] = INF
        return loss._replace(mean=loss.mean + INF)


def test_an_infinite_loss_with_finite_gradients_is_detected(
    fit: Fit, tiny_config: GPDiTConfig, tiny_shards: Path, tmp_path: Path
) -> None:
    data, history = LatentDataModule(videos=SourceConfig([str(tiny_shards)], batch_size=4)), History()
    with pytest.raises(NonFiniteError, match="stopped at optimizer step 2: the loss is not finite") as caught:
        fit(InfiniteStage(tiny_config), data, tmp_path, 4, [Health(), history])
    history.note_state()
    assert history.same_state(2, 1)
    assert named(str(caught.value)) == history.keys[1][1:2]


def test_a_long_list_of_samples_is_shortened(fit: Fit, stage: GPDiTStage, write_shards: Any, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", {("train", "video", (1, 2, 2)): 20}).directory
    data = LatentDataModule(videos=SourceConfig([str(shards)], batch_size=20))
    with pytest.raises(NonFiniteError, match=r"\w \.\.\.; inspect them") as caught:
        fit(stage, data, tmp_path, 1, [Health(), BreakGradient(0, NAN)])
    assert len(named(str(caught.value).replace(" ...", ""))) == 16


@pytest.mark.parametrize(("row", "key"), [(0, "a"), (1, "a"), (2, "b"), (3, "c"), (4, "b"), (5, "c")])
def test_losses_of_noisy_copies_have_the_keys_of_their_clips(row: int, key: str) -> None:
    """Two copies of a clip with context, then twice the two without."""
    latents, losses = torch.zeros(3, 2, 4, 2, 2), torch.ones(6)
    batch = LatentBatch(latents, torch.zeros(6, 2, 4, 2, 2), torch.zeros(6, 2), 1, 1.0, "videos", ["a", "b", "c"])
    losses[row] = NAN
    health = Health()
    health.skipped = health._measured = True
    trainer: Any = SimpleNamespace(global_step=1, world_size=1)
    with pytest.raises(NonFiniteError) as caught:
        health.on_train_batch_end(trainer, None, {"per_clip": losses}, batch, 0)  # type: ignore[arg-type]
    assert named(str(caught.value)) == [key]


def test_errors_of_health_are_input_errors() -> None:
    assert issubclass(NonFiniteError, InputError)
    assert issubclass(DamagedDataError, InputError)


@pytest.mark.timeout(60)
def test_a_rank_names_the_samples_of_all_ranks(fit: Fit, stage: GPDiTStage, tiny_shards: Path, tmp_path: Path) -> None:
    if torch.cuda.is_initialized():
        pytest.skip("a process that uses CUDA cannot fork")

    class RecordedHealth(Health):
        def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:  # type: ignore[override]
            try:
                super().on_train_batch_end(trainer, *arguments)
            except NonFiniteError as error:
                (tmp_path / f"rank-{trainer.global_rank}").write_text("\n".join([str(error), *plant.keys]))
                trainer.strategy.barrier()  # the first rank to die takes the other with it
                raise

    data = LatentDataModule(videos=SourceConfig([str(tiny_shards)], batch_size=4), max_ranks=2)
    plant = Plant(NAN, 1, rank=1)
    with pytest.raises(Exception, match="stopped at optimizer step 2"):
        fit(stage, data, tmp_path, 3, [RecordedHealth(), plant], devices=2, strategy="ddp_fork")
    (first,), (second, key) = ((tmp_path / f"rank-{rank}").read_text().splitlines() for rank in (0, 1))
    assert named(first) == named(second) == [key]


# Skipped steps


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_skipped_step_changes_only_the_step_count_and_the_schedule(
    fit: Fit,
    stage: GPDiTStage,
    data: LatentDataModule,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    algorithm: str,
) -> None:
    """Steps 1, 3, 4 and 6 are broken: at most two are consecutive."""
    health, history, plant, ema = Health(max_skips=2), History(), Plant(NAN, 0, 5, 6, 10), EMA(0.5)
    with caplog.at_level(logging.WARNING):
        trainer = fit(
            stage,
            data,
            tmp_path,
            7,
            [health, history, plant, ema],
            gradient_clip_val=0.1,
            gradient_clip_algorithm=algorithm,
        )
    history.note_state()
    assert trainer.global_step == 7
    assert torch.equal(history.weights[1], history.weights[0])
    assert history.optimizer_state[1] == []
    left_out = [step for step in range(2, 8) if history.same_state(step, step - 1)]
    assert left_out == [3, 4, 6]
    assert history.rates == pytest.approx([LEARNING_RATE * min(1, (step + 1) / 5) for step in range(7)])
    assert (health.skipped_steps, health.skipped) == (4, False)
    assert ema.updates == 7
    assert all(values.isfinite().all() for values in ema.average.values())
    messages = [record.getMessage() for record in caplog.records if "was skipped" in record.getMessage()]
    assert [named(message) for message in messages] == [[key] for key in plant.keys]
    assert [re.findall(r"step (\d+) was|(\d+) consecutive", message) for message in messages] == [
        [(str(step), ""), ("", str(row))] for step, row in ((1, 1), (3, 1), (4, 2), (6, 1))
    ]


def test_too_many_consecutive_skips_stop_the_run(
    fit: Fit, stage: GPDiTStage, data: LatentDataModule, tmp_path: Path
) -> None:
    health, history, plant = Health(max_skips=2), History(), Plant(NAN, 2, 4, 6)
    with pytest.raises(NonFiniteError, match=r"optimizer step 4: .* health\.max_skips above 2") as caught:
        fit(stage, data, tmp_path, 9, [health, history, plant])
    history.note_state()
    assert named(str(caught.value)) == plant.keys[2:]
    assert history.same_state(4, 1)
    assert health.skipped_steps == 3


def test_skipped_steps_are_counted_across_a_resume(
    fit: Fit, stage: GPDiTStage, data: LatentDataModule, tiny_config: GPDiTConfig, tmp_path: Path
) -> None:
    fit(stage, data, tmp_path, 3, [Health(max_skips=2), Plant(NAN, 2, 4), EMA(), RunCheckpoint()])
    resumed = Health(max_skips=2)
    with pytest.raises(NonFiniteError, match="stopped at optimizer step 4"):
        fit(
            GPDiTStage(tiny_config, optimizer=OptimizerConfig(LEARNING_RATE, warmup_steps=5)),
            data,
            tmp_path,
            6,
            [resumed, Plant(NAN, 6), EMA(), RunCheckpoint()],
            tmp_path / "checkpoints/last.ckpt",
        )
    assert resumed.skipped_steps == 3


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_overflow_in_fp16_is_handled_by_the_gradient_scaler(
    fit: Fit, stage: GPDiTStage, data: LatentDataModule, tmp_path: Path
) -> None:
    health, history = Health(spike_window=1), History()
    precision = MixedPrecision("16-mixed", "cpu")
    assert precision.scaler is not None
    trainer = fit(stage, data, tmp_path, 4, [health, history, BreakGradient(3, INF)], plugins=[precision])
    assert trainer.global_step == 4
    assert history.same_state(2, 1)
    assert not history.same_state(3, 2)
    assert precision.scaler.get_scale() == 2.0**15
    assert (health.skipped_steps, health.skipped, health.spikes) == (0, False, 0)
    assert math.isfinite(health.mean_norm)


# Damaged samples


DAMAGED = ((0, 1), (0, 3), (1, 2), (2, 0))


class Damaged:
    """Twelve clips in shards of five, four of them damaged; three steps of two micro-batches are an epoch."""

    def __init__(self, fit: Fit, config: GPDiTConfig, manifest: Manifest) -> None:
        self.names = {damage(manifest, shard, number) for shard, number in DAMAGED}
        self.fit, self.config, self.manifest = fit, config, manifest

    def run(
        self, folder: Path, max_steps: int, health: Health, *callbacks: Callback, resume: bool = False, **settings: Any
    ) -> Health:
        torch.manual_seed(0)
        stage = GPDiTStage(self.config, optimizer=OptimizerConfig(LEARNING_RATE))
        videos = SourceConfig([str(self.manifest.directory)], batch_size=4, micro_batches=MICRO_BATCHES)
        data = LatentDataModule(videos=videos, max_ranks=2)
        last = folder / "checkpoints/last.ckpt" if resume else None
        self.fit(
            stage, data, folder, max_steps, [health, *callbacks, EMA(), RunCheckpoint(every_steps=1)], last, **settings
        )
        return health


@pytest.fixture
def damaged(fit: Fit, tiny_config: GPDiTConfig, write_shards: Callable[..., Manifest], tmp_path: Path) -> Damaged:
    return Damaged(fit, tiny_config, write_shards(tmp_path / "shards", {("train", "video", (2, 4, 4)): 12}))


def test_a_run_tolerates_the_maximum_number_of_damaged_samples(
    damaged: Damaged, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        health = damaged.run(tmp_path, 9, Health(max_damaged_samples=4))
    assert set(health.damaged) == damaged.names
    assert len(health.damaged) == 4
    messages = [message for message in caplog.messages if "damaged training samples so far" in message]
    assert "replaced by others: 4 (health.max_damaged_samples: 4)" in messages[-1]
    assert all(name in messages[-1] for name in damaged.names)


def test_one_more_damaged_sample_stops_the_run_before_the_update(damaged: Damaged, tmp_path: Path) -> None:
    history, health = History(), Health(max_damaged_samples=3)
    with pytest.raises(DamagedDataError, match=r"samples: 4, more than health\.max_damaged_samples = 3 \(sample"):
        damaged.run(tmp_path, 9, health, history)
    steps = len(history.keys)
    assert 1 < steps <= 3  # within the first epoch
    history.note_state()
    assert history.same_state(steps, steps - 1)
    saved = read_checkpoint(tmp_path)
    assert saved["global_step"] == steps - 1
    assert set(health.damaged) == damaged.names


def test_the_message_names_the_first_damaged_samples_and_the_cure(damaged: Damaged, tmp_path: Path) -> None:
    health = Health(max_damaged_samples=0)
    with pytest.raises(InputError, match="copy their shards again, or allow more") as caught:
        damaged.run(tmp_path, 9, health)
    assert health.damaged
    assert all(name in str(caught.value) for name in health.damaged)


def test_damaged_samples_are_counted_across_a_resume(damaged: Damaged, tmp_path: Path) -> None:
    uninterrupted = damaged.run(tmp_path / "uninterrupted", 4, Health())
    damaged.run(tmp_path / "broken", 1, Health())
    resumed = damaged.run(tmp_path / "broken", 4, Health(), resume=True)
    assert resumed.state_dict() == uninterrupted.state_dict()
    assert set(resumed.damaged) == damaged.names


@pytest.mark.timeout(60)
def test_damaged_samples_are_counted_over_ranks_and_stop_all_of_them(damaged: Damaged, tmp_path: Path) -> None:
    if torch.cuda.is_initialized():
        pytest.skip("a process that uses CUDA cannot fork")
    alone = tmp_path / "alone"
    with pytest.raises(DamagedDataError):
        damaged.run(alone, 9, Health(max_damaged_samples=2))

    class RecordedHealth(Health):
        def on_before_optimizer_step(self, trainer: Trainer, *arguments: Any) -> None:  # type: ignore[override]
            own = list(self._newly_damaged)
            try:
                super().on_before_optimizer_step(trainer, *arguments)
            except DamagedDataError as error:
                logged = [trainer.global_step, str(error), self.damaged, own]
                (tmp_path / f"rank-{trainer.global_rank}").write_text(json.dumps(logged))
                trainer.strategy.barrier()  # the first rank to die takes the other with it
                raise

    with pytest.raises(Exception, match=r"more than health\.max_damaged_samples = 2"):
        damaged.run(tmp_path / "two", 9, RecordedHealth(max_damaged_samples=2), devices=2, strategy="ddp_fork")
    (*first, own), (*second, other) = (json.loads((tmp_path / f"rank-{rank}").read_text()) for rank in (0, 1))
    assert first == second
    assert own != other
    assert first[0] == read_checkpoint(alone)["global_step"]


# Norms


def test_the_gradient_norm_is_measured_before_clipping(
    fit: Fit, stage: GPDiTStage, data: LatentDataModule, tmp_path: Path
) -> None:
    health, norms = Health(), GradientNorms()
    fit(stage, data, tmp_path, max_steps=3, callbacks=[health, norms], gradient_clip_val=1e-3)
    assert len(norms.norms) == 3
    assert norms.norms[-1] > 1e-2  # so that clipping would show
    assert health.gradient_norm == pytest.approx(norms.norms[-1], rel=1e-5)


def test_the_mean_norm_is_a_mean_and_later_an_exponential_average(
    fit: Fit, stage: GPDiTStage, data: LatentDataModule, tmp_path: Path
) -> None:
    health, norms = Health(spike_window=3, spike_factor=1e9), GradientNorms()
    fit(stage, data, tmp_path, 5, [health, norms])
    expected = sum(norms.norms[:3]) / 3
    for norm in norms.norms[3:]:
        expected += (norm - expected) / 3
    assert health.mean_norm == pytest.approx(expected, rel=1e-5)


def texts(folder: Path) -> dict[int, str]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tag = "warnings/spike/text_summary"
    if tag not in events.Tags()["tensors"]:
        return {}
    return {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)}


class Spikes:
    """Runs of the same training with planted spikes in steps 3 and 6; the mean norm is over 4 steps."""

    def __init__(self, fit: Fit, config: GPDiTConfig, data: LatentDataModule) -> None:
        self.fit, self.config, self.data = fit, config, data

    def run(
        self, folder: Path, max_steps: int, resume_from: Path | None = None, spike_factor: float = 5.0
    ) -> tuple[Health, list[str]]:
        torch.manual_seed(0)
        stage = GPDiTStage(self.config, optimizer=OptimizerConfig(1e-5))
        health, plant = Health(spike_factor=spike_factor, spike_window=4), Plant(1e3, 5, 11)
        logger = TensorBoardLogger(folder, name="", version="tensorboard")
        self.fit(
            stage, self.data, folder, max_steps, [health, plant, EMA(), RunCheckpoint()], resume_from, logger=logger
        )
        return health, plant.keys


@pytest.fixture
def spikes(fit: Fit, tiny_config: GPDiTConfig, tiny_shards: Path) -> Spikes:
    videos = SourceConfig([str(tiny_shards)], batch_size=8, micro_batches=MICRO_BATCHES)
    return Spikes(fit, tiny_config, LatentDataModule(videos=videos))


def test_a_spike_is_logged_with_the_clip_of_the_largest_loss(
    spikes: Spikes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The one in step 3 comes before the window of the mean is full."""
    with caplog.at_level(logging.WARNING):
        health, keys = spikes.run(tmp_path, 8)
    messages = [record.getMessage() for record in caplog.records if "gradient norm" in record.getMessage()]
    assert texts(tmp_path) == {6: messages[0]}
    assert len(messages) == health.spikes == 1
    logged = re.search(r"step 6 .* norm of ([\d.e+]+) where the mean is ([\d.e+]+);.*losses: ([^ ]+) \(", messages[0])
    assert logged
    assert float(logged[1]) > 5 * float(logged[2])
    assert logged[3] == keys[1]
    assert messages[0].count("(") == 4  # of eight


def test_a_resumed_run_logs_the_same_spikes(spikes: Spikes, tmp_path: Path) -> None:
    """Interrupted after step 3: a mean that starts over would have no full window in step 6."""
    uninterrupted, _ = spikes.run(tmp_path / "uninterrupted", 8)
    spikes.run(tmp_path / "broken", 3)
    resumed, _ = spikes.run(tmp_path / "broken", 8, tmp_path / "broken/checkpoints/last.ckpt")
    assert resumed.state_dict() == uninterrupted.state_dict()
    assert resumed.spikes == 1
    assert texts(tmp_path / "broken") == texts(tmp_path / "uninterrupted")


def test_spike_factor_zero_logs_no_spikes(spikes: Spikes, tmp_path: Path) -> None:
    health, _ = spikes.run(tmp_path, 6, spike_factor=0)
    assert health.spikes == 0
    assert texts(tmp_path) == {}


def test_a_spike_does_not_hide_the_next_and_a_lasting_norm_becomes_the_mean() -> None:
    health = Health(spike_factor=2, spike_window=10)
    health._losses_by_key = lambda: []  # type: ignore[method-assign]
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_progress_bar=False)
    for norms, spikes, usual in (([1.0] * 20, 0, 1.0), ([1e3, 1.0, 10.0], 2, 1.2), ([10.0] * 60, 17, 10.0)):
        for norm in norms:
            health.gradient_norm = norm
            health._update_mean_norm(trainer)
        assert health.spikes == spikes
        assert health.mean_norm == pytest.approx(usual, rel=0.05)


# Reading from the device


class Reads(TorchFunctionMode):
    """Counts operations that wait for the values of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in {
            *("item", "tolist", "numpy", "cpu", "equal", "allclose", "is_nonzero", "nonzero"),
            *("__float__", "__int__", "__bool__", "__index__", "__array__", "__format__", "__repr__"),
        }:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def watched(reads: Reads, **options: Any) -> Health:
    """A Health whose reads are counted by `reads`."""

    def under(hook: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            with reads:
                hook(*arguments)

        return run

    health = Health(**options)
    for name in ("on_before_backward", "on_before_optimizer_step", "on_train_batch_end"):
        setattr(health, name, under(getattr(health, name)))
    return health


def test_the_counter_detects_reads() -> None:
    reads, tensor = Reads(), torch.tensor(2.0)
    with reads:
        _ = (float(tensor), tensor.item(), tensor.tolist(), bool(tensor > 1), tensor.cpu(), torch.equal(tensor, tensor))
    assert len(reads.names) == 6


def test_a_step_reads_from_the_device_once(fit: Fit, stage: GPDiTStage, data: LatentDataModule, tmp_path: Path) -> None:
    reads = Reads()
    fit(stage, data, tmp_path, 5, [watched(reads, spike_window=2)])
    assert reads.names == ["tolist"] * 5


def test_counting_damaged_samples_adds_no_read(damaged: Damaged, tmp_path: Path) -> None:
    reads = Reads()
    assert damaged.run(tmp_path, 5, watched(reads)).damaged
    assert reads.names == ["tolist"] * 5


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_skips": -1}, r"health\.max_skips is -1"),
        ({"spike_factor": 1.0}, r"health\.spike_factor is 1\.0; it must be above 1, or 0"),
        ({"spike_factor": NAN}, r"health\.spike_factor is nan"),
        ({"spike_window": 0}, r"health\.spike_window is 0"),
        ({"max_damaged_samples": -1}, r"health\.max_damaged_samples is -1"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Health(**settings)
