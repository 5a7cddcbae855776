"""`export`: write the model of a checkpoint to a folder that is read without unpickling."""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from gpdit_lightning.checkpoints.card import CardDetails, CardScore
from gpdit_lightning.checkpoints.exported import CARD, CODEC, CONFIG, WEIGHTS, config_json, write_exported
from gpdit_lightning.checkpoints.files import remove
from gpdit_lightning.checkpoints.reading import TrainedModel, load_trained_model
from gpdit_lightning.checkpoints.weights import Weights
from gpdit_lightning.codecs import load_codec_from_spec
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.report import HEADINGS, Report
from gpdit_lightning.evaluation.report_text import RESULTS
from gpdit_lightning.files import partial_path, publish
from gpdit_lightning.generation.pipeline import GPDiTPipeline
from gpdit_lightning.media.images import write_animation, write_strip
from gpdit_lightning.options.export import ExportOptions
from gpdit_lightning.options.sample import GenerationOptions

log = logging.getLogger(__name__)

STRIP, ANIMATION = "sample.png", "sample.gif"
IMAGES = (STRIP, ANIMATION)

# Continuations of held-out clips for the card: at most so many latent frames of context, and pixel frames. The sampler
# is the one that needs the fewest steps.
NUM_CLIPS, MAX_CONTEXT, MAX_FRAMES = 4, 4, 16
SAMPLER, STEPS = "adams", 8
MAX_PARAMETERS = 200_000_000  # of a model that generates continuations on a CPU, within a few minutes


def export(options: ExportOptions) -> None:
    """Write the model of a checkpoint to a folder.

    Raises:
        InputError: the weights cannot be read, the folder contains other files, or the evaluation is of another model.
    """
    trained = load_trained_model(options.checkpoint, weights=options.weights)
    out = options.out.resolve()
    model = trained.backbone
    stored = Weights(model.state_dict(), model.config, model.facts)
    if options.dtype:
        dtype = getattr(torch, options.dtype)
        stored = replace(stored, tensors={name: value.to(dtype) for name, value in stored.tensors.items()})
    check_replaceable(out, stored)
    partial = partial_path(out)
    remove(partial)  # left by a killed export
    try:
        partial.mkdir(parents=True)
        run_dir = run_folder_of(trained.path)
        images = write_images(partial, trained, run_dir) if options.samples else {}
        details = CardDetails(images, scores_of(trained, options.evaluation, run_dir))
        codec_file = Path(trained.codec_source or "")
        if codec_file.suffix == ".safetensors" and codec_file.is_file():
            shutil.copyfile(codec_file, partial / CODEC)
        if (out / CARD).exists():
            shutil.copy(out / CARD, partial)  # which the user may have edited
        write_exported(partial, stored, details)
        remove(out)
        publish(out)
    finally:
        remove(partial)
    kind = "averaged" if model.facts.weights == "ema" else "trained"
    codec_option = f" --codec {trained.codec.name}" if trained.codec.is_custom else ""
    print(
        f"{options.out}: the {kind} weights of step {trained.step}; to continue a video with them: "
        f"python -m gpdit_lightning sample --checkpoint {options.out}{codec_option} --context VIDEO.mp4"
    )


def check_replaceable(out: Path, weights: Weights) -> None:
    """Raise `InputError` if a folder contains anything other than an export of the same model."""
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    is_export = {WEIGHTS, CONFIG, CARD} <= names <= {WEIGHTS, CONFIG, CARD, CODEC, *IMAGES}
    if names and not (is_export and (out / CONFIG).read_bytes() == config_json(weights).encode()):
        raise InputError(f"{out} contains something other than an export of this model: choose another --out.")


def run_folder_of(checkpoint: Path) -> Path | None:
    """Return the run folder of a checkpoint; None for one that was copied elsewhere, and for an exported folder."""
    run_dir = checkpoint.absolute().parent.parent
    return run_dir if checkpoint.parent.name == "checkpoints" and (run_dir / "config.yaml").is_file() else None


