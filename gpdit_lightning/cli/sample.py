"""`sample`: continue videos with a trained model, or make them from nothing."""

import argparse
import logging
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

from gpdit_lightning.codecs import Codec, load_codec_from_spec
from gpdit_lightning.diffusion import SAMPLERS, Guidance, NoiseSchedule, make_sampler
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation import GenerationConfig, products_in, stream_video
from gpdit_lightning.generation.contexts import Context, Reading, grouped, read_contexts
from gpdit_lightning.generation.outputs import FORMATS, Output
from gpdit_lightning.media.images import parse_size
from gpdit_lightning.model import NO_LABEL
from gpdit_lightning.training.checkpoints import TrainedModel, load_trained_model

log = logging.getLogger(__name__)

PRECISIONS = {"32": None, "bf16": torch.bfloat16}


def parser() -> argparse.ArgumentParser:
    """The verb's options."""
    options = argparse.ArgumentParser(
        prog="python -m gpdit_lightning sample",
        description="Continue videos: contexts are read at the stride of the training clips, and results play at the "
        "matching rate. Frames are written as they are done; Ctrl-C keeps those so far as a playable file.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = options.add_argument
    add("--checkpoint", required=True, help="a checkpoint, a run folder or an exported folder")

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
    add("--seed", type=int, default=0, help="of the noise, the same for every context and whatever the batch")
    add("--batch_size", type=int, default=8, help="videos generated side by side")
    add("--sampler", default="rotation", choices=list(SAMPLERS), help="from noise to a frame; see docs/generation.md")
    add("--steps", type=int, default=25, help="sampler steps for each latent frame")
    add("--guidance", type=float, default=1.0, help="scale over the context; the paper takes 1.2 for H, 2.0 for B")
    add("--label_guidance", type=float, default=1.0, help="scale over the label")
    add(
        "--guidance_levels",
        type=float,
        nargs=2,
        default=[0.0, 1.0],
        metavar=("FROM", "TO"),
        help="noise levels that are guided: 1 is pure noise, 0 a clean frame",
    )
    add("--window", type=int, help="latest latent frames that a frame sees (default: as many as in training)")
    add("--sinks", type=int, default=0, help="first latent frames of the video that stay visible besides")
    add("--no_cache", action="store_true", help="keep no keys and values: less memory, more work (models with `of`)")
    add("--compile", action="store_true", help="fuse blocks with torch.compile: for long videos and on GPUs")
    add("--precision", default="auto", choices=["auto", *PRECISIONS], help="of products; auto is bf16 on CUDA, else 32")
    add("--weights", default="ema", choices=["ema", "raw"], help="averaged or last trained weights")
    add("--codec_source", help="where the codec's weights are now, if they moved since preparation")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")

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
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    trained = load_trained_model(options.checkpoint, device, options.weights)
    config = generation_config(options, trained, device)
    codec = load_codec_from_spec(trained.codec, device, options.codec_source, where=str(options.checkpoint))
    videos = videos_to_make(options, trained, codec)
    if config.precision is not None:
        products_in(trained.backbone, config.precision)

    log.info("%d x %d frames with the weights of step %d", len(videos), options.frames, trained.step)
    total = len(videos) * options.frames
    with (
        tqdm(total=total, unit=" frames", desc="generating") as bar,
        logging_redirect_tqdm([logging.getLogger("gpdit_lightning")]),
    ):
        for batch in grouped(videos, options.batch_size, lambda video: video.context):
            generate(batch, options.frames, trained, codec, config, bar)


def generation_config(options: argparse.Namespace, trained: TrainedModel, device: str) -> GenerationConfig:
    """How to generate, as the options say and the training allows."""
    longest = max(1, trained.geometry["frames"] - 1)
    window = max(1, longest - options.sinks) if options.window is None else options.window
    if window + options.sinks > longest:
        log.warning(
            "warning: frames see up to %d others (--window and --sinks), but in training at most %d: farther ones may "
            "do harm",
            window + options.sinks,
            longest,
        )
    precision = options.precision
    if precision == "auto":
        precision = "bf16" if device.startswith("cuda") else "32"
    return GenerationConfig(
        sampler=make_sampler(options.sampler, options.steps, NoiseSchedule(**trained.schedule)),
        guidance=Guidance(options.guidance, options.label_guidance, *options.guidance_levels),
        window=window,
        sinks=options.sinks,
        cached=not options.no_cache,
        compiled=options.compile,
        precision=PRECISIONS[precision],
    )


@dataclass(frozen=True)
class Video:
    """One video to make: what it continues, its noise and its label, and where it goes."""

    context: Context
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
    if ending in FORMATS and not single:
        raise InputError(
            f"--out {options.out} is one file, but {len(contexts) * len(seeds)} videos are made: give a folder."
        )
    videos = []
    for context in contexts:
        for seed in seeds:
            name = context.name if options.samples == 1 else f"{context.name}-seed{seed}"
            path = options.out.with_suffix("") if ending in FORMATS else options.out / name
            output = Output(path, formats, context, options.frames, options.mark, options.side_by_side)
            videos.append(Video(context, seed, class_of(options.label, context, trained), output))
    return videos


def reading_of(options: argparse.Namespace, trained: TrainedModel, codec: Codec) -> Reading:
    """Contexts like the training clips, but for what the options say."""
    sizes = tuple((height, width) for height, width in trained.geometry["sizes"])
    if options.size is not None:
        wanted = parse_size(options.size)
        if wanted not in sizes:
            known = ", ".join(f"{height}x{width}" for height, width in sizes)
            raise InputError(f"--size is {options.size}, but the checkpoint was trained on {known}: give one of these.")
        sizes = (wanted,)
    return Reading(
        frames=options.context_frames or codec.pixel_frames(max(1, trained.geometry["frames"] - 1)),
        stride=trained.geometry["stride"],
        sizes=sizes,
        following=options.frames,
        start=options.start,
        fps=options.fps,
    )


def from_nothing(reading: Reading) -> Context:
    """A context without frames, of the first size."""
    nothing = torch.zeros((0, 3, *reading.sizes[0]), dtype=torch.uint8)
    return Context("sample", nothing, nothing, reading.fps_or(None) / reading.stride)


def class_of(label: str | None, context: Context, trained: TrainedModel) -> int:
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
            for piece in stream_video(
                trained.backbone, codec, known, frames, config, seeds=seeds, condition=conditions
            ):
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


def known_latents(context: Context, codec: Codec) -> Tensor:
    """The raw latents of a context: (1, k, C, h, w)."""
    if context.latents is not None:
        return context.latents[None].to(codec.device)
    if len(context.pixels):
        return codec.encode(context.pixels[None])
    height, width = (side // codec.spatial_factor for side in context.pixels.shape[-2:])
    return torch.zeros((1, 0, codec.latent_channels, height, width), device=codec.device)


@contextmanager
def interrupts_later() -> Iterator[None]:
    """Let Ctrl-C wait until a frame is whole."""
    caught = []
    before = signal.signal(signal.SIGINT, lambda *_: caught.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        raise KeyboardInterrupt
