"""`export`: the model of a checkpoint as a folder that can be shared, and opened without unpickling anything."""

import shutil
from pathlib import Path

import torch

from gpdit_lightning.checkpoints.files import remove
from gpdit_lightning.checkpoints.reading import load_trained_model
from gpdit_lightning.checkpoints.weights import CARD, CONFIG, WEIGHTS, Weights, config_json, write_exported
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import partial_path, publish
from gpdit_lightning.options.export import ExportOptions


def export(options: ExportOptions) -> None:
    """Write the folder.

    Raises:
        InputError: the weights cannot be read, or `out` holds something else.
    """
    model = load_trained_model(options.checkpoint, weights=options.weights).backbone
    if options.dtype:
        model.to(getattr(torch, options.dtype))
    weights = Weights(model.state_dict(), model.config, model.facts)
    write(weights, options.out.resolve())
    kind = "averaged" if model.facts.weights == "ema" else "trained"
    print(
        f"{options.out}: the {kind} weights of step {model.facts.step}; to continue a video with them: "
        f"python -m gpdit_lightning sample --checkpoint {options.out} --context VIDEO.mp4"
    )


def write(weights: Weights, out: Path) -> None:
    """Write the folder whole, in the place of an earlier export of the same model, whose card stays.

    Raises:
        InputError: something else is there.
    """
    found = {path.name for path in out.iterdir()} if out.exists() else set()
    same = found == {WEIGHTS, CONFIG, CARD} and (out / CONFIG).read_bytes() == config_json(weights).encode()
    if found and not same:
        raise InputError(f"{out} holds something else than an earlier export of this model: choose another --out.")
    partial = partial_path(out)
    remove(partial)  # of a killed export
    try:
        partial.mkdir(parents=True)
        if same:
            shutil.copy(out / CARD, partial)  # somebody may have written a license into it
        write_exported(partial, weights)
        remove(out)
        publish(out)
    finally:
        remove(partial)