def write_images(folder: Path, trained: TrainedModel, run_dir: Path | None) -> dict[str, str]:
    """Write sample images to a folder, as far as there are any; return their captions by their names.

    Args:
        folder: the exported folder.
        trained: the model.
        run_dir: its run folder, or None. An exported folder that is exported again keeps its images.
    """
    if run_dir is None:
        found = {name: trained.path / name for name in IMAGES if (trained.path / name).is_file()}
        for name, path in found.items():
            shutil.copyfile(path, folder / name)
        return dict.fromkeys(found, "Continuations by the model.")
    previews = sorted((run_dir / "previews").glob("step-*.png"), key=_step_of)
    previews = [path for path in previews if _step_of(path) <= trained.step]
    if not previews:
        return _write_continuations(folder, trained, run_dir)
    captions = {}
    for name, path in ((STRIP, previews[-1]), (ANIMATION, previews[-1].with_suffix(".gif"))):
        if path.is_file():
            shutil.copyfile(path, folder / name)
            captions[name] = f"Preview of step {_step_of(path):,}: generated frames and the ground truth."
    return captions


def _step_of(preview: Path) -> int:
    number = preview.stem.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def _write_continuations(folder: Path, trained: TrainedModel, run_dir: Path) -> dict[str, str]:
    """Continue held-out clips of a run; a log message states why there are none."""
    parameters = sum(parameter.numel() for parameter in trained.backbone.parameters())
    if parameters > MAX_PARAMETERS:
        log.info("no sample images: the run has no previews, and %s parameters are slow on a CPU", f"{parameters:,}")
        return {}
    try:
        samples = held_out_samples(run_dir)
        if not samples:
            return {}
        codec = load_codec_from_spec(trained.codec, source=trained.codec_source, owner="the checkpoint")
        pipeline = GPDiTPipeline(trained, codec, precision="32")
        context = max(1, min(trained.geometry.frames // 2, MAX_CONTEXT))
        frames = min(MAX_FRAMES, (trained.geometry.frames - context) * codec.temporal_factor)
        settings = GenerationOptions(
            context_frames=codec.pixel_frames(context), frames=frames, sampler=SAMPLER, steps=STEPS
        )
        videos = pipeline.run(pipeline.plan(samples, settings, frames))
    except InputError as error:
        log.info("no sample images: %s", error)
        return {}
    context = len(videos[0].clip.context.pixels)
    known = min(len(video.clip.context.ground_truth) for video in videos)
    rows = {}
    for number, video in enumerate(videos, start=1):
        rows[f"{number} generated"] = torch.cat((video.clip.context.pixels, video.pixels))
        rows[f"{number} ground truth"] = torch.cat((video.clip.context.pixels, video.clip.context.ground_truth))
    write_strip(folder / STRIP, rows, context=context)
    columns = {
        name: torch.stack([clip[: context + known] for label, clip in rows.items() if label.endswith(name)])
        for name in ("generated", "ground truth")
    }
    write_animation(folder / ANIMATION, columns, float(videos[0].clip.context.fps), context=context)
    caption = f"Held-out clips: {context} context frames, then generated frames ({SAMPLER} sampler, {STEPS} steps)."
    return dict.fromkeys(IMAGES, caption)


def held_out_samples(run_dir: Path) -> Sequence[str]:
    """Return samples of a shard of held-out videos of a run, as contexts; none if no shard is found."""
    recipe = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    data = recipe.get("data") or {}
    folders = (data.get("videos") or {}).get("manifests") or data.get("data_dir") or []
    for folder in [folders] if isinstance(folders, str) else folders:
        if not Path(folder).exists():
            continue
        for shard in Manifest.load(folder, check_files=False).of_split("validation"):
            if shard.kind == "video" and (Path(folder) / shard.path).is_file():
                return [f"{Path(folder) / shard.path}#{number}" for number in range(min(NUM_CLIPS, shard.count))]
    return []


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
    text = (
        f"{protocol.videos:,} videos of {protocol.size[0]}x{protocol.size[1]}, {protocol.generated_frames} frames from "
        f"{protocol.context_frames}; {protocol.sampler} sampler, {protocol.steps} steps"
    )
    return [
        CardScore(name, HEADINGS[name], score.mean, str(score), protocol.data, text)
        for name, score in report.scores.items()
    ]
