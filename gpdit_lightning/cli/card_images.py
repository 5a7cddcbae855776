"""Sample images of the model card: the last preview of a run, or continuations of its held-out clips."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gpdit_lightning.checkpoints.exported import ANIMATION, IMAGES, STRIP
from gpdit_lightning.checkpoints.reading import TrainedModel
from gpdit_lightning.cli.recipe_files import read_yaml
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation.pipeline import GPDiTPipeline
from gpdit_lightning.generation.results import GeneratedClip
from gpdit_lightning.generation.settings import layout_of, load_codec_of
from gpdit_lightning.media.images import write_animation, write_strip
from gpdit_lightning.names import number_in
from gpdit_lightning.options.sample import GenerationOptions
from gpdit_lightning.training.run_folder import RECIPE

log = logging.getLogger(__name__)

# Continuations of held-out clips: at most so many latent frames of context, and pixel frames. The sampler is the one
# that needs the fewest steps.
NUM_CLIPS, MAX_CONTEXT, MAX_FRAMES = 4, 4, 16
SAMPLER, STEPS = "adams", 8
MAX_PARAMETERS = 200_000_000  # of a model that generates continuations on a CPU, within a few minutes


def write_images(
    folder: Path, trained: TrainedModel, run_dir: Path | None, codec_source: str | None = None
) -> dict[str, str]:
    """Write sample images to a folder, as far as there are any; return their captions by their names.

    Args:
        folder: the exported folder.
        trained: the model.
        run_dir: its run folder, or None. An exported folder that is exported again keeps its images.
        codec_source: folder, file or hub name of the codec's weights; None for the default.
    """
    if run_dir is None:
        found = {name: trained.path / name for name in IMAGES if (trained.path / name).is_file()}
        for name, path in found.items():
            shutil.copyfile(path, folder / name)
        return dict.fromkeys(found, "Continuations by the model.")
    previews = sorted((run_dir / "previews").glob("step-*.png"), key=_step_of)
    previews = [path for path in previews if _step_of(path) <= trained.step]
    if not previews:
        return _write_continuations(folder, trained, run_dir, codec_source)
    captions = {}
    for name, path in ((STRIP, previews[-1]), (ANIMATION, previews[-1].with_suffix(".gif"))):
        if path.is_file():
            shutil.copyfile(path, folder / name)
            captions[name] = f"Preview of step {_step_of(path):,}: generated frames and the ground truth."
    return captions


def _step_of(preview: Path) -> int:
    number = number_in(preview.stem.removeprefix("step-"))
    return -1 if number is None else number


def _write_continuations(
    folder: Path, trained: TrainedModel, run_dir: Path, codec_source: str | None
) -> dict[str, str]:
    """Continue held-out clips of a run and write the images; a log message states why there are none."""
    parameters = sum(parameter.numel() for parameter in trained.backbone.parameters())
    if parameters > MAX_PARAMETERS:
        log.info("no sample images: the run has no previews, and %s parameters are slow on a CPU", f"{parameters:,}")
        return {}
    try:
        videos = _continue_held_out_clips(trained, run_dir, codec_source)
    except InputError as error:
        log.info("no sample images: %s", error)
        return {}
    if not videos:
        return {}
    context = len(videos[0].clip.context.pixels)
    generated = [torch.cat((video.clip.context.pixels, video.pixels)) for video in videos]
    truth = [torch.cat((video.clip.context.pixels, video.clip.context.ground_truth)) for video in videos]
    rows: dict[str, Tensor] = {}
    for number, (clip, true_clip) in enumerate(zip(generated, truth, strict=True), start=1):
        rows |= {f"{number} generated": clip, f"{number} ground truth": true_clip}
    write_strip(folder / STRIP, rows, context=context)
    frames = min(len(clip) for clip in truth)  # known in every clip
    columns = {
        name: torch.stack([clip[:frames] for clip in clips])
        for name, clips in (("generated", generated), ("ground truth", truth))
    }
    write_animation(folder / ANIMATION, columns, float(videos[0].clip.context.fps), context=context)
    caption = f"Held-out clips: {context} context frames, then generated frames ({SAMPLER} sampler, {STEPS} steps)."
    return dict.fromkeys(IMAGES, caption)


def _continue_held_out_clips(trained: TrainedModel, run_dir: Path, codec_source: str | None) -> Sequence[GeneratedClip]:
    """Continue held-out clips of a run; none if no shard of such clips is found.

    Raises:
        InputError: the codec cannot be loaded, or a clip cannot be used.
    """
    samples = held_out_samples(run_dir)
    if not samples:
        return ()
    codec = load_codec_of(trained, source=codec_source)
    frames = trained.geometry.frames
    context = layout_of(trained, codec).context_within(frames, max(1, min(frames // 2, MAX_CONTEXT)))
    if not context:  # the model generates a clip as one block
        return ()
    frames = min(MAX_FRAMES, (trained.geometry.frames - context) * codec.temporal_factor)
    options = GenerationOptions(context_frames=codec.pixel_frames(context), frames=frames, sampler=SAMPLER, steps=STEPS)
    pipeline = GPDiTPipeline(trained, codec, precision="32")
    return pipeline.run(pipeline.plan(samples, options, frames))


def held_out_samples(run_dir: Path) -> Sequence[str]:
    """Return samples of a shard of held-out videos of a run, as contexts; none if no shard is found."""
    recipe = read_yaml(run_dir / RECIPE)
    data = recipe.get("data") or {}
    folders = (data.get("videos") or {}).get("manifests") or data.get("data_dir") or []
    for folder in [folders] if isinstance(folders, str) else folders:
        if not Path(folder).exists():
            continue
        for shard in Manifest.load(folder, check_files=False).of_split("validation"):
            if shard.kind == "video" and (Path(folder) / shard.path).is_file():
                return [f"{Path(folder) / shard.path}#{number}" for number in range(min(NUM_CLIPS, shard.count))]
    return []
