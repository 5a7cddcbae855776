import dataclasses
import errno
import os
import pickle
import resource
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from torch import Tensor

from gpdit_lightning import GPDiTConfig
from gpdit_lightning.checkpoints.files import last_checkpoint, open_checkpoint
from gpdit_lightning.checkpoints.io import FolderCheckpointIO
from gpdit_lightning.checkpoints.reading import load_trained_model
from gpdit_lightning.data.datamodule import LatentDataModule, SourceConfig
from gpdit_lightning.diffusion import NoiseSchedule
from gpdit_lightning.errors import InputError
from gpdit_lightning.signals import SIGNALS
from gpdit_lightning.stages import GPDiTStage
from gpdit_lightning.stages.agreement import check_architecture
from gpdit_lightning.training.callbacks.ema import EMA
from gpdit_lightning.training.callbacks.run_checkpoint import RunCheckpoint
from gpdit_lightning.training.optimizer import OptimizerConfig
from tests.checkpoints.content import read_checkpoint

Fit = Callable[..., Trainer]


def stage_of(config: GPDiTConfig, **settings: Any) -> GPDiTStage:
    torch.manual_seed(0)
    optimizer = OptimizerConfig(learning_rate=0.03, warmup_steps=3, decay="cosine")
    return GPDiTStage(config, NoiseSchedule(shift=2.0), optimizer, **settings)


def data_of(shards: Path) -> LatentDataModule:
    """Two micro-batches in every optimizer step."""
    return LatentDataModule(videos=SourceConfig([str(shards)], batch_size=4, micro_batches=2))


@pytest.fixture(scope="module")
def run(
    tiny_shards: Path, tiny_config: GPDiTConfig, fit: Fit, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, GPDiTStage, EMA]:
    """A run of 5 steps: its folder, the stage and the average as they ended. Do not change the folder."""
    folder = tmp_path_factory.mktemp("run")
    stage, ema = stage_of(tiny_config), EMA(0.5)
    fit(stage, data_of(tiny_shards), folder, 5, [ema, RunCheckpoint(every_steps=2, keep_every_steps=2)])
    return folder, stage, ema


@pytest.fixture
def checkpoint(run: tuple[Path, GPDiTStage, EMA], tmp_path: Path) -> Path:
    """A copy of the run's last checkpoint, for tests that damage it."""
    copy = tmp_path / "copy.ckpt"
    shutil.copytree(run[0] / "checkpoints/last.ckpt", copy)
    return copy


