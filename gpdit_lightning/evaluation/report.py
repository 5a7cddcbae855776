"""What an evaluation found, with all that it depends on, beside what GPDiT published (its tables 2 and 3)."""

import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from gpdit_lightning.diffusion import Guidance, NoiseSchedule
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.metrics import mean_and_deviation
from gpdit_lightning.evaluation.network_files import NetworkRecord
from gpdit_lightning.evaluation.paper_results import PAPER_FRAMES, PAPER_TABLES, UNSTATED, PaperTable
from gpdit_lightning.evaluation.self_checks import SelfChecks
from gpdit_lightning.files import written_whole
from gpdit_lightning.media.images import Size

RESULTS, TABLES = "results.json", "results.md"
HEADINGS = {
    "fid": "FID ↓",
    "is": "IS ↑",
    "fvd": "FVD ↓",
    "precision": "Precision ↑",
    "recall": "Recall ↑",
    "psnr": "PSNR ↑",
    "ssim": "SSIM ↑",
}

# A checked FID is of all generated frames at once, where the score is a mean over their places.
CHECKED_AS = {"fvd": "FVD", "fid": "FID, all frames at once"}


def library_versions() -> dict[str, str]:
    """Of Python and of the libraries that frames, networks and scores go through."""
    libraries = ("gpdit_lightning", "torch", "torchmetrics", "numpy", "av", "diffusers")
    return {"python": platform.python_version()} | {name: version(name) for name in libraries}


@dataclass(frozen=True)
class Protocol:
    """All that scores depend on."""

    data: str
    """The data set's name."""
    choice: str
    """How videos were chosen from it, and their frames from them."""
    split_sha256: str
    """Of the videos' names in their order."""
    videos: int
    context_frames: int
    generated_frames: int
    fvd_frames: Literal["all", "generated"]
    """What the video network saw."""
    size: Size
    """(height, width) in pixels."""
    stride: int
    resize: str
    """How frames came to that size."""
    sampler: str
    steps: int
    """Of the sampler, for each latent frame."""
    guidance: Guidance
    schedule: NoiseSchedule
    seeds: tuple[int, ...]
    window: int | None
    """The latest latent frames that a frame sees; all without."""
    precision: str
    """Of products in the model."""
    checkpoint: str
    """Its name."""
    checkpoint_sha256: str
    step: int
    """Optimizer steps trained."""
    weights: Literal["ema", "raw"]
    codec: str
    codec_sha256: str
    networks: dict[str, NetworkRecord]
    """By their role."""
    versions: dict[str, str]
    hardware: str


@dataclass(frozen=True)
class Score:
    """A score over seeds."""

    mean: float
    deviation: float | None
    """Sample standard deviation; none of one seed."""
    per_seed: tuple[float, ...]

    @classmethod
    def of(cls, per_seed: Sequence[float]) -> Self:
        """The score of values, one a seed."""
        return cls(*mean_and_deviation(per_seed), tuple(per_seed))

    def __str__(self) -> str:
        decimals = 1 if abs(self.mean) >= 100 else 2 if abs(self.mean) >= 10 else 3
        shown = f"{self.mean:.{decimals}f}"
        return shown if self.deviation is None else f"{shown} ± {self.deviation:.{decimals}f}"


