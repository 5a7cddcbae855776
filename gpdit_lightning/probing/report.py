"""What linear probes found, as JSON, as a table and as figure 5 of the paper (GPDiT, section 5.3)."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpdit_lightning.evaluation.report import Report, library_versions
from gpdit_lightning.files import written_whole
from gpdit_lightning.media.images import Size
from gpdit_lightning.probing.probe import C_GRID, FOLDS, RESAMPLES, LayerScore
from gpdit_lightning.probing.splits import LabelledVideo

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class ProbeProtocol:
    """Everything besides the model that a score depends on."""

    data: str
    """Where the videos were."""
    data_sha256: str
    """Of the names, sizes in bytes, classes, groups and halves of the videos used; see :func:`videos_sha256`."""
    split: str
    """Who tests: a published split, lists or folders."""
    classes: int
    train_videos: int
    test_videos: int
    test_groups: int
    chance: float
    """The accuracy of always naming the most frequent class of the test half."""
    left_out: int
    """Videos that could not be read."""
    squeezed: int
    """Videos too short for the stride, sampled more densely."""
    frames: int
    stride: int
    size: Size
    """(height, width) in pixels."""
    regularisation: str
    """How C was chosen."""
    interval: str
    """How intervals were drawn."""
    versions: dict[str, str]


@dataclass(frozen=True)
class ProbeResult:
    """The probes of one checkpoint."""

    checkpoint: str
    """The place it was opened at."""
    identity: str
    """A sha256 of the checkpoint."""
    step: int
    weights: str
    """"ema" or "raw"."""
    codec: str
    """Its name and fingerprint."""
    layers: tuple[LayerScore, ...]
    protocol: ProbeProtocol

    @property
    def best(self) -> LayerScore:
        """The layer of the highest accuracy in cross-validation, or where there was none in the test; the lowest."""
        return max(self.layers, key=lambda score: score.accuracy if score.validation is None else score.validation)


def make_protocol(
    videos: Sequence[LabelledVideo], left_out: int, squeezed: int, regularisation: float | None, **rest: Any
) -> ProbeProtocol:
    """The protocol, from the videos that were used; `rest` are its further fields."""
    train, test = ([video for video in videos if video.split == split] for split in ("train", "test"))
    grid = ", ".join(f"{C:g}" for C in C_GRID)
    chosen = f"best C of {grid} in cross-validation over training groups, {FOLDS} folds at most"
    return ProbeProtocol(
        data_sha256=videos_sha256(videos),
        classes=len({video.label for video in train}),
        train_videos=len(train),
        test_videos=len(test),
        test_groups=len({video.group for video in test}),
        chance=Counter(video.label for video in test).most_common(1)[0][1] / len(test),
        left_out=left_out,
        squeezed=squeezed,
        regularisation=chosen if regularisation is None else f"C = {regularisation:g}",
        versions=library_versions() | {"scikit-learn": version("scikit-learn")},
        interval=f"95 %, bootstrap over test groups, {RESAMPLES} draws",
        **rest,
    )


def videos_sha256(videos: Sequence[LabelledVideo]) -> str:
    """A sha256 over what was used, wherever it lies: sorted lines `SPLIT CLASS GROUP NAME BYTES`."""
    lines = sorted(
        f"{video.split} {video.label} {video.group} {video.path.name} {video.path.stat().st_size}\n" for video in videos
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_json(results: Sequence[ProbeResult], path: Path) -> None:
    """Write all of the results."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps({"results": [asdict(result) for result in results]}, indent=2) + "\n")


def markdown(results: Sequence[ProbeResult]) -> str:
    """A table for each checkpoint, under its protocol."""
    return "\n".join(_section(result) for result in results)