def edited(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    content = torch.load(path / "training.ckpt", weights_only=True)
    change(content)
    torch.save(content, path / "training.ckpt")
    return path


class PretendTrainer(SimpleNamespace):
    """A trainer that saves its step in a file; with `breaks` the disk is full after half of the file."""

    def __init__(self, folder: Path, validate_every: int = 0) -> None:
        strategy = SimpleNamespace(barrier=lambda: self.events.append("barrier"), broadcast=lambda failure: failure)
        super().__init__(
            global_step=0,
            max_steps=10,
            should_stop=False,
            sanity_checking=False,
            default_root_dir=str(folder),
            is_global_zero=True,
            world_size=1,
            strategy=strategy,
            loggers=[],
        )
        self.validate_every, self.batches = validate_every, 0
        epoch_loop = SimpleNamespace(_should_check_val_fx=self.validation_is_due, val_loop=SimpleNamespace(skip=False))
        self.fit_loop = SimpleNamespace(epoch_loop=epoch_loop, _data_fetcher=object())
        self.events: list[str] = []
        self.breaks = False

    @property
    def saves(self) -> list[int]:
        return [int(event.removeprefix("save ")) for event in self.events if event.startswith("save")]

    def validation_is_due(self, fetcher: object) -> bool:
        return self.validate_every > 0 and self.batches % self.validate_every == 0

    def save_checkpoint(self, path: Path, weights_only: bool) -> None:
        Path(path).write_text("half a")
        if self.breaks:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        Path(path).write_text(f"step {self.global_step}")
        self.events.append(f"save {self.global_step}")

    def train(self, checkpoint: RunCheckpoint, steps: int, accumulated: int = 1) -> None:
        checkpoint.on_fit_start(self, None)  # type: ignore[arg-type]
        checkpoint.on_train_start(self, None)  # type: ignore[arg-type]
        for _ in range(steps):
            for within in range(accumulated):
                self.batches += 1
                self.global_step += within == accumulated - 1
                checkpoint.on_train_batch_end(self, None)  # type: ignore[arg-type]
                if self.validation_is_due(None):
                    self.events.append("validation")
                    checkpoint.on_validation_end(self, None)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """Restores the handlers, as Lightning would."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)


# When


def test_a_run_keeps_its_last_checkpoints_and_the_milestones(run: tuple[Path, GPDiTStage, EMA]) -> None:
    names = {path.name for path in (run[0] / "checkpoints").iterdir()}
    assert names == {"last.ckpt"} | {f"step-{n}.ckpt{mark}" for n in (2, 4, 5) for mark in ("", ".complete")}
    assert read_checkpoint(run[0])["global_step"] == 5
    assert read_checkpoint(run[0] / "checkpoints/last.ckpt")["global_step"] == 5
    assert read_checkpoint(run[0] / "checkpoints/step-2.ckpt")["global_step"] == 2
    assert last_checkpoint(run[0], verify=True) == run[0] / "checkpoints/step-5.ckpt"


def test_each_interval_and_the_last_step_are_saved_once(tmp_path: Path) -> None:
    trainer = PretendTrainer(tmp_path)
    trainer.train(RunCheckpoint(every_steps=4), steps=10, accumulated=3)
    assert trainer.saves == [4, 8, 10]


def test_milestones_are_saved(tmp_path: Path) -> None:
    trainer = PretendTrainer(tmp_path)
    trainer.train(RunCheckpoint(every_steps=4, keep_last=1, keep_every_steps=3), steps=10)
    assert trainer.saves == [3, 4, 6, 8, 9, 10]
    assert {path.name for path in (tmp_path / "checkpoints").glob("step-*.ckpt")} == {
        f"step-{step}.ckpt" for step in (3, 6, 9, 10)
    }


def test_a_training_that_stops_early_is_saved(tmp_path: Path) -> None:
    """By trainer.max_time, for one."""
    trainer, checkpoint = PretendTrainer(tmp_path), RunCheckpoint(every_steps=100)
    trainer.train(checkpoint, steps=2)
    trainer.should_stop = True
    trainer.train(checkpoint, steps=1)
    assert trainer.saves == [3]


def test_minutes_count_from_the_last_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = PretendTrainer(tmp_path)
    # A step takes a minute.
    monkeypatch.setattr(
        "gpdit_lightning.training.callbacks.run_checkpoint.time.monotonic", lambda: 60.0 * trainer.global_step
    )
    trainer.train(RunCheckpoint(every_steps=5, every_minutes=3), steps=9)
    assert trainer.saves == [3, 5, 8]
    trainer = PretendTrainer(tmp_path / "steps alone")
    trainer.train(RunCheckpoint(every_steps=5), steps=9)
    assert trainer.saves == [5]


def test_all_ranks_save_by_the_clock_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one small reduction per step."""
    trainer = PretendTrainer(tmp_path)
    trainer.world_size, trainer.is_global_zero = 2, False
    (tmp_path / "checkpoints").mkdir()  # by the first rank
    first_rank = torch.tensor([0, 0, 0])
    trainer.strategy.root_device = torch.device("cpu")
    monkeypatch.setattr(
        "gpdit_lightning.training.reduction.reduce_over_ranks",
        lambda mine, operation: {"max": torch.maximum}[operation](mine, first_rank),
    )
    monkeypatch.setattr(
        "gpdit_lightning.training.callbacks.run_checkpoint.time.monotonic", lambda: 600.0 * trainer.global_step
    )
    checkpoint = RunCheckpoint(every_minutes=1)
    trainer.train(checkpoint, steps=2)
    assert trainer.saves == []
    first_rank[1] = 1
    trainer.train(checkpoint, steps=1)
    assert trainer.saves == [3]


def test_a_save_waits_for_the_validation_of_its_step(tmp_path: Path) -> None:
    trainer = PretendTrainer(tmp_path, validate_every=6)
    trainer.train(RunCheckpoint(every_steps=1), steps=4, accumulated=3)
    assert trainer.events == ["save 1", "validation", "save 2", "save 3", "validation", "save 4"]


def test_a_validation_within_a_step_saves_nothing(tmp_path: Path) -> None:
    trainer = PretendTrainer(tmp_path, validate_every=2)
    trainer.train(RunCheckpoint(every_steps=1), steps=2, accumulated=3)
    assert trainer.events == ["validation", "save 1", "validation", "validation", "save 2"]


def test_a_resumed_run_does_not_save_its_first_step_again(tmp_path: Path) -> None:
    trainer = PretendTrainer(tmp_path)
    trainer.global_step = 4
    trainer.train(RunCheckpoint(every_steps=2), steps=2, accumulated=2)
    assert trainer.saves == [6]


@pytest.mark.parametrize(
    ("setting", "value"), [("every_steps", 0), ("every_minutes", -1), ("keep_last", 0), ("keep_every_steps", -5)]
)
def test_invalid_intervals_are_refused(setting: str, value: int) -> None:
    with pytest.raises(InputError, match=rf"checkpoint\.{setting} is {value}; it must be at least"):
        RunCheckpoint(**{setting: value})


class Validations(Callback):
    """Records the steps at which the run was validated and saved."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.events.append(f"validated {trainer.global_step}")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.events.append(f"saved {trainer.global_step}")


@pytest.mark.parametrize("stood_at", [1, 2, 4])
def test_validations_come_before_saves_and_are_not_repeated(
    tiny_shards: Path, tiny_config: GPDiTConfig, fit: Fit, tmp_path: Path, stood_at: int
) -> None:
    """Every second step, before it is saved; a resumed run neither repeats nor leaves out a validation."""
    settings = {"val_check_interval": 4, "limit_val_batches": 1}  # of two micro-batches a step
    uninterrupted, after = Validations(), Validations()
    every = RunCheckpoint(every_steps=1, keep_every_steps=1)
    fit(stage_of(tiny_config), data_of(tiny_shards), tmp_path / "a", 5, [uninterrupted, EMA(), every], **settings)
    saves = [f"saved {step}" for step in range(1, 6)]
    assert uninterrupted.events == [*saves[:1], "validated 2", *saves[1:3], "validated 4", *saves[3:]]
    start = tmp_path / f"a/checkpoints/step-{stood_at}.ckpt"
    callbacks = [after, EMA(), RunCheckpoint(every_steps=1)]
    fit(stage_of(tiny_config), data_of(tiny_shards), tmp_path / "b", 5, callbacks, start, **settings)
    assert after.events == uninterrupted.events[uninterrupted.events.index(f"saved {stood_at}") + 1 :]
    assert_same(read_checkpoint(tmp_path / "b")["state_dict"], read_checkpoint(tmp_path / "a")["state_dict"])


# Where it cannot be written


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    trainer, checkpoint = PretendTrainer(tmp_path), RunCheckpoint(every_steps=1)
    trainer.train(checkpoint, steps=2)
    before = set((tmp_path / "checkpoints").iterdir())
    trainer.breaks = True
    with pytest.raises(InputError) as caught:
        trainer.train(checkpoint, steps=1)
    assert trainer.events[-1] == "barrier"  # where the other ranks wait
    path = tmp_path / "checkpoints/step-3.ckpt"
    assert f"the checkpoint of step 3 could not be written to {path} (No space left on device)" in str(caught.value)
    assert "step-2.ckpt is complete" in str(caught.value)
    assert set(path.parent.iterdir()) == before
    assert last_checkpoint(tmp_path, verify=True) == path.with_name("step-2.ckpt")
    trainer.breaks = False
    trainer.train(checkpoint, steps=1)
    assert last_checkpoint(tmp_path, verify=True) == path.with_name("step-4.ckpt")


@pytest.mark.parametrize("call", ["fsync", "replace", "symlink"])
def test_a_failure_of_the_mark_or_the_link_leaves_the_previous_checkpoint(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it writes the completion mark or the link."""
    trainer, checkpoint = PretendTrainer(tmp_path), RunCheckpoint(every_steps=1)
    trainer.train(checkpoint, steps=2)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(
            InputError, match=r"step 3 could not be .* \(Input/output error\): .*step-2.ckpt is complete"
        ):
            trainer.train(checkpoint, steps=1)
    assert last_checkpoint(tmp_path, verify=True) == tmp_path / "checkpoints/step-2.ckpt"
    trainer.train(checkpoint, steps=1)
    assert last_checkpoint(tmp_path, verify=True) == tmp_path / "checkpoints/step-4.ckpt"


def test_a_failure_of_the_first_checkpoint_reports_that_there_is_none(tmp_path: Path) -> None:
    trainer = PretendTrainer(tmp_path)
    trainer.breaks = True
    with pytest.raises(InputError, match="there is no checkpoint yet"):
        trainer.train(RunCheckpoint(every_steps=1), steps=1)


def test_other_ranks_exit_with_status_zero_if_the_first_cannot_write(tmp_path: Path) -> None:
    """With another status Lightning's launcher would kill the first rank before it prints its message."""
    trainer = PretendTrainer(tmp_path)
    trainer.is_global_zero = False
    trainer.strategy.broadcast = lambda failure: "the disk is full"
    with pytest.raises(SystemExit) as caught:
        RunCheckpoint().on_fit_start(trainer, None)  # type: ignore[arg-type]
    assert caught.value.code == 0


@pytest.mark.parametrize("place", ["a file", "/proc/nowhere"])
def test_a_folder_that_is_not_writable_is_reported_before_training(tmp_path: Path, place: str) -> None:
    (tmp_path / "a file").write_text("")
    run_dir = tmp_path / place
    with pytest.raises(InputError, match=f"no checkpoint can be saved in {run_dir}/checkpoints"):
        PretendTrainer(run_dir).train(RunCheckpoint(), steps=1)


def test_torch_save_raises_the_error_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpdit_lightning.checkpoints.io.TRAINING", "/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        FolderCheckpointIO().save_checkpoint({"weight": torch.zeros(100_000)}, tmp_path / "full")
    with pytest.raises(FileExistsError):
        FolderCheckpointIO().save_checkpoint({"weight": torch.zeros(1)}, tmp_path)


class SmallDisk(Callback):
    """From a step on, files cannot grow beyond 10 kB."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_run_resumes_after_a_save_that_failed(
    run: tuple[Path, GPDiTStage, EMA], tiny_shards: Path, tiny_config: GPDiTConfig, fit: Fit, tmp_path: Path
) -> None:
    """It ends like an uninterrupted run."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    callbacks = [SmallDisk(3), EMA(0.5), RunCheckpoint(every_steps=1)]
    try:
        with pytest.raises(InputError, match=r"step 4 could not be .* \(File too large\): .*step-3.ckpt is complete"):
            fit(stage_of(tiny_config), data_of(tiny_shards), tmp_path, 5, callbacks)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    last = last_checkpoint(tmp_path, verify=True)
    assert last == tmp_path / "checkpoints/step-3.ckpt"
    assert not list(last.parent.glob("*.partial"))
    fit(stage_of(tiny_config), data_of(tiny_shards), tmp_path, 5, [EMA(0.5), RunCheckpoint()], last)
    assert_same(read_checkpoint(tmp_path)["state_dict"], read_checkpoint(run[0])["state_dict"])


# Resuming


def test_a_resumed_run_ends_bit_equal(
    run: tuple[Path, GPDiTStage, EMA], tiny_shards: Path, tiny_config: GPDiTConfig, fit: Fit, tmp_path: Path
) -> None:
    resumed, ema = stage_of(tiny_config), EMA(0.5)
    start = run[0] / "checkpoints/step-2.ckpt"
    trainer = fit(resumed, data_of(tiny_shards), tmp_path, 5, [ema, RunCheckpoint()], start)
    assert trainer.global_step == 5
    uninterrupted = read_checkpoint(run[0])
    again = read_checkpoint(tmp_path)
    assert_same(again["state_dict"], uninterrupted["state_dict"])
    assert_same(again["ema"]["weights"], uninterrupted["ema"]["weights"])
    assert again["optimizer_states"][0]["param_groups"] == uninterrupted["optimizer_states"][0]["param_groups"]
    for number, state in uninterrupted["optimizer_states"][0]["state"].items():
        assert_same(again["optimizer_states"][0]["state"][number], state)


def test_resuming_with_another_architecture_is_refused(
    run: tuple[Path, GPDiTStage, EMA], tiny_shards: Path, tiny_config: GPDiTConfig, fit: Fit, tmp_path: Path
) -> None:
    other = stage_of(tiny_config.replaced(mlp_width=32))
    with pytest.raises(InputError, match="mlp_width = 24, but this one has 32"):
        fit(other, data_of(tiny_shards), tmp_path, 6, [EMA(), RunCheckpoint()], run[0] / "checkpoints/last.ckpt")


# Reading


def test_a_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.ckpt", tmp_path):
        with pytest.raises(InputError, match="there is no checkpoint at"):
            read_checkpoint(path)


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("name", ["training.ckpt", "ema.safetensors"])
def test_a_truncated_file_is_refused(checkpoint: Path, name: str, kept: float) -> None:
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(InputError, match=rf"copy\.ckpt/{name} is not a complete"):
        read_checkpoint(checkpoint)


def test_a_missing_file_is_refused(checkpoint: Path) -> None:
    assert read_checkpoint(checkpoint / "training.ckpt")["global_step"] == 5  # its folder is meant
    (checkpoint / "ema.safetensors").unlink()
    with pytest.raises(InputError, match=r"copy\.ckpt/ema\.safetensors cannot be read \(No such file"):
        read_checkpoint(checkpoint / "training.ckpt")
    (checkpoint / "training.ckpt").unlink()
    with pytest.raises(InputError, match="there is no checkpoint at"):
        read_checkpoint(checkpoint)


def test_the_average_is_readable_by_safetensors(run: tuple[Path, GPDiTStage, EMA]) -> None:
    """In float32 and complete."""
    found = load_file(run[0] / "checkpoints/last.ckpt/ema.safetensors")
    assert_same(found, run[2].average)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


@pytest.mark.parametrize("name", ["training.ckpt", "ema.safetensors"])
def test_a_file_that_differs_from_its_completion_mark_is_refused(
    name: str, run: tuple[Path, GPDiTStage, EMA], tmp_path: Path
) -> None:
    """A copy without a mark is read."""
    shutil.copytree(run[0] / "checkpoints" / "step-5.ckpt", tmp_path / "step-5.ckpt")
    shutil.copy(run[0] / "checkpoints" / "step-5.ckpt.complete", tmp_path)
    read_checkpoint(tmp_path / "step-5.ckpt")
    with (tmp_path / "step-5.ckpt" / name).open("ab") as file:
        file.write(b"more")
    fault = rf"is not a complete checkpoint \(step-5\.ckpt/{name} has \d+ bytes"
    with pytest.raises(InputError, match=rf"step-5\.ckpt {fault}"):
        read_checkpoint(tmp_path / "step-5.ckpt")
    (tmp_path / "last.ckpt").symlink_to("step-5.ckpt")
    with pytest.raises(InputError, match=rf"step-5\.ckpt {fault}"):
        read_checkpoint(tmp_path / "last.ckpt")


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("text", "archive", "tensors", "values")]
    for folder in folders:
        folder.mkdir()
    text, archive, tensors, values = (folder / "training.ckpt" for folder in folders)
    text.write_text("seed: 0\n")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", "a")
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, tensors)
    torch.save([1, 2], values)
    for path, message in (
        (text, "is not a complete checkpoint"),
        (archive, "cannot be read as a checkpoint"),
        (tensors, "is not a checkpoint of gpdit_lightning"),
        (values, "is not a checkpoint of gpdit_lightning"),
    ):
        with pytest.raises(InputError, match=f"{path} {message}"):
            read_checkpoint(path.parent)


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_a_malicious_pickle_is_not_executed(tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "last.ckpt" / "training.ckpt"
    path.parent.mkdir()
    pickle.loads(pickle.dumps(Malicious(trace)))  # it would work
    assert trace.exists()
    trace.unlink()
    torch.save({"gpdit": Malicious(trace), "state_dict": {}}, path)
    for read in (read_checkpoint, load_trained_model):
        with pytest.raises(InputError, match=r"training\.ckpt cannot be read as a checkpoint"):
            read(path.parent)
    assert not trace.exists()


# The model in it


def test_the_average_is_loaded_unless_the_trained_weights_are_requested(run: tuple[Path, GPDiTStage, EMA]) -> None:
    folder, stage, ema = run
    averaged, trained = load_trained_model(folder), load_trained_model(folder, weights="raw")
    assert_same(dict(trained.backbone.named_parameters()), dict(stage.backbone.named_parameters()))
    assert_same({f"backbone.{name}": p for name, p in averaged.backbone.named_parameters()}, ema.average)
    name, parameter = next(iter(averaged.backbone.named_parameters()))
    assert not torch.equal(parameter, dict(trained.backbone.named_parameters())[name])


def test_a_trained_model_has_the_facts_of_its_data(run: tuple[Path, GPDiTStage, EMA], tiny_shards: Path) -> None:
    folder, stage, _ = run
    model = load_trained_model(folder)
    data = data_of(tiny_shards)
    assert (model.step, model.geometry, model.codec) == (5, data.geometry, data.codec)
    assert model.schedule == NoiseSchedule(shift=2.0)
    assert model.backbone.config == stage.config
    assert not model.backbone.training
    assert not any(parameter.is_meta for parameter in model.backbone.parameters())


def test_without_an_average_the_trained_weights_are_loaded(checkpoint: Path) -> None:
    edited(checkpoint, lambda content: content.pop("ema"))
    found = open_checkpoint(checkpoint)
    average, trained = (
        {name: weight.read() for name, weight in found.stored_weights(kind).items()} for kind in ("ema", "raw")
    )
    assert_same(average, trained)
    load_trained_model(checkpoint)


def test_a_stage_starts_from_the_averaged_weights_of_another_run(
    run: tuple[Path, GPDiTStage, EMA], tiny_config: GPDiTConfig
) -> None:
    next_stage = stage_of(tiny_config.replaced(activation_checkpointing=True), initial_weights=str(run[0]))
    next_stage.configure_model()
    assert_same(dict(next_stage.named_parameters()), run[2].average)


@pytest.mark.parametrize(
    ("field", "value"), [("layers", 3), ("attention", "of"), ("time_site", "input"), ("rope_lengths", (32, 32, 16))]
)
def test_another_architecture_is_refused_with_the_field_that_differs(
    run: tuple[Path, GPDiTStage, EMA], tiny_config: GPDiTConfig, field: str, value: Any
) -> None:
    other = tiny_config.replaced(**{field: value})
    theirs = getattr(tiny_config, field)
    stage = stage_of(other, initial_weights=str(run[0]))
    with pytest.raises(InputError) as caught:
        stage.configure_model()
    assert f"{run[0]} is of a model with {field} = {theirs}, but this one has {value}" in str(caught.value)


def test_execution_options_may_differ(tiny_config: GPDiTConfig) -> None:
    saved = dataclasses.asdict(tiny_config) | {"activation_checkpointing": True, "attention_backend": "sdpa"}
    check_architecture(saved, tiny_config, "here")


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, values in second.items():
        assert torch.equal(first[name], values), name
