"""`demo`: train a small model on synthetic videos within minutes, with the functions that also serve real data."""

import json
import math
import os
import shutil
from collections.abc import Collection, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gpdit_lightning.checkpoints.reading import TrainedModel, load_trained_model
from gpdit_lightning.cli.chain import chain
from gpdit_lightning.cli.demo_videos import write_videos
from gpdit_lightning.codecs import Codec, load_codec_from_spec
from gpdit_lightning.diffusion import RotationSampler
from gpdit_lightning.errors import InputError, TransientError
from gpdit_lightning.files import atomic_write, write_once
from gpdit_lightning.generation import ClipInputs, GenerationConfig, continue_video
from gpdit_lightning.generation.context_readers import read_contexts
from gpdit_lightning.generation.contexts import ContextSettings
from gpdit_lightning.media.images import animation_pages, parse_size, read_image, write_animation, write_strip
from gpdit_lightning.media.video import iterate_frames
from gpdit_lightning.media.video_writer import write_video
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
from gpdit_lightning.progress import progress_bar
from gpdit_lightning.regular_files import read_bounded
from gpdit_lightning.schema import MAX_JSON_BYTES, SIZE, check, parse_json

VERSION = 2  # of the videos and the codec: data and models of other versions do not fit
VIDEOS, HELD_OUT_VIDEOS, SEED = 1200, 64, 0
FRAME_SIZE = "64x64"
RECORD = "demo.json"  # in the run folder: which demo it holds
CLIP, SHORTEST_CLIP = 21, 17  # frames at the training stride
CONTEXT = 9  # context frames of a clip; the others are generated
PAIRS, HELD_OUT_PAIRS = 40, 4
SAMPLER_STEPS = 2  # the motion of the context determines the next frames: more steps add detail, and errors
STRIP_CLIPS = 4  # clips in sample.png
ANIMATED_CLIPS = 2  # clips in sample.mp4 and sample.gif
ANIMATED_SIDE = 144  # pixels along a side of their frames
SAMPLING_BATCH = 16  # clips
OTHER_CURES = (
    "--out",
    "gpdit_lightning prepare",
    "same preparation",
)  # options and verbs that the user of `demo` did not give


def demo(options: DemoOptions) -> None:
    """Prepare data, train four stages, generate, and print the paths of the results.

    Raises:
        InputError: the videos cannot be used, or a file of an earlier demo in the run folder is damaged.
    """
    try:
        run_demo(options)
    except TransientError:
        raise
    except InputError as error:
        problem, _, cure = str(error).rpartition(": ")
        if not any(words in cure for words in OTHER_CURES):
            raise
        raise InputError(f"{problem}: remove {options.run_dir}, or give another --run_dir.") from None


def run_demo(options: DemoOptions) -> None:
    """Do what :func:`demo` does; errors have the cures of the verbs that the demo calls."""
    run_dir = options.run_dir
    check_run_dir(run_dir, options.videos)
    if options.videos:
        files = list_input_files(video_options(run_dir, options.videos))
        check_splits(options.videos, {str(file.split) for file in files}, "")
    record_demo(run_dir, options.videos)
    print("1/3  videos -> latents")
    videos = video_options(run_dir, options.videos)
    manifest = prepare(videos)
    if manifest is None:
        raise InputError(f"another process prepares {videos.out}: wait for it, or give another --run_dir.")
    print(summary(manifest))
    if options.videos:
        long_enough = f" of {videos.stride * (SHORTEST_CLIP - 1) + 1} or more frames"
        check_splits(options.videos, {shard.split for shard in manifest.shards}, long_enough)
    write_images(run_dir / "images", list_input_files(videos))
    prepare(image_options(run_dir, videos.codec))
    prepare_pairs(pair_options(run_dir, videos.codec))
    print("2/3  training on images, images and videos, longer videos, and few-shot sequences")
    steps = [f"--trainer.max_steps={options.max_steps}"] if options.max_steps else []
    chain(ChainOptions(config=["gpdit:demo/chain"], overrides=[f"--runs={run_dir}", *steps]))
    print("3/3  generating")
    print(evaluate(run_dir, videos))
    previews = run_dir / "stage4_few_shot" / "previews"
    few_shot = max(previews.glob("*.png"), default=None)
    if few_shot is None:
        raise InputError(
            f"{previews} has no images, though its stage is trained: remove {previews.parent}, and run the same "
            "command again."
        )
    with atomic_write(run_dir / "few_shot.png") as path:
        shutil.copyfile(few_shot, path)
    print(
        f"\nResults:\n  {run_dir}/sample.png     context, then generated frames above the ground truth\n"
        f"  {run_dir}/sample.mp4     the first of these clips as a video, and {run_dir}/sample.gif\n"
        f"  {run_dir}/few_shot.png   colour to grayscale, learned from 20 sequences; the last column is generated\n"
        f"  tensorboard --logdir {run_dir}   metrics, and previews during training\n"
        f"To continue {'one of your videos' if options.videos else 'another video of digits'}:\n"
        f"  python -m gpdit_lightning sample --checkpoint {run_dir}/stage3_long_video --steps {SAMPLER_STEPS} "
        f"--context {'VIDEO' if options.videos else run_dir / 'movies/held_out/digit_0004.mp4'} --out out.mp4"
    )


