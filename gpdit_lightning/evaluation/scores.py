"""From what was found in all chunks to a report."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor
from tqdm import tqdm

from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.chunks import BLUR, CODEC, GROUND_TRUTH, NOISE, REPEATED, ChunkFiles, seed_variant
from gpdit_lightning.evaluation.metrics import FrechetDistance, bias_warning, inception_score, precision_recall
from gpdit_lightning.evaluation.report import HEADINGS, Protocol, Report, Score
from gpdit_lightning.evaluation.self_checks import BLUR_LEVELS, NOISE_LEVELS, SelfChecks, assign_halves, check_distances

IS_SPLITS = 10
NEIGHBOURS = 3  # of precision and recall
FEW = 1000  # videos below which precision and recall are warned of
# What a report calls a variant, and what its scores say.
REFERENCES = {
    GROUND_TRUTH: "the truth",
    CODEC: "the truth through the codec",
    REPEATED: "the last given frame repeated",
}
CHECKED = {"fvd": "video", "fid": "image"}  # what distances that are checked are made of
DISTANCES_OF_CHECK = 2 + len(NOISE) + len(BLUR)
BULK = 1024  # features that are summed up at a time


def make_report(files: ChunkFiles, protocol: Protocol, lost: Iterable[str] = ()) -> Report:
    """All scores, references and self-checks, with a progress bar.

    Args:
        files: of all chunks.
        protocol: how they came about.
        lost: names of videos that could not be read.

    Raises:
        InputError: too few videos for a score, or features that are not finite.
    """
    if len(files.names) < 2:
        raise InputError(f"{len(files.names)} videos could be read, where scores need at least 2: add videos.")
    seeds = [seed_variant(seed) for seed in protocol.seeds]
    variants, checked = [*seeds, *REFERENCES], checked_in(files)
    of_subject = (places_of(files) if files.has(GROUND_TRUTH, "image") else 0) + files.has(GROUND_TRUTH, "video")
    total = of_subject * len(variants) + DISTANCES_OF_CHECK * len(checked)
    with tqdm(total=total, desc="scoring", unit=" distances") as bar:
        scores = scores_of(files, variants, bar.update)
        self_checks = {name: self_checks_of(files, what, bar.update) for name, what in checked.items()}
    return Report(
        protocol,
        scores={name: Score.of([scores[seed][name] for seed in seeds]) for name in scores[seeds[0]]},
        references={
            words: {name: Score.of([value]) for name, value in scores[variant].items()}
            for variant, words in REFERENCES.items()
        },
        self_checks=self_checks,
        warnings=tuple(warnings_of(files, self_checks, lost)),
    )


def scores_of(
    files: ChunkFiles, variants: Sequence[str], done: Callable[[], object] = lambda: None
) -> dict[str, dict[str, float]]:
    """The scores of variants against the truth, by the names of `report.HEADINGS`, as far as the networks go.

    FID and IS are those of each generated frame's place in the clip, averaged, as the paper has it ("the average
    [FID and IS] are calculated over individual frames", section 5.1).

    Args:
        files: of all chunks.
        variants: whose scores.
        done: called after each Frechet distance.
    """
    scores: dict[str, dict[str, float]] = {variant: {} for variant in variants}
    if files.has(GROUND_TRUTH, "image"):
        at_places = [
            distances(
                files.values(GROUND_TRUTH, "image", place),
                {variant: files.values(variant, "image", place) for variant in variants},
                done,
            )
            for place in range(places_of(files))
        ]
        for variant in variants:
            scores[variant]["fid"] = fmean(found[variant] for found in at_places)
    if files.has(GROUND_TRUTH, "classes"):
        splits = min(IS_SPLITS, len(files.names))
        for variant in variants:
            classes = (together(files, variant, "classes", place) for place in range(places_of(files)))
            scores[variant]["is"] = fmean(inception_score(probabilities, splits)[0] for probabilities in classes)
    if files.has(GROUND_TRUTH, "video"):
        others = {variant: files.values(variant, "video") for variant in variants}
        for variant, found in distances(files.values(GROUND_TRUTH, "video"), others, done).items():
            scores[variant]["fvd"] = found
        if len(files.names) > NEIGHBOURS:
            real = together(files, GROUND_TRUTH, "video")
            for variant in variants:
                precision, recall = precision_recall(real, together(files, variant, "video"), NEIGHBOURS)
                scores[variant] |= {"precision": precision, "recall": recall}
    for variant in variants:
        if variant != GROUND_TRUTH:
            for what in ("psnr", "ssim"):
                scores[variant][what] = together(files, variant, what).double().mean().item()
    return scores


def checked_in(files: ChunkFiles) -> dict[str, str]:
    """Of `CHECKED` what there is enough of: two distorted videos, and two in each half."""
    if any(Counter(assign_halves(files.names))[half] < 2 for half in (0, 1)):
        return {}
    return {name: what for name, what in CHECKED.items() if sum(map(len, files.values(NOISE[0], what))) > 1}


def self_checks_of(files: ChunkFiles, what: str, done: Callable[[], object] = lambda: None) -> SelfChecks:
    """What a distance, FID of all frames at once, says of truth and of distorted truth.

    Args:
        files: of all chunks.
        what: of `CHECKED`.
        done: called after each Frechet distance.
    """
    itself = distances(
        each(files.values(GROUND_TRUTH, what)), {GROUND_TRUTH: each(files.values(GROUND_TRUTH, what))}, done
    )
    between_halves = distances(half_of(files, what, 0), {GROUND_TRUTH: half_of(files, what, 1)}, done)
    distorted = {variant: each(files.values(variant, what)) for variant in (*NOISE, *BLUR)}
    found = distances(each(files.values(GROUND_TRUTH, what, as_of=NOISE[0])), distorted, done)
    return check_distances(
        itself[GROUND_TRUTH],
        between_halves[GROUND_TRUTH],
        tuple((level, found[variant]) for level, variant in zip(NOISE_LEVELS, NOISE, strict=True)),
        tuple((level, found[variant]) for level, variant in zip(BLUR_LEVELS, BLUR, strict=True)),
        sum(map(len, files.values(NOISE[0], what))),
    )


def half_of(files: ChunkFiles, what: str, number: int) -> Iterator[Tensor]:
    """The features of one half of the videos."""
    half = torch.tensor(assign_halves(files.names))
    start = 0
    for values in files.values(GROUND_TRUTH, what):
        yield from each([values[half[start : start + len(values)] == number]])
        start += len(values)


def distances(
    real: Iterable[Tensor], others: Mapping[str, Iterable[Tensor]], done: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Frechet distances from one truth to others.

    Args:
        real: features (n, d), piece by piece.
        others: by name.
        done: called after each.

    Raises:
        InputError: fewer than two samples, or features that are not finite.
    """
    metric: FrechetDistance | None = None
    for features in in_bulk(real):
        metric = metric or FrechetDistance(features.shape[1], reset_real_features=False)
        metric.update(features, real=True)
    if metric is None:
        raise InputError("too few samples for a Frechet distance (0): evaluate on more videos.")
    found = {}
    for name, pieces in others.items():
        metric.reset()
        for features in in_bulk(pieces):
            metric.update(features, real=False)
        found[name] = metric.compute().item()
        done()
    return found


