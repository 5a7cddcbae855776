"""The results of an ablation: a table, curves, and both as data."""

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import torch

from gpdit_lightning.cli.ablation import Ablation, Arm
from gpdit_lightning.devices import device_name
from gpdit_lightning.estimation.budget import RunCosts
from gpdit_lightning.estimation.units import duration, flops
from gpdit_lightning.files import atomic_write
from gpdit_lightning.names import figure_text
from gpdit_lightning.version import __version__

BUDGETS = {"steps": "optimizer steps", "flops": "training FLOPs", "time": "seconds of training"}
CONFIDENCE = 0.95
# Fields of the backbone that change what the loss is a mean of, and so make it incomparable.
OF_THE_LOSS = ("target", "block_shape", "first_block_frames")


@dataclass(frozen=True)
class ArmResults:
    """The results of an arm.

    Attributes:
        arm: the arm.
        runs: the record of each finished run, see `AblationRecord`, by seed.
        failures: why a run failed, by seed.
    """

    arm: Arm
    runs: Mapping[int, Mapping[str, Any]]
    failures: Mapping[int, str] = field(default_factory=dict)

    @property
    def losses(self) -> dict[int, float]:
        """The validation loss at the end, by seed."""
        return {seed: float(run["curve"][-1][1]) for seed, run in self.runs.items()}

    @property
    def kind_of_loss(self) -> tuple[Any, ...]:
        """What must be equal for losses to be comparable."""
        return tuple(getattr(self.arm.run.backbone, name) for name in OF_THE_LOSS) if self.arm.run else ()


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return mean and standard deviation over seeds, with significant digits; - without values."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}g}"
    return f"{mean} ± {statistics.stdev(values):.2g}" if len(values) > 1 else mean


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of the mean of normally distributed values (Student's t); None for one."""
    if len(values) < 2:
        return None
    from scipy.stats import t  # takes half a second to import

    error = statistics.stdev(values) / math.sqrt(len(values))
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error
    mean = statistics.mean(values)
    return mean - half, mean + half


def interval_text(values: Sequence[float], form: str) -> str:
    """Return the interval of a mean as text; - if there is none."""
    bounds = interval(values)
    return "-" if bounds is None else f"[{bounds[0]:{form}}, {bounds[1]:{form}}]"


def differences(result: ArmResults, first: ArmResults) -> list[float]:
    """Return the losses of an arm less those of the first arm with the same seed; none if they are not comparable."""
    if result is first or result.kind_of_loss != first.kind_of_loss:
        return []
    return [loss - first.losses[seed] for seed, loss in result.losses.items() if seed in first.losses]


def title(ablation: Ablation) -> str:
    """Return the circumstances of an ablation in one line."""
    options = ablation.options
    device = torch.device("cuda" if torch.cuda.is_available() and ablation.base.trainer.accelerator != "cpu" else "cpu")
    return (
        f"Equal {BUDGETS[options.budget]}: those of {ablation.costs.steps} steps of the base; seeds "
        f"{' '.join(map(str, options.seeds))}; {device_name(device)}, {torch.get_num_threads()} threads, "
        f"gpdit_lightning {__version__}, torch {torch.__version__}, {datetime.now():%Y-%m-%d}"
    )


def table(results: Sequence[ArmResults]) -> str:
    """Return the results as a Markdown table: means and standard deviations over seeds, and intervals."""
    first = results[0]
    head = ["arm", "runs", "loss", "95 % interval", f"less {first.arm.name}, by seed", "95 % interval", "parameters"]
    head += ["steps", "TFLOP", "train s", "peak GiB"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for result in results:
        costs, losses, runs = result.arm.costs, list(result.losses.values()), list(result.runs.values())
        less = differences(result, first)
        cells = [
            result.arm.name,
            f"{len(runs)}" + f", {len(result.failures)} failed" * bool(result.failures),
            spread(losses, 4),
            interval_text(losses, ".4g"),
            f"{statistics.mean(less):+.3g}" if less else "-",
            interval_text(less, "+.3g"),
            f"{costs.parameters:,}" if costs else "-",
            f"{costs.steps:,}" if costs else "-",
            f"{costs.flops / 1e12:.4g}" if costs else "-",
            spread([run["seconds"] for run in runs]),
            spread([run["peak_memory_gib"] for run in runs]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def notes(results: Sequence[ArmResults], seconds: str) -> list[str]:
    """Return what a reader of the table must know.

    Args:
        results: of all arms.
        seconds: what the seconds are.
    """
    lines = [
        "`loss`: of the averaged weights at the end, on the held-out clips, noise and noise levels of the base recipe, "
        "which are the same for all arms and seeds; mean and standard deviation over seeds. Intervals: Student's t, of "
        f"the mean. `train s`: {seconds} of all optimizer steps, without validation and checkpoints."
    ]
    kinds = {result.kind_of_loss for result in results if result.arm.run}
    if len(kinds) > 1:
        lines.append(
            f"Arms that differ in {', '.join(OF_THE_LOSS)} have losses of another kind: they are not compared."
        )
    lines += [
        f"failed: {result.arm.name}, seed {seed}: {failure}"
        for result in results
        for seed, failure in result.failures.items()
    ]
    return lines


def write_report(ablation: Ablation, results: Sequence[ArmResults]) -> str:
    """Write `ablation.md`, `results.json`, `results.csv` and, of finished runs, `curves.png`; return the text."""
    folder = ablation.options.out
    seconds = (
        "CPU seconds" if ablation.base.trainer.accelerator == "cpu" or not torch.cuda.is_available() else "seconds"
    )
    text = "\n\n".join([title(ablation), table(results), *notes(results, seconds)]) + "\n"
    contents = {"ablation.md": text, "results.json": as_json(ablation, results), "results.csv": as_csv(results)}
    for name, content in contents.items():
        with atomic_write(folder / name) as path:
            path.write_text(content, encoding="utf-8")
    if any(result.runs for result in results):
        draw_curves(ablation, results)
    return text


def as_json(ablation: Ablation, results: Sequence[ArmResults]) -> str:
    """Return all results, with the curve of every run."""
    arms = []
    for result in results:
        costs, losses, less = result.arm.costs, list(result.losses.values()), differences(result, results[0])
        arms.append(
            {
                "name": result.arm.name,
                "overrides": result.arm.overrides,
                "parameters": costs and costs.parameters,
                "steps": costs and costs.steps,
                "flops_per_step": costs and costs.step_flops,
                "loss": {
                    "mean": statistics.mean(losses) if losses else None,
                    "deviation": statistics.stdev(losses) if len(losses) > 1 else None,
                    "interval": interval(losses),
                },
                "difference": {"mean": statistics.mean(less) if less else None, "interval": interval(less)},
                "runs": [{"seed": seed, **run} for seed, run in result.runs.items()],
                "failures": [{"seed": seed, "reason": reason} for seed, reason in result.failures.items()],
            }
        )
    content = {"title": title(ablation), "budget": ablation.options.budget, "arms": arms}
    return json.dumps(content, indent=1) + "\n"


def as_csv(results: Sequence[ArmResults]) -> str:
    """Return a line for each finished run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["arm", "seed", "loss", "parameters", "steps", "flops", "seconds", "peak_memory_gib"])
    for result in results:
        for seed, run in result.runs.items():
            costs = result.arm.costs
            assert costs is not None
            measured = [run["seconds"], run["peak_memory_gib"]]
            writer.writerow(
                [result.arm.name, seed, result.losses[seed], costs.parameters, costs.steps, costs.flops, *measured]
            )
    return text.getvalue()


def plot_range(axes: Any, x: Sequence[float], rows: Sequence[Sequence[float]], label: str) -> None:
    """Draw the mean of some rows of values, and their range."""
    values = torch.tensor(rows, dtype=torch.float64)
    (line,) = axes.plot(x, values.mean(dim=0), "o-", markersize=3, label=label)
    low, high = values.amin(dim=0), values.amax(dim=0)
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def draw_curves(ablation: Ablation, results: Sequence[ArmResults]) -> None:
    """Draw the validation losses against steps and against FLOPs: mean over seeds, and range."""
    from matplotlib.figure import Figure  # takes half a second to import

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for result in results:
        costs, curves = result.arm.costs, [run["curve"] for run in result.runs.values()]
        if not curves or costs is None:
            continue
        steps = [step for step, *_ in curves[0]]
        losses = [[loss for _, loss, _ in curve] for curve in curves]
        name = figure_text(result.arm.name)
        plot_range(panels[0], steps, losses, name)
        plot_range(panels[1], [step * costs.step_flops / 1e12 for step in steps], losses, name)
    for axes, label in zip(panels, ("optimizer steps", "training TFLOP"), strict=True):
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="validation loss: mean and range over seeds")
    panels[0].legend(fontsize=8)
    figure.suptitle(title(ablation), fontsize=8)
    with atomic_write(ablation.options.out / "curves.png") as path:
        figure.savefig(path, format="png", dpi=120)


def dry_run_text(ablation: Ablation, flops_per_s: float) -> str:
    """Return the arms with their costs, without results.

    Args:
        ablation: the ablation.
        flops_per_s: expected FLOP/s of training on this machine.
    """
    seeds = len(ablation.options.seeds)
    lines = ["| arm | parameters | steps | FLOPs of a step | FLOPs | estimated time |", f"|{'---|' * 6}"]
    total = 0.0
    for arm in ablation.arms:
        if arm.costs is None:
            lines.append(f"| {arm.name} | refused: {arm.failure} | | | | |")
            continue
        seconds = arm.costs.flops / flops_per_s
        total += seconds * seeds
        lines.append(f"| {arm.name} | {_costs_text(arm.costs)} | {duration(seconds)} |")
    text = f"{seeds} seeds of each arm take {duration(total)}, one after another, at {flops(flops_per_s)}/s (assumed)."
    if ablation.assumed:
        text += f" No {' and '.join(sorted(ablation.assumed))} are prepared: the sizes of the paper are assumed."
    if ablation.options.budget == "time":
        text += " The steps are those of equal FLOPs: a trial determines those of equal time."
    return "\n".join([*lines, "", text])


def _costs_text(costs: RunCosts) -> str:
    cells = f"{costs.parameters:,}", f"{costs.steps:,}", flops(costs.step_flops), flops(costs.flops)
    return " | ".join(cells)
