"""`python -m benchmarks.systems --data_dir LATENTS --videos HELD_OUT`: the papers' systems at equal training FLOPs.

Each system has a recipe in recipes/systems. It is trained once per seed, with as many steps as the FLOPs of `--steps`
steps of GPDiT allow. Then every model continues the same held-out videos. The table shows the validation loss, whose
values are comparable for equal targets and frames only, PSNR and SSIM (and FVD, if its network is given), and the costs
of training and sampling. The error ratio of a generated frame is its mean squared error relative to that of the last
context frame, over all videos. One figure shows it by frame, another the continuations of two videos.

The results of complete runs are kept in --out: the same command continues with the systems and seeds that are missing.
A run that was interrupted begins again. At another size, give recipes that override those of the systems: --config
recipes/size/b.yaml.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.block_size import machine_name
from gpdit_lightning import GPDiTPipeline
from gpdit_lightning.cli.ablation_report import plot_range, spread
from gpdit_lightning.cli.estimated_recipe import read_recipe
from gpdit_lightning.estimation.budget import RunCosts
from gpdit_lightning.estimation.units import GIB
from gpdit_lightning.evaluation.videos import read_clip, select_videos
from gpdit_lightning.files import atomic_write
from gpdit_lightning.media.images import write_strip

RECIPES = Path(__file__).parents[1] / "recipes" / "systems"
OF = "model.init_args.backbone.attention=of"
# Name: recipe, overrides.
SYSTEMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "GPDiT of2": ("gpdit", ()),
    "GPDiT of": ("gpdit", (OF,)),
    "ACDiT": ("acdit_video", ()),
    "ViD-GPT": ("vidgpt", ()),
    "full sequence": ("full_sequence", ()),
}
REFERENCE = "GPDiT of2"
STRIP_VIDEOS, PICTURES = 2, "continuations.safetensors"


@dataclass(frozen=True)
class RunResult:
    """The results of a training run.

    Attributes:
        train_seconds: CPU seconds of all optimizer steps on a CPU, else seconds.
        validation_loss: after the last step.
        scores: PSNR and SSIM, and FVD if its network is given.
        ratios: for each generated frame, the error ratio.
        sample_seconds: of a generated pixel frame, as `train_seconds`.
        sample_flops: of a generated pixel frame.
    """

    train_seconds: float
    validation_loss: float
    scores: dict[str, float]
    ratios: list[float]
    sample_seconds: float
    sample_flops: float

    @property
    def frames_better(self) -> int:
        """Return the number of first generated frames whose error ratio is below 1."""
        return frames_below_1(self.ratios)


def frames_below_1(ratios: Sequence[float]) -> int:
    """Return the number of first generated frames whose error ratio is below 1."""
    return next((frame for frame, ratio in enumerate(ratios) if ratio >= 1), len(ratios))


def recipe_arguments(name: str, options: argparse.Namespace) -> list[str]:
    """Return the arguments of `fit` for a system, without those that differ between its runs."""
    recipe, overrides = SYSTEMS[name]
    configs = [RECIPES / f"{recipe}.yaml", *options.config]
    return [
        *(f"--config={path}" for path in configs),
        *(f"--{text}" for text in overrides),
        f"--data_dir={options.data_dir}",
    ]


def costs_of(name: str, options: argparse.Namespace, budget: float | None = None) -> RunCosts:
    """Return the costs of a system for a budget of FLOPs; without one, for `--steps` steps."""
    run = read_recipe(recipe_arguments(name, options)).run
    return RunCosts.of_steps(run, options.steps) if budget is None else RunCosts.within_flops(run, budget)


def train(name: str, seed: int, steps: int, folder: Path, options: argparse.Namespace) -> float:
    """Train a system in another process, and return its seconds; CPU seconds, if it trains on the CPU."""
    command = [sys.executable, "-m", "gpdit_lightning", "fit", *recipe_arguments(name, options)]
    command += [f"--run_dir={folder}", f"--seed_everything={seed}", f"--trainer.max_steps={steps}"]
    command += [f"--validate_every_steps={steps}", f"--trainer.accelerator={options.device}"]
    before, start = os.times(), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    if options.device == "cpu":
        return after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start


def validation_loss(folder: Path) -> float:
    """Return the last validation loss of a run."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return float(events.Scalars("loss/val")[-1].value)


