"""`python -m benchmarks.trained_arms --checkpoint ARM=RUN,RUN [...] --videos HELD_OUT`: what trained runs generate.

Every run continues the same held-out videos, from the same noise, with every combination of sampler and guidance scale
that is given. Runs of one arm of an ablation with several seeds are given as one name, ARM=RUN,RUN,RUN. The table shows
means and standard deviations over the runs of an arm:

- PSNR of the generated frames, and the error ratio: mean squared error of a generated frame over all videos, relative
  to that of the last context frame. It is shown as the mean over all frames, and by horizon;
- the difference of that mean from the first row, run by run, with the 95 % interval of its mean (Student's t). The
  runs of two arms are paired in their order, so give them in the order of their seeds;
- FVD, if its network is given with --video_network;
- with --probe_videos, the accuracy of a linear probe of each layer, by `python -m gpdit_lightning probe`.

So it compares guidance scales, samplers and their steps, or arms such as `of` and `of2`, with the spread over seeds.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.drift import arm_of, sampler_of
from benchmarks.systems import error_ratios
from gpdit_lightning import GPDiTPipeline
from gpdit_lightning.cli.ablation_report import interval_text, plot_range, spread
from gpdit_lightning.devices import device_name
from gpdit_lightning.evaluation.videos import read_clip, select_videos
from gpdit_lightning.files import atomic_write
from gpdit_lightning.progress import progress_bar

HORIZONS = (1, 4, 8, 16)  # generated pixel frames


@dataclass(frozen=True)
class Sampling:
    """How continuations are generated.

    Attributes:
        sampler: name of the sampler.
        steps: sampler steps per latent frame.
        guidance: guidance scale over the context.
    """

    sampler: str
    steps: int
    guidance: float

    def __str__(self) -> str:
        return f"{self.sampler} {self.steps}, guidance {self.guidance:g}"


@dataclass(frozen=True)
class Continued:
    """The scores of one run with one way of sampling.

    Attributes:
        psnr: in dB, mean over frames, then videos.
        ratios: for each generated frame, the error ratio.
        fvd: None without a network.
    """

    psnr: float
    ratios: list[float]
    fvd: float | None = None

    @property
    def mean_ratio(self) -> float:
        """The mean error ratio of all generated frames."""
        return statistics.mean(self.ratios)


def truth_of(pipeline: GPDiTPipeline, options: argparse.Namespace) -> Tensor:
    """Return the held-out videos, uint8 (videos, T, 3, H, W), at the stride of training."""
    frames, stride = options.context_frames + options.generated_frames, pipeline.trained.geometry.stride
    selection = select_videos(options.videos, options.count, 0, 1 + (frames - 1) * stride)
    return torch.stack([read_clip(path, frames, stride, pipeline.sizes[0]) for path in selection.paths])


def psnr(generated: Tensor, truth: Tensor) -> float:
    """Return the PSNR in dB of frames (videos, T, 3, H, W) in [0, 255]: mean over frames, then videos."""
    errors = (generated - truth.float()).square().mean(dim=(2, 3, 4)).clamp_min(1e-10)
    return float((10 * torch.log10(255**2 / errors)).mean())


def continued(pipeline: GPDiTPipeline, truth: Tensor, how: Sampling, options: argparse.Namespace) -> Continued:
    """Continue the beginnings of videos (videos, T, 3, H, W), uint8, and score the continuations."""
    context = options.context_frames
    output = pipeline(
        [clip[:context] for clip in truth],
        frames=options.generated_frames,
        context_frames=context,
        stride=1,
        sampler=how.sampler,
        steps=how.steps,
        guidance=how.guidance,
        seed=list(range(len(truth))),
        output_type="pt",
    )
    generated = 255 * torch.stack(list(output.frames)).cpu()
    return Continued(psnr(generated, truth[:, context:]), error_ratios(generated, truth, context))


def fvd(run: str, how: Sampling, folder: Path, options: argparse.Namespace) -> float:
    """Return the FVD by `evaluate`, in another process; an evaluation of an earlier call is read."""
    command = [sys.executable, "-m", "gpdit_lightning", "evaluate", "--checkpoint", run, "--out", str(folder)]
    command += ["--videos", *options.videos, "--self_check_videos", "0", "--device", options.device]
    command += ["--video_network.path", str(options.video_network)]
    settings = {
        "context_frames": options.context_frames,
        "generated_frames": options.generated_frames,
        "count": options.count,
        **asdict(how),
    }
    command += [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    scores = json.loads((folder / "results.json").read_text(encoding="utf-8"))["scores"]
    return float(scores["fvd"]["mean"])


def probe_accuracies(runs: Sequence[str], options: argparse.Namespace) -> tuple[list[list[float]], float]:
    """Return the accuracy of a linear probe of each layer, for each run, and chance, by `probe` in another process."""
    command = [sys.executable, "-m", "gpdit_lightning", "probe", "--checkpoint", *runs, "--device", options.device]
    command += ["--videos", *options.probe_videos, "--out", str(options.out / "probe")]
    command += ["--split", options.split] if options.split else []
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    results = json.loads((options.out / "probe" / "probe.json").read_text(encoding="utf-8"))["results"]
    accuracies = [[layer["accuracy"] for layer in result["layers"]] for result in results]
    return accuracies, results[0]["protocol"]["chance"]


def table(results: Mapping[str, Sequence[Continued]]) -> str:
    """Return the scores as a Markdown table, with a row for each arm and way of sampling."""
    first = next(iter(results.values()))
    horizons = [frame for frame in HORIZONS if frame <= len(first[0].ratios)]
    has_fvd = first[0].fvd is not None
    head = ["arm", "runs", "PSNR", *["FVD"] * has_fvd, "error ratio", "less the first row", "95 % interval"]
    head += [f"at frame {frame}" for frame in horizons]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, runs in results.items():
        less = [run.mean_ratio - other.mean_ratio for run, other in zip(runs, first, strict=False)]
        compared = runs is not first
        cells = [
            name,
            str(len(runs)),
            spread([run.psnr for run in runs]),
            *[spread([run.fvd for run in runs if run.fvd is not None])] * has_fvd,
            spread([run.mean_ratio for run in runs]),
            f"{statistics.mean(less):+.3g}" if compared else "-",
            interval_text(less, "+.3g") if compared else "-",
            *(spread([run.ratios[frame - 1] for run in runs]) for frame in horizons),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def probe_table(accuracies: Mapping[str, Sequence[Sequence[float]]], chance: float) -> str:
    """Return the accuracies as a Markdown table, with a column for each layer.

    Args:
        accuracies: of each layer, for each run, by arm.
        chance: accuracy of always predicting the most frequent class.
    """
    layers = range(len(next(iter(accuracies.values()))[0]))
    head = [f"linear probe (chance {chance:.3f})", *(f"layer {layer}" for layer in layers)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, runs in accuracies.items():
        lines.append(f"| {name} | {' | '.join(spread([run[layer] for run in runs]) for layer in layers)} |")
    return "\n".join(lines)


def draw(results: Mapping[str, Sequence[Continued]], title: str, path: Path) -> None:
    """Draw the error ratio by generated frame: the mean over the runs of an arm, and the range between them."""
    from matplotlib.figure import Figure  # takes half a second to import

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, runs in results.items():
        plot_range(axes, range(1, len(runs[0].ratios) + 1), [run.ratios for run in runs], name)
    axes.axhline(1, color="grey", linestyle="--", label="last context frame, repeated")
    axes.set(xlabel="generated pixel frame", ylabel="error ratio", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title(title, fontsize=8)
    figure.savefig(path, format="png", dpi=120)


def option_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m benchmarks.trained_arms",
        description=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", nargs="+", required=True, help="RUN, or ARM=RUN,RUN for several seeds")
    add("--videos", nargs="+", required=True, help="held-out videos to continue")
    add("--count", type=int, help="number of videos; by default all that are long enough")
    add("--context_frames", type=int, default=9, help="pixel frames that are given")
    add("--generated_frames", type=int, default=16, help="pixel frames that are generated")
    add("--sampler", nargs="+", type=sampler_of, default=[("rotation", 25)], help="SAMPLER:STEPS")
    add("--guidance", nargs="+", type=float, default=[1.0], help="guidance scales over the context")
    add("--video_network", type=Path, help="weights of I3D, for FVD; as --video_network.path of evaluate")
    add("--probe_videos", nargs="*", default=[], help="labelled videos for a linear probe; as --videos of probe")
    add("--split", help="as --split of probe")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--out", type=Path, default=Path("trained_arms"), help="folder for arms.json, arms.md and arms.png")
    return parser


def measure(arms: Mapping[str, Sequence[str]], options: argparse.Namespace) -> dict[str, list[Continued]]:
    """Return the scores of all runs, by arm and way of sampling."""
    ways = [
        Sampling(name, steps, scale) for (name, steps), scale in itertools.product(options.sampler, options.guidance)
    ]
    results: dict[str, list[Continued]] = {}
    total = len(ways) * sum(map(len, arms.values()))
    with progress_bar(total=total, desc="continuations") as bar:
        for arm, runs in arms.items():
            for number, run in enumerate(runs):
                pipeline = GPDiTPipeline.from_pretrained(run, device=options.device, precision="32")
                truth = truth_of(pipeline, options)
                for way in ways:
                    scores = continued(pipeline, truth, way, options)
                    if options.video_network is not None:
                        folder = options.out / "evaluations" / f"{arm}-{number}, {way}"
                        scores = Continued(scores.psnr, scores.ratios, fvd(run, way, folder, options))
                    results.setdefault(f"{arm}, {way}" if len(ways) > 1 else arm, []).append(scores)
                    bar.update()
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, and write them with the curves."""
    options = option_parser().parse_args(arguments)
    arms = dict(map(arm_of, options.checkpoint))
    options.out.mkdir(parents=True, exist_ok=True)
    results = measure(arms, options)
    device = device_name(torch.device(options.device))
    title = (
        f"{options.generated_frames} frames after {options.context_frames}, {device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {datetime.now():%Y-%m-%d}"
    )
    texts = [title, table(results)]
    content = {"title": title, "arms": {name: [asdict(run) for run in runs] for name, runs in results.items()}}
    if options.probe_videos:
        found, chance = probe_accuracies([run for runs in arms.values() for run in runs], options)
        of_runs = iter(found)
        accuracies = {name: [next(of_runs) for _ in runs] for name, runs in arms.items()}
        texts.append(probe_table(accuracies, chance))
        content["probe"] = {"chance": chance, "accuracies": accuracies}
    text = "\n\n".join(texts)
    print(text)
    for name, written in (("arms.md", text + "\n"), ("arms.json", json.dumps(content))):
        with atomic_write(options.out / name) as path:
            path.write_text(written, encoding="utf-8")
    with atomic_write(options.out / "arms.png") as path:
        draw(results, title, path)


if __name__ == "__main__":
    main()
