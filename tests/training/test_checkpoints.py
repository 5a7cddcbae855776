import dataclasses
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor

from gpdit_lightning import GPDiTConfig
from gpdit_lightning.data.datamodule import LatentDataModule, SourceConfig
from gpdit_lightning.diffusion import NoiseSchedule
from gpdit_lightning.errors import InputError
from gpdit_lightning.stages import GPDiTStage
from gpdit_lightning.training.checkpoints import (
    RunCheckpoint,
    backbone_weights,
    check_architecture,
    last_checkpoint,
    load_trained_model,
    read_checkpoint,
)
from gpdit_lightning.training.ema import EMA
from gpdit_lightning.training.optimizer import OptimizerConfig

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
    """A copy of the run's last checkpoint, to be spoiled."""
    copy = tmp_path / "copy.ckpt"
    copy.write_bytes((run[0] / "checkpoints/last.ckpt").read_bytes())
    return copy


def edited(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


class PretendTrainer(SimpleNamespace):
    """A trainer that saves its step in a file; with `breaks` it dies half-way through the file."""

    def __init__(self, folder: Path) -> None:
        strategy = SimpleNamespace(barrier=lambda: None)
        super().__init__(
            global_step=0, max_steps=10, default_root_dir=str(folder), is_global_zero=True, strategy=strategy
        )
        self.saves: list[int] = []
        self.breaks = False

    def save_checkpoint(self, path: Path, weights_only: bool) -> None:
        Path(path).write_text("half a")
        if self.breaks:
            raise OSError("no space left on device")
        Path(path).write_text(f"step {self.global_step}")
        self.saves.append(self.global_step)

    def micro_batches(self, checkpoint: RunCheckpoint, steps: int, accumulated: int = 1) -> None:
        checkpoint.on_train_start(self, None)  # type: ignore[arg-type]
        for _ in range(steps):
            for within in range(accumulated):
                self.global_step += within == accumulated - 1
                checkpoint.on_train_batch_end(self, None)  # type: ignore[arg-type]


# Saving


def test_a_run_leaves_its_last_checkpoint_and_the_kept_ones(run: tuple[Path, GPDiTStage, EMA]) -> None:
    names = sorted(path.name for path in (run[0] / "checkpoints").iterdir())
    assert names == ["last.ckpt", "step-2.ckpt", "step-4.ckpt"]
    assert read_checkpoint(run[0])["global_step"] == 5
    assert read_checkpoint(run[0] / "checkpoints/step-2.ckpt")["global_step"] == 2
    assert last_checkpoint(run[0]) == run[0] / "checkpoints/last.ckpt"


def test_every_interval_and_the_end_are_saved_once(tmp_path: Path) -> None:
    trainer = PretendTrainer(tmp_path)
    trainer.micro_batches(RunCheckpoint(every_steps=4), steps=10, accumulated=3)
    assert trainer.saves == [4, 8, 10]


def test_a_resumed_run_does_not_save_again_what_it_began_from(tmp_path: Path) -> None:
    trainer = PretendTrainer(tmp_path)
    trainer.global_step = 4
    trainer.micro_batches(RunCheckpoint(every_steps=2), steps=2, accumulated=2)
    assert trainer.saves == [6]


def test_a_save_that_breaks_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    trainer, checkpoint = PretendTrainer(tmp_path), RunCheckpoint(every_steps=1, keep_every_steps=1)
    trainer.micro_batches(checkpoint, steps=2)
    trainer.breaks = True
    with pytest.raises(OSError, match="no space left"):
        trainer.micro_batches(checkpoint, steps=1)
    assert (tmp_path / "checkpoints/last.ckpt").read_text() == "step 2"
    assert (tmp_path / "checkpoints/step-1.ckpt").read_text() == "step 1"
    assert not (tmp_path / "checkpoints/step-3.ckpt").exists()
    trainer.breaks = False
    trainer.micro_batches(checkpoint, steps=1)  # what is left of the broken one is in nobody's way
    assert (tmp_path / "checkpoints/last.ckpt").read_text() == "step 4"


def test_there_is_no_last_checkpoint_before_the_first(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt.partial").write_text("half a")
    assert last_checkpoint(tmp_path) is None


@pytest.mark.parametrize(("every", "keep"), [(0, 0), (-1, 0), (10, 25), (10, 5)])
def test_intervals_that_make_no_sense_are_refused(every: int, keep: int) -> None:
    with pytest.raises(InputError, match=r"checkpoint\.every_steps is"):
        RunCheckpoint(every, keep)


# Resuming


def test_a_resumed_run_ends_as_an_unbroken_one(
    run: tuple[Path, GPDiTStage, EMA], tiny_shards: Path, tiny_config: GPDiTConfig, fit: Fit, tmp_path: Path
) -> None:
    resumed, ema = stage_of(tiny_config), EMA(0.5)
    start = run[0] / "checkpoints/step-2.ckpt"
    trainer = fit(resumed, data_of(tiny_shards), tmp_path, 5, [ema, RunCheckpoint()], start)
    assert trainer.global_step == 5
    unbroken = read_checkpoint(run[0])
    again = read_checkpoint(tmp_path)
    assert_same(again["state_dict"], unbroken["state_dict"])
    assert_same(again["ema"]["weights"], unbroken["ema"]["weights"])
    assert again["optimizer_states"][0]["param_groups"] == unbroken["optimizer_states"][0]["param_groups"]
    for number, moments in unbroken["optimizer_states"][0]["state"].items():
        assert_same(again["optimizer_states"][0]["state"][number], moments)


def test_resuming_with_another_architecture_is_refused(
    run: tuple[Path, GPDiTStage, EMA], tiny_shards: Path, tiny_config: GPDiTConfig, fit: Fit, tmp_path: Path
) -> None:
    other = stage_of(tiny_config.replaced(mlp_width=32))
    with pytest.raises(InputError, match="mlp_width = 24, but this one has 32"):
        fit(other, data_of(tiny_shards), tmp_path, 6, [EMA()], run[0] / "checkpoints/last.ckpt")


# Reading


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.ckpt", tmp_path):
        with pytest.raises(InputError, match="there is no checkpoint at"):
            read_checkpoint(path)


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_torn_file_is_refused(checkpoint: Path, kept: float) -> None:
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(InputError, match=r"copy\.ckpt is not a whole checkpoint"):
        read_checkpoint(checkpoint)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    text, archive, tensors, values = (tmp_path / name for name in ("text", "archive", "tensors", "values"))
    text.write_text("seed: 0\n")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", "a")
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, tensors)
    torch.save([1, 2], values)
    for path, message in (
        (text, "is not a whole checkpoint"),
        (archive, "cannot be read as a checkpoint"),
        (tensors, "is not a checkpoint of gpdit_lightning"),
        (values, "is not a checkpoint of gpdit_lightning"),
    ):
        with pytest.raises(InputError, match=f"{path.name} {message}"):
            read_checkpoint(path)


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_a_malicious_pickle_is_not_executed(tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "last.ckpt"
    pickle.loads(pickle.dumps(Malicious(trace)))  # it would work
    assert trace.exists()
    trace.unlink()
    torch.save({"gpdit": Malicious(trace), "state_dict": {}}, path)
    for read in (read_checkpoint, load_trained_model):
        with pytest.raises(InputError, match=r"last\.ckpt cannot be read as a checkpoint"):
            read(path)
    assert not trace.exists()


# The model in it


def test_the_average_is_loaded_unless_the_trained_weights_are_asked_for(run: tuple[Path, GPDiTStage, EMA]) -> None:
    folder, stage, ema = run
    averaged, trained = load_trained_model(folder), load_trained_model(folder, weights="raw")
    assert_same(dict(trained.backbone.named_parameters()), dict(stage.backbone.named_parameters()))
    assert_same({f"backbone.{name}": p for name, p in averaged.backbone.named_parameters()}, ema.average)
    name, parameter = next(iter(averaged.backbone.named_parameters()))
    assert not torch.equal(parameter, dict(trained.backbone.named_parameters())[name])


def test_a_trained_model_knows_its_data(run: tuple[Path, GPDiTStage, EMA], tiny_shards: Path) -> None:
    folder, stage, _ = run
    model = load_trained_model(folder)
    data = data_of(tiny_shards)
    assert (model.step, model.geometry, model.codec) == (5, data.geometry, data.codec)
    assert NoiseSchedule(**model.schedule) == NoiseSchedule(shift=2.0)
    assert model.backbone.config == stage.config
    assert not model.backbone.training
    assert not any(parameter.is_meta for parameter in model.backbone.parameters())


def test_without_an_average_the_trained_weights_are_loaded(checkpoint: Path) -> None:
    edited(checkpoint, lambda content: content.pop("ema"))
    content = read_checkpoint(checkpoint)
    assert_same(backbone_weights(content, "ema"), backbone_weights(content, "raw"))
    load_trained_model(checkpoint)


def test_a_stage_begins_with_the_averaged_weights_of_another_run(
    run: tuple[Path, GPDiTStage, EMA], tiny_config: GPDiTConfig
) -> None:
    next_stage = stage_of(tiny_config.replaced(activation_checkpointing=True), initial_weights=str(run[0]))
    next_stage.configure_model()
    assert_same(dict(next_stage.named_parameters()), run[2].average)


@pytest.mark.parametrize(
    ("field", "value"), [("layers", 3), ("attention", "of"), ("time_site", "input"), ("rope_lengths", (32, 32, 16))]
)
def test_another_architecture_is_refused_by_the_field_that_differs(
    run: tuple[Path, GPDiTStage, EMA], tiny_config: GPDiTConfig, field: str, value: Any
) -> None:
    other = tiny_config.replaced(**{field: value})
    theirs = getattr(tiny_config, field)
    stage = stage_of(other, initial_weights=str(run[0]))
    with pytest.raises(InputError) as caught:
        stage.configure_model()
    assert f"{run[0]} holds a model with {field} = {theirs}, but this one has {value}" in str(caught.value)


def test_how_a_model_is_executed_may_differ(tiny_config: GPDiTConfig) -> None:
    saved = dataclasses.asdict(tiny_config) | {"activation_checkpointing": True, "attention_backend": "sdpa"}
    check_architecture(saved, tiny_config, "here")


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, values in second.items():
        assert torch.equal(first[name], values), name