def truth_of(options: argparse.Namespace, size: tuple[int, int], stride: int) -> Tensor:
    """Return the held-out videos, uint8 (videos, T, 3, H, W)."""
    frames = options.context_frames + options.generated_frames
    selection = select_videos([options.videos], None, 0, 1 + (frames - 1) * stride)
    return torch.stack([read_clip(path, frames, stride, size) for path in selection.paths])


def continuations(pipeline: GPDiTPipeline, truth: Tensor, options: argparse.Namespace) -> Tensor:
    """Return the generated frames of all videos, (videos, generated frames, 3, H, W), in [0, 255]."""
    context = [clip[: options.context_frames] for clip in truth]
    output = pipeline(
        context,
        frames=options.generated_frames,
        context_frames=options.context_frames,
        stride=1,
        steps=options.sampler_steps,
        seed=list(range(len(context))),
        output_type="pt",
    )
    return 255 * torch.stack(list(output.frames))


def error_ratios(generated: Tensor, truth: Tensor, context: int) -> list[float]:
    """Return the error of each generated frame relative to that of the last context frame, over all videos."""
    target, repeated = truth[:, context:].float(), truth[:, context - 1 : context].float()
    errors = [(frames - target).square().mean(dim=(0, 2, 3, 4)) for frames in (generated, repeated)]
    return [float(ratio) for ratio in errors[0] / errors[1]]


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Return the CPU seconds of a computation on the CPU, else its seconds."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    run()
    return clock() - start