def check_run_dir(run_dir: Path, videos: Path | None) -> None:
    """Check that a run folder is new or holds this demo.

    Raises:
        InputError: the folder holds a demo of another version, or of other videos.
    """
    cure = "remove that folder, or give another --run_dir"
    record = run_dir / RECORD
    if record.exists():
        found = parse_json(read_bounded(record, MAX_JSON_BYTES), str(record), cure)
        check(found, {"version": SIZE}, "", str(record), cure)
    elif any((run_dir / name).exists() for name in ("movies", "images", "latents")):
        found = {"version": 1}
    else:
        return
    if found["version"] != VERSION:
        raise InputError(f"{run_dir} holds a demo that was begun by another version of this package: {cure}.")
    if found != recorded(videos):
        other = found.get("videos") or "the digits"
        raise InputError(f"{run_dir} holds the demo of {other}, not of {videos or 'the digits'}: {cure}.")


def record_demo(run_dir: Path, videos: Path | None) -> None:
    """Record in a new run folder which demo it holds, unless another process has recorded one, and compare it.

    Raises:
        InputError: the folder holds a demo of other videos.
    """
    if not (run_dir / RECORD).exists():
        write_once(run_dir / RECORD, json.dumps(recorded(videos)))
    check_run_dir(run_dir, videos)


def recorded(videos: Path | None) -> dict[str, Any]:
    """Return the record of the demo of a folder of videos, or of the digits."""
    return {"version": VERSION, "videos": os.path.realpath(videos) if videos else None}


def check_splits(videos: Path, splits: Collection[str], kind: str) -> None:
    """Raise `InputError` unless there are videos for training and held-out ones.

    Args:
        videos: the user's folder.
        splits: the splits that have videos.
        kind: a requirement of the videos, for the message.
    """
    if not {"train", "validation"} <= set(splits):
        raise InputError(
            f"{videos} has too few videos{kind}: the demo trains on some and continues others, so give --videos a "
            f"folder of at least two{kind}."
        )


def video_options(run_dir: Path, videos: Path | None) -> PrepareOptions:
    """Return how to prepare the user's videos, or synthetic ones, which are written first."""
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
        codec="pca" if held_out == [] else "pca_digits",
        video_sizes=[FRAME_SIZE],
        clip_frames=CLIP,
        least_clip_frames=SHORTEST_CLIP,
        batch_size=16,
    )


def write_images(directory: Path, videos: Sequence[InputFile]) -> None:
    """Write the first frames of every video as PNG files, in a folder per split; enough for all pairs."""
    per_video = math.ceil((PAIRS + HELD_OUT_PAIRS) / len(videos))
    for video in progress_bar(videos, desc="images", unit="video", leave=False):
        stem = video.name.replace("/", "-").replace(".", "-")
        paths = [directory / str(video.split) / f"{stem}-{number}.png" for number in range(per_video)]
        if not all(map(is_written, paths)):
            try:
                frames = list(iterate_frames(video.path, stride=9, max_frames=per_video))
            except InputError:
                continue  # reported by the preparation
            for path, frame in zip(paths, frames, strict=False):
                pixels = frame.resized(parse_size(FRAME_SIZE))
                with atomic_write(path) as temporary:
                    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(temporary, format="PNG")


