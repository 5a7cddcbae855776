"""Training of a recipe by `fit` on random videos, with measurements in the run folder."""

import gc
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import LightningModule, Trainer

from benchmarks.fitting import video_arguments
from benchmarks.gpu_check.cases import Row, Setup
from gpdit_lightning.cli.estimated_recipe import read_recipe
from gpdit_lightning.cli.fit import fit
from gpdit_lightning.cli.plan_trial import MeasureSpeed, TrialFinishedError
from gpdit_lightning.data.batches import LatentBatch
from gpdit_lightning.estimation.gpus import peak_bf16_flops
from gpdit_lightning.estimation.requirements import ALLOWANCE, memory
from gpdit_lightning.estimation.units import GIB
from gpdit_lightning.options.shared import RecipeOptions
from gpdit_lightning.training.attention_choice import RECORD
from gpdit_lightning.training.callbacks.throughput import peak_memory_gib, reset_peak_memory

FIGURES = "figures.json"
SMALL_LATENT, LATENT = (16, 4, 6), (16, 24, 40)  # (C, H, W)
HOST = torch.device("cpu")


class Share(NamedTuple):
    """The share of a GPU in an optimizer step of a recipe.

    Attributes:
        recipe: name of the recipe.
        frames: latent frames of a clip, the most of the recipe.
        clips: of a step.
    """

    recipe: str
    frames: int
    clips: int


STAGE2 = Share("stage2_mixed", frames=5, clips=8)  # of 64 videos on 8 GPUs
STAGE3 = Share("stage3_long_video", frames=12, clips=5)  # of 160 videos on 32 GPUs
LONGEST = max(share.frames for share in (STAGE2, STAGE3))


def latent_shape(smoke_test: bool) -> tuple[int, ...]:
    """Return the shape (F, C, H, W) of the random videos: 45 frames at 192x320, or fewer latent pixels."""
    return (LONGEST, *(SMALL_LATENT if smoke_test else LATENT))


class StepFigures(MeasureSpeed):
    """Measures speed, losses and memory of a training, and writes them to the run folder.

    Args:
        max_steps: optimizer steps after which the training is ended and nothing is saved; one that ends before saves
            its checkpoint.
    """

    def __init__(self, max_steps: int) -> None:
        super().__init__(math.inf, max_steps)
        self.losses: list[torch.Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, and measure the peak of the memory from now on."""
        super().on_train_start(trainer, pl_module)
        for device in {pl_module.device, HOST}:
            reset_peak_memory(device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: LatentBatch, batch_idx: int
    ) -> None:
        """Count a micro-batch, which is an optimizer step; at the end write the figures.

        Raises:
            TrialFinishedError: there were enough steps.
        """
        self.losses.append(outputs["loss"].detach())
        try:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        finally:
            if trainer.global_step in (self.max_steps, trainer.max_steps):
                self.write(trainer, pl_module)

    def write(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the figures."""
        device, done = pl_module.device, self._measured
        on_gpu = device.type == "cuda"
        peak_flops = peak_bf16_flops(torch.cuda.get_device_name(device)) if on_gpu else None
        optimizer = getattr(trainer.strategy, "inner_optimizer", trainer.optimizers[0])
        figures = {
            "backend": pl_module.config.attention_backend,
            "fused": "yes" if optimizer.defaults.get("fused") else "no",
            "milliseconds": 1000 * done.seconds / done.steps,
            "update_milliseconds": 1000 * self.update_seconds,
            "waited": done.waited / done.seconds,
            "tokens_per_second": done.tokens / done.seconds,
            "teraflops_per_second": self.flops_per_s / 1e12,
            "mfu": self.flops_per_s / peak_flops if peak_flops else None,
            "peak_gib": peak_memory_gib(device),
            "host_gib": peak_memory_gib(HOST),
            "losses": torch.stack(self.losses).tolist(),
        }
        (Path(trainer.default_root_dir) / FIGURES).write_text(json.dumps(figures))


def train(
    setup: Setup,
    size: str,
    share: Share,
    callback: Callable[..., object],
    callback_settings: dict[str, int],
    max_steps: int,
    settings: Mapping[str, Any],
) -> Row:
    """Train a recipe by `fit` with a callback that writes figures to the run folder; return them with the estimate.

    Args:
        setup: what all parts share.
        size: of the backbone.
        share: the recipe, and the clips of a step.
        callback: class of the callback.
        callback_settings: its arguments.
        max_steps: optimizer steps of the training, at whose end a checkpoint is written.
        settings: options of `fit`, as of `video_arguments`.
    """
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder, "run")
        arguments = recipe_arguments(setup, size, share, run_dir=run_dir, trainer__max_steps=max_steps, **settings)
        run = read_recipe(arguments).run
        arguments.append(f"--trainer.callbacks+={callback.__module__}.{callback.__qualname__}")
        arguments += [f"--trainer.callbacks.{name}={value}" for name, value in callback_settings.items()]
        try:
            with suppress(TrialFinishedError):
                fit(RecipeOptions(config=[], overrides=arguments))
        finally:
            gc.collect()  # frees the memory of the device for the next training
        figures: Row = json.loads((run_dir / FIGURES).read_text())
        record = run_dir / RECORD
        if record.exists():
            figures["kernel"] = json.loads(record.read_text())["kernel"]
    predicted = memory(run)
    return figures | {
        "predicted_gib": (predicted["total"] - ALLOWANCE) / GIB,
        "predicted_host_gib": predicted["host_memory"] / GIB,
    }


def recipe_arguments(setup: Setup, size: str, share: Share, **settings: Any) -> list[str]:
    """Return the arguments of `fit` for one GPU's share of a recipe, in which every clip has context."""
    backbone = "model__init_args__backbone"
    of_smoke_test = {
        "trainer__accelerator": "cpu",
        "data__workers": 0,
        f"{backbone}__layers": 2,
        f"{backbone}__width": 32,
        f"{backbone}__mlp_width": 32,
        f"{backbone}__heads": 2,
    }
    return video_arguments(
        setup.latents,
        share.recipe,
        **{
            "data__videos__batch_size": setup.clips or share.clips,
            "data__videos__frames": share.frames,
            "data__videos__least_frames": share.frames,
            "data__max_ranks": 1,
            "data__context_dropout": 0,
            "trainer__devices": 1,
            "trainer__strategy": "auto",
            f"{backbone}__size": size,
            f"{backbone}__activation_checkpointing": "true" if size == "H" else "false",
            **(of_smoke_test if setup.smoke_test else {}),
            **settings,
        },
    )


def check_losses(figures: Row) -> Row:
    """Return figures, with a failure if a loss is not finite."""
    wrong = [loss for loss in figures["losses"] if not math.isfinite(loss)]
    return figures | ({"failure": f"a loss is {wrong[0]}"} if wrong else {})


def against_estimate(figures: Row) -> Row:
    """Return figures with the ratio of the peak memory to the estimate."""
    return figures | {"peak_to_predicted": figures["peak_gib"] / figures["predicted_gib"]}