def _section(result: ProbeResult) -> str:
    protocol, best = result.protocol, result.best
    height, width = protocol.size
    lines = [
        f"## Linear probe of {result.checkpoint}, step {result.step}",
        "",
        f"- {protocol.data}, {protocol.split}: {protocol.train_videos} videos train and {protocol.test_videos} in "
        f"{protocol.test_groups} groups test, {protocol.classes} classes; {protocol.left_out} left out as unreadable; "
        f"sha256 {protocol.data_sha256[:16]}",
        f"- {protocol.frames} frames, {protocol.stride} apart, in the middle of each video ({protocol.squeezed} too "
        f"short, sampled more densely), {height}x{width} pixels, codec {result.codec}",
        f"- clean stream alone, theta = 0, mean over frames and tokens; {result.weights} weights, sha256 "
        f"{result.identity[:16]}",
        f"- logistic regression on standardised features; {protocol.regularisation}",
        f"- intervals: {protocol.interval}; chance, always the most frequent class: {protocol.chance:.1%}; bold: "
        "the best layer by cross-validation, or without one by the test half itself",
        f"- {', '.join(f'{name} {number}' for name, number in protocol.versions.items())}",
        "",
        "| layer | top-1 accuracy | 95 % interval | C | in cross-validation |",
        "|---:|---:|:---:|---:|---:|",
    ]
    for score in result.layers:
        accuracy = f"{score.accuracy:.1%}"
        validation = "" if score.validation is None else f"{score.validation:.1%}"
        lines.append(
            f"| {score.layer} | {f'**{accuracy}**' if score is best else accuracy} | "
            f"{score.interval[0]:.1%} to {score.interval[1]:.1%} | {score.C:g} | {validation} |"
        )
    return "\n".join([*lines, ""])


def plot_probe(results: Sequence[ProbeResult], path: Path, evaluations: Sequence[Report] = ()) -> None:
    """Draw accuracy against layers (figure 5a), and that of the best layer against steps (5b) and FVD (5c).

    Args:
        results: a line and a point for each checkpoint.
        path: of the PNG.
        evaluations: with an FVD; those of checkpoints among the results make the points of 5c.
    """
    from matplotlib.figure import Figure  # half a second that others need not wait

    results = sorted(results, key=lambda result: result.step)
    distances: dict[tuple[str, str], float] = {
        (report.protocol.checkpoint_sha256, report.protocol.weights): report.scores["fvd"].mean
        for report in evaluations
    }
    steps = [float(result.step) for result in results]
    fvd = [distances.get((result.identity, result.weights)) for result in results]
    against: dict[str, list[float | None]] = {}
    if len(results) > 1:
        against["optimizer steps"] = [*steps]
    if any(distance is not None for distance in fvd):
        against["FVD"] = fvd
    figure = Figure(figsize=(5.5 * (1 + len(against)), 4.5), layout="constrained")
    of_layers, *of_best = figure.subplots(1, 1 + len(against), squeeze=False, sharey=True)[0]
    for number, result in enumerate(results):
        _draw_layers(of_layers, result, _name(result, results), f"C{number}")
    of_layers.set(xlabel="layer (0: patch embedding)", ylabel="top-1 accuracy, %")
    of_layers.xaxis.get_major_locator().set_params(integer=True)
    for axes, (name, places) in zip(of_best, against.items(), strict=True):
        for number, (result, place) in enumerate(zip(results, places, strict=True)):
            if place is not None:
                _draw_best(axes, result.best, place, f"C{number}")
        axes.set(xlabel=name, title="best layer")
        axes.margins(x=0.15)
    for axes in (of_layers, *of_best):
        for chance in sorted({result.protocol.chance for result in results}):
            axes.axhline(100 * chance, color="grey", linestyle="--", label="chance")
        axes.grid(alpha=0.3)
    of_layers.legend()
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _draw_layers(axes: "Axes", result: ProbeResult, name: str, colour: str) -> None:
    layers = [score.layer for score in result.layers]
    low, high = ([100 * score.interval[end] for score in result.layers] for end in (0, 1))
    axes.plot(layers, [100 * score.accuracy for score in result.layers], "o-", color=colour, label=name)
    axes.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)


def _draw_best(axes: "Axes", best: LayerScore, place: float, colour: str) -> None:
    low, high = best.interval
    axes.plot([place, place], [100 * low, 100 * high], "_-", color=colour)
    axes.plot(place, 100 * best.accuracy, "o", color=colour)
    axes.annotate(f"layer {best.layer}", (place, 100 * best.accuracy), xytext=(6, 4), textcoords="offset points")


def _name(result: ProbeResult, results: Sequence[ProbeResult]) -> str:
    """The step, with the place where steps repeat."""
    steps = Counter(other.step for other in results)
    return f"step {result.step}" if steps[result.step] == 1 else f"{result.checkpoint}, step {result.step}"
