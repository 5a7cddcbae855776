"""`sample`: continue videos with a trained model, or generate them from nothing."""

import logging
import math
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from gpdit_lightning.checkpoints.reading import TrainedModel, load_trained_model
from gpdit_lightning.cli.generating import generation_config, load_codec_of, trained_sizes
from gpdit_lightning.codecs import Codec
from gpdit_lightning.devices import available_device
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation import ClipInputs, GenerationConfig, cast_linear_weights, stream_video
from gpdit_lightning.generation.contexts import ContextSettings, VideoContext, batches_of_one_shape, read_contexts
from gpdit_lightning.generation.outputs import FORMATS, Output
from gpdit_lightning.media.images import IMAGE_EXTENSIONS
from gpdit_lightning.media.video import VIDEO_EXTENSIONS
from gpdit_lightning.model import NO_LABEL
from gpdit_lightning.options.sample import SampleOptions

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TRUTH_SHOWN = 96  # frames of the ground truth in a strip or GIF; all of them are held in memory


def sample(options: SampleOptions) -> None:
    """Generate videos and write them.

    Frames are written as they are decoded; Ctrl-C keeps those so far as a playable file.

    Raises:
        InputError: an option, a context or the checkpoint cannot be used.
        KeyboardInterrupt: after the files were finished.
    """
    trained = load_trained_model(options.checkpoint, available_device(options.device), options.weights)
    codec = load_codec_of(trained, options)
    config = rollout_config(options, trained)
    videos = requested_videos(options, trained, codec)
    longest = max(len(video.context.pixels) for video in videos) + options.frames
    check_history(config, codec.temporal_factor, longest, trained)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: the frames so far are kept
    if config.autocast_dtype is not None:
        cast_linear_weights(trained.backbone, config.autocast_dtype)

    log.info("%d x %d frames with the weights of step %d", len(videos), options.frames, trained.step)
    total = len(videos) * options.frames
    with (
        tqdm(total=total, unit=" frames", desc="generating") as bar,
        logging_redirect_tqdm([logging.getLogger("gpdit_lightning")]),
    ):
        for batch in batches_of_one_shape(videos, options.batch_size, lambda video: video.context):
            generate(batch, options.frames, trained, codec, config, bar)


def rollout_config(options: SampleOptions, trained: TrainedModel) -> GenerationConfig:
    """How to generate, by the options and, where they say nothing, as the model was trained."""
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


def check_history(config: GenerationConfig, temporal_factor: int, frames: int, trained: TrainedModel) -> None:
    """Warn if frames see more frames than in training, and refuse what cannot be computed without a cache.

    Args:
        config: gives window and sinks.
        temporal_factor: pixel frames per latent frame.
        frames: pixel frames of the longest video, with its context.
        trained: the model and its training clips.
    """
    assert config.window is not None
    visible, before_last = config.window + config.sinks, math.ceil((frames - 1) / temporal_factor)
    if min(visible, before_last) > max(1, trained.geometry.frames - 1):
        log.warning(
            "warning: frames see up to %d others (--window and --sinks), but in training at most %d: the result may "
            "be worse",
            min(visible, before_last),
            trained.geometry.frames - 1,
        )
    if not config.use_cache and trained.backbone.config.attention == "of2" and before_last > visible:
        raise InputError(
            f"--no_cache with an of2 model must see all {before_last} latent frames, but --window and --sinks "
            f"let it see {visible}: leave --no_cache out, raise --window, or generate fewer frames."
        )


@dataclass(frozen=True)
class Video:
    """One video to generate: its context, the seed of its noise, its label, and its output."""

    context: VideoContext
    seed: int
    label: int
    output: Output


