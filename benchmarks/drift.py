"""`python -m benchmarks.drift --checkpoint RUN [RUN ...] --videos HELD_OUT`: drift of long rollouts.

Each model continues the beginning of the held-out videos for many latent frames, with every combination of sampler,
window and context noise that is given. Two curves show what becomes of the latent frames:

- the error ratio, where the videos are long enough to know the truth: mean squared error of a frame over all videos,
  relative to that of the last context frame. Above 1, repeating the last frame is better. A video of another scene on
  another path would have a ratio near 1 too, so the ratio shows errors of the content.
- the distance of statistics: squared 2-Wasserstein distance of Gaussians with the means and standard deviations of each
  channel over all places and videos, from those of the real latents, averaged over channels. It is 0 for frames that
  look like real ones, whatever they show, and grows as frames lose contrast or gain noise.

The numbers are how many frames pass before the ratio is at least 1, and the growth of the distance per 100 frames, by
least squares. `python -m benchmarks.drift_videos` makes videos whose continuation is known at any length. Runs of one
arm with several seeds are given as one name, ARM=RUN,RUN,RUN: curves are means over them, with the range between them,
in `drift.png`. `frames.png` shows frames of the first two videos, by the first run of each arm, below the truth.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.systems import frames_below_1
from gpdit_lightning import GPDiTPipeline
from gpdit_lightning.cli.ablation_report import spread
from gpdit_lightning.diffusion import make_sampler
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.videos import read_clip, select_videos
from gpdit_lightning.files import atomic_write
from gpdit_lightning.generation import ClipInputs, GenerationConfig, rollout
from gpdit_lightning.generation.plans import block_window
from gpdit_lightning.media.images import write_sheet
from gpdit_lightning.media.video import count_frames
from gpdit_lightning.progress import progress_bar

SHOWN_VIDEOS = 2
SHOWN_FRAMES = 1, 2, 5, 10, 20, 35, 50, 100, 150, 200  # generated latent frames


@dataclass(frozen=True)
class Rollouts:
    """How continuations are generated.

    Attributes:
        sampler: name of the sampler.
        steps: sampler steps per latent frame.
        window: latent frames that a new frame attends to; None: as in training.
        context_noise: angle in radians of the context noise.
    """

    sampler: str
    steps: int
    window: int | None
    context_noise: float

    def __str__(self) -> str:
        window = "" if self.window is None else f", window {self.window}"
        return f"{self.sampler} {self.steps}{window}, context noise {self.context_noise:g}"


@dataclass(frozen=True)
class DriftCurves:
    """The curves of one model, by generated latent frame.

    Attributes:
        ratios: error ratio of each frame whose truth is known.
        distances: distance of statistics of each frame.
    """

    ratios: list[float]
    distances: list[float]

    @property
    def frames_better(self) -> int:
        """Number of first frames whose error ratio is below 1."""
        return frames_below_1(self.ratios)

    @property
    def growth(self) -> float:
        """Growth of the distance of statistics per 100 frames."""
        return float(np.polyfit(np.arange(len(self.distances)), self.distances, 1)[0]) * 100


def channel_statistics(latents: Tensor) -> Tensor:
    """Return mean and standard deviation of each channel, (2, ..., C), of whitened latents (B, ..., C, h, w)."""
    by_channel = latents.movedim(0, -1).flatten(-3)
    return torch.stack((by_channel.mean(-1), by_channel.std(-1)))


def drift_curves(generated: Tensor, context: Tensor, truth: Tensor) -> DriftCurves:
    """Compare generated latent frames with the truth.

    Args:
        generated: (B, F, C, h, w) whitened.
        context: (B, C, h, w), the last context frame.
        truth: (B, F', C, h, w) the frames that follow it, as far as they are known; F' may be less than F.
    """
    known = min(generated.shape[1], truth.shape[1])
    errors, of_repeating = (
        (frames - truth[:, :known]).square().mean((0, 2, 3, 4)) for frames in (generated[:, :known], context[:, None])
    )
    real = channel_statistics(torch.cat((context[:, None], truth), dim=1).flatten(0, 1))
    distances = (channel_statistics(generated) - real[:, None]).square().sum(0).mean(-1)
    return DriftCurves((errors / of_repeating).tolist(), distances.tolist())


def held_out_latents(pipeline: GPDiTPipeline, folders: Sequence[str], count: int, frames: int) -> Tensor:
    """Return the whitened latents (B, F, C, h, w) of the beginnings of videos, at most `frames` and equally many."""
    codec, geometry = pipeline.codec, pipeline.trained.geometry
    shortest = 1 + (codec.pixel_frames(geometry.frames) - 1) * geometry.stride
    clips = []
    for path in progress_bar(select_videos(folders, count, 0, shortest).paths, desc="reading", leave=False):
        available = 1 + (count_frames(path) - 1) // geometry.stride
        whole = min(frames, 1 + (available - 1) // codec.temporal_factor)
        pixels = read_clip(path, codec.pixel_frames(whole), geometry.stride, pipeline.sizes[0])
        clips.append(codec.whitened(codec.encode(pixels[None].to(codec.device)))[0])
    return torch.stack([clip[: min(map(len, clips))] for clip in clips])


def given_frames(pipeline: GPDiTPipeline, latents: Tensor) -> int:
    """Return the number of frames of latents (B, F, C, h, w) that a model is given: as many as it can in training."""
    return pipeline.model.layout(*latents.shape[-2:]).context_length(pipeline.trained.geometry.frames - 1)


def continuations(pipeline: GPDiTPipeline, latents: Tensor, frames: int, how: Rollouts) -> Tensor:
    """Continue the beginnings of latents (B, F, C, h, w); return the generated ones (B, frames, C, h, w)."""
    trained, model = pipeline.trained, pipeline.model
    layout, given = model.layout(*latents.shape[-2:]), given_frames(pipeline, latents)
    window, sinks = block_window(layout, trained.geometry.frames, given + frames, how.window)
    sampler = make_sampler(how.sampler, how.steps, trained.schedule)
    config = GenerationConfig(sampler, window=window, sinks=sinks, context_noise=how.context_noise)
    steps = progress_bar(
        rollout(model, latents[:, :given], frames, config, ClipInputs(0)),
        total=frames,
        desc=str(how),
        unit="frame",
        leave=False,
    )
    return torch.stack(list(steps), dim=1)


def shown_frames(pipeline: GPDiTPipeline, latents: Tensor, given: int) -> list[list[Tensor]]:
    """Return frames (3, H, W) of each of the first videos: the last given frame, and `SHOWN_FRAMES` after it."""
    decoder, columns = pipeline.codec.decoder(), []
    for number, latent in enumerate(pipeline.codec.unwhitened(latents[:SHOWN_VIDEOS]).split(1, dim=1), 1 - given):
        pixels = decoder(latent)
        if number in (0, *SHOWN_FRAMES):
            columns.append(pixels[:, -1].cpu())
    return [list(video) for video in torch.stack(columns, dim=1)]


def draw(results: dict[str, list[DriftCurves]], path: Path) -> None:
    """Draw both curves: the mean over the models of an arm, and the range between them."""
    from matplotlib.figure import Figure  # takes half a second to import

    figure = Figure(figsize=(11, 4 + 0.1 * len(results)), layout="constrained")
    for axes, name, label in zip(
        figure.subplots(1, 2), ("ratios", "distances"), ("error ratio", "distance of statistics"), strict=True
    ):
        for number, (arm, curves) in enumerate(results.items()):
            values = np.array([getattr(curve, name) for curve in curves])
            frames = np.arange(1, values.shape[1] + 1)
            style = ("-", "--", ":")[number // 10 % 3]  # colours repeat after ten arms
            (line,) = axes.plot(frames, values.mean(0), style, label=arm)
            axes.fill_between(frames, values.min(0), values.max(0), color=line.get_color(), alpha=0.15)
        axes.set_xlabel("generated latent frame")
        axes.set_ylabel(label)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, format="png", dpi=110)


def table(results: dict[str, list[DriftCurves]]) -> str:
    """Return the numbers as a table in Markdown: means and standard deviations over the models of an arm."""
    lines = [
        "| arm | frames until the ratio is 1 | ratio, mean of frames 1 to 10 | distance at the end | growth per 100 |",
        "|---|---|---|---|---|",
    ]
    for arm, curves in results.items():
        cells = [
            [float(curve.frames_better) for curve in curves],
            [float(np.mean(curve.ratios[:10])) for curve in curves],
            [float(np.mean(curve.distances[-10:])) for curve in curves],
            [curve.growth for curve in curves],
        ]
        lines.append(f"| {arm} | {' | '.join(spread(values) for values in cells)} |")
    return "\n".join(lines)


def arm_of(text: str) -> tuple[str, list[str]]:
    """Return name and runs of ARM=RUN,RUN, or of a single RUN."""
    name, _, runs = text.partition("=")
    return name, (runs or name).split(",")


def sampler_of(text: str) -> tuple[str, int]:
    """Return name and steps of SAMPLER:STEPS."""
    name, _, steps = text.partition(":")
    if not steps.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not SAMPLER:STEPS, such as adams:8")
    return name, int(steps)


def option_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m benchmarks.drift",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", nargs="+", required=True, help="RUN, or ARM=RUN,RUN for several seeds")
    parser.add_argument("--videos", nargs="+", required=True, help="folders of held-out videos")
    parser.add_argument("--clips", type=int, default=16, help="number of videos")
    parser.add_argument("--frames", type=int, default=200, help="latent frames to generate")
    parser.add_argument("--sampler", nargs="+", type=sampler_of, default=[("adams", 8)], help="SAMPLER:STEPS")
    parser.add_argument(
        "--window", nargs="+", type=int, default=[None], help="latent frames; by default as in training"
    )
    parser.add_argument("--context_noise", nargs="+", type=float, default=[0.0], help="angles in radians")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--out", type=Path, default=Path("drift"), help="folder for drift.json, drift.md and pictures")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write it with the curves."""
    options = option_parser().parse_args(arguments)
    ways = [
        Rollouts(name, steps, window, angle)
        for (name, steps), window, angle in itertools.product(options.sampler, options.window, options.context_noise)
    ]
    results: dict[str, list[DriftCurves]] = {}
    pictures: list[tuple[str, list[Tensor]]] = []
    for name, runs in map(arm_of, options.checkpoint):
        for run in runs:
            pipeline = GPDiTPipeline.from_pretrained(run, device=options.device, precision="32")
            if not pipeline.model.config.takes_context:
                raise InputError(f"{run} is a model of whole clips, which has no rollout: leave it out.")
            latents = held_out_latents(pipeline, options.videos, options.clips, options.frames + 64)
            given = given_frames(pipeline, latents)
            if not pictures:
                pictures += [("truth", pixels) for pixels in shown_frames(pipeline, latents, given)]
            for how in ways:
                arm = f"{name}, {how}" if len(ways) > 1 else name
                generated = continuations(pipeline, latents, options.frames, how)
                if arm not in results:
                    whole = torch.cat((latents[:, :given], generated), dim=1)
                    pictures += [(arm, pixels) for pixels in shown_frames(pipeline, whole, given)]
                curves = drift_curves(generated, latents[:, given - 1], latents[:, given:])
                results.setdefault(arm, []).append(curves)
    options.out.mkdir(parents=True, exist_ok=True)
    text = table(results)
    print(text)
    with atomic_write(options.out / "drift.md") as path:
        path.write_text(text + "\n", encoding="utf-8")
    content = {arm: [asdict(curve) for curve in curves] for arm, curves in results.items()}
    with atomic_write(options.out / "drift.json") as path:
        path.write_text(json.dumps(content), encoding="utf-8")
    with atomic_write(options.out / "drift.png") as path:
        draw(results, path)
    with atomic_write(options.out / "frames.png") as path:
        write_sheet(path, ["given", *(f"frame {number}" for number in SHOWN_FRAMES)], pictures, context_columns=1)


if __name__ == "__main__":
    main()
