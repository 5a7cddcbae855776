"""From the results of all chunks to the scores of a report.

Shapes: B videos of a chunk, T' generated frames, n features.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor
from tqdm import tqdm

from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.chunk_files import ChunkFiles
from gpdit_lightning.evaluation.chunks import BLUR, CODEC, GROUND_TRUTH, NOISE, REPEATED, seed_variant
from gpdit_lightning.evaluation.metrics import FrechetDistance, bias_warning, inception_score, precision_recall
from gpdit_lightning.evaluation.report import HEADINGS, Protocol, Report, Score
from gpdit_lightning.evaluation.self_checks import (
    BLUR_LEVELS,
    NOISE_LEVELS,
    SelfChecks,
    assign_halves,
    check_distances,
)

IS_SPLITS = 10
NEIGHBOURS = 3  # of precision and recall
MIN_VIDEOS_FOR_PRECISION = 1000  # below, the report warns about precision and recall
# The variants that are no model's, by their names in a report's JSON.
REFERENCES = {
    GROUND_TRUTH: "the truth",
    CODEC: "the truth through the codec",
    REPEATED: "the last given frame repeated",
}
CHECKED = {"fvd": "video", "fid": "image"}  # the distances with self-checks, and the features they are computed from
DISTANCES_PER_CHECK = 2 + len(NOISE) + len(BLUR)
ROWS_PER_UPDATE = 1024  # features that are accumulated at a time


def make_report(files: ChunkFiles, protocol: Protocol, unreadable: Iterable[str] = ()) -> Report:
    """Compute all scores, references and self-checks, with a progress bar.

    Args:
        files: of all chunks.
        protocol: of the evaluation.
        unreadable: names of videos that could not be read.

    Raises:
        InputError: too few videos for a score, or features that are not finite.
    """
    if len(files.names) < 2:
        raise InputError(f"{len(files.names)} videos could be read, but scores need at least 2: add videos.")
    seeds = [seed_variant(seed) for seed in protocol.seeds]
    variants, checked = [*seeds, *REFERENCES], checked_distances(files)
    distances_per_variant = (num_positions(files) if files.has(GROUND_TRUTH, "image") else 0) + files.has(
        GROUND_TRUTH, "video"
    )
    total = distances_per_variant * len(variants) + DISTANCES_PER_CHECK * len(checked)
    with tqdm(total=total, desc="scoring", unit=" distances") as bar:
        scores = compute_scores(files, variants, bar.update)
        self_checks = {name: run_self_checks(files, quantity, bar.update) for name, quantity in checked.items()}
    return Report(
        protocol,
        scores={name: Score.of([scores[seed][name] for seed in seeds]) for name in scores[seeds[0]]},
        references={
            label: {name: Score.of([value]) for name, value in scores[variant].items()}
            for variant, label in REFERENCES.items()
        },
        self_checks=self_checks,
        warnings=tuple(report_warnings(files, self_checks, unreadable)),
    )


def compute_scores(
    files: ChunkFiles, variants: Sequence[str], on_distance: Callable[[], object] = lambda: None
) -> dict[str, dict[str, float]]:
    """The scores of variants against the ground truth, by their keys in `report.HEADINGS`.

    Scores whose network is missing are left out. FID and IS are computed for each position of a generated frame in the
    clip and averaged, as in the paper ("the average [FID and IS] are calculated over individual frames", section 5.1).

    Args:
        files: of all chunks.
        variants: to score.
        on_distance: called after each Frechet distance.
    """
    scores: dict[str, dict[str, float]] = {variant: {} for variant in variants}
    if files.has(GROUND_TRUTH, "image"):
        distances = [
            frechet_distances(
                files.values(GROUND_TRUTH, "image", position),
                {variant: files.values(variant, "image", position) for variant in variants},
                on_distance,
            )
            for position in range(num_positions(files))
        ]
        for variant in variants:
            scores[variant]["fid"] = fmean(at_position[variant] for at_position in distances)
    if files.has(GROUND_TRUTH, "classes"):
        splits = min(IS_SPLITS, len(files.names))
        for variant in variants:
            classes = (all_values(files, variant, "classes", position) for position in range(num_positions(files)))
            scores[variant]["is"] = fmean(inception_score(probabilities, splits)[0] for probabilities in classes)
    if files.has(GROUND_TRUTH, "video"):
        others = {variant: files.values(variant, "video") for variant in variants}
        for variant, distance in frechet_distances(files.values(GROUND_TRUTH, "video"), others, on_distance).items():
            scores[variant]["fvd"] = distance
        if len(files.names) > NEIGHBOURS:
            real = all_values(files, GROUND_TRUTH, "video")
            for variant in variants:
                precision, recall = precision_recall(real, all_values(files, variant, "video"), NEIGHBOURS)
                scores[variant] |= {"precision": precision, "recall": recall}
    for variant in variants:
        if variant != GROUND_TRUTH:
            for quantity in ("psnr", "ssim"):
                scores[variant][quantity] = all_values(files, variant, quantity).double().mean().item()
    return scores


def checked_distances(files: ChunkFiles) -> dict[str, str]:
    """The entries of `CHECKED` with enough videos: at least two distorted ones, and two in each half."""
    if any(Counter(assign_halves(files.names))[half] < 2 for half in (0, 1)):
        return {}
    return {name: quantity for name, quantity in CHECKED.items() if num_distorted(files, quantity) > 1}


def num_distorted(files: ChunkFiles, quantity: str) -> int:
    """How many videos have distorted variants."""
    return sum(map(len, files.values(NOISE[0], quantity)))


def run_self_checks(files: ChunkFiles, quantity: str, on_distance: Callable[[], object] = lambda: None) -> SelfChecks:
    """Distances from the ground truth to itself and to its distorted variants; FID of all frames at once.

    Args:
        files: of all chunks.
        quantity: features, a value of `CHECKED`.
        on_distance: called after each Frechet distance.
    """

    def rows(variant: str, limit_to: str | None = None) -> Iterator[Tensor]:
        return flattened(files.values(variant, quantity, limit_to=limit_to))

    itself = frechet_distances(rows(GROUND_TRUTH), {GROUND_TRUTH: rows(GROUND_TRUTH)}, on_distance)
    first, second = (half_of_ground_truth(files, quantity, half) for half in (0, 1))
    halves = frechet_distances(first, {GROUND_TRUTH: second}, on_distance)
    distorted = {variant: rows(variant) for variant in (*NOISE, *BLUR)}
    distances = frechet_distances(rows(GROUND_TRUTH, limit_to=NOISE[0]), distorted, on_distance)
    return check_distances(
        itself[GROUND_TRUTH],
        halves[GROUND_TRUTH],
        noise=tuple((level, distances[variant]) for level, variant in zip(NOISE_LEVELS, NOISE, strict=True)),
        blur=tuple((level, distances[variant]) for level, variant in zip(BLUR_LEVELS, BLUR, strict=True)),
        videos=num_distorted(files, quantity),
    )


def half_of_ground_truth(files: ChunkFiles, quantity: str, number: int) -> Iterator[Tensor]:
    """The features of half of the videos, chunk by chunk."""
    halves = torch.tensor(assign_halves(files.names))
    start = 0
    for values in files.values(GROUND_TRUTH, quantity):
        yield from flattened([values[halves[start : start + len(values)] == number]])
        start += len(values)


def frechet_distances(
    real: Iterable[Tensor], others: Mapping[str, Iterable[Tensor]], on_distance: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Frechet distances from one set of features to others.

    Args:
        real: features (rows, n), in parts.
        others: by name, likewise.
        on_distance: called after each.

    Raises:
        InputError: fewer than two samples, or features that are not finite.
    """
    metric: FrechetDistance | None = None
    for features in in_larger_parts(real):
        metric = metric or FrechetDistance(features.shape[1], reset_real_features=False)
        metric.update(features, real=True)
    if metric is None:
        raise InputError("There are no samples for a Frechet distance: evaluate on more videos.")
    distances = {}
    for name, parts in others.items():
        metric.reset()
        for features in in_larger_parts(parts):
            metric.update(features, real=False)
        distances[name] = metric.compute().item()
        on_distance()
    return distances


