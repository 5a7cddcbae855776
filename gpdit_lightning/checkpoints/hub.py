"""The backbone with loading from, and saving to, a folder or the Hugging Face hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelHubMixin, snapshot_download

from gpdit_lightning.checkpoints.exported import (
    CHECKSUMS,
    CODEC,
    CONFIG,
    WEIGHTS,
    contains,
    copy_companions,
    is_exported,
    read_exported,
    write_exported,
)
from gpdit_lightning.checkpoints.facts import TrainingFacts
from gpdit_lightning.checkpoints.weights import Weights
from gpdit_lightning.errors import InputError
from gpdit_lightning.model import GPDiT, GPDiTConfig

HUB_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only")


def check_hub_arguments(hub: Mapping[str, Any]) -> None:
    """Raise `InputError` for another argument than those of the hub; a folder uses none, and would ignore it."""
    if unknown := [name for name in hub if name not in HUB_ARGUMENTS]:
        raise InputError(
            f"from_pretrained has no argument {unknown[0]!r}: for the hub, give {', '.join(HUB_ARGUMENTS)}."
        )


def download(name: str, **hub: Any) -> Path:
    """Download an exported model from the hub, unless it is in the local cache; return its folder.

    Args:
        name: its name, like `user/model`.
        hub: as for `HubGPDiT.from_pretrained`.

    Raises:
        InputError: the hub has no such model, or it cannot be reached.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, CODEC, CHECKSUMS], **hub))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{name} is neither a folder nor a model that the hub provides ({reason}): give a folder that "
            "`export` wrote, or a name on the hub."
        ) from None


class HubGPDiT(GPDiT, ModelHubMixin):
    """The backbone with `from_pretrained`, `save_pretrained` and `push_to_hub`; `gpdit_lightning.GPDiT` is this class.

    The network itself, :class:`gpdit_lightning.model.GPDiT`, depends on torch only. `save_pretrained` and `push_to_hub`
    are inherited from the mixin; exported.py documents the files that they write. `PyTorchModelHubMixin` is not used,
    since it loads pickled weights if there are no others.

    Args:
        config: the architecture.

    Attributes:
        facts: record of the training of the weights; read by `from_pretrained` and written by `save_pretrained`.
        folder: the exported folder from which the weights were read, if any. As long as they are unchanged,
            `push_to_hub` and `save_pretrained` to another folder keep its card with the sample images.
    """

    def __init__(self, config: GPDiTConfig) -> None:
        super().__init__(config)
        self.facts = TrainingFacts()
        self.folder: Path | None = None

    @classmethod
    def from_weights(cls, weights: Weights) -> Self:
        """Return a model in evaluation mode whose parameters are these tensors, without a copy.

        Raises:
            InputError: the tensors do not fit the architecture.
        """
        weights.check_fit()
        with torch.device("meta"):
            model = cls(weights.config)
        weights.load_into(model, assign=True)
        model.facts, model.folder = weights.facts, weights.folder
        return model.eval()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, map_location: str | torch.device = "cpu", **hub: Any
    ) -> Self:
        """Load a model in evaluation mode from a folder written by `export` or `save_pretrained`, or from the hub.

        Args:
            pretrained_model_name_or_path: the folder, or a name on the hub like `user/model`.
            map_location: device of the model.
            hub: `revision`, `token`, `cache_dir`, `force_download` and `local_files_only`, as in huggingface_hub's
                `snapshot_download`.

        Raises:
            InputError: there is no such folder or model on the hub, its files are damaged, or an argument is unknown.
        """
        check_hub_arguments(hub)
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = download(str(pretrained_model_name_or_path), **hub)
        return cls.from_weights(read_exported(folder)).to(map_location)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Called by the mixin's `save_pretrained` and `push_to_hub`."""
        weights = Weights(self.state_dict(), self.config, self.facts)
        write_exported(save_directory, weights)
        if self.folder is not None and is_exported(self.folder) and not save_directory.samefile(self.folder):
            copy_companions(self.folder, save_directory, card=contains(self.folder, weights))
