"""`sample`: continue videos with a trained model, or generate them from noise alone."""

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from gpdit_lightning.checkpoints.reading import TrainedModel, load_trained_model
from gpdit_lightning.cli.generating import batches_by_shape, generation_config, load_codec_of, trained_sizes
from gpdit_lightning.codecs import Codec
from gpdit_lightning.devices import available_device
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation import ClipInputs, GenerationConfig, cast_linear_weights, stream_video
from gpdit_lightning.generation.context_loss import UNLIKE_TRAINING, relative_loss
from gpdit_lightning.generation.contexts import ContextSettings, VideoContext, read_contexts
from gpdit_lightning.generation.outputs import FORMATS, VideoOutput
from gpdit_lightning.generation.video import encode_context
from gpdit_lightning.media.images import IMAGE_EXTENSIONS
from gpdit_lightning.media.video import VIDEO_EXTENSIONS
from gpdit_lightning.model import NO_LABEL
from gpdit_lightning.options.sample import SampleOptions
from gpdit_lightning.progress import progress_bar
from gpdit_lightning.signals import signals_delayed

log = logging.getLogger(__name__)

MAX_NAMED_CONTEXTS = 3  # in the warning about contexts that are unlike the training data
MAX_GROUND_TRUTH = 96  # frames of ground truth for a strip or GIF, all of which are held in memory


def sample(options: SampleOptions) -> None:
    """Generate videos and write them frame by frame. Ctrl-C keeps the frames so far as a playable file.

    Raises:
        InputError: an option, a context or the checkpoint cannot be used.
        KeyboardInterrupt: on Ctrl-C, after the files were completed.
    """
    trained = load_trained_model(options.checkpoint, available_device(options.device), options.weights)
    codec = load_codec_of(trained, options)
    config = rollout_config(options, trained)
    jobs = plan_videos(options, trained, codec)
    longest = max(len(job.context.pixels) for job in jobs) + options.frames
    check_visible_frames(config, codec.temporal_factor, longest, trained)
    if config.autocast_dtype is not None:
        cast_linear_weights(trained.backbone, config.autocast_dtype)

    log.info("%d x %d frames with the weights of step %d", len(jobs), options.frames, trained.step)
    with (
        progress_bar(total=len(jobs) * options.frames, unit=" frames", desc="generating") as bar,
        logging_redirect_tqdm([logging.getLogger("gpdit_lightning")]),
    ):
        for batch in batches_by_shape(jobs, options.batch_size, lambda job: job.context.pixels.shape):
            generate(batch, options.frames, trained, codec, config, bar)


def rollout_config(options: SampleOptions, trained: TrainedModel) -> GenerationConfig:
    """Return the rollout settings of the options; the default window is the longest history of the training clips."""
    if trained.backbone.config.text_width:
        raise InputError(
            f"{options.checkpoint} is conditioned on text embeddings, which this command cannot compute: call "
            "gpdit_lightning.generation.rollout with them."
        )
    window = max(1, trained.geometry.frames - 1 - options.sinks) if options.window is None else options.window
    return generation_config(
        options,
        trained,
        options.label_guidance,
        window=window,
        sinks=options.sinks,
        use_cache=options.cache,
        compile=options.compile,
    )


def check_visible_frames(config: GenerationConfig, temporal_factor: int, frames: int, trained: TrainedModel) -> None:
    """Warn if frames attend to more frames than in training; refuse a window that `of2` cannot use without a cache.

    Args:
        config: gives window and sinks.
        temporal_factor: pixel frames of each latent frame after the first.
        frames: pixel frames of the longest video, including its context.
        trained: the model and the geometry of its training clips.
    """
    assert config.window is not None
    visible, history = config.window + config.sinks, math.ceil((frames - 1) / temporal_factor)
    if min(visible, history) > max(1, trained.geometry.frames - 1):
        log.warning(
            "warning: frames attend to up to %d others (--window and --sinks), but in training to at most %d: the "
            "result may be worse",
            min(visible, history),
            trained.geometry.frames - 1,
        )
    if not config.use_cache and trained.backbone.config.attention == "of2" and history > visible:
        raise InputError(
            f"--no_cache with an of2 model must attend to all {history} latent frames, but --window and --sinks allow "
            f"{visible}: leave --no_cache out, raise --window, or generate fewer frames."
        )


