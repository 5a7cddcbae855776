"""Videos to generate: contexts, seeds, labels and lengths, from options and a trained model."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpdit_lightning.checkpoints.reading import TrainedModel
from gpdit_lightning.codecs import Codec
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation.config import GenerationConfig
from gpdit_lightning.generation.context_readers import read_contexts
from gpdit_lightning.generation.contexts import DEFAULT_FPS, ContextSettings, VideoContext, folder_name, unique_names
from gpdit_lightning.generation.settings import check_context_frames, layout_of, trained_sizes, warn_of_short_context
from gpdit_lightning.generation.video import num_latent_frames
from gpdit_lightning.model import NO_LABEL
from gpdit_lightning.model.layout import BlockLayout
from gpdit_lightning.names import counted, nearest_names, number_in
from gpdit_lightning.options.sample import ALL_CLASSES, GenerationOptions, RolloutOptions
from gpdit_lightning.specs import FRAME_RATE

DEFAULT_FRAMES = 16  # pixel frames that are generated after a context

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Clip:
    """One video to generate.

    Attributes:
        context: its beginning.
        seed: seed of the noise.
        label: class number, or `NO_LABEL`.
        frames: number of pixel frames to generate.
        sample: number of the video among those of its context.
        by_class: whether the files of the video are named by its class and number.
    """

    context: VideoContext
    seed: int
    label: int
    frames: int
    sample: int
    by_class: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """What the clips of a batch have in common: the shape of the context, and the number of frames."""
        return *self.context.pixels.shape, self.frames


@dataclass(frozen=True)
class GenerationPlan:
    """Videos to generate, and how.

    Attributes:
        clips: in the order of their contexts; those of one context follow each other.
        config: sampler, guidance, window, and how to compute.
        batches: the clips, in batches of one shape.
    """

    clips: Sequence[Clip]
    config: GenerationConfig
    batches: Sequence[Sequence[Clip]]


def plan_clips(
    sources: Sequence[str | Tensor | VideoContext],
    options: GenerationOptions,
    trained: TrainedModel,
    codec: Codec,
    ground_truth_frames: int,
    seconds: float | None,
    seeds: Sequence[int] | None,
    *,
    skip_unusable: bool,
) -> list[Clip]:
    """Read contexts and return the videos to generate: for each context one per sample.

    Args:
        sources: as for :func:`read_contexts`; without any, videos are generated from noise alone.
        options: which part of the sources is read, and how many videos of what length are generated.
        trained: the model.
        codec: its codec.
        ground_truth_frames: maximum number of frames after a context to read.
        seconds: duration of the generated frames instead of their number.
        seeds: the seed of the first sample of each context; None for that of the options.
        skip_unusable: as for :func:`read_contexts`.

    Raises:
        InputError: an option or a context cannot be used, or the number of seeds is not that of the contexts.
    """
    settings = context_settings(options, trained, codec, ground_truth_frames)
    if options.by_class:
        clips = _plan_samples(sources, options, trained, codec, settings, seconds, seeds)
    else:
        contexts = [_empty_context(settings)]
        if sources:
            contexts = read_contexts(sources, settings, codec, skip_unusable=skip_unusable)
        clips = _plan_continuations(contexts, options, trained, codec, seconds, seeds)
    warn_of_short_context(min(len(clip.context.pixels) for clip in clips), trained, codec)
    return clips


def _plan_continuations(
    contexts: Sequence[VideoContext],
    options: GenerationOptions,
    trained: TrainedModel,
    codec: Codec,
    seconds: float | None,
    seeds: Sequence[int] | None,
) -> list[Clip]:
    """Return the videos to generate after contexts; arguments as `plan_clips`."""
    if seeds is None:
        seeds = [options.seed] * len(contexts)
    elif len(seeds) != len(contexts):
        raise InputError(
            f"seed is a list of {len(seeds)}, but there are {len(contexts)} contexts: give one number, or one for each."
        )
    clips = []
    for context, seed in zip(contexts, seeds, strict=True):
        label = class_number(options.label[0] if options.label else None, context, trained)
        _check_label_guidance(options, label, context)
        frames = generated_frames(options, trained, codec) if seconds is None else _frames_of(seconds, context)
        for sample in range(options.samples):
            clips.append(Clip(context, seed + sample, label, frames, sample))
    return clips


def _plan_samples(
    sources: Sequence[str | Tensor | VideoContext],
    options: GenerationOptions,
    trained: TrainedModel,
    codec: Codec,
    settings: ContextSettings,
    seconds: float | None,
    seeds: Sequence[int] | None,
) -> list[Clip]:
    """Return the images or videos to generate from noise alone, `count` of each class; arguments as `plan_clips`."""
    if sources:
        raise InputError(
            "a context is given with --count or several labels, which generate from noise alone: leave the context "
            "out, or give one label without --count."
        )
    if seeds is not None:
        raise InputError(f"seed is a list of {len(seeds)}, but samples of classes have one seed: give one number.")
    clips = []
    for context in _class_contexts(options, trained, settings):
        label = class_number(None, context, trained)
        _check_label_guidance(options, label, context)
        frames = generated_frames(options, trained, codec) if seconds is None else _frames_of(seconds, context)
        for number in range(options.count or 1):
            seed = sample_seed(options.seed, context.label, number)
            clips.append(Clip(context, seed, label, frames, number, by_class=True))
    return clips


def _class_contexts(options: GenerationOptions, trained: TrainedModel, settings: ContextSettings) -> list[VideoContext]:
    """Return an empty context for each class of the options, whose name is that of a folder; one without classes."""
    empty = _empty_context(settings)
    requested = options.label or ()
    if not requested:
        return [empty]
    if ALL_CLASSES in requested:
        if not trained.classes:
            raise InputError(f"--label is {ALL_CLASSES}, but the checkpoint was trained without labels: leave it out.")
        requested = trained.classes
    numbers = dict.fromkeys(class_number(label, empty, trained) for label in requested)
    labels = [trained.classes[number] for number in numbers]
    return unique_names([replace(empty, name=folder_name(label), label=label) for label in labels])


def sample_seed(seed: int, label: str | None, number: int) -> int:
    """Return the seed of the noise of a sample: a function of the given seed, the label and the sample's number."""
    key = f"{seed} {number} {label or ''}"
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8]) >> 1  # fits an int64


