"""Training on the simulated device; run by tests/device/test_on_sim.py."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning import Trainer

from gpdit_lightning.cli.fit import fit, validate
from gpdit_lightning.codecs import load_codec
from gpdit_lightning.data.batches import LatentBatch
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.shard_writer import ShardSetWriter
from gpdit_lightning.diffusion import DenoisingLoss
from gpdit_lightning.options.shared import RecipeOptions
from gpdit_lightning.stages import ImageWarmupStage
from gpdit_lightning.training import reduction
from gpdit_lightning.training.callbacks import run_checkpoint
from gpdit_lightning.training.callbacks.health import NonFiniteError
from tests.device.accelerator import SimStrategy, Waits
from tests.device.simulated import recording
from tests.evaluation.scripted import ClipColours
from tests.training.callbacks.test_run_checkpoint import PretendTrainer

LOG_EVERY, SAVE_EVERY, STEPS = 3, 4, 6  # steps 2 and 5 log, validate and save nothing, and 5 follows steps that do
CODEC = load_codec("pca")
SOURCE = {"batch_size": 4}
STAGES: dict[str, dict[str, Any]] = {
    "ImageWarmupStage": {"images": SOURCE | {"micro_batches": 2}},
    "MixedStage": {"images": SOURCE | {"weight": 0.5}, "videos": SOURCE | {"frames": 3}},
    "alternating MixedStage": {"images": SOURCE, "videos": SOURCE | {"frames": 3}, "sampling": "alternate"},
    "LongVideoStage": {"videos": SOURCE | {"least_frames": 2}, "noise_draws": 2},
    "FewShotStage": {"sequences": SOURCE | {"loss_frames": "targets"}},
    "squares GPDiTStage": {"sources": ["images"], "images": SOURCE},
    "chunks GPDiTStage": {"sources": ["videos"], "videos": SOURCE | {"frames": 3}},
}
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "squares ClassificationStage": {"sources": ["images"], "images": SOURCE | {"micro_batches": 2}},
    "chunks ClassificationStage": {"sources": ["videos"], "videos": SOURCE | {"frames": 3}},
}
CLASSIFICATION = {"label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "drop_path": 0.2}
ADALN = {"time_conditioning": "adaln", "target": "epsilon"}
BACKBONES: dict[str, dict[str, Any]] = {
    "squares GPDiTStage": {"block_shape": [1, 2, 2], "patch_size": 1, **ADALN},
    "chunks GPDiTStage": {
        **{"block_shape": [2, 0, 0], "first_block_frames": 1, "causal_in_block": True, "factorized": True},
        **ADALN,
    },
}
BACKBONES |= {name: BACKBONES[name.replace("ClassificationStage", "GPDiTStage")] for name in CLASSIFIERS}


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled latents of all kinds, some held out."""
    folder = tmp_path_factory.mktemp("latents")
    numbers = np.random.default_rng(0)
    with ShardSetWriter(folder, 5) as writer:
        for split, count in (("train", 9), ("validation", 3)):
            for kind, frames in (("image", 1), ("video", 5), ("video", 3), ("sequence", 6)):
                for place in range(count):
                    latent = numbers.normal(size=(frames, CODEC.latent_channels, 4, 4))
                    metadata = {"source": f"{split}-{kind}-{frames}-{place}", "label": "ab"[place % 2]}
                    writer.write(split, kind, latent, metadata)
        shards = writer.close()
    manifest = Manifest(
        folder, CODEC.spec(), shards, {"stride": 3}, validation={"held_out_by": "source"}, labels=("a", "b")
    )
    manifest.save()
    return folder


