"""Initial weights of a stage, and the record of their origin."""

import logging
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from torch import Tensor

from gpdit_lightning.checkpoints.facts import Origin
from gpdit_lightning.checkpoints.reading import open_weights, sha256_of_weights
from gpdit_lightning.data.datamodule import LatentDataModule
from gpdit_lightning.errors import InputError
from gpdit_lightning.model import GPDiT
from gpdit_lightning.path_kinds import does_not_exist
from gpdit_lightning.regular_files import check_regular
from gpdit_lightning.specs import CodecSpec
from gpdit_lightning.stages.agreement import check_architecture, check_classes
from gpdit_lightning.tensor_files import TensorOnDisk

log = logging.getLogger(__name__)

SAME_CODEC = "prepare the data with the codec of the weights, or start from other weights"


def check_kind(path: str) -> None:
    """Raise `InputError` if the path of initial weights is a pipe, a device or a socket; it need not exist."""
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISDIR(mode):
        check_regular(path, "give initial_weights a run folder, a checkpoint or an exported folder, or null")


@dataclass(frozen=True)
class InitialWeights:
    """The recorded facts of weights that were loaded into a backbone.

    Attributes:
        origin: their file, its optimizer step and sha256.
        codec: the codec of the latents on which they were trained; None if unknown.
        classes: names of the classes on which they were trained; empty without classes.
        tensors: the weights by name.
    """

    origin: Origin
    codec: CodecSpec | None
    classes: tuple[str, ...]
    tensors: Mapping[str, Tensor | TensorOnDisk]

    @classmethod
    def load(cls, path: str, backbone: GPDiT) -> Self:
        """Load the averaged weights, or the trained ones where there is no average, into a backbone.

        Args:
            path: a checkpoint, a run folder (its last checkpoint) or an exported folder.
            backbone: a backbone of the same architecture; nothing is loaded into one on the meta device.

        Raises:
            InputError: the path does not exist or is a pipe or a device, a file is damaged, or the architecture
                differs.
        """
        check_kind(path)
        if not Path(path).exists():
            raise InputError(
                f"model.init_args.initial_weights is {path}, which {does_not_exist(path)}: train that stage first "
                "(`chain` trains all stages), or start from random weights with --model.init_args.initial_weights null."
            )
        weights, folder = open_weights(path)
        check_architecture(weights.config.to_dict(), backbone.config, path)
        weights.check_fit()
        if backbone.device.type != "meta":
            weights.load_into(backbone)
        origin = Origin(path, weights.facts.step or 0, sha256_of_weights(folder))
        kind = "averaged" if weights.facts.weights == "ema" else "trained"
        log.info("training starts from the %s weights of %s (step %d)", kind, path, origin.step)
        return cls(origin, weights.facts.codec, weights.facts.classes, weights.tensors)

    def check_data(self, data: LatentDataModule) -> None:
        """Raise `InputError` unless the data have the codec and the classes that the weights were trained with."""
        if self.codec is not None:
            self.codec.check_same(data.codec, self.origin.path, "the data", SAME_CODEC)
        if self.classes:
            check_classes(self.classes, data.classes, self.origin.path)