@dataclass(frozen=True)
class Report:
    """Scores with their protocol."""

    protocol: Protocol
    scores: dict[str, Score]
    """By names of `HEADINGS`."""
    references: dict[str, dict[str, Score]] = field(default_factory=dict)
    """Scores of what is no model, such as the truth through the codec, by its name in words."""
    self_checks: dict[str, SelfChecks] = field(default_factory=dict)
    """By the distance's name in `HEADINGS`."""
    warnings: tuple[str, ...] = ()
    date: str = field(default_factory=lambda: date.today().isoformat())

    def to_json(self) -> str:
        """The report as JSON; `ValueError` for a number that JSON does not know."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "the report") -> Self:
        """The report that :meth:`to_json` wrote.

        Args:
            text: JSON.
            where: its file, for messages.

        Raises:
            InputError: anything else, as a field that is missing or unknown.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise InputError(f"{where} is no JSON ({error}): give what `evaluate` wrote.") from None
        return _parsed(cls, content, where)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a `results.json`; raises as :meth:`from_json`, and when there is none."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read ({error}): give what `evaluate` wrote.") from None
        return cls.from_json(text, str(path))

    def write(self, folder: Path) -> None:
        """Write `results.json` and, for people, `results.md`."""
        for name, text in ((RESULTS, self.to_json()), (TABLES, self.to_markdown())):
            with written_whole(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")

    def to_markdown(self) -> str:
        """Scores in a row with the protocol's figures, the protocol in words, self-checks, and the comparison."""
        protocol = self.protocol
        title = f"# {protocol.data}: {_frames(protocol)}"
        sections = [title, _score_table(self), *(f"**Warning:** {warning}" for warning in self.warnings)]
        sections += ["## Protocol", "\n".join(f"- {line}" for line in _in_words(protocol, self.date))]
        if self.self_checks:
            sections += ["## Self-checks", _check_table(self.self_checks)]
        return "\n\n".join([*sections, "## Beside the paper", comparison(self)]) + "\n"


def _parsed(kind: Any, value: Any, where: str) -> Any:
    """A JSON value as the type that a field is annotated with; `where` names file and field."""
    origin, parts = get_origin(kind), get_args(kind)
    if is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        for name in sorted(value.keys() ^ hints.keys()):
            what = "lacks the field" if name in hints else "has the unknown field"
            raise InputError(f"{where} {what} {name!r}: give what this version of `evaluate` wrote.")
        return kind(**{name: _parsed(hints[name], value[name], f"{where}, {name}") for name in hints})  # type: ignore[operator]
    if origin is dict and isinstance(value, dict):
        return {name: _parsed(parts[1], entry, f"{where}, {name}") for name, entry in value.items()}
    if origin is tuple and isinstance(value, list):
        kinds = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        if len(kinds) == len(value):
            return tuple(_parsed(part, entry, where) for part, entry in zip(kinds, value, strict=True))
    if NoneType in parts:
        return None if value is None else _parsed(parts[0], value, where)
    if origin is Literal and value in parts:
        return value
    if type(value) is kind or (kind is float and type(value) is int):
        return kind(value)
    raise InputError(f"{where} is {value!r}, no value for it: give what this version of `evaluate` wrote.")


def _table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(headings), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(scores: Mapping[str, Score], names: Iterable[str]) -> list[str]:
    return [str(scores[name]) if name in scores else "-" for name in names]


def _score_table(report: Report) -> str:
    protocol = report.protocol
    facts = {
        "data": protocol.data,
        "videos": f"{protocol.videos:,}",
        "frames": f"{protocol.generated_frames} from {protocol.context_frames}",
        "FVD of": f"{protocol.fvd_frames} frames",
        "size": f"{protocol.size[0]}x{protocol.size[1]}",
        "stride": str(protocol.stride),
        "sampler": f"{protocol.sampler}, {protocol.steps} steps",
        "guidance": f"{protocol.guidance.context:g}",
        "seeds": str(len(protocol.seeds)),
    }
    rows = [[f"`{protocol.checkpoint}`", *_cells(report.scores, report.scores), *facts.values()]]
    for name, scores in report.references.items():
        rows.append([name, *_cells(scores, report.scores), *[""] * len(facts)])
    return _table(["", *(HEADINGS[name] for name in report.scores), *facts], rows)


def _in_words(protocol: Protocol, day: str) -> list[str]:
    guidance, schedule = protocol.guidance, protocol.schedule
    levels = "" if guidance.at_all_levels else f" at noise levels {guidance.least_level:g} to {guidance.most_level:g}"
    seen = "given and generated frames" if protocol.fvd_frames == "all" else "generated frames alone"
    return [
        f"Videos: {protocol.videos:,} of {protocol.data}, {protocol.choice}; sha256 of their names "
        f"`{protocol.split_sha256}`.",
        f"Frames: {protocol.generated_frames} generated from {protocol.context_frames}, stride {protocol.stride}, "
        f"{protocol.size[0]}x{protocol.size[1]} pixels, {protocol.resize}. FVD, precision and recall see {seen}; "
        "other scores are of generated frames.",
        f"Sampler: {protocol.sampler}, {protocol.steps} steps, {schedule.name} schedule with shift {schedule.shift:g}; "
        f"guidance {guidance.context:g} over the context, {guidance.label:g} over the label{levels}; frames see "
        f"{'all' if protocol.window is None else f'the latest {protocol.window}'} latent frames before them; precision "
        f"{protocol.precision}.",
        f"Seeds: {', '.join(map(str, protocol.seeds))}; ± is the sample standard deviation over them.",
        f"Weights: `{protocol.checkpoint}` ({protocol.weights}, step {protocol.step:,}), sha256 "
        f"`{protocol.checkpoint_sha256}`; codec {protocol.codec}, sha256 `{protocol.codec_sha256}`.",
        *(
            f"Network, {role}: {network.name} (`{network.file}`, {_fingerprint(network)}); {network.preprocessing}."
            for role, network in protocol.networks.items()
        ),
        f"Versions: {', '.join(f'{name} {number}' for name, number in protocol.versions.items())}.",
        f"On {protocol.hardware}, {day}.",
    ]


def _fingerprint(network: NetworkRecord) -> str:
    return f"sha256 `{network.sha256}`" if network.sha256 else "without weights"


def _check_table(self_checks: Mapping[str, SelfChecks]) -> str:
    first = next(iter(self_checks.values()))
    headings = ["truth against", "videos distorted", "itself", "its other half"]
    headings += [f"{kind} {level:g}" for kind, distances in first.by_distortion.items() for level, _ in distances]
    rows = []
    for name, checks in self_checks.items():
        distances = [distance for levels in checks.by_distortion.values() for _, distance in levels]
        cells = [f"{value:.4g}" for value in (checks.itself, checks.halves, *distances)]
        rows.append([CHECKED_AS[name], f"{checks.videos:,}", *cells, "; ".join(checks.failures) or "passed"])
    return _table([*headings, "verdict"], rows)


def plot_self_checks(report: Report, path: Path) -> None:
    """Draw each distance against noise and blur, as a PNG; dashed: between two halves of the truth."""
    from matplotlib.figure import Figure  # half a second that others need not wait

    figure = Figure(figsize=(9, 3.5 * len(report.self_checks)), layout="constrained")
    panels = figure.subplots(len(report.self_checks), 2, squeeze=False)
    units = {"noise": "noise, standard deviation in 8-bit levels", "blur": "blur, sigma in pixels"}
    for row, (name, checks) in zip(panels, report.self_checks.items(), strict=True):
        for axes, (kind, distances) in zip(row, checks.by_distortion.items(), strict=True):
            axes.plot(*zip((0.0, checks.itself), *distances, strict=True), "o-")
            axes.axhline(checks.halves, color="grey", linestyle="--", label="two halves of the truth")
            axes.set(xlabel=units[kind], ylabel=HEADINGS[name].split()[0])
            axes.legend()
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def comparison(report: Report) -> str:
    """The paper's tables on the same data set, or all where it is another, each with our row and what differs."""
    protocol = report.protocol
    own_protocol = f"{protocol.videos:,} videos, {_frames(protocol)}, guidance {protocol.guidance.context:g}"
    sections = []
    of_same_data = [table for table in PAPER_TABLES if _plain(table.data) in _plain(protocol.data)]
    for table in of_same_data or PAPER_TABLES:
        rows = [
            [method, *cells, table.protocol if method.startswith("GPDiT") else table.others]
            for method, cells in table.rows.items()
        ]
        rows.append([f"`{protocol.checkpoint}`", *_cells(report.scores, table.columns), own_protocol])
        differences = "; ".join(_differences(protocol, table)) or "nothing that it states"
        sections += [
            f"### {table.title}",
            _table(["Method", *(HEADINGS.get(column, column) for column in table.columns), "Protocol"], rows),
            f"What differs from the paper: {differences}. The paper does not state {UNSTATED}.",
        ]
    return "\n\n".join(sections)


def _differences(protocol: Protocol, table: PaperTable) -> Iterator[str]:
    if _plain(protocol.data) != _plain(table.data):
        yield f"data {protocol.data}, not {table.data}"
    if protocol.videos != table.videos:
        yield f"{protocol.videos:,} videos, not {table.videos:,}"
    if (protocol.generated_frames, protocol.context_frames) != PAPER_FRAMES:
        yield f"{_frames(protocol)}, not {PAPER_FRAMES[0]} from {PAPER_FRAMES[1]}"
    if protocol.guidance.context != table.guidance:
        yield f"guidance {protocol.guidance.context:g}, not {table.guidance:g}"


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def _frames(protocol: Protocol) -> str:
    return f"{protocol.generated_frames} frames from {protocol.context_frames}"
