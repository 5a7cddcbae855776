"""`sample`: continue videos with a trained model, or make them from nothing."""

import argparse
import logging
import math
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from gpdit_lightning.checkpoints.reading import TrainedModel
from gpdit_lightning.cli.generating import add_generation, config_of, opened, parser_of, trained_sizes
from gpdit_lightning.codecs import Codec
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation import ClipInputs, GenerationConfig, cast_linear_weights, stream_video
from gpdit_lightning.generation.contexts import ContextSettings, VideoContext, batches_of_one_shape, read_contexts
from gpdit_lightning.generation.outputs import FORMATS, Output
from gpdit_lightning.media.images import IMAGE_EXTENSIONS
from gpdit_lightning.media.video import VIDEO_EXTENSIONS
from gpdit_lightning.model import NO_LABEL

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TRUTH_SHOWN = 96  # frames: what a strip or GIF shows of it; a longer one would be kept in memory


def parser() -> argparse.ArgumentParser:
    """The verb's options."""
    options = parser_of(
        "sample",
        "Continue videos: contexts are read at the stride of the training clips, and results play at the matching "
        "rate. Frames are written as they are done; Ctrl-C keeps those so far as a playable file.",
    )

    what = options.add_argument_group("what to continue")
    add = what.add_argument
    add(
        "--context",
        nargs="+",
        default=[],
        help="videos, GIFs, still images, folders of frames or of videos, shards of latents (SHARD.tar, or one sample "
        "of it: SHARD.tar#NUMBER or SHARD.tar#KEY); without, a video begins from nothing",
    )
    add("--context_frames", type=int, help="frames given, 1 + 4k (default: the training clips' but one latent frame)")
    add("--start", type=float, help="second at which a context begins (default: such that it ends with the video)")
    add("--fps", type=float, help="frames a second of pictures, which do not say (default: 24)")
    add("--size", help="HEIGHTxWIDTH in pixels, one that was trained on (default: the closest in aspect)")
    add("--label", help="class to generate, by name or number (default: what a shard says of its sample, else none)")

    how = options.add_argument_group("how to generate")
    add = how.add_argument
    add("--frames", type=int, default=16, help="frames to generate")
    add("--samples", type=int, default=1, help="videos for each context, with one seed after another")
    add_generation(add)
    add("--label_guidance", type=float, default=1.0, help="scale over the label")
    add("--window", type=int, help="latest latent frames that a frame sees (default: as many as in training)")
    add("--sinks", type=int, default=0, help="first latent frames of the video that stay visible besides")
    add("--no_cache", action="store_true", help="keep no keys and values: less memory, more work (models with `of`)")
    add("--compile", action="store_true", help="fuse blocks with torch.compile: for long videos and on GPUs")

    result = options.add_argument_group("what to write")
    add = result.add_argument
    add("--out", type=Path, default=Path("sample.mp4"), help="a file for one video, a folder for several")
    add(
        "--formats",
        nargs="+",
        choices=FORMATS,
        metavar="FORMAT",
        help="mp4, gif, png (a strip), safetensors (raw latents) (default: as --out, and a strip beside an mp4)",
    )
    add("--mark", action="store_true", help="frame the mp4's pictures: grey for the context, orange for what is new")
    add("--side_by_side", action="store_true", help="show the truth beside, where the context's source goes on")
    return options


def run(verb: str, arguments: Sequence[str]) -> None:
    """Generate and write."""
    options = parser().parse_args(arguments)
    for name in ("frames", "samples"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} is {getattr(options, name)}: generate at least 1.")
    if options.seed < 0:
        raise InputError(f"--seed is {options.seed}: give a number from 0 on.")
    trained, codec = opened(options)
    config = generation_config(options, trained)
    videos = videos_to_make(options, trained, codec)
    longest = max(len(video.context.pixels) for video in videos) + options.frames
    check_history(config, codec.temporal_factor, longest, trained)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what there is so far is kept
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


def generation_config(options: argparse.Namespace, trained: TrainedModel) -> GenerationConfig:
    """How to generate, as the options say and the training allows."""
    if trained.backbone.config.text_width:
        raise InputError(
            f"{options.checkpoint} takes embeddings of texts, which this command cannot make: call "
            "gpdit_lightning.generation.rollout with them."
        )
    window = max(1, trained.geometry["frames"] - 1 - options.sinks) if options.window is None else options.window
    return config_of(
        options,
        trained,
        options.label_guidance,
        window=window,
        sinks=options.sinks,
        use_cache=not options.no_cache,
        compile=options.compile,
    )


