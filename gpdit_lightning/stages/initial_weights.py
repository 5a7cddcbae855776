"""The weights that a stage starts from, and the record of where they came from."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from gpdit_lightning.checkpoints.facts import Origin
from gpdit_lightning.checkpoints.reading import open_weights, sha256_of_weights
from gpdit_lightning.data.datamodule import LatentDataModule
from gpdit_lightning.errors import InputError
from gpdit_lightning.model import GPDiT
from gpdit_lightning.specs import CodecSpec
from gpdit_lightning.stages.agreement import check_architecture, check_classes

log = logging.getLogger(__name__)

SAME_CODEC = "prepare the data with the codec of the weights, or start from other weights"


@dataclass(frozen=True)
class InitialWeights:
    """What is known of weights that were loaded into a backbone.

    Attributes:
        origin: where they came from.
        codec: the codec whose latents they were trained on; None if unknown.
        classes: names of the classes they were trained with; empty without classes.
    """

    origin: Origin
    codec: CodecSpec | None
    classes: tuple[str, ...]

    @classmethod
    def load(cls, path: str, backbone: GPDiT) -> Self:
        """Load the averaged weights, or the trained ones where there is no average, into a backbone.

        Args:
            path: a checkpoint, a run folder (its last checkpoint) or an exported folder.
            backbone: of the same architecture.

        Raises:
            InputError: nothing is found there, a file is damaged, or the architecture is another one.
        """
        if not Path(path).exists():
            raise InputError(
                f"model.init_args.initial_weights is {path}, which does not exist: train that stage first (`chain` "
                "trains all stages), or start from random weights with --model.init_args.initial_weights=''."
            )
        weights = open_weights(path, verify=True)
        assert weights.path is not None
        check_architecture(weights.config.to_dict(), backbone.config, path)
        weights.load_into(backbone)
        origin = Origin(path, weights.facts.step or 0, sha256_of_weights(weights.path))
        kind = "averaged" if weights.facts.weights == "ema" else "trained"
        log.info("training starts from the %s weights of %s (step %d)", kind, path, origin.step)
        return cls(origin, weights.facts.codec, weights.facts.classes)

    def check_data(self, data: LatentDataModule) -> None:
        """Raise `InputError` unless the data have the codec and the classes that the weights were trained with."""
        if self.codec is not None:
            self.codec.check_same(data.codec, self.origin.path, "the data", SAME_CODEC)
        if self.classes:
            check_classes(self.classes, data.classes, self.origin.path)
