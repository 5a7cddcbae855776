"""`sample`: continue a video with a trained model."""

import argparse
from collections import deque
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from gpdit_lightning.codecs import load_codec_from_spec
from gpdit_lightning.diffusion import NoiseSchedule, RotationSampler
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation import continue_video
from gpdit_lightning.media.images import IMAGE_ENDINGS, closest_size, read_image, resize_and_crop, write_strip
from gpdit_lightning.media.video import iterate_frames, video_info, write_video
from gpdit_lightning.training.checkpoints import load_trained_model

STILL_RATE = Fraction(24)  # frames per second that a still image is taken to have


def parser() -> argparse.ArgumentParser:
    """The verb's options."""
    options = argparse.ArgumentParser(
        prog="python -m gpdit_lightning sample",
        description="Continue a video: the context is read at the stride of the training clips, and the result plays "
        "at the matching rate. Writes an mp4 (context, then generated frames) and a PNG strip beside it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    options.add_argument("--checkpoint", required=True, help="a checkpoint, a run folder or an exported folder")
    options.add_argument("--context", required=True, type=Path, help="the video or still image to continue")
    options.add_argument("--frames", type=int, default=16, help="frames to generate")
    options.add_argument("--out", type=Path, default=Path("sample.mp4"), help="the mp4 to write")
    options.add_argument(
        "--context_frames",
        type=int,
        help="context frames, 1 + 4k at the training stride (default: the training clips' but one latent frame)",
    )
    options.add_argument(
        "--start", type=float, help="second at which the context begins (default: such that it ends with the video)"
    )
    options.add_argument("--steps", type=int, default=25, help="sampler steps for each latent frame")
    options.add_argument("--rule", default="rotation", choices=["rotation", "tangent"], help="the sampler's step")
    options.add_argument("--seed", type=int, default=0, help="of the noise")
    options.add_argument("--weights", default="ema", choices=["ema", "raw"], help="averaged or last trained weights")
    options.add_argument("--codec_source", help="where the codec's weights are now, if they moved since preparation")
    options.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return options


def read_context(
    path: Path, stride: int, sizes: Sequence[Sequence[int]], wanted: int, start: float | None, following: int
) -> tuple[Tensor, Tensor, Fraction]:
    """Context frames of a video, and those that really follow.

    Args:
        path: a video or a still image.
        stride: take every stride-th frame.
        sizes: (height, width) choices; the closest in aspect is taken.
        wanted: context frames.
        start: second at which they begin; None: so that they end with the video.
        following: how many later frames to read as truth.

    Returns:
        context (T, 3, H, W) uint8, truth (at most `following`, 3, H, W), and frames per second at this stride.

    Raises:
        InputError: unreadable, or shorter than the context.
    """
    if path.suffix.lower() in IMAGE_ENDINGS:
        image = read_image(path)
        size = closest_size(image.shape[-2], image.shape[-1], [(height, width) for height, width in sizes])
        return resize_and_crop(image, size), image[:0], STILL_RATE / stride
    info = video_info(path)
    size = closest_size(info.height, info.width, [(height, width) for height, width in sizes])
    if start is None:
        frames = list(deque(iterate_frames(path, stride=stride), maxlen=wanted))
    else:
        frames = list(iterate_frames(path, round(start * info.fps), stride, wanted + following))
    if len(frames) < wanted:
        raise InputError(
            f"{path} gives {len(frames)} frames at stride {stride}, but the context needs {wanted}: take a longer "
            "video, an earlier --start, or fewer --context_frames (1 + 4k)."
        )
    pixels = resize_and_crop(torch.stack(frames), size)
    return pixels[:wanted], pixels[wanted:], info.fps / stride


def run(verb: str, arguments: Sequence[str]) -> None:
    """Generate and write."""
    options = parser().parse_args(arguments)
    if options.frames < 1:
        raise InputError(f"--frames is {options.frames}: generate at least 1.")
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    trained = load_trained_model(options.checkpoint, device, options.weights)
    codec = load_codec_from_spec(trained.codec, device, options.codec_source, where=str(options.checkpoint))
    known = options.context_frames or codec.pixel_frames(max(1, trained.geometry["frames"] - 1))
    still = options.context.suffix.lower() in IMAGE_ENDINGS
    context, truth, rate = read_context(
        options.context,
        trained.geometry["stride"],
        trained.geometry["sizes"],
        1 if still else known,
        options.start,
        options.frames,
    )
    sampler = RotationSampler(options.steps, options.rule, NoiseSchedule(**trained.schedule))
    result = continue_video(
        trained.backbone, codec, context[None], options.frames, sampler, options.seed, progress=True
    ).pixels[0]
    write_video(options.out, result, rate)
    strip = options.out.with_suffix(".png")
    rows = {"generated": result}
    if len(truth):
        rows["truth"] = torch.cat((context, truth))
    write_strip(strip, rows, context=len(context))
    print(
        f"{options.out}: {len(context)} context frames and {options.frames} generated at {float(rate):.3g} frames/s "
        f"(step {trained.step}); the same as a picture: {strip}"
    )