def in_bulk(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Pieces joined to larger ones: their products with themselves take a sixth of the time of sixteen at a time."""
    held: list[Tensor] = []
    for piece in pieces:
        held.append(piece)
        if sum(map(len, held)) >= BULK:
            yield torch.cat(held)
            held.clear()
    if held:
        yield torch.cat(held)


def each(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Features of videos (B, n) as they are, and of frames (B, T', n) one by one."""
    return (piece.flatten(0, -2) for piece in pieces)


def together(files: ChunkFiles, variant: str, what: str, place: int | None = None) -> Tensor:
    """All that was found in a variant, or at one place of its frames."""
    return torch.cat(list(files.values(variant, what, place)))


def places_of(files: ChunkFiles) -> int:
    """How many generated frames there are."""
    return next(files.values(GROUND_TRUTH, "image")).shape[1]


def warnings_of(files: ChunkFiles, self_checks: Mapping[str, SelfChecks], lost: Iterable[str]) -> Iterator[str]:
    """What a reader of the scores should know besides."""
    missing = sorted(lost)
    if missing:
        yield f"{len(missing)} videos could not be read whole and are left out: {', '.join(missing)}."
    if files.has(GROUND_TRUTH, "classes"):
        classes = next(files.values(GROUND_TRUTH, "classes")).shape[-1]
        if len(files.names) < IS_SPLITS * classes:
            most = max(1, len(files.names) // IS_SPLITS)
            yield f"IS is of {len(files.names):,} videos in parts of {most:,}, and cannot exceed {most:,}."
    if files.has(GROUND_TRUTH, "video") and len(files.names) < FEW:
        yield f"precision and recall of {len(files.names):,} videos say little: with so few, most lie among the others."
    for name, what in CHECKED.items():
        score = HEADINGS[name].split()[0]
        if files.has(GROUND_TRUTH, what):
            dimensions = next(files.values(GROUND_TRUTH, what)).shape[-1]
            if warning := bias_warning(score, len(files.names), dimensions):
                yield warning
        if files.has(NOISE[0], what) and name not in self_checks:
            yield f"the videos are too few for self-checks of {score}."
        elif name in self_checks and not self_checks[name].passed:
            yield f"{score} fails its self-checks: {'; '.join(self_checks[name].failures)}."