def in_larger_parts(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """Joined parts: accumulating 1024 rows at a time takes a sixth of the time of 16 at a time."""
    pending: list[Tensor] = []
    for part in parts:
        pending.append(part)
        if sum(map(len, pending)) >= ROWS_PER_UPDATE:
            yield torch.cat(pending)
            pending.clear()
    if pending:
        yield torch.cat(pending)


def flattened(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """Features of videos (B, n) unchanged, and of frames (B, T', n) as (B T', n)."""
    return (part.flatten(0, -2) for part in parts)


def all_values(files: ChunkFiles, variant: str, quantity: str, position: int | None = None) -> Tensor:
    """The results of one kind from all chunks, of all generated frames or of one position."""
    return torch.cat(list(files.values(variant, quantity, position)))


def num_positions(files: ChunkFiles) -> int:
    """T', the number of generated frames of a clip."""
    return next(files.values(GROUND_TRUTH, "image")).shape[1]


def report_warnings(
    files: ChunkFiles, self_checks: Mapping[str, SelfChecks], unreadable: Iterable[str]
) -> Iterator[str]:
    """Sentences on what limits the meaning of the scores."""
    videos = len(files.names)
    missing = sorted(unreadable)
    if missing:
        yield f"{len(missing)} videos could not be read completely and are left out: {', '.join(missing)}."
    if files.has(GROUND_TRUTH, "classes"):
        classes = next(files.values(GROUND_TRUTH, "classes")).shape[-1]
        if videos < IS_SPLITS * classes:
            per_split = max(1, videos // IS_SPLITS)
            yield f"IS of {videos:,} videos in splits of {per_split:,} cannot exceed {per_split:,}."
    if files.has(GROUND_TRUTH, "video") and videos < MIN_VIDEOS_FOR_PRECISION:
        yield f"precision and recall of {videos:,} videos mean little: of so few, most lie in the other set's manifold."
    for name, quantity in CHECKED.items():
        score = HEADINGS[name].split()[0]
        if files.has(GROUND_TRUTH, quantity):
            dimensions = next(files.values(GROUND_TRUTH, quantity)).shape[-1]
            if warning := bias_warning(score, videos, dimensions):
                yield warning
        if files.has(NOISE[0], quantity) and name not in self_checks:
            yield f"there are too few videos for self-checks of {score}."
        elif name in self_checks and not self_checks[name].passed:
            yield f"{score} fails its self-checks: {'; '.join(self_checks[name].failures)}."