def evaluate(folder: Path, with_fvd: bool, options: argparse.Namespace) -> dict[str, float]:
    """Score a run by `evaluate` in another process, and return its scores."""
    out = folder / "evaluation"
    command = [sys.executable, "-m", "gpdit_lightning", "evaluate", "--checkpoint", str(folder), "--out", str(out)]
    command += ["--videos", str(options.videos), "--self_check_videos", "0", "--device", options.device]
    for name in ("context_frames", "generated_frames"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--steps", str(options.sampler_steps)]
    if with_fvd:
        command += ["--video_network.path", str(options.video_network)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    scores = json.loads((out / "results.json").read_text(encoding="utf-8"))["scores"]
    return {name: score["mean"] for name, score in scores.items()}


def run_folder(name: str, seed: int, options: argparse.Namespace) -> Path:
    """Return the folder of a run."""
    return options.out / "runs" / name.replace(" ", "_") / f"seed_{seed}"


def measure(name: str, seed: int, steps: int, options: argparse.Namespace) -> RunResult:
    """Train a system with a seed and measure it; results of an earlier call are read."""
    folder = run_folder(name, seed, options)
    path = folder / "measured.json"
    if path.exists():
        return RunResult(**json.loads(path.read_text(encoding="utf-8")))
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted call: its seconds would not be those of the run
    seconds = train(name, seed, steps, folder, options)
    pipeline = GPDiTPipeline.from_pretrained(folder, device=options.device, precision="32")
    truth = truth_of(options, pipeline.sizes[0], pipeline.trained.geometry.stride)
    generated: list[Tensor] = []
    sample_seconds = seconds_of(
        lambda: generated.append(continuations(pipeline, truth, options).cpu()), options.device
    ) / (len(truth) * options.generated_frames)
    with FlopCounterMode(display=False) as counter:
        continuations(pipeline, truth[:1], options)
    pictures = torch.cat(
        (truth[:STRIP_VIDEOS, : options.context_frames], generated[0][:STRIP_VIDEOS].round().byte()), 1
    )
    save_file({"videos": pictures, "truth": truth[:STRIP_VIDEOS]}, folder / PICTURES)
    result = RunResult(
        train_seconds=seconds,
        validation_loss=validation_loss(folder),
        scores=evaluate(folder, options.video_network is not None and seed < options.fvd_seeds, options),
        ratios=error_ratios(generated[0], truth, options.context_frames),
        sample_seconds=sample_seconds,
        sample_flops=counter.get_total_flops() / options.generated_frames,
    )
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(asdict(result)), encoding="utf-8")
    return result


def table(costs: dict[str, RunCosts], results: dict[str, list[RunResult]]) -> str:
    """Return the results as a Markdown table."""
    score_names = list(next(iter(results.values()))[0].scores)  # those of the first seed, which may have an FVD alone
    head = [
        "system",
        "parameters",
        "steps",
        "training s",
        "training memory",
        "loss/val",
        *(n.upper() for n in score_names),
    ]
    head += ["error ratio, all frames", "frames below 1", "sampling s/frame", "sampling GFLOP/frame"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, runs in results.items():
        cost = costs[name]
        cells = [
            name,
            f"{cost.parameters / 1e6:.2f}M",
            str(cost.steps),
            spread([run.train_seconds for run in runs]),
            f"{cost.memory / GIB:.2f} GiB",
            spread([run.validation_loss for run in runs]),
            *(spread([run.scores[score] for run in runs if score in run.scores]) for score in score_names),
            spread([statistics.mean(run.ratios) for run in runs]),
            spread([run.frames_better for run in runs], 2),
            spread([run.sample_seconds for run in runs]),
            f"{runs[0].sample_flops / 1e9:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_ratios(results: dict[str, list[RunResult]], title: str, path: Path) -> None:
    """Draw the error ratios by frame: the mean over seeds, and its range."""
    from matplotlib.figure import Figure as Drawing  # takes half a second to import

    drawing = Drawing(figsize=(7, 4.2), layout="constrained")
    axes = drawing.subplots()
    for name, runs in results.items():
        by_frame = [run.ratios for run in runs]
        plot_range(axes, range(1, len(by_frame[0]) + 1), by_frame, name)
    axes.axhline(1, color="grey", linestyle="--", label="last context frame, repeated")
    axes.set_yscale("log")
    axes.set_xlabel("generated pixel frame")
    axes.set_ylabel("error ratio")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title(title, fontsize=9)
    with atomic_write(path) as temporary:
        drawing.savefig(temporary, format="png", dpi=120)


def draw_strip(names: Sequence[str], options: argparse.Namespace) -> None:
    """Write the continuations of the first seed, each below the ground truth."""
    rows: dict[str, Tensor] = {}
    for number in range(STRIP_VIDEOS):
        for name in names:
            pictures = load_file(run_folder(name, 0, options) / PICTURES)
            rows.setdefault(f"ground truth {number + 1}", pictures["truth"][number])
            rows[f"{name} {number + 1}"] = pictures["videos"][number]
    write_strip(options.out / "systems.png", rows, columns=10, context=options.context_frames)


def option_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m benchmarks.systems",
        description=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data_dir", required=True, type=Path, help="prepared training videos, with held-out ones")
    add("--videos", required=True, type=Path, help="folder of held-out videos to continue")
    add("--out", type=Path, default=Path("runs/systems"), help="folder of all runs and results")
    add("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS), help="systems to compare")
    add("--seeds", type=int, default=3, help="number of seeds, from 0")
    add("--steps", type=int, default=600, help="optimizer steps of GPDiT, which determine the FLOPs of all systems")
    add("--config", nargs="*", default=[], help="recipes that override those of the systems")
    add("--context_frames", type=int, default=9, help="pixel frames that are given")
    add("--generated_frames", type=int, default=16, help="pixel frames that are generated")
    add("--sampler_steps", type=int, default=25, help="sampler steps of every block")
    add("--video_network", type=Path, help="weights of I3D, for FVD; as --video_network.path of evaluate")
    add("--fvd_seeds", type=int, default=3, help="number of seeds, from 0, with an FVD, which is slow on a CPU")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, print the table, and write the figures."""
    options = option_parser().parse_args(arguments)
    reference = costs_of(REFERENCE, options)
    budget = reference.flops
    costs = {name: costs_of(name, options, budget) for name in options.systems}
    results: dict[str, list[RunResult]] = {name: [] for name in options.systems}
    for seed in range(options.seeds):
        for name in options.systems:
            results[name].append(measure(name, seed, costs[name].steps, options))
    title = (
        f"{budget / 1e12:.3g} TFLOP of training each, {options.seeds} seeds, "
        f"{machine_name(torch.device(options.device))}, torch {torch.__version__}, {datetime.now():%Y-%m-%d}"
    )
    text = f"{title}\n\n{table(costs, results)}\n"
    print(text)
    with atomic_write(options.out / "systems.md") as path:
        path.write_text(text, encoding="utf-8")
    draw_ratios(results, title, options.out / "error_ratios.png")
    draw_strip(options.systems, options)


if __name__ == "__main__":
    main()
