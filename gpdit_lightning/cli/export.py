"""`export`: write the model of a checkpoint to a folder that is read without unpickling."""

import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from gpdit_lightning.checkpoints.card import CardDetails, CardScore
from gpdit_lightning.checkpoints.exported import (
    CARD,
    CHECKSUMS,
    CODEC,
    CONFIG,
    IMAGES,
    WEIGHTS,
    config_json,
    has_edited_card,
    write_exported,
)
from gpdit_lightning.checkpoints.files import CHECKPOINTS
from gpdit_lightning.checkpoints.first_use import first_use
from gpdit_lightning.checkpoints.reading import TrainedModel, load_trained_model
from gpdit_lightning.checkpoints.weights import Weights
from gpdit_lightning.cli.card_images import write_images
from gpdit_lightning.codecs import CODECS
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.report import Report
from gpdit_lightning.evaluation.report_text import RESULTS, what_is_generated
from gpdit_lightning.files import new_partial, publish, remove
from gpdit_lightning.generation.settings import load_codec_of
from gpdit_lightning.names import printable
from gpdit_lightning.options.export import ExportOptions
from gpdit_lightning.regular_files import read_bounded
from gpdit_lightning.training.run_folder import RECIPE


def export(options: ExportOptions) -> None:
    """Write the model of a checkpoint to a folder.

    Raises:
        InputError: the weights cannot be read, the folder contains other files or an edited card, or the evaluation is
            of another model.
    """
    trained = load_trained_model(options.checkpoint, weights=options.weights)
    out = Path(os.path.realpath(options.out))
    model = trained.backbone
    stored = Weights(model.state_dict(), model.config, model.facts)
    if options.dtype:
        dtype = getattr(torch, options.dtype)
        stored = replace(stored, tensors={name: value.to(dtype) for name, value in model.state_dict().items()})
    with new_partial(out, is_folder=True) as partial:
        check_replaceable(out, stored)
        run_dir = run_folder_of(trained.path)
        images = write_images(partial, trained, run_dir, options.codec_source) if options.samples else {}
        details = CardDetails(images, scores_of(trained, options.evaluation, run_dir))
        source = options.codec_source or trained.exported_codec
        if source is not None and is_tensor_file(source):
            if not trained.codec.is_custom:
                load_codec_of(trained, source=source)  # the weights must be those of the training
            shutil.copyfile(source, partial / CODEC)
        write_exported(partial, stored, details)
        remove(out)
        publish(out)
    kind = "averaged" if model.facts.weights == "ema" else "trained"
    use = first_use(model.config, model.facts)
    assert use is not None  # load_trained_model requires the record
    command = use.command(str(options.out), trained.codec.name if trained.codec.is_custom else None)
    if not (out / CODEC).exists() and trained.codec.name in CODECS:
        source, default = trained.codec.source, CODECS[trained.codec.name].default_source
        if source not in (None, default):  # an exported model does not choose it
            command += f" --codec_source {printable(shlex.quote(source))}"
    print(f"{options.out}: the {kind} weights of step {trained.step}; to {use.purpose} with them: {command}")


def is_tensor_file(source: str) -> bool:
    """Return whether the source of a codec is one file of weights, which an exported folder can contain."""
    return source.endswith(".safetensors") and Path(source).is_file()


def check_replaceable(out: Path, weights: Weights) -> None:
    """Raise `InputError` if a folder contains anything other than an export of the same model, or an edited card."""
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    is_export = {WEIGHTS, CONFIG} <= names <= {WEIGHTS, CONFIG, CARD, CHECKSUMS, CODEC, *IMAGES}
    if names and not (is_export and read_bounded(out / CONFIG) == config_json(weights).encode()):
        raise InputError(f"{out} contains something other than an export of this model: choose another --out.")
    if has_edited_card(out):
        raise InputError(
            f"{out / CARD} was edited, or written by an earlier version, and would be replaced: move or delete it, or "
            "choose another --out."
        )


def run_folder_of(checkpoint: Path) -> Path | None:
    """Return the run folder of a checkpoint; None for one that was copied elsewhere, and for an exported folder."""
    run_dir = checkpoint.absolute().parent.parent
    return run_dir if checkpoint.parent.name == CHECKPOINTS and (run_dir / RECIPE).is_file() else None


def scores_of(trained: TrainedModel, evaluation: Path | None, run_dir: Path | None) -> Sequence[CardScore]:
    """Return the scores of the evaluation of a model.

    Args:
        trained: the model.
        evaluation: folder of the evaluation; None for one of this model in its run folder, if there is one.
        run_dir: the run folder, or None.

    Raises:
        InputError: the given folder contains no report, or that of other weights.
    """
    if evaluation is not None:
        report = Report.load(evaluation / RESULTS)
        if not _is_of(report, trained):
            raise InputError(
                f"{evaluation / RESULTS} is of another checkpoint or of other weights ({report.protocol.checkpoint}): "
                "evaluate this one, or leave --evaluation out."
            )
        return _card_scores(report)
    for path in sorted(run_dir.glob(f"*/{RESULTS}")) if run_dir else ():
        report = Report.load(path)
        if _is_of(report, trained):
            return _card_scores(report)
    return ()


def _is_of(report: Report, trained: TrainedModel) -> bool:
    protocol = report.protocol
    return (protocol.checkpoint_sha256, protocol.weights) == (trained.sha256, trained.weights)


def _card_scores(report: Report) -> Sequence[CardScore]:
    protocol = report.protocol
    size = f"{protocol.size[0]}x{protocol.size[1]}"
    if protocol.samples is None:
        generated = f"{protocol.videos:,} videos of {size}, {what_is_generated(protocol)}"
    else:
        generated = (
            f"{what_is_generated(protocol)}, {size}, against {protocol.videos:,} real ones; guidance "
            f"{protocol.guidance.label:g} over the label"
        )
    text = f"{generated}; {protocol.sampler} sampler, {protocol.steps} steps"
    return [CardScore(name, score.mean, str(score), protocol.data, text) for name, score in report.scores.items()]
