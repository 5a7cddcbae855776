"""`export`: write the model of a checkpoint to a folder that is read without unpickling."""

import shutil
from pathlib import Path

import torch

from gpdit_lightning.checkpoints.exported import CARD, CONFIG, WEIGHTS, config_json, write_exported
from gpdit_lightning.checkpoints.files import remove
from gpdit_lightning.checkpoints.reading import load_trained_model
from gpdit_lightning.checkpoints.weights import Weights
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import partial_path, publish
from gpdit_lightning.options.export import ExportOptions


def export(options: ExportOptions) -> None:
    """Write the model of a checkpoint to a folder.

    Raises:
        InputError: the weights cannot be read, or the folder contains other files.
    """
    model = load_trained_model(options.checkpoint, weights=options.weights).backbone
    if options.dtype:
        model.to(getattr(torch, options.dtype))
    weights = Weights(model.state_dict(), model.config, model.facts)
    write_folder(weights, options.out.resolve())
    kind = "averaged" if model.facts.weights == "ema" else "trained"
    codec = model.facts.codec
    codec_option = f" --codec {codec.name}" if codec is not None and codec.is_custom else ""
    print(
        f"{options.out}: the {kind} weights of step {model.facts.step}; to continue a video with them: "
        f"python -m gpdit_lightning sample --checkpoint {options.out}{codec_option} --context VIDEO.mp4"
    )


def write_folder(weights: Weights, out: Path) -> None:
    """Write a folder atomically. It replaces an earlier export of the same model, except for its model card.

    Raises:
        InputError: the folder contains other files.
    """
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    same_model = names == {WEIGHTS, CONFIG, CARD} and (out / CONFIG).read_bytes() == config_json(weights).encode()
    if names and not same_model:
        raise InputError(f"{out} contains something other than an export of this model: choose another --out.")
    partial = partial_path(out)
    remove(partial)  # left by a killed export
    try:
        partial.mkdir(parents=True)
        if same_model:
            shutil.copy(out / CARD, partial)  # which the user may have edited
        write_exported(partial, weights)
        remove(out)
        publish(out)
    finally:
        remove(partial)
