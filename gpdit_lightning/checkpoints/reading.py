"""Opening of models from a checkpoint, a run folder or an exported folder."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpdit_lightning.checkpoints.exported import CODEC, WEIGHTS, is_exported, read_exported
from gpdit_lightning.checkpoints.facts import ValidationLoss, WeightsKind
from gpdit_lightning.checkpoints.files import find_checkpoint, open_checkpoint
from gpdit_lightning.checkpoints.hub import HubGPDiT, check_hub_arguments, download
from gpdit_lightning.checkpoints.marks import checkpoint_sha256
from gpdit_lightning.checkpoints.weights import Weights
from gpdit_lightning.diffusion import NoiseSchedule
from gpdit_lightning.errors import InputError
from gpdit_lightning.hashes import remembered_sha256
from gpdit_lightning.names import is_hub_name
from gpdit_lightning.specs import ClipGeometry, CodecSpec

MAX_BLOCK_PIXELS = 2**32  # of all latent frames of a block, which are generated at once


class OpenedWeights(NamedTuple):
    """Weights, and the checkpoint or exported folder that they were read from."""

    weights: Weights
    path: Path


def local_path(path: str | Path, **hub: Any) -> Path:
    """Return a path, or the folder of a model that is downloaded from the hub.

    Args:
        path: a path, or a name like `user/model`, as `is_hub_name` distinguishes them.
        hub: as for `HubGPDiT.from_pretrained`.

    Raises:
        InputError: there is no such path, and the hub has no such model, or an argument is unknown.
    """
    check_hub_arguments(hub)
    return download(path, **hub) if isinstance(path, str) and is_hub_name(path) else Path(path)


def find_weights(path: str | Path) -> Path:
    """Return the exported folder at a path or of a name on the hub, or a checkpoint as :func:`find_checkpoint`."""
    local = local_path(path)
    return local if is_exported(local) else find_checkpoint(local)


def sha256_of_weights(path: Path) -> str:
    """Return a sha256 that identifies the weights of a checkpoint or exported folder, as given by `find_weights`."""
    return remembered_sha256(path / WEIGHTS) if is_exported(path) else checkpoint_sha256(path)


def open_weights(path: str | Path, kind: WeightsKind = "ema") -> OpenedWeights:
    """Open weights, whose files are verified, without reading their tensors or unpickling other objects.

    Args:
        path: a checkpoint, a run folder (its last checkpoint), or a folder written by `export` or `save_pretrained`.
        kind: averaged weights (`ema`; the trained ones if there is no average) or trained weights (`raw`).

    Raises:
        InputError: the files cannot be read or have other hashes than when they were written, or trained weights are
            requested from a folder of averaged ones.
    """
    folder = Path(path)
    if is_exported(folder):
        weights = read_exported(folder)
        if kind == "raw" and weights.facts.weights == "ema":
            raise InputError(f"{path} has averaged weights only: use those, or export again with --weights raw.")
        return OpenedWeights(weights, folder)
    checkpoint = open_checkpoint(path)
    tensors, facts = checkpoint.stored_weights(kind), checkpoint.facts(kind)
    return OpenedWeights(Weights.checked(tensors, checkpoint.config, facts, str(checkpoint.path)), checkpoint.path)


@dataclass(frozen=True)
class TrainedModel:
    """A model for generation, with the record of its training.

    Attributes:
        backbone: the network in evaluation mode.
        path: the checkpoint or exported folder that it was read from.
        weights: averaged (`ema`) or trained (`raw`) weights; a run without an average has trained ones only.
        schedule: noise schedule, from noise levels to angles.
        codec: codec of the training latents.
        geometry: stride, frame sizes and length of the training clips.
        step: optimizer steps trained.
        classes: names of the classes on which it can be conditioned, in the order of their numbers; may be empty.
        validation: its loss on held-out data; None if it is not recorded.
        context_dropout: fraction of the clips that were trained without context; None if it is not recorded.
        context_noise: largest angle, in radians, of the context noise of training.
        frames_without_loss: latent frames at the start of each training video that had no loss.
    """

    backbone: HubGPDiT
    path: Path
    weights: WeightsKind
    schedule: NoiseSchedule
    codec: CodecSpec
    geometry: ClipGeometry
    step: int
    classes: tuple[str, ...] = ()
    validation: ValidationLoss | None = None
    context_dropout: float | None = None
    context_noise: float = 0.0
    frames_without_loss: int = 0

    @property
    def is_exported(self) -> bool:
        """Whether it was read from an exported folder, which may come from others, and not from a checkpoint."""
        return is_exported(self.path)

    @property
    def exported_codec(self) -> str | None:
        """The weights of the codec in the exported folder; None if it has none."""
        path = self.path / CODEC
        return str(path) if path.exists() else None

    @cached_property
    def sha256(self) -> str:
        """The hash that identifies the checkpoint or exported folder."""
        return sha256_of_weights(self.path)


def load_trained_model(
    path: str | Path, device: torch.device | str = "cpu", weights: WeightsKind = "ema", **hub: Any
) -> TrainedModel:
    """Load a model for generation.

    Args:
        path: as in :func:`open_weights`, or a name on the hub like `user/model`.
        device: device of the model.
        weights: averaged (`ema`) or trained (`raw`).
        hub: as for `HubGPDiT.from_pretrained`.

    Raises:
        InputError: as :func:`open_weights`, or the record of the training is incomplete.
    """
    opened = open_weights(local_path(path, **hub), weights)
    facts = opened.weights.facts
    if facts.schedule is None or facts.codec is None or facts.geometry is None or facts.step is None:
        missing = [name for name in ("schedule", "codec", "geometry", "step") if getattr(facts, name) is None]
        raise InputError(
            f"{path} does not record the {', '.join(missing)} of its training, so it cannot generate: export it from a "
            "checkpoint."
        )
    side = facts.codec.spatial_factor * opened.weights.config.patch_size
    for height, width in facts.geometry.sizes:
        if height % side or width % side:
            raise InputError(
                f"{path} records clips of {height}x{width} pixels, which do not divide into patches of {side}: "
                "export it again."
            )
    of_blocks = opened.weights.config.block_frames
    frames = max(*of_blocks, facts.geometry.frames if 0 in of_blocks else 1)  # 0: all frames of a clip
    if (pixels := frames * max(height * width for height, width in facts.geometry.sizes)) > MAX_BLOCK_PIXELS:
        raise InputError(
            f"{path} records blocks of {frames} latent frames with {pixels} pixels, more than {MAX_BLOCK_PIXELS}: "
            "export it again."
        )
    return TrainedModel(
        backbone=HubGPDiT.from_weights(opened.weights).to(device),
        path=opened.path,
        weights=facts.weights or weights,
        schedule=facts.schedule,
        codec=facts.codec,
        geometry=facts.geometry,
        step=facts.step,
        classes=facts.classes,
        validation=facts.validation,
        context_dropout=facts.data.get("data.context_dropout"),
        context_noise=facts.data.get("data.context_noise", 0.0),
        frames_without_loss=facts.data.get("data.videos.frames_without_loss", 0),
    )