@dataclass(frozen=True)
class VideoJob:
    """One video to generate: its context, seed of the noise, class number, and output files.

    Attributes:
        is_first: whether it is the first video of its context.
    """

    context: VideoContext
    seed: int
    label: int
    output: VideoOutput
    is_first: bool


def plan_videos(options: SampleOptions, trained: TrainedModel, codec: Codec) -> list[VideoJob]:
    """Read the contexts and return a job for each context and seed.

    Raises:
        InputError: a context, label or output cannot be used.
    """
    settings = context_settings(options, trained, codec)
    contexts = read_contexts(options.context, settings, codec) if options.context else [empty_context(settings)]
    formats = output_formats(options, len(contexts) * options.samples)
    jobs = []
    for context in contexts:
        label = class_number(options.label, context, trained)
        if label == NO_LABEL and options.label_guidance != 1:
            raise InputError(
                f"--label_guidance is {options.label_guidance}, but {context.name} has no label of the checkpoint's "
                "classes: give --label, or leave --label_guidance out."
            )
        for seed in range(options.seed, options.seed + options.samples):
            output = VideoOutput(
                output_path(options, context, seed),
                formats,
                context,
                options.frames,
                temporal_factor=codec.temporal_factor,
                mark=options.mark,
                side_by_side=options.side_by_side,
            )
            jobs.append(VideoJob(context, seed, label, output, is_first=seed == options.seed))
    return jobs


def output_formats(options: SampleOptions, videos: int) -> Sequence[str]:
    """Return the formats to write: those of --formats, else that of --out, else mp4 and png.

    Raises:
        InputError: --out has the extension of a format that cannot be written, or names one file for several videos.
    """
    extension = options.out.suffix.removeprefix(".")
    if extension not in FORMATS and options.out.suffix.lower() in (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS):
        extensions = ", ".join(f".{name}" for name in FORMATS)
        raise InputError(
            f"--out {options.out} is not of a format that can be written: give a folder, or one of {extensions}."
        )
    if extension in FORMATS and videos > 1:
        raise InputError(f"--out {options.out} is one file, but {videos} videos are requested: give a folder.")
    return options.formats or ([extension] if extension in FORMATS and extension != "mp4" else ["mp4", "png"])


def output_path(options: SampleOptions, context: VideoContext, seed: int) -> Path:
    """Return the path of a video's files without extension."""
    if options.out.suffix.removeprefix(".") in FORMATS:
        return options.out.with_suffix("")
    return options.out / (context.name if options.samples == 1 else f"{context.name}-seed{seed}")


def context_settings(options: SampleOptions, trained: TrainedModel, codec: Codec) -> ContextSettings:
    """Return how contexts are read: like the training clips unless the options say otherwise."""
    frames = options.context_frames
    return ContextSettings(
        frames=codec.pixel_frames(max(1, trained.geometry.frames - 1)) if frames is None else frames,
        stride=trained.geometry.stride,
        sizes=trained_sizes(options.size, trained),
        ground_truth_frames=options.frames if options.side_by_side else min(options.frames, MAX_GROUND_TRUTH),
        start=options.start,
        fps=options.fps,
        video_fps=trained.geometry.fps,
        may_be_shorter=frames is None,
    )


def empty_context(settings: ContextSettings) -> VideoContext:
    """Return a context without frames, of the first size."""
    no_frames = torch.zeros((0, 3, *settings.sizes[0]), dtype=torch.uint8)
    return VideoContext("sample", no_frames, no_frames, settings.source_fps() / settings.stride)


