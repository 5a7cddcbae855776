"""The backbone that can be loaded from and saved to a folder or the Hugging Face hub."""

from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelHubMixin, snapshot_download

from gpdit_lightning.checkpoints.facts import TrainingFacts
from gpdit_lightning.checkpoints.weights import CONFIG, WEIGHTS, Weights, read_exported, write_exported
from gpdit_lightning.errors import InputError
from gpdit_lightning.model import GPDiT, GPDiTConfig


class HubGPDiT(GPDiT, ModelHubMixin):
    """The backbone with `from_pretrained`, `save_pretrained` and `push_to_hub`; `gpdit_lightning.GPDiT` is this class.

    The network itself, :class:`gpdit_lightning.model.GPDiT`, needs torch alone. `save_pretrained` and `push_to_hub` are
    the mixin's; weights.py documents the files they write. `PyTorchModelHubMixin` is not used: it opens pickled weights
    where it finds no others.

    Args:
        config: the architecture.

    Attributes:
        facts: what is known of the training of the weights. `from_pretrained` reads it from the folder,
            `save_pretrained` writes it there.
    """

    def __init__(self, config: GPDiTConfig) -> None:
        super().__init__(config)
        self.facts = TrainingFacts()

    @classmethod
    def from_weights(cls, weights: Weights) -> Self:
        """A model in evaluation mode whose parameters are these tensors themselves, not copies.

        Raises:
            InputError: tensors that do not fit their architecture.
        """
        with torch.device("meta"):
            model = cls(weights.config)
        weights.load_into(model, assign=True)
        model.facts = weights.facts
        return model.eval()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, map_location: str | torch.device = "cpu", **hub: Any
    ) -> Self:
        """A model in evaluation mode from a folder that `export` or `save_pretrained` wrote, or from the hub.

        Args:
            pretrained_model_name_or_path: the folder, or a name on the hub like `user/model`.
            map_location: the device of the model.
            hub: `revision`, `token`, `cache_dir`, `force_download` and `local_files_only`, as in huggingface_hub's
                `snapshot_download`.

        Raises:
            InputError: neither a folder nor found on the hub, or damaged files.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            name = str(pretrained_model_name_or_path)
            try:
                folder = Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS], **hub))
            except (OSError, ValueError) as error:
                reason = str(error).strip().partition("\n")[0]
                raise InputError(
                    f"{name} is neither a folder nor a model that the hub provides ({reason}): give a folder that "
                    "`export` wrote, or a name on the hub."
                ) from None
        return cls.from_weights(read_exported(folder)).to(map_location)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Called by the mixin's `save_pretrained` and `push_to_hub`."""
        write_exported(save_directory, Weights(self.state_dict(), self.config, self.facts))
