"""Lightning's interface for writing and reading the folder of a checkpoint (see files.py for its format)."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from safetensors import SafetensorError
from safetensors.torch import save_file

from gpdit_lightning.checkpoints.content import read_resumable
from gpdit_lightning.checkpoints.marks import AVERAGE, TRAINING


class FolderCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint directly to its files; Lightning's class makes another copy of it in memory."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the folder.

        Raises:
            OSError: the error of the file system, instead of torch's error, which gives only a position in the file.
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
                # safetensors makes the file readable by its owner only.
                (folder / AVERAGE).chmod((folder / TRAINING).stat().st_mode)
        except (RuntimeError, SafetensorError) as error:
            reason: BaseException | None = error
            while reason is not None and not isinstance(reason, OSError):
                reason = reason.__context__
            raise reason or OSError(str(error)) from None

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the content into host memory: the folder may be removed while training continues."""
        return read_resumable(Path(path))
