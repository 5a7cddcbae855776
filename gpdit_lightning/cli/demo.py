"""`demo`: train a small model on drawn videos within minutes, by the same functions that a user's own data takes."""

import json
import math
import shutil
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from gpdit_lightning.checkpoints.reading import load_trained_model
from gpdit_lightning.cli.chain import chain
from gpdit_lightning.cli.demo_videos import write_videos
from gpdit_lightning.codecs import Codec, load_codec_from_spec
from gpdit_lightning.diffusion import RotationSampler
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import atomic_write
from gpdit_lightning.generation import ClipInputs, GenerationConfig, continue_video
from gpdit_lightning.generation.contexts import ContextSettings, read_contexts
from gpdit_lightning.media.images import parse_size, resize_and_crop, write_strip
from gpdit_lightning.media.video import iterate_frames, write_video
from gpdit_lightning.options.chain import ChainOptions
from gpdit_lightning.options.demo import DemoOptions
from gpdit_lightning.preparation import (
    PrepareOptions,
    PreparePairsOptions,
    list_input_files,
    prepare,
    prepare_pairs,
    summary,
)
from gpdit_lightning.preparation.input_files import InputFile

VIDEOS, HELD_OUT_VIDEOS, SEED = 1200, 64, 0
FRAME_SIZE = "64x64"
CLIP, SHORTEST_CLIP = 21, 17  # frames at the training stride
CONTEXT = 9  # frames of a clip that are given; the others are generated
PAIRS, HELD_OUT_PAIRS = 40, 4
SAMPLER_STEPS = 8
SHOWN = 4  # clips in sample.png


def demo(options: DemoOptions) -> None:
    """Prepare, train, sample, and say which files to open."""
    run_dir = options.run_dir
    print("1/3  videos -> latents")
    videos = video_options(run_dir, options.videos)
    manifest = prepare(videos)
    if manifest is None:
        raise InputError(f"another process prepares {videos.out}: wait for it, or give another --run_dir.")
    print(summary(manifest))
    write_images(run_dir / "pictures", list_input_files(videos))
    prepare(image_options(run_dir))
    prepare_pairs(pair_options(run_dir))
    print("2/3  training: images, images and videos, longer videos, few-shot")
    steps = [f"--trainer.max_steps={options.max_steps}"] if options.max_steps else []
    chain(ChainOptions(config=["gpdit:demo/chain"], overrides=[f"--runs={run_dir}", *steps]))
    print("3/3  generating")
    print(evaluate(run_dir, videos))
    few_shot = max((run_dir / "stage4_few_shot" / "previews").glob("*.png"))
    shutil.copyfile(few_shot, run_dir / "few_shot.png")
    print(
        f"\nResults:\n  {run_dir}/sample.png     context | generated frames above the true ones\n"
        f"  {run_dir}/sample.mp4     the first of them as a video, generated beside true\n"
        f"  {run_dir}/few_shot.png   colour to grayscale, learned from 20 sequences: the last column is generated\n"
        f"  tensorboard --logdir {run_dir}   curves, and previews during training\n"
        "Continue a video of your own:\n"
        f"  python -m gpdit_lightning sample --checkpoint {run_dir}/stage3_long_video --context VIDEO --out out.mp4"
    )


def video_options(run_dir: Path, videos: Path | None) -> PrepareOptions:
    """How to prepare the user's videos, or drawn ones, which are written first."""
    held_out: list[Path] = []
    if videos is None:
        videos, held_out = run_dir / "movies" / "train", [run_dir / "movies" / "held_out"]
        write_videos(videos, VIDEOS, held_out=False, seed=SEED)
        write_videos(held_out[0], HELD_OUT_VIDEOS, held_out=True, seed=SEED)
    return PrepareOptions(
        out=run_dir / "latents" / "video",
        videos=[videos],
        validation_videos=held_out,
        validation_fraction=0.2,
        codec="pca",
        video_sizes=[FRAME_SIZE],
        clip_frames=CLIP,
        least_clip_frames=SHORTEST_CLIP,
        batch_size=16,
    )


def write_images(directory: Path, videos: Sequence[InputFile]) -> None:
    """Write the first frames of every video as PNG files, by split: enough for the pairs."""
    each = math.ceil((PAIRS + HELD_OUT_PAIRS) / len(videos))
    for source in tqdm(videos, desc="images", unit="video", leave=False):
        stem = source.name.replace("/", "-").replace(".", "-")
        paths = [directory / str(source.split) / f"{stem}-{number}.png" for number in range(each)]
        if not all(path.exists() for path in paths):
            try:
                frames = list(iterate_frames(source.path, stride=9, max_frames=each))
            except InputError:
                continue  # named by the preparation already
            for path, frame in zip(paths, frames, strict=False):
                pixels = resize_and_crop(frame[None], parse_size(FRAME_SIZE))[0]
                with atomic_write(path) as temporary:
                    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(temporary, format="PNG")