def generated_frames(options: GenerationOptions, trained: TrainedModel, codec: Codec) -> int:
    """Return the number of pixel frames to generate: by default 16, or those of a training clip for samples of classes.

    Args:
        options: frames, labels and count.
        trained: the model; one of images generates one frame by default.
        codec: its codec.
    """
    in_training = codec.pixel_frames(trained.geometry.frames)
    by_default = in_training if options.by_class or in_training == 1 else DEFAULT_FRAMES
    return by_default if options.frames is None else options.frames


def _frames_of(seconds: float, context: VideoContext) -> int:
    return max(1, round(seconds * context.fps))


def _check_label_guidance(options: GenerationOptions, label: int, context: VideoContext) -> None:
    if label == NO_LABEL and options.label_guidance != 1:
        raise InputError(
            f"--label_guidance is {options.label_guidance}, but {context.name} has no label of the "
            "checkpoint's classes: give --label, or leave --label_guidance out."
        )


def context_settings(
    options: GenerationOptions, trained: TrainedModel, codec: Codec, ground_truth_frames: int = 0
) -> ContextSettings:
    """Return how contexts are read: like the training clips unless the options say otherwise.

    Raises:
        InputError: the options give a context that does not consist of whole blocks of the model, or a stride at which
            images would have no possible frame rate.
    """
    frames, geometry, layout = options.context_frames, trained.geometry, layout_of(trained, codec)
    stride = options.stride or geometry.stride
    # Of a clip of one block, such as an image, a video can be continued.
    latents = layout.context_length(max(1, geometry.frames - 1)) or layout.first_frames
    if frames is not None:
        check_context_frames(frames, layout, codec)
    elif latents:
        frames = codec.pixel_frames(latents)
    # By default the rate of the result is that of training at any stride.
    fps = DEFAULT_FPS * stride / geometry.stride if options.fps is None else options.fps
    if options.fps is None and not FRAME_RATE.accepts(fps):
        raise InputError(
            f"--stride is {stride}, so that images would have {fps:g} frames per second: give another --stride, or "
            "--fps."
        )
    return ContextSettings(
        frames=frames or 0,
        stride=stride,
        sizes=trained_sizes(options.size, trained),
        ground_truth_frames=ground_truth_frames,
        start=options.start,
        fps=fps,
        video_fps=geometry.fps,
        may_be_shorter=options.context_frames is None,
        layout=layout,
    )


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
    if (number := number_in(label)) is not None and number < len(classes):
        return number
    if not classes:
        raise InputError(f"--label is {label!r}, but the checkpoint was trained without labels: leave --label out.")
    raise InputError(
        f"--label is {label!r}, which is no class of the checkpoint: give one of {nearest_names(label, classes)}."
    )


