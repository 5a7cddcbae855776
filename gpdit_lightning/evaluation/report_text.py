"""The report of an evaluation as Markdown and as a figure, with tables of GPDiT and ACDiT for comparison."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from gpdit_lightning.evaluation.network_files import NetworkRecord, missing_scores
from gpdit_lightning.evaluation.paper_results import (
    ACDIT_SAMPLER,
    ACDIT_SIZE,
    NOT_STATED,
    PAPER_TABLES,
    PaperTable,
)
from gpdit_lightning.evaluation.report import Protocol, Report, Score
from gpdit_lightning.evaluation.self_checks import SelfChecks
from gpdit_lightning.evaluation.videos import stride_text
from gpdit_lightning.files import atomic_write
from gpdit_lightning.names import SCORE_NAMES, printable
from gpdit_lightning.path_kinds import Medium

RESULTS, TABLES = "results.json", "results.md"
# The FID of the self-checks is computed over all generated frames; the FID score is a mean over their positions.
CHECKED_DISTANCES = {"fvd": "FVD", "fid": "FID, all frames at once"}
# Labels of the references in tables, by their names in JSON.
REFERENCE_LABELS = {
    "half of the truth": "real data, one half against the other",
    "the truth": "ground truth",
    "the truth through the codec": "ground truth, encoded and decoded",
    "the last given frame repeated": "last context frame, repeated",
}


def write_report(report: Report, folder: Path) -> None:
    """Write `results.json` and then `results.md`."""
    for name, text in ((RESULTS, report.to_json()), (TABLES, to_markdown(report))):
        with atomic_write(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # for names that are not UTF-8


def to_markdown(report: Report) -> str:
    """Return the missing scores, the table of scores, warnings, protocol, self-checks and comparison with the paper."""
    protocol = report.protocol
    sections = [f"# {protocol.data}: {what_is_generated(protocol)}"]
    missing = missing_scores(protocol.networks, "is" in report.scores, protocol.medium)
    sections += [f"**Missing:** {sentence}" for sentence in missing]
    sections.append(score_table(report))
    sections += [f"**Warning:** {warning}" for warning in report.warnings]
    sections += ["## Protocol", "\n".join(f"- {line}" for line in protocol_sentences(protocol, report.date))]
    if report.self_checks:
        sections += ["## Self-checks", self_check_table(report.self_checks, protocol.medium)]
    return "\n\n".join([*sections, "## Comparison with the paper", paper_comparison(report)]) + "\n"


def _table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (headings, *rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(path: str) -> str:
    """Return a path as code in Markdown, on one line."""
    return f"`{printable(path)}`"


def _cells(scores: Mapping[str, Score], names: Iterable[str]) -> list[str]:
    return [str(scores[name]) if name in scores else "-" for name in names]


def score_table(report: Report) -> str:
    """Return a table with the scores of the model and its main settings, followed by the scores of the references."""
    protocol = report.protocol
    if protocol.samples is None:
        counts = {
            "videos": f"{protocol.videos:,}",
            "frames": f"{protocol.generated_frames} from {_context(protocol)}",
            **({"FVD of": f"{protocol.fvd_frames} frames"} if "fvd" in report.scores else {}),
        }
    else:
        counts = {"samples": f"{protocol.samples:,}", f"real {protocol.medium}s": f"{protocol.videos:,}"}
    of_videos = {"frames": str(protocol.generated_frames)} if protocol.samples is not None else {}
    of_videos |= {"stride": stride_text(protocol.stride, protocol.fps)}
    settings = {
        "data": protocol.data,
        **counts,
        "size": f"{protocol.size[0]}x{protocol.size[1]}",
        **(of_videos if protocol.medium == "video" else {}),
        "sampler": f"{protocol.sampler}, {protocol.steps} steps",
        "guidance": f"{protocol.guidance.context:g}",
        **({"labels": f"guidance {protocol.guidance.label:g}"} if protocol.labels else {}),
        "seeds": str(len(protocol.seeds)),
    }
    rows = [[_code(protocol.checkpoint), *_cells(report.scores, report.scores), *settings.values()]]
    for name, scores in report.references.items():
        rows.append([REFERENCE_LABELS.get(name, name), *_cells(scores, report.scores), *[""] * len(settings)])
    return _table(["", *(SCORE_NAMES[name] for name in report.scores), *settings], rows)


def protocol_sentences(protocol: Protocol, date: str) -> list[str]:
    """Return the protocol in sentences."""
    guidance, schedule = protocol.guidance, protocol.schedule
    levels = "" if guidance.at_all_levels else f" at noise levels {guidance.least_level:g} to {guidance.most_level:g}"
    inputs = "Scores are computed from generated frames."
    if "video" in protocol.networks and protocol.fvd_frames == "all" and protocol.context_frames:
        inputs = (
            "FVD, precision and recall are computed from context and generated frames, other scores from generated "
            "frames."
        )
    visible = "all blocks" if protocol.window is None else f"the latest {protocol.window} latent frames"
    if protocol.context_noise:
        visible += f", the generated ones with context noise of {protocol.context_noise:g} radians,"
    size = f"{protocol.size[0]}x{protocol.size[1]} pixels"
    data = [
        f"Videos: {protocol.videos:,} of {protocol.data}, {protocol.choice}; sha256 of their names "
        f"`{protocol.split_sha256}`.",
        f"Frames: {protocol.generated_frames} generated from {_context(protocol)}, "
        f"stride {stride_text(protocol.stride, protocol.fps)}, {size}, {protocol.resize}. {inputs}",
    ]
    return [
        *(data if protocol.samples is None else _sentences_on_samples(protocol, size)),
        f"Labels: {protocol.labels or 'none'}.",
        f"Sampler: {protocol.sampler}, {protocol.steps} steps, {schedule.name} schedule with shift {schedule.shift:g}; "
        f"guidance {guidance.context:g} over the context, {guidance.label:g} over the label{levels}; a block attends "
        f"to {visible} before it; precision {protocol.precision}.",
        f"Seeds: {', '.join(map(str, protocol.seeds))}; ± is the sample standard deviation over them.",
        f"Weights: {_code(protocol.checkpoint)} ({protocol.weights}, step {protocol.step:,}), sha256 "
        f"`{protocol.checkpoint_sha256}`; codec {protocol.codec}, sha256 `{protocol.codec_sha256}`.",
        *(
            f"Network, {role}: {network.name} (`{network.file}`, {_sha256(network)}); {network.preprocessing}."
            for role, network in protocol.networks.items()
        ),
        f"Versions: {', '.join(f'{name} {number}' for name, number in protocol.versions.items())}.",
        f"Hardware: {protocol.hardware}; date: {date}.",
    ]


def _sentences_on_samples(protocol: Protocol, size: str) -> list[str]:
    """Return sentences on samples from noise alone and on the real data that they are compared with."""
    is_video, noun = protocol.medium == "video", f"{protocol.medium}s"
    clips = f" of {protocol.generated_frames} frames" if is_video else ""
    stride = f", stride {stride_text(protocol.stride, protocol.fps)}" if is_video else ""
    source = f"; statistics from {_code(protocol.reference)}" if protocol.reference else ""
    features = f"the features of {'FVD' if is_video else 'FID'}"
    return [
        f"Samples: {protocol.samples:,} {noun}{clips} from noise alone, {size}; the noise of a sample is a function of "
        "the seed, its label and its number.",
        f"Real {noun}: {protocol.videos:,} of {protocol.data}, {protocol.choice}{stride}, {size}, {protocol.resize}; "
        f"sha256 of their names `{protocol.split_sha256}`{source}.",
        "FID and IS: of all frames together; IS in ten random splits."
        if is_video
        else "FID: of all samples against all real images; IS in ten random splits.",
        f"Precision and recall: of {protocol.manifold:,} real and {protocol.samples:,} generated {noun} on {features}, "
        "with balls to the third nearest neighbour.",
    ]


def _sha256(network: NetworkRecord) -> str:
    return f"sha256 `{network.sha256}`" if network.sha256 else "without weights"


def self_check_table(self_checks: Mapping[str, SelfChecks], medium: Medium) -> str:
    """Return a table with a row of distances for each checked score."""
    first = next(iter(self_checks.values()))
    headings = ["ground truth against", f"{medium}s distorted", "itself", "the other half"]
    headings += [f"{kind} {level:g}" for kind, pairs in first.by_distortion.items() for level, _ in pairs]
    rows = []
    for name, checks in self_checks.items():
        distances = [distance for pairs in checks.by_distortion.values() for _, distance in pairs]
        cells = [f"{value:.4g}" for value in (checks.itself, checks.halves, *distances)]
        rows.append([CHECKED_DISTANCES[name], f"{checks.videos:,}", *cells, "; ".join(checks.failures) or "passed"])
    return _table([*headings, "result"], rows)


def paper_comparison(report: Report) -> str:
    """Return the tables of the papers for this data set, or all of the same mode, each with a row of this report.

    Tables of continued videos belong to the mode of continuations, and tables of classes to samples from noise alone.
    The differences from the protocol of the paper are listed below each table. Tables without a score of this report
    are left out.
    """
    protocol = report.protocol
    our_protocol = f"{what_is_generated(protocol)}, guidance {_guidance(protocol):g}"
    if protocol.samples is None:
        our_protocol = f"{protocol.videos:,} videos, {our_protocol}"
    sections = []
    of_mode = [table for table in PAPER_TABLES if table.samples == (protocol.medium if protocol.samples else None)]
    same_data = [table for table in of_mode if _normalised(table.data) in _normalised(protocol.data)]
    tables = [table for table in same_data or of_mode if report.scores.keys() & set(table.columns)]
    if not tables:
        return "The scores of the paper's tables are FID, FVD and IS; this report has none of those for these data."
    for table in tables:
        rows = [
            [method, *cells, table.protocol if method.startswith(table.paper) else table.protocol_of_others]
            for method, cells in table.rows.items()
        ]
        rows.append([_code(protocol.checkpoint), *_cells(report.scores, table.columns), our_protocol])
        differences = "; ".join(_differences(protocol, table)) or "none in what the paper states"
        sections += [
            f"### {table.title}",
            _table(["Method", *(SCORE_NAMES.get(column, column) for column in table.columns), "Protocol"], rows),
            f"Differences from the paper: {differences}. The paper does not state {table.not_stated or NOT_STATED}.",
        ]
    return "\n\n".join(sections)


def _differences(protocol: Protocol, table: PaperTable) -> Iterator[str]:
    if _normalised(protocol.data) != _normalised(table.data):
        yield f"data {protocol.data}, not {table.data}"
    if protocol.samples is not None:
        yield from _differences_of_samples(protocol, table)
    elif protocol.videos != table.videos:
        yield f"{protocol.videos:,} videos, not {table.videos:,}"
    if (protocol.generated_frames, protocol.context_frames) != table.frames:
        frames, context = table.frames
        yield f"{_frame_counts(protocol)}, not {frames} from {context or 'noise alone'}"
    if protocol.labels and protocol.samples is None:
        yield "conditioned on labels"
    if _guidance(protocol) != table.guidance:
        yield f"guidance {_guidance(protocol):g}, not {table.guidance:g}"


def _differences_of_samples(protocol: Protocol, table: PaperTable) -> Iterator[str]:
    if table.videos is not None and protocol.samples != table.videos:
        yield f"{protocol.samples:,} samples, not {table.videos:,}"
    if protocol.size != ACDIT_SIZE:
        yield f"{protocol.size[0]}x{protocol.size[1]} pixels, not {ACDIT_SIZE[0]}x{ACDIT_SIZE[1]}"
    if (protocol.sampler, protocol.steps) != ACDIT_SAMPLER:
        yield f"{protocol.sampler} with {protocol.steps} steps, not DPM-Solver with {ACDIT_SAMPLER[1]}"
    if not protocol.labels:
        yield "not conditioned on labels"


def _guidance(protocol: Protocol) -> float:
    """Return the guidance scale over the context, or over the label of samples from noise alone."""
    return protocol.guidance.context if protocol.samples is None else protocol.guidance.label


def what_is_generated(protocol: Protocol) -> str:
    """Return the frames of each continuation, or the number of samples."""
    if protocol.samples is None:
        return _frame_counts(protocol)
    frames = f" of {protocol.generated_frames} frames" if protocol.medium == "video" else ""
    return f"{protocol.samples:,} {protocol.medium}s{frames} from noise alone"


def _normalised(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def _frame_counts(protocol: Protocol) -> str:
    return f"{protocol.generated_frames} frames from {_context(protocol)}"


def _context(protocol: Protocol) -> str:
    return str(protocol.context_frames or "noise alone")


def plot_self_checks(report: Report, path: Path) -> None:
    """Plot each distance as a function of noise and blur to a PNG.

    A dashed line shows the distance between two halves of the ground truth.
    """
    from matplotlib.figure import Figure  # takes half a second to import

    figure = Figure(figsize=(9, 3.5 * len(report.self_checks)), layout="constrained")
    panels = figure.subplots(len(report.self_checks), 2, squeeze=False)
    units = {"noise": "noise, standard deviation in 8-bit levels", "blur": "blur, sigma in pixels"}
    for row, (name, checks) in zip(panels, report.self_checks.items(), strict=True):
        for axes, (kind, pairs) in zip(row, checks.by_distortion.items(), strict=True):
            axes.plot(*zip((0.0, checks.itself), *pairs, strict=True), "o-")
            axes.axhline(checks.halves, color="grey", linestyle="--", label="between halves of the ground truth")
            axes.set(xlabel=units[kind], ylabel=SCORE_NAMES[name].split()[0])
            axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