def is_written(path: Path) -> bool:
    """Return whether an image was written; a damaged one is written again."""
    try:
        return path.is_file() and len(read_image(path)) > 0
    except TransientError:
        raise
    except InputError:
        return False


def image_options(run_dir: Path, codec: str) -> PrepareOptions:
    """Return how to prepare the images of the first two stages."""
    images = run_dir / "images"
    return PrepareOptions(
        out=run_dir / "latents" / "laion",
        images=[images / "train"],
        validation_images=[images / "validation"],
        codec=codec,
        image_sizes=[FRAME_SIZE],
        batch_size=64,
    )


def pair_options(run_dir: Path, codec: str) -> PreparePairsOptions:
    """Return how to build few-shot sequences from images of the training videos and their grayscale versions."""
    return PreparePairsOptions(
        out=run_dir / "latents" / "few_shot",
        task="grayscale",
        sources=run_dir / "images" / "train",
        pairs=PAIRS,
        held_out_pairs=HELD_OUT_PAIRS,
        size=FRAME_SIZE,
        codec=codec,
    )


def held_out_clips(preparation: PrepareOptions, stride: int, codec: Codec) -> tuple[Tensor, Fraction]:
    """Read the beginning of every held-out video that has CLIP frames, or SHORTEST_CLIP if none has, at the stride.

    Returns:
        Pixels (clips, T, 3, H, W) uint8, and the frames per second of the first clip.

    Raises:
        InputError: no held-out video is long enough.
    """
    for frames in (CLIP, SHORTEST_CLIP):
        settings = ContextSettings(
            CONTEXT, stride, (parse_size(FRAME_SIZE),), ground_truth_frames=frames - CONTEXT, start=0.0
        )
        clips, rates = clips_of_length(frames, preparation, settings, codec)
        if clips:
            return torch.stack(clips), rates[0]
    raise InputError(
        f"no held-out video has {stride * SHORTEST_CLIP} frames, which the comparison needs: give --videos a folder "
        "of at least two videos of that length."
    )


def clips_of_length(
    frames: int, preparation: PrepareOptions, settings: ContextSettings, codec: Codec
) -> tuple[list[Tensor], list[Fraction]]:
    """Return the first `frames` frames of every held-out video that is long enough, and their frames per second."""
    clips, rates = [], []
    for video in list_input_files(preparation):
        if video.split != "validation":
            continue
        try:
            (context,) = read_contexts([str(video.path)], settings, codec)
        except InputError:
            continue  # reported by the preparation
        clip = torch.cat((context.pixels, context.ground_truth))
        if len(clip) == frames:
            clips.append(clip)
            rates.append(context.fps)
    return clips, rates


def evaluate(run_dir: Path, preparation: PrepareOptions) -> str:
    """Continue the held-out clips, write samples and `report.json`, and compare with repeating the last context frame.

    Returns:
        The comparison as a table.
    """
    model = load_trained_model(run_dir / "stage3_long_video")
    codec = load_codec_from_spec(model.codec, owner=str(run_dir))
    clips, rate = held_out_clips(preparation, model.geometry.stride, codec)
    generated = continue_clips(model, codec, clips)
    write_animations(run_dir, generated, clips, rate)
    rows = {}
    for clip in range(min(STRIP_CLIPS, len(clips))):
        rows[f"{clip + 1} generated"], rows[f"{clip + 1} ground truth"] = generated[clip], clips[clip]
    write_strip(run_dir / "sample.png", rows, columns=clips.shape[1], context=CONTEXT)

    error, codec_error, copy_error = (
        squared_errors(videos, clips)
        for videos in (generated, through_codec(codec, clips), clips[:, CONTEXT - 1 : CONTEXT])
    )
    report = {
        "clips": len(clips),
        "step": model.step,
        "ratio": float(error.mean() / copy_error.mean()),
        "error": error.tolist(),
        "codec_error": codec_error.tolist(),
        "copy_error": copy_error.tolist(),
    }
    with atomic_write(run_dir / "report.json") as path:
        path.write_text(json.dumps(report, indent=2))
    return (
        f"mean squared error (8-bit levels) on {len(clips)} held-out clips, {CONTEXT} frames of context\n"
        f"{error_table(error, codec_error, copy_error)}\n"
        "ratio: error relative to repeating the last context frame (0: perfect, above 1: worse than repeating); the "
        "codec alone is the limit of every model; at +1 little has moved, so repeating is hard to beat"
    )