def run(latents: Path, run_dir: Path, stage: str, **trainer: Any) -> Trainer:
    """Train a small model of a stage with everything that a recipe may use, and return the trainer."""
    sources = (STAGES | CLASSIFIERS).get(stage, {"images": SOURCE})  # custom stages train on images
    content: dict[str, Any] = {
        "run_dir": str(run_dir),
        "seed_everything": 3,
        "model": {
            "class_path": stage.split()[-1],
            "init_args": {
                "backbone": {
                    "size": "tiny",
                    "layers": 2 if stage in CLASSIFIERS else 1,  # stochastic depth never drops the first one
                    "width": 24,
                    "heads": 2,
                    "mlp_width": 48,
                    "classes": 2,
                    "activation_checkpointing": stage == "MixedStage",
                    **BACKBONES.get(stage, {}),
                },
                "schedule": {"name": "linear" if stage in BACKBONES else "cosine"},
                "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
            },
        },
        "data": {
            "max_ranks": 2,
            "context_dropout": 0.25,
            "labels": True,
            "validation_batches": 1,
            **{
                name: {"manifests": [str(latents)], **value} if isinstance(value, dict) else value
                for name, value in sources.items()
            },
        },
        "trainer": {
            "accelerator": "sim",
            "strategy": f"{SimStrategy.__module__}.SimStrategy",
            "callbacks": [{"class_path": f"{Waits.__module__}.Waits"}],
            "max_steps": STEPS,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": LOG_EVERY,
            **trainer,
        },
        "validate_every_steps": SAVE_EVERY,
        "ema": {"decay": 0.5},
        "checkpoint": {"every_steps": SAVE_EVERY},
        "health": {"stall_minutes": 0},
        "preview": {"every_steps": SAVE_EVERY, "clips": 1, "sampler_steps": 1, "context_frames": 1},
        "scores": {
            "every_steps": SAVE_EVERY,
            "clips": 3,
            "chunk": 2,
            "sampler_steps": 1,
            "context_frames": 1,
            "video_network": {"kind": f"{ClipColours.__module__}.ClipColours"},
        },
    }
    if stage in CLASSIFIERS:
        content["model"]["init_args"]["classification"] = CLASSIFICATION
        content["model"]["init_args"]["optimizer"] |= {"layer_decay": 0.5, "decay_vectors": False}
        content["data"]["label_dropout"] = 0.0
        content["preview"], content["scores"] = {}, {}
    path = run_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(content))
    return fit(RecipeOptions(config=[str(path)]))


