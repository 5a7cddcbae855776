"""`demo`: from nothing to a generated video in minutes, through the same commands that a user's own data takes."""

import argparse
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from gpdit_lightning.cli import fit
from gpdit_lightning.cli.demo_movies import write_movies
from gpdit_lightning.cli.sample import read_context
from gpdit_lightning.codecs import load_codec_from_spec
from gpdit_lightning.diffusion import NoiseSchedule, RotationSampler
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import written_whole
from gpdit_lightning.generation import continue_video
from gpdit_lightning.media.images import parse_size, write_strip
from gpdit_lightning.media.video import write_video
from gpdit_lightning.preparation import PrepareOptions, prepare, summary
from gpdit_lightning.preparation.sources import find_sources
from gpdit_lightning.training.checkpoints import load_trained_model

RECIPE = Path(__file__).parents[2] / "recipes" / "demo" / "digits.yaml"

MOVIES, HELD_OUT_MOVIES, SEED = 1200, 64, 0
FRAME_SIZE = "64x64"
CONTEXT, GENERATED = 9, 8  # frames at the training stride: three latent frames given, two generated
SAMPLER_STEPS = 8
SHOWN = 4  # clips in sample.png


def parser() -> argparse.ArgumentParser:
    """The verb's options."""
    options = argparse.ArgumentParser(
        prog="python -m gpdit_lightning demo",
        description="Prepares moving pictures, trains a small GPDiT on them, continues held-out clips and compares "
        "them with repeating the last frame. Everything stays in one folder; the same command goes on from there.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    options.add_argument("--videos", type=Path, help="your own videos instead of the drawn ones (some are held out)")
    options.add_argument("--run_dir", type=Path, default=Path("runs/demo"), help="folder for everything the demo makes")
    options.add_argument("--max_steps", type=int, help="optimizer steps (default: the recipe's)")
    return options


def run(verb: str, arguments: Sequence[str]) -> None:
    """Prepare, train, sample, and say what to open."""
    options = parser().parse_args(arguments)
    if not RECIPE.is_file():
        raise InputError(
            f"{RECIPE} is missing: the demo trains from the recipes of a clone of the project; run it there."
        )
    run_dir: Path = options.run_dir
    print("1/3  moving pictures -> latents")
    preparation = preparation_of(run_dir, options.videos)
    manifest = prepare(preparation)
    print(summary(manifest))
    print("2/3  training")
    steps = [f"--trainer.max_steps={options.max_steps}"] if options.max_steps else []
    fit.run(
        "fit",
        [f"--config={RECIPE}", f"--run_dir={run_dir}", f"--data.videos.manifests=['{manifest.directory}']", *steps],
    )
    print("3/3  generating")
    print(evaluate(run_dir, preparation))
    print(
        f"\nLook at\n  {run_dir}/sample.png   context | generated against the truth\n  {run_dir}/sample.mp4   one of "
        f"them as a video\n  tensorboard --logdir {run_dir}   the curves\nContinue a video of your own:\n"
        f"  python -m gpdit_lightning sample --checkpoint {run_dir} --context VIDEO --out continued.mp4"
    )


def preparation_of(run_dir: Path, videos: Path | None) -> PrepareOptions:
    """How to shard the user's videos, or drawn ones, which are drawn first."""
    held_out: list[Path] = []
    if videos is None:
        videos, held_out = run_dir / "movies" / "train", [run_dir / "movies" / "held_out"]
        write_movies(videos, MOVIES, held_out=False, seed=SEED)
        write_movies(held_out[0], HELD_OUT_MOVIES, held_out=True, seed=SEED)
    return PrepareOptions(
        out=run_dir / "latents",
        videos=[videos],
        validation_videos=held_out,
        validation_fraction=0.2,
        codec="pca",
        video_sizes=[FRAME_SIZE],
        batch_size=16,
    )


def held_out_clips(preparation: PrepareOptions, stride: int) -> tuple[Tensor, Fraction]:
    """The first CONTEXT + GENERATED frames of every held-out video that is long enough.

    Returns:
        pixels (n, T, 3, H, W) uint8 and the first one's frames per second.

    Raises:
        InputError: no video was held out, or none of those is long enough.
    """
    size = parse_size(FRAME_SIZE)
    clips, rates = [], []
    for source in find_sources(preparation):
        if source.split != "validation":
            continue
        try:
            context, truth, rate = read_context(source.path, stride, [size], CONTEXT, 0.0, GENERATED)
        except InputError:
            continue  # the preparation has named it already
        if len(truth) == GENERATED:
            clips.append(torch.cat((context, truth)))
            rates.append(rate)
    if not clips:
        raise InputError(
            f"no held-out video has {stride * (CONTEXT + GENERATED)} frames to be continued and compared: give "
            "--videos a folder of at least two videos of that length."
        )
    return torch.stack(clips), rates[0]


def evaluate(run_dir: Path, preparation: PrepareOptions) -> str:
    """Continue the held-out clips, write pictures, and compare with repeating the last context frame."""
    model = load_trained_model(run_dir)
    codec = load_codec_from_spec(model.codec, where=str(run_dir))
    clips, rate = held_out_clips(preparation, model.geometry["stride"])
    sampler = RotationSampler(SAMPLER_STEPS, schedule=NoiseSchedule(**model.schedule))
    generated = torch.cat(
        [
            continue_video(model.backbone, codec, batch[:, :CONTEXT], GENERATED, sampler, seed=SEED + number).pixels
            for number, batch in enumerate(tqdm(clips.split(16), desc="generating", unit="batch", leave=False))
        ]
    )
    future, truth = generated[:, CONTEXT:].float(), clips[:, CONTEXT:].float()
    copied = clips[:, CONTEXT - 1 : CONTEXT].float()
    error = (future - truth).square().mean(dim=(0, 2, 3, 4))
    copy_error = (copied - truth).square().mean(dim=(0, 2, 3, 4))

    write_video(run_dir / "sample.mp4", torch.cat((generated[0], clips[0]), dim=-1), rate)
    rows = {}
    for clip in range(min(SHOWN, len(clips))):
        rows[f"{clip + 1} generated"], rows[f"{clip + 1} truth"] = generated[clip], clips[clip]
    write_strip(run_dir / "sample.png", rows, columns=CONTEXT + GENERATED, context=CONTEXT)

    ratio = float(error.mean() / copy_error.mean())
    with written_whole(run_dir / "report.json") as path:
        figures = {"clips": len(clips), "step": model.step, "ratio": ratio}
        path.write_text(json.dumps(figures | {"error": error.tolist(), "copy_error": copy_error.tolist()}, indent=2))
    lines = [
        f"mean squared error (8-bit levels) on {len(clips)} held-out clips, {CONTEXT} frames given",
        f"{'frame':>8}{'generated':>12}{'last frame repeated':>22}{'ratio':>8}",
    ]
    for horizon, (ours, copy) in enumerate(zip(error.tolist(), copy_error.tolist(), strict=True), start=1):
        lines.append(f"{'+' + str(horizon):>8}{ours:>12.1f}{copy:>22.1f}{ours / copy:>8.2f}")
    lines.append(f"{'mean':>8}{error.mean():>12.1f}{copy_error.mean():>22.1f}{ratio:>8.2f}")
    return "\n".join(lines)