def check_history(config: GenerationConfig, temporal_factor: int, frames: int, trained: TrainedModel) -> None:
    """Warn if frames see more than training showed, and refuse what cannot be computed without a cache.

    Args:
        config: whose window and sinks count.
        temporal_factor: pixel frames of a latent frame.
        frames: pixel frames of the longest video, with its context.
        trained: the model and what it was trained on.
    """
    assert config.window is not None
    visible, before_last = config.window + config.sinks, math.ceil((frames - 1) / temporal_factor)
    if min(visible, before_last) > max(1, trained.geometry["frames"] - 1):
        log.warning(
            "warning: frames see up to %d others (--window and --sinks), but in training at most %d: farther ones may "
            "do harm",
            min(visible, before_last),
            trained.geometry["frames"] - 1,
        )
    if not config.use_cache and trained.backbone.config.attention == "of2" and before_last > visible:
        raise InputError(
            f"--no_cache with an of2 model needs all frames in view, {before_last} latent ones, and --window and "
            f"--sinks let it see {visible}: leave --no_cache out, raise --window, or generate fewer frames."
        )


@dataclass(frozen=True)
class Video:
    """One video to make: what it continues, its noise and its label, and where it goes."""

    context: VideoContext
    seed: int
    label: int
    output: Output


def videos_to_make(options: argparse.Namespace, trained: TrainedModel, codec: Codec) -> list[Video]:
    """Every context with every seed; all that can be wrong with them is found before any is made."""
    reading = reading_of(options, trained, codec)
    contexts = read_contexts(options.context, reading, codec) if options.context else [from_nothing(reading)]
    seeds = range(options.seed, options.seed + options.samples)
    single, ending = len(contexts) * len(seeds) == 1, options.out.suffix.removeprefix(".")
    formats = options.formats or (
        ["mp4", "png"] if ending == "mp4" else [ending] if ending in FORMATS else ["mp4", "png"]
    )
    if ending not in FORMATS and options.out.suffix.lower() in (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS):
        endings = ", ".join(f".{name}" for name in FORMATS)
        raise InputError(f"--out {options.out} is of no format that is written: give a folder, or one of {endings}.")
    if ending in FORMATS and not single:
        raise InputError(
            f"--out {options.out} is one file, but {len(contexts) * len(seeds)} videos are made: give a folder."
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
            output = Output(path, formats, context, options.frames, options.mark, options.side_by_side)
            videos.append(Video(context, seed, label, output))
    return videos


def reading_of(options: argparse.Namespace, trained: TrainedModel, codec: Codec) -> ContextSettings:
    """Contexts like the training clips, but for what the options say."""
    frames = options.context_frames
    return ContextSettings(
        frames=codec.pixel_frames(max(1, trained.geometry["frames"] - 1)) if frames is None else frames,
        stride=trained.geometry["stride"],
        sizes=trained_sizes(options.size, trained),
        ground_truth_frames=options.frames if options.side_by_side else min(options.frames, TRUTH_SHOWN),
        start=options.start,
        fps=options.fps,
    )


def from_nothing(reading: ContextSettings) -> VideoContext:
    """A context without frames, of the first size."""
    nothing = torch.zeros((0, 3, *reading.sizes[0]), dtype=torch.uint8)
    return VideoContext("sample", nothing, nothing, reading.fps_or(None) / reading.stride)


def class_of(label: str | None, context: VideoContext, trained: TrainedModel) -> int:
    """The number of the class to generate; `NO_LABEL` for none.

    Raises:
        InputError: a label that the model does not know.
    """
    classes = trained.classes
    if label is None:
        return classes.index(context.label) if context.label in classes else NO_LABEL
    if label in classes:
        return classes.index(label)
    if label.isdecimal() and int(label) < len(classes):
        return int(label)
    known = f"give one of {', '.join(classes)}" if classes else "it was trained without labels, leave --label out"
    raise InputError(f"--label is {label!r}, which the checkpoint does not know: {known}.")


def generate(
    batch: Sequence[Video],
    frames: int,
    trained: TrainedModel,
    codec: Codec,
    config: GenerationConfig,
    bar: "tqdm[NoReturn]",
) -> None:
    """Make the videos of a batch, and say where they are; on Ctrl-C what there is of them.

    Raises:
        KeyboardInterrupt: after the files were finished.
    """
    stopped = False
    with ExitStack() as files:
        outputs = [files.enter_context(video.output) for video in batch]
        conditions = torch.tensor([video.label for video in batch]) if trained.classes else None
        try:
            known = torch.cat([known_latents(video.context, codec) for video in batch])
            for video, latents in zip(batch, known.cpu(), strict=True):
                if video.context.latents is None:
                    video.output.write(video.context.pixels[:0], latents)
            seeds = [video.seed for video in batch]
            for piece in stream_video(trained.backbone, codec, known, frames, config, ClipInputs(seeds, conditions)):
                with interrupts_later():
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


def known_latents(context: VideoContext, codec: Codec) -> Tensor:
    """The raw latents of a context: (1, k, C, h, w)."""
    if context.latents is not None:
        return context.latents[None].to(codec.device)
    if len(context.pixels):
        return codec.encode(context.pixels[None])
    height, width = (side // codec.spatial_factor for side in context.pixels.shape[-2:])
    return torch.zeros((1, 0, codec.latent_channels, height, width), device=codec.device)


@contextmanager
def interrupts_later() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until a frame is whole."""
    caught: list[int] = []
    before = {number: signal.signal(number, lambda number, _: caught.append(number)) for number in SIGNALS}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    for number in caught[:1]:
        signal.raise_signal(number)