def image_options(run_dir: Path) -> PrepareOptions:
    """How to prepare the images of the first two stages."""
    images = run_dir / "pictures"
    return PrepareOptions(
        out=run_dir / "latents" / "laion",
        images=[images / "train"],
        validation_images=[images / "validation"],
        codec="pca",
        image_sizes=[FRAME_SIZE],
        batch_size=64,
    )


def pair_options(run_dir: Path) -> PreparePairsOptions:
    """How to build the few-shot sequences: from images of the training videos and their grayscale versions."""
    return PreparePairsOptions(
        out=run_dir / "latents" / "few_shot",
        task="grayscale",
        sources=run_dir / "pictures" / "train",
        pairs=PAIRS,
        held_out_pairs=HELD_OUT_PAIRS,
        size=FRAME_SIZE,
        codec="pca",
    )


def held_out_clips(preparation: PrepareOptions, stride: int, codec: Codec) -> tuple[Tensor, Fraction]:
    """The first CLIP frames of every held-out video that is long enough at the stride; else the first SHORTEST_CLIP.

    Returns:
        pixels (clips, T, 3, H, W) uint8, and the frames per second of the first.

    Raises:
        InputError: no held-out video is long enough.
    """
    for frames in (CLIP, SHORTEST_CLIP):
        reading = ContextSettings(
            CONTEXT, stride, (parse_size(FRAME_SIZE),), ground_truth_frames=frames - CONTEXT, start=0.0
        )
        clips, rates = clips_of_length(frames, preparation, reading, codec)
        if clips:
            return torch.stack(clips), rates[0]
    raise InputError(
        f"no held-out video has the {stride * SHORTEST_CLIP} frames that a comparison needs: give --videos a folder "
        "of at least two videos of that length."
    )


def clips_of_length(
    frames: int, preparation: PrepareOptions, reading: ContextSettings, codec: Codec
) -> tuple[list[Tensor], list[Fraction]]:
    """The first `frames` frames of every held-out video that is long enough, and their frames per second."""
    clips, rates = [], []
    for source in list_input_files(preparation):
        if source.split != "validation":
            continue
        try:
            (context,) = read_contexts([str(source.path)], reading, codec)
        except InputError:
            continue  # named by the preparation already
        clip = torch.cat((context.pixels, context.ground_truth))
        if len(clip) == frames:
            clips.append(clip)
            rates.append(context.fps)
    return clips, rates


def evaluate(run_dir: Path, preparation: PrepareOptions) -> str:
    """Continue the held-out clips, write images, and compare with repeating the last context frame."""
    model = load_trained_model(run_dir / "stage3_long_video")
    codec = load_codec_from_spec(model.codec, owner=str(run_dir))
    clips, rate = held_out_clips(preparation, model.geometry.stride, codec)
    future_frames = clips.shape[1] - CONTEXT
    config = GenerationConfig(RotationSampler(SAMPLER_STEPS, schedule=model.schedule))
    generated = torch.cat(
        [
            continue_video(
                model.backbone, codec, batch[:, :CONTEXT], future_frames, config, ClipInputs(SEED + 16 * number)
            ).pixels
            for number, batch in enumerate(tqdm(clips.split(16), desc="generating", unit="batch", leave=False))
        ]
    )
    future, truth = generated[:, CONTEXT:].float(), clips[:, CONTEXT:].float()
    last = clips[:, CONTEXT - 1 : CONTEXT].float()
    error = (future - truth).square().mean(dim=(0, 2, 3, 4))
    copy_error = (last - truth).square().mean(dim=(0, 2, 3, 4))

    write_video(run_dir / "sample.mp4", torch.cat((generated[0], clips[0]), dim=-1), rate)
    rows = {}
    for clip in range(min(SHOWN, len(clips))):
        rows[f"{clip + 1} generated"], rows[f"{clip + 1} truth"] = generated[clip], clips[clip]
    write_strip(run_dir / "sample.png", rows, columns=clips.shape[1], context=CONTEXT)

    ratio = float(error.mean() / copy_error.mean())
    with atomic_write(run_dir / "report.json") as path:
        figures = {"clips": len(clips), "step": model.step, "ratio": ratio}
        path.write_text(json.dumps(figures | {"error": error.tolist(), "copy_error": copy_error.tolist()}, indent=2))
    lines = [
        f"mean squared error (8-bit levels) on {len(clips)} held-out clips, {CONTEXT} frames of context",
        f"{'frame':>8}{'generated':>12}{'last frame repeated':>22}{'ratio':>8}",
    ]
    for horizon, (own, copied) in enumerate(zip(error.tolist(), copy_error.tolist(), strict=True), start=1):
        lines.append(f"{'+' + str(horizon):>8}{own:>12.1f}{copied:>22.1f}{own / copied:>8.2f}")
    lines.append(f"{'mean':>8}{error.mean():>12.1f}{copy_error.mean():>22.1f}{ratio:>8.2f}")
    return "\n".join(lines)