def write_animations(run_dir: Path, generated: Tensor, clips: Tensor, rate: Fraction) -> None:
    """Write `sample.mp4` and `sample.gif`: what is given, the generated clip and the ground truth, for the first clips.

    Args:
        run_dir: the folder.
        generated, clips: (B, T, 3, H, W) uint8.
        rate: frames per second.
    """
    given = clips.clone()
    given[:, CONTEXT:] = clips[:, CONTEXT - 1 : CONTEXT]  # stands still where generation begins
    videos = {"given": given, "generated": generated, "ground truth": clips}
    columns = {label: video[:ANIMATED_CLIPS] for label, video in videos.items()}
    write_animation(run_dir / "sample.gif", columns, float(rate), ANIMATED_SIDE, CONTEXT)
    pages = animation_pages(run_dir / "sample.mp4", columns, ANIMATED_SIDE, CONTEXT)
    pixels = torch.stack([torch.from_numpy(np.array(page)) for page in pages]).permute(0, 3, 1, 2)
    height, width = (side // 2 * 2 for side in pixels.shape[2:])  # mp4 needs even sides
    write_video(run_dir / "sample.mp4", pixels[..., :height, :width], rate)


def through_codec(codec: Codec, clips: Tensor) -> Tensor:
    """Return clips (B, T, 3, H, W) after encoding and decoding."""
    return torch.cat([codec.decode(codec.encode(batch)) for batch in clips.split(SAMPLING_BATCH)])


def squared_errors(videos: Tensor, clips: Tensor) -> Tensor:
    """Return the mean squared error of each frame after the context: (T - CONTEXT,).

    Args:
        videos: (B, T, 3, H, W) uint8, or a single frame (B, 1, 3, H, W) that is repeated.
        clips: the ground truth (B, T, 3, H, W) uint8.
    """
    future = videos[:, CONTEXT:] if videos.shape[1] > 1 else videos
    return (future.float() - clips[:, CONTEXT:].float()).square().mean(dim=(0, 2, 3, 4))


def continue_clips(model: TrainedModel, codec: Codec, clips: Tensor) -> Tensor:
    """Continue the first CONTEXT frames of clips (B, T, 3, H, W) to their length."""
    config = GenerationConfig(RotationSampler(SAMPLER_STEPS, schedule=model.schedule))
    frames = clips.shape[1] - CONTEXT
    batches = progress_bar(clips.split(SAMPLING_BATCH), desc="generating", unit="batch", leave=False)
    videos = [
        continue_video(
            model.backbone, codec, batch[:, :CONTEXT], frames, config, ClipInputs(SEED + SAMPLING_BATCH * number)
        )
        for number, batch in enumerate(batches)
    ]
    return torch.cat([video.pixels for video in videos])


def error_table(error: Tensor, codec_error: Tensor, copy_error: Tensor) -> str:
    """Return the errors of each generated frame, (T,) each, and their means as a table."""
    errors = torch.stack((error, codec_error, copy_error), dim=1)
    rows = [(f"+{frame}", values) for frame, values in enumerate(errors, start=1)] + [("mean", errors.mean(dim=0))]
    lines = [f"{'frame':>8}{'generated':>12}{'codec alone':>14}{'last repeated':>16}{'ratio':>8}{'of codec alone':>16}"]
    lines += [
        f"{name:>8}{ours:>12.1f}{codec:>14.1f}{copied:>16.1f}{ours / copied:>8.2f}{codec / copied:>16.2f}"
        for name, (ours, codec, copied) in rows
    ]
    return "\n".join(lines)
