"""Results of linear probes and of fine-tuned classifiers as JSON and as a table, in one form.

The figure of probes is like figure 5 of the paper (GPDiT, section 5.3).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gpdit_lightning.evaluation.report import Report, library_versions
from gpdit_lightning.evaluation.videos import stride_text
from gpdit_lightning.files import atomic_write
from gpdit_lightning.media.images import Size
from gpdit_lightning.names import as_text, figure_text
from gpdit_lightning.probing.probe import C_GRID, FOLDS, RESAMPLES, LayerScore
from gpdit_lightning.probing.splits import LabelledVideo

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class ProbeProtocol:
    """Everything except the model that a score depends on. Field names are the keys of the JSON."""

    data: str
    """Folders of the videos."""
    data_sha256: str
    """sha256 of names, sizes in bytes, classes, groups and splits of the videos used; see :func:`videos_sha256`."""
    split: str
    """Origin of the splits: a published split, lists or folders."""
    classes: int
    train_videos: int
    test_videos: int
    test_groups: int
    chance: float
    """Accuracy of always predicting the most frequent class of the test videos."""
    left_out: int
    """Number of videos that could not be read."""
    squeezed: int
    """Number of videos that were too short for the stride and were sampled more densely."""
    frames: int
    stride: int
    size: Size
    """(height, width) in pixels."""
    regularisation: str
    """How C was selected."""
    interval: str
    """How confidence intervals were computed."""
    versions: dict[str, str]
    fps: float | None = None
    """Frames per second to which videos were resampled before the stride; None if they were not."""
    medium: Literal["videos", "images"] = "videos"
    """What is classified; of images, `..._videos` are numbers of images."""
    test_clips: int | None = None
    """Number of classified clips of the test videos, on which the accuracy is; None: one from the middle of each."""


@dataclass(frozen=True)
class ProbeResult:
    """The probes of one checkpoint, or the classifier of one that was fine-tuned."""

    checkpoint: str
    """Path of the checkpoint."""
    identity: str
    """sha256 of the checkpoint."""
    step: int
    """Optimizer steps of the training."""
    weights: str
    """"ema" or "raw"."""
    codec: str
    """Name and fingerprint of the codec."""
    layers: tuple[LayerScore, ...]
    protocol: ProbeProtocol
    classifier: Literal["linear probe", "fine-tuned"] = "linear probe"

    @property
    def best(self) -> LayerScore:
        """The first layer with the highest cross-validation accuracy, or test accuracy if C was given."""
        return max(self.layers, key=lambda score: score.accuracy if score.validation is None else score.validation)


def make_protocol(
    videos: Sequence[LabelledVideo], left_out: int, num_resampled: int, regularisation: float | None, **fields: Any
) -> ProbeProtocol:
    """Return the protocol of a probe.

    Args:
        videos: that were used.
        left_out: number of videos that could not be read.
        num_resampled: number of videos that were sampled more densely.
        regularisation: C, or None if cross-validation selected it.
        fields: the remaining fields of the protocol.
    """
    train, test = ([video for video in videos if video.split == split] for split in ("train", "test"))
    grid = ", ".join(f"{C:g}" for C in C_GRID)
    selected = f"best C of {grid} in cross-validation over training groups, at most {FOLDS} folds"
    return ProbeProtocol(
        data_sha256=videos_sha256(videos),
        classes=len({video.label for video in train}),
        train_videos=len(train),
        test_videos=len(test),
        test_groups=len({video.group for video in test}),
        chance=Counter(video.label for video in test).most_common(1)[0][1] / len(test),
        left_out=left_out,
        squeezed=num_resampled,
        regularisation=selected if regularisation is None else f"C = {regularisation:g}",
        versions=library_versions() | {"scikit-learn": version("scikit-learn")},
        interval=f"95 %, bootstrap over test groups, {RESAMPLES} draws",
        **fields,
    )


def videos_sha256(videos: Sequence[LabelledVideo]) -> str:
    """Return the sha256 of sorted lines `SPLIT CLASS GROUP NAME BYTES`, which is independent of the videos' folder."""
    lines = sorted(
        f"{video.split} {video.label} {video.group} {as_text(video.path.name)} {video.path.stat().st_size}\n"
        for video in videos
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_json(results: Sequence[ProbeResult], path: Path) -> None:
    """Write the results as JSON."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps({"results": [asdict(result) for result in results]}, indent=2) + "\n")


def markdown(results: Sequence[ProbeResult]) -> str:
    """Return the protocol and a table for each checkpoint as Markdown."""
    return "\n".join(_section(result) for result in results)


def _section(result: ProbeResult) -> str:
    protocol, best = result.protocol, result.best
    of_probe = result.classifier == "linear probe"
    title = "Linear probe" if of_probe else "Fine-tuned classifier"
    top5 = any(score.top5 is not None for score in result.layers)
    lines = [
        f"## {title} of {result.checkpoint}, step {result.step}",
        "",
        *(_protocol_of_probe(result) if of_probe else _protocol_of_classifier(result)),
        f"- {', '.join(f'{name} {number}' for name, number in protocol.versions.items())}",
        "",
        f"| layer | top-1 accuracy | 95 % interval | C | cross-validation accuracy |{' top-5 accuracy |' * top5}",
        f"|---:|---:|:---:|---:|---:|{'---:|' * top5}",
    ]
    for score in result.layers:
        accuracy = f"{score.accuracy:.1%}"
        validation = "" if score.validation is None else f"{score.validation:.1%}"
        strength = "" if score.C is None else f"{score.C:g}"
        last = "" if score.top5 is None else f" {score.top5:.1%} |"
        lines.append(
            f"| {score.layer} | {f'**{accuracy}**' if score is best else accuracy} | "
            f"{score.interval[0]:.1%} to {score.interval[1]:.1%} | {strength} | {validation} |{last}"
        )
    return "\n".join([*lines, ""])


def _protocol_of_probe(result: ProbeResult) -> list[str]:
    protocol = result.protocol
    return [
        f"- {_data(protocol)}",
        f"- {protocol.frames} frames at stride {stride_text(protocol.stride, protocol.fps)} from the middle of each "
        f"video ({protocol.squeezed} short videos sampled more densely), {_size(protocol)}, codec {result.codec}",
        f"- clean stream only, theta = 0, mean over frames and tokens; {result.weights} weights, sha256 "
        f"{result.identity[:16]}",
        f"- logistic regression on standardised features; {protocol.regularisation}",
        f"- intervals: {protocol.interval}; {_chance(protocol)}; bold: the best layer in cross-validation, or in the "
        "test if C was given",
    ]


def _protocol_of_classifier(result: ProbeResult) -> list[str]:
    protocol = result.protocol
    clips = f"{protocol.test_clips} clips of up to {protocol.frames} frames at stride "
    clips += f"{stride_text(protocol.stride, protocol.fps)}, all clips of each test video, "
    return [
        f"- {_data(protocol)}",
        f"- {clips if protocol.medium == 'videos' else ''}{_size(protocol)}, codec {result.codec}",
        f"- clean stream only, theta = 0, mean over frames and tokens; all weights trained; {result.weights} weights, "
        f"sha256 {result.identity[:16]}",
        f"- cross-entropy; {protocol.regularisation}",
        f"- interval: {protocol.interval}; {_chance(protocol)}",
    ]


def _data(protocol: ProbeProtocol) -> str:
    """Return data, split and the numbers of videos or images as text."""
    medium = protocol.medium
    return (
        f"{protocol.data}, {protocol.split}: {protocol.train_videos} training {medium}, {protocol.test_videos} test "
        f"{medium} in {protocol.test_groups} groups, {protocol.classes} classes; {protocol.left_out} unreadable "
        f"{medium} left out; sha256 {protocol.data_sha256[:16]}"
    )


def _size(protocol: ProbeProtocol) -> str:
    height, width = protocol.size
    return f"{height}x{width} pixels"


def _chance(protocol: ProbeProtocol) -> str:
    return f"chance (always the most frequent class): {protocol.chance:.1%}"


def plot_probe(results: Sequence[ProbeResult], path: Path, evaluations: Sequence[Report] = ()) -> None:
    """Plot accuracy over layers (figure 5a), and of the best layer over training steps (5b) and over FVD (5c).

    Args:
        results: one per checkpoint.
        path: of the PNG.
        evaluations: reports with an FVD; reports of other checkpoints are ignored.
    """
    from matplotlib.figure import Figure  # takes half a second to import

    results = sorted(results, key=lambda result: result.step)
    distances: dict[tuple[str, str], float] = {
        (report.protocol.checkpoint_sha256, report.protocol.weights): report.scores["fvd"].mean
        for report in evaluations
    }
    steps = [float(result.step) for result in results]
    fvd = [distances.get((result.identity, result.weights)) for result in results]
    x_values: dict[str, list[float | None]] = {}
    if len(results) > 1:
        x_values["training steps"] = [*steps]
    if any(distance is not None for distance in fvd):
        x_values["FVD"] = fvd
    figure = Figure(figsize=(5.5 * (1 + len(x_values)), 4.5), layout="constrained")
    layer_axes, *best_axes = figure.subplots(1, 1 + len(x_values), squeeze=False, sharey=True)[0]
    for number, result in enumerate(results):
        _draw_layers(layer_axes, result, figure_text(_label(result, results)), f"C{number}")
    layer_axes.set(xlabel="layer (0: patch embedding)", ylabel="top-1 accuracy, %")
    layer_axes.xaxis.get_major_locator().set_params(integer=True)
    for axes, (name, values) in zip(best_axes, x_values.items(), strict=True):
        for number, (result, x) in enumerate(zip(results, values, strict=True)):
            if x is not None:
                _draw_best(axes, result.best, x, f"C{number}")
        axes.set(xlabel=name, title="best layer")
        axes.margins(x=0.15)
    for axes in (layer_axes, *best_axes):
        for chance in sorted({result.protocol.chance for result in results}):
            axes.axhline(100 * chance, color="grey", linestyle="--", label="chance")
        axes.grid(alpha=0.3)
    layer_axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _draw_layers(axes: "Axes", result: ProbeResult, label: str, colour: str) -> None:
    layers = [score.layer for score in result.layers]
    low, high = ([100 * score.interval[end] for score in result.layers] for end in (0, 1))
    axes.plot(layers, [100 * score.accuracy for score in result.layers], "o-", color=colour, label=label)
    axes.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)


def _draw_best(axes: "Axes", best: LayerScore, x: float, colour: str) -> None:
    low, high = best.interval
    axes.plot([x, x], [100 * low, 100 * high], "_-", color=colour)
    axes.plot(x, 100 * best.accuracy, "o", color=colour)
    axes.annotate(f"layer {best.layer}", (x, 100 * best.accuracy), xytext=(6, 4), textcoords="offset points")


def _label(result: ProbeResult, results: Sequence[ProbeResult]) -> str:
    """Return the step, with the path of the checkpoint if several checkpoints have the same step."""
    steps = Counter(other.step for other in results)
    return f"step {result.step}" if steps[result.step] == 1 else f"{result.checkpoint}, step {result.step}"