def class_number(label: str | None, context: VideoContext, trained: TrainedModel) -> int:
    """Return the number of the class to generate, or `NO_LABEL`.

    Args:
        label: name or number of a class; None for the label of the context, if the model was trained with it.
        context: may have a label.
        trained: the model.

    Raises:
        InputError: the model was not trained with the label.
    """
    classes = trained.classes
    if label is None:
        return classes.index(context.label) if context.label in classes else NO_LABEL
    if label in classes:
        return classes.index(label)
    if label.isdecimal() and int(label) < len(classes):
        return int(label)
    if not classes:
        raise InputError(f"--label is {label!r}, but the checkpoint was trained without labels: leave --label out.")
    raise InputError(f"--label is {label!r}, which is no class of the checkpoint: give one of {', '.join(classes)}.")


def generate(
    batch: Sequence[VideoJob],
    frames: int,
    trained: TrainedModel,
    codec: Codec,
    config: GenerationConfig,
    bar: "tqdm[NoReturn]",
) -> None:
    """Generate the videos of a batch and print their files; after Ctrl-C, those of the frames so far.

    Raises:
        KeyboardInterrupt: on Ctrl-C, after the files were completed.
    """
    interrupted = False
    with ExitStack() as files:
        outputs = [files.enter_context(job.output) for job in batch]
        labels = torch.tensor([job.label for job in batch]) if trained.classes else None
        try:
            context = torch.cat([context_latents(job.context, codec) for job in batch])
            for job, latents in zip(batch, context.cpu(), strict=True):
                if job.context.latents is None:
                    job.output.write(job.context.pixels[:0], latents)
            warn_of_unlike_contexts(batch, codec.whitened(context), trained, config)
            inputs = ClipInputs([job.seed for job in batch], labels)
            for piece in stream_video(trained.backbone, codec, context, frames, config, inputs):
                with signals_delayed():  # so that all videos of a batch have the same frames
                    for output, pixels, latents in zip(outputs, piece.pixels, piece.latents, strict=True):
                        output.write(pixels, latents)
                bar.update(piece.pixels.shape[0] * piece.pixels.shape[1])
        except KeyboardInterrupt:
            interrupted = True
    for output in outputs:
        if output.files:
            bar.write(f"{output.frames_written} frames: {', '.join(str(path) for path in output.files)}")
    if interrupted:
        raise KeyboardInterrupt


def warn_of_unlike_contexts(
    batch: Sequence[VideoJob], context: Tensor, trained: TrainedModel, config: GenerationConfig
) -> None:
    """Warn, in one line, of contexts that are unlike the training data of the model.

    Args:
        batch: videos to generate; a context is checked for the first of its videos.
        context: (B, k, C, h, w) whitened latents.
        trained: the model.
        config: gives the precision.
    """
    unlike = []
    for job, latents in zip(batch, context.to(trained.backbone.device), strict=True):
        label = job.label if trained.classes else None
        loss = relative_loss(trained, latents, label, config.autocast_dtype) if job.is_first else None
        if loss is not None and loss > UNLIKE_TRAINING:
            unlike.append(f"{job.context.name} (velocity loss {loss:.1f} times the validation loss)")
    if unlike:
        shown = ", ".join(unlike[:MAX_NAMED_CONTEXTS])
        more = f" and {len(unlike) - MAX_NAMED_CONTEXTS} more" if len(unlike) > MAX_NAMED_CONTEXTS else ""
        log.warning(
            "warning: contexts are unlike the training data, so that results may be poor: %s%s",
            shown,
            more,
        )


def context_latents(context: VideoContext, codec: Codec) -> Tensor:
    """Return the raw latents of a context, (1, k, C, h, w)."""
    if context.latents is not None:
        return context.latents[None].to(codec.device)
    return encode_context(codec, context.pixels[None])