@pytest.fixture(scope="module")
def of_images(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """The trainer of a run on images."""
    return run(latents, tmp_path_factory.mktemp("images") / "run", "ImageWarmupStage")


def waits_of(trainer: Trainer) -> dict[int, Counter[str]]:
    """Return the waits of each optimizer step."""
    (callback,) = [callback for callback in trainer.callbacks if isinstance(callback, Waits)]
    return callback.of_step


def causes(waits: Counter[str]) -> list[str]:
    """Return the causes of waits without the numbers of lines, once for each wait."""
    return sorted(cause.rpartition(":")[0] for cause in waits.elements())


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_waits_once_per_step(latents: Path, of_images: Trainer, tmp_path: Path, stage: str) -> None:
    """For the loss and the gradient, which are checked before the step is applied."""
    trainer = of_images if stage == "ImageWarmupStage" else run(latents, tmp_path / "run", stage)
    assert {"loss/train", "loss/val"} <= trainer.callback_metrics.keys()
    assert ("scores_vs_decoded/fvd" in trainer.callback_metrics) == ("videos" in STAGES[stage])
    assert all(metric.isfinite() for metric in trainer.callback_metrics.values())
    assert len(list(Path(trainer.default_root_dir, "previews").glob("*.png"))) == 2
    waits = waits_of(trainer)
    for step in (2, 5):
        # A clip length that was not used before needs a table of positions.
        others = [cause for cause in causes(waits[step]) if cause != "copy to the device at model/positions.py"]
        assert others == ["tolist at callbacks/health.py"]
    assert "copy to the CPU at callbacks/metrics.py" in causes(waits[LOG_EVERY])


@pytest.mark.parametrize("stage", CLASSIFIERS)
def test_classification_waits_once_per_step(
    latents: Path, tmp_path: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With mixup, CutMix and stochastic depth, whose random numbers are on the host or come with the batch."""
    trainer = run(latents, tmp_path / "run", stage)
    assert {"loss/train", "loss/val", "val/top1_accuracy", "val/top5_accuracy"} <= trainer.callback_metrics.keys()
    waits = waits_of(trainer)
    for step in (2, 5):
        others = [cause for cause in causes(waits[step]) if cause != "copy to the device at model/positions.py"]
        assert others == ["tolist at callbacks/health.py"]
    capsys.readouterr()
    validate(RecipeOptions(config=[str(tmp_path / "run.yaml")]))
    assert "val/top1_accuracy" in capsys.readouterr().out


def test_a_run_resumes_and_is_validated(
    latents: Path, of_images: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(latents, tmp_path / "run", "ImageWarmupStage", max_steps=SAVE_EVERY)
    resumed = run(latents, tmp_path / "run", "ImageWarmupStage")
    assert sorted(waits_of(resumed)) == [5, 6]
    assert "tolist at callbacks/health.py" in causes(waits_of(resumed)[5])
    for name, weight in of_images.lightning_module.state_dict().items():
        torch.testing.assert_close(resumed.lightning_module.state_dict()[name], weight, rtol=0, atol=0)
    capsys.readouterr()
    validate(RecipeOptions(config=[str(tmp_path / "run.yaml")]))
    assert "loss/val" in capsys.readouterr().out


class DivergingStage(ImageWarmupStage):
    """A stage whose loss is not a number at the third optimizer step."""

    def objective(self, batch: LatentBatch) -> DenoisingLoss:
        """Return the loss of the batch, or NaN."""
        loss = super().objective(batch)
        return loss._replace(mean=loss.mean * math.nan) if self.trainer.global_step == 2 else loss


def test_a_loss_that_is_not_finite_stops_its_own_step(latents: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"training stopped at optimizer step 3: the (loss|gradient)"):
        run(latents, tmp_path / "run", f"{__name__}.DivergingStage")


class Event:
    """Stands for torch's events, which the simulated device lacks."""

    def __init__(self, device: torch.device) -> None:
        self.recorded = False

    def record(self) -> None:
        """Mark the event."""
        self.recorded = True

    def synchronize(self) -> None:
        """Check that the event was marked."""
        assert self.recorded


def test_ranks_agree_on_a_stop_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The maxima over ranks, here this rank and one with (0, 1), are known one step later."""
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(reduction, "reduce_over_ranks", lambda mine, operation: torch.maximum(mine, other_rank))
    other_rank = torch.tensor([0, 1]).to("sim")
    agreement, device = reduction.DelayedMaximum(), torch.device("sim", 0)
    with recording() as record:
        results = [agreement.exchange(values, device) for values in ([0, 0], [15, 0], [0, 0])]
    assert results == [[0, 0], [0, 1], [15, 1]]
    assert not record.waits


@pytest.fixture
def _two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run be the first of two ranks, with communication that returns what was sent."""

    def nothing(*_: Any, **__: Any) -> None:
        pass

    def gather(of_ranks: list[Any], mine: Any, *_: Any, **__: Any) -> None:
        of_ranks[:] = [mine, mine]

    replaced = {"is_initialized": lambda: True, "get_world_size": lambda *_: 2, "get_rank": lambda *_: 0}
    replaced |= {"get_backend": lambda *_: "nccl", "all_gather_object": gather}
    replaced |= dict.fromkeys(("all_reduce", "broadcast", "barrier"), nothing)
    for name, function in replaced.items():
        monkeypatch.setattr(torch.distributed, name, function)
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(SimStrategy, "setup_environment", lambda self: setattr(self, "world_size", 2))


@pytest.mark.usefixtures("_two_ranks")
def test_several_ranks_do_not_wait_in_each_micro_batch(latents: Path, tmp_path: Path) -> None:
    """Two micro-batches per step; Lightning would broadcast a signal before each of them, and read it."""
    trainer = run(latents, tmp_path / "run", "ImageWarmupStage")
    assert trainer.world_size == 2
    for step in (2, 5):
        others = [c for c in causes(waits_of(trainer)[step]) if c != "copy to the device at model/positions.py"]
        assert others == ["tolist at callbacks/health.py"]


def test_ranks_save_once_per_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes a minute."""
    trainer = PretendTrainer(tmp_path)
    trainer.world_size, trainer.strategy.root_device = 2, torch.device("sim", 0)
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(run_checkpoint.time, "monotonic", lambda: 60.0 * trainer.global_step)
    trainer.train(run_checkpoint.RunCheckpoint(every_steps=100, every_minutes=3), steps=9)
    assert trainer.saves == [4, 8]