def requested_videos(options: SampleOptions, trained: TrainedModel, codec: Codec) -> list[Video]:
    """A video for every context and seed; errors in any of them are found before one is generated."""
    settings = context_settings(options, trained, codec)
    contexts = read_contexts(options.context, settings, codec) if options.context else [empty_context(settings)]
    seeds = range(options.seed, options.seed + options.samples)
    single, ending = len(contexts) * len(seeds) == 1, options.out.suffix.removeprefix(".")
    formats = options.formats or ([ending] if ending in FORMATS and ending != "mp4" else ["mp4", "png"])
    if ending not in FORMATS and options.out.suffix.lower() in (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS):
        endings = ", ".join(f".{name}" for name in FORMATS)
        raise InputError(
            f"--out {options.out} is not of a format that can be written: give a folder, or one of {endings}."
        )
    if ending in FORMATS and not single:
        raise InputError(
            f"--out {options.out} is one file, but {len(contexts) * len(seeds)} videos are requested: give a folder."
        )
    videos = []
    for context in contexts:
        label = class_of(options.label, context, trained)
        if label == NO_LABEL and options.label_guidance != 1:
            raise InputError(
                f"--label_guidance is {options.label_guidance}, but {context.name} has no label that the checkpoint "
                "knows: give --label, or leave --label_guidance out."
            )
        for seed in seeds:
            name = context.name if options.samples == 1 else f"{context.name}-seed{seed}"
            path = options.out.with_suffix("") if ending in FORMATS else options.out / name
            how = (options.frames, options.mark, options.side_by_side, codec.temporal_factor)
            output = Output(path, formats, context, *how)
            videos.append(Video(context, seed, label, output))
    return videos


def context_settings(options: SampleOptions, trained: TrainedModel, codec: Codec) -> ContextSettings:
    """How contexts are read: like the training clips, unless the options say otherwise."""
    frames = options.context_frames
    return ContextSettings(
        frames=codec.pixel_frames(max(1, trained.geometry.frames - 1)) if frames is None else frames,
        stride=trained.geometry.stride,
        sizes=trained_sizes(options.size, trained),
        ground_truth_frames=options.frames if options.side_by_side else min(options.frames, TRUTH_SHOWN),
        start=options.start,
        fps=options.fps,
    )


def empty_context(settings: ContextSettings) -> VideoContext:
    """A context without frames, of the first size."""
    nothing = torch.zeros((0, 3, *settings.sizes[0]), dtype=torch.uint8)
    return VideoContext("sample", nothing, nothing, settings.fps_or(None) / settings.stride)


def class_of(label: str | None, context: VideoContext, trained: TrainedModel) -> int:
    """The number of the class to generate; `NO_LABEL` for none.

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
    known = f"give one of {', '.join(classes)}" if classes else "it was trained without labels: leave --label out"
    raise InputError(f"--label is {label!r}, with which the checkpoint was not trained: {known}.")


def generate(
    batch: Sequence[Video],
    frames: int,
    trained: TrainedModel,
    codec: Codec,
    config: GenerationConfig,
    bar: "tqdm[NoReturn]",
) -> None:
    """Generate the videos of a batch and print their files; after Ctrl-C, the frames so far.

    Raises:
        KeyboardInterrupt: after the files were finished.
    """
    stopped = False
    with ExitStack() as files:
        outputs = [files.enter_context(video.output) for video in batch]
        conditions = torch.tensor([video.label for video in batch]) if trained.classes else None
        try:
            known = torch.cat([context_latents(video.context, codec) for video in batch])
            for video, latents in zip(batch, known.cpu(), strict=True):
                if video.context.latents is None:
                    video.output.write(video.context.pixels[:0], latents)
            seeds = [video.seed for video in batch]
            for piece in stream_video(trained.backbone, codec, known, frames, config, ClipInputs(seeds, conditions)):
                with interrupts_deferred():
                    for output, pixels, latents in zip(outputs, piece.pixels, piece.latents, strict=True):
                        output.write(pixels, latents)
                bar.update(piece.pixels.shape[0] * piece.pixels.shape[1])
        except KeyboardInterrupt:
            stopped = True
    for output in outputs:
        if output.files:
            bar.write(f"{output.written} frames: {', '.join(str(path) for path in output.files)}")
    if stopped:
        raise KeyboardInterrupt


def context_latents(context: VideoContext, codec: Codec) -> Tensor:
    """The raw latents of a context: (1, k, C, h, w)."""
    if context.latents is not None:
        return context.latents[None].to(codec.device)
    if len(context.pixels):
        return codec.encode(context.pixels[None])
    height, width = (side // codec.spatial_factor for side in context.pixels.shape[-2:])
    return torch.zeros((1, 0, codec.latent_channels, height, width), device=codec.device)


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Handle Ctrl-C and SIGTERM after the block, so that no frame is written partly."""
    caught: list[int] = []
    before = {number: signal.signal(number, lambda number, _: caught.append(number)) for number in SIGNALS}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    for number in caught[:1]:
        signal.raise_signal(number)