def rollout_window(
    options: RolloutOptions, trained: TrainedModel, codec: Codec, longest: int
) -> tuple[int | None, int]:
    """Return window and sinks of options: by default the longest history of the training clips, and no sinks.

    Args:
        options: window, sinks and cache.
        trained: the model.
        codec: its codec.
        longest: pixel frames of the longest video, including its context.

    Raises:
        InputError: window or sinks do not consist of blocks of the model, or without a cache the window is too short.
    """
    layout, frames = layout_of(trained, codec), num_latent_frames(codec, 0, longest)
    if trained.geometry.frames == 1 and frames > 1:
        log.warning(
            "warning: the model was trained on single frames, and does not continue videos: give one that was trained "
            "on videos, such as that of a later stage"
        )
    window, sinks = block_window(layout, trained.geometry.frames, frames, options.window, options.sinks)
    if window is None:
        return None, sinks
    in_training = layout.last_group(trained.geometry.frames).start
    visible, history = window + sinks, layout.last_group(frames).start
    if min(visible, history) > max(1, in_training):
        log.warning(
            "warning: frames attend to up to %d others (--window and --sinks), but in training to at most %d: the "
            "result may be worse",
            min(visible, history),
            in_training,
        )
    if not options.cache and trained.backbone.config.attention == "of2" and history > visible:
        raise InputError(
            f"--no_cache with an of2 model must attend to all {history} latent frames, but --window and --sinks "
            f"allow {visible}: leave --no_cache out, raise --window, or generate fewer frames."
        )
    return window, sinks


def block_window(
    layout: BlockLayout, in_training: int, frames: int, window: int | None, sinks: int = 0
) -> tuple[int | None, int]:
    """Return a window and sinks of whole blocks, in latent frames.

    The sinks of a video that is longer than the window contain its first block if that has another length than the
    others. There is no window if blocks are parts of frames, or if one block has all frames that follow the first.

    Args:
        layout: the blocks of the model.
        in_training: latent frames of the longest training clips.
        frames: latent frames of the video.
        window: --window; None for the longest history of the training clips.
        sinks: --sinks.

    Raises:
        InputError: window or sinks do not consist of whole blocks.
    """
    if layout.blocks_per_group > 1 or not layout.frames:
        of_blocks = "parts of frames" if layout.blocks_per_group > 1 else "all frames of a clip"
        if window is not None or sinks:
            raise InputError(
                f"--window and --sinks need blocks of a number of frames, but those of the model are {of_blocks}: "
                "leave them out."
            )
        if frames > in_training or (not layout.frames and frames != in_training):
            log.warning(
                "warning: the video has %d latent frames with its context, but training clips had %d, and blocks that "
                "are %s allow no window: the result may be worse",
                frames,
                in_training,
                of_blocks,
            )
        return None, 0
    if sinks and layout.context_length(sinks) != sinks:
        lengths = " or ".join(map(str, layout.contexts_near(sinks)))
        raise InputError(f"--sinks is {sinks}, which cuts a block of the model: give {lengths}, or 0 for none.")
    if window is not None and window % layout.frames:
        raise InputError(
            f"--window is {window}, which cuts a block of the model: give a multiple of {layout.frames} latent frames."
        )
    history = layout.last_group(in_training).start

    def within_training(sinks: int) -> int:
        return max(layout.frames, (history - sinks) // layout.frames * layout.frames)

    chosen = within_training(sinks) if window is None else window
    if not sinks and layout.first_frames != layout.frames and layout.last_group(frames).start > chosen:
        sinks = layout.first_frames
        log.info("the first block, of %s, stays visible: --sinks %d", counted(sinks, "latent frame"), sinks)
        chosen = within_training(sinks) if window is None else window
    return chosen, sinks


def _empty_context(settings: ContextSettings) -> VideoContext:
    """Return a context without frames, of the first size."""
    no_frames = torch.zeros((0, 3, *settings.sizes[0]), dtype=torch.uint8)
    return VideoContext("sample", no_frames, no_frames, settings.frame_rate())
