"""What is in a checkpoint's folder: `training.ckpt` and, if there is one, the average as `ema.safetensors`."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gpdit_lightning.errors import InputError

TRAINING, AVERAGE = "training.ckpt", "ema.safetensors"


class FolderCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint straight to its files; Lightning's own holds all of it in memory a second time."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the folder.

        Raises:
            OSError: what the file system said. torch speaks of a position in the file instead.
        """
        folder = Path(path)
        folder.mkdir(parents=True)
        average = checkpoint.get("ema")
        if average is not None:
            checkpoint = checkpoint | {"ema": {name: value for name, value in average.items() if name != "weights"}}
        try:
            with (folder / TRAINING).open("wb") as file:
                torch.save(checkpoint, file)
            if average is not None:
                save_file({name: weight.contiguous() for name, weight in average["weights"].items()}, folder / AVERAGE)
                (folder / AVERAGE).chmod((folder / TRAINING).stat().st_mode)  # safetensors lets its owner alone read it
        except (RuntimeError, SafetensorError) as error:
            reason: BaseException | None = error
            while reason is not None and not isinstance(reason, OSError):
                reason = reason.__context__
            raise reason or OSError(str(error)) from None

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The content, in main memory: the folder may be removed while the training goes on from it."""
        return read_folder_of_checkpoint(Path(path), mapped=False)


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a checkpoint's folder."""
    return (path / TRAINING).is_file()


def read_folder_of_checkpoint(folder: Path, mapped: bool = True) -> dict[str, Any]:
    """The content of a checkpoint; objects other than tensors and plain values are refused.

    Args:
        folder: the checkpoint.
        mapped: whether its tensors are mapped into memory, which processes share, instead of read.

    Raises:
        InputError: a file is missing, cut off, or of another kind.
    """
    path, again = folder / TRAINING, "use another of the run's"
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is not a whole checkpoint (cut off or of another kind): {again}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(f"{path} cannot be read as a checkpoint ({str(error).splitlines()[0]}): {again}.") from None
    parts = ("state_dict", "gpdit", "LatentDataModule")
    found = (
        [checkpoint.get(part) for part in parts] + [checkpoint.get("ema", {})] if isinstance(checkpoint, dict) else []
    )
    if not found or not all(isinstance(part, dict) for part in found):
        raise InputError(f"{path} is not a checkpoint of gpdit_lightning: give one that `fit` wrote.")
    if "ema" in checkpoint:
        try:
            average = load_file(folder / AVERAGE)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{folder / AVERAGE} is no whole safetensors file ({error}): {again}.") from None
        checkpoint["ema"]["weights"] = average if mapped else {name: value.clone() for name, value in average.items()}
    return checkpoint
