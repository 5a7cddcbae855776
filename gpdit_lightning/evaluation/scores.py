"""From what was found in all chunks to a report."""

from collections.abc import Iterable, Iterator
from statistics import fmean

import torch
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.chunks import BLUR, CODEC, NOISE, REPEATED, TRUTH, ChunkFiles, of_seed
from gpdit_lightning.evaluation.metrics import FrechetDistance, bias_warning, inception_score, precision_recall
from gpdit_lightning.evaluation.report import Protocol, Report, Score
from gpdit_lightning.evaluation.self_checks import BLUR_LEVELS, NOISE_LEVELS, SelfChecks, halves, judged

IS_SPLITS = 10
NEIGHBOURS = 3  # of precision and recall
# What a report calls a subject, and what its scores say.
REFERENCES = {TRUTH: "the truth", CODEC: "the truth through the codec", REPEATED: "the last given frame repeated"}


def report_of(files: ChunkFiles, protocol: Protocol, lost: Iterable[str] = ()) -> Report:
    """All scores, references and self-checks.

    Args:
        files: of all chunks.
        protocol: how they came about.
        lost: names of videos that could not be read.

    Raises:
        InputError: too few videos for a score.
    """
    if len(files.names) < 2:
        raise InputError(f"{len(files.names)} videos could be read, where scores need at least 2: add videos.")
    per_seed = [scores_of(files, of_seed(seed)) for seed in protocol.seeds]
    references = {words: scores_of(files, subject) for subject, words in REFERENCES.items()}
    return Report(
        protocol,
        scores={name: Score.of([scores[name] for scores in per_seed]) for name in per_seed[0]},
        references={
            words: {name: Score.of([value]) for name, value in scores.items()} for words, scores in references.items()
        },
        self_checks=self_checks_of(files),
        warnings=tuple(warnings_of(files, lost)),
    )


def scores_of(files: ChunkFiles, subject: str) -> dict[str, float]:
    """The scores of a subject against the truth, by the names of `report.HEADINGS`, as far as the networks go.

    FID and IS are those of each generated frame's place in the clip, averaged, as the paper has it ("the average
    [FID and IS] are calculated over individual frames", section 5.1).
    """
    scores: dict[str, float] = {}
    if files.has(subject, "image"):
        places = frames_of(files, "image")
        scores["fid"] = fmean(
            distance(at_place(files.values(TRUTH, "image"), place), at_place(files.values(subject, "image"), place))
            for place in range(places)
        )
    if files.has(subject, "classes"):
        classes = together(files, subject, "classes")
        splits = min(IS_SPLITS, len(classes))
        scores["is"] = fmean(inception_score(probabilities, splits)[0] for probabilities in classes.unbind(1))
    if files.has(subject, "video"):
        scores["fvd"] = distance(files.values(TRUTH, "video"), files.values(subject, "video"))
        if len(files.names) > NEIGHBOURS:
            real, other = (together(files, name, "video") for name in (TRUTH, subject))
            scores["precision"], scores["recall"] = precision_recall(real, other, NEIGHBOURS)
    if subject != TRUTH:
        for what in ("psnr", "ssim"):
            scores[what] = together(files, subject, what).double().mean().item()
    return scores


def self_checks_of(files: ChunkFiles) -> dict[str, SelfChecks]:
    """What FVD and FID, this one of all frames at once, say of truth and of distorted truth, where that was made."""
    found = {}
    for name, what in (("fvd", "video"), ("fid", "image")):
        if not files.has(NOISE[0], what):
            continue

        def to(subject: str, what: str = what) -> float:
            return distance(each(files.values(TRUTH, what, as_of=subject)), each(files.values(subject, what)))

        found[name] = judged(
            distance(each(files.values(TRUTH, what)), each(files.values(TRUTH, what))),
            between_halves(files, what),
            tuple((level, to(subject)) for level, subject in zip(NOISE_LEVELS, NOISE, strict=True)),
            tuple((level, to(subject)) for level, subject in zip(BLUR_LEVELS, BLUR, strict=True)),
        )
    return found


def between_halves(files: ChunkFiles, what: str) -> float:
    """The distance of one half of the videos from the other."""
    half = torch.tensor(halves(files.names))

    def of_half(number: int) -> Iterator[Tensor]:
        start = 0
        for values in files.values(TRUTH, what):
            chosen = values[half[start : start + len(values)] == number]
            start += len(values)
            if len(chosen):
                yield from each([chosen])

    return distance(of_half(0), of_half(1))


def distance(real: Iterable[Tensor], other: Iterable[Tensor]) -> float:
    """The Frechet distance of features (n, d) that come piece by piece."""
    metric: FrechetDistance | None = None
    for is_real, pieces in ((True, real), (False, other)):
        for features in pieces:
            metric = metric or FrechetDistance(features.shape[1])
            metric.update(features, real=is_real)
    if metric is None:
        raise InputError("too few samples for a Frechet distance (0): evaluate on more videos.")
    return metric.compute().item()


def each(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Features of videos (B, n) as they are, and of frames (B, T', n) one by one."""
    return (piece.flatten(0, -2) for piece in pieces)


def at_place(pieces: Iterable[Tensor], place: int) -> Iterator[Tensor]:
    """The features of one generated frame of each video."""
    return (piece[:, place] for piece in pieces)


def together(files: ChunkFiles, subject: str, what: str) -> Tensor:
    """All that was found in a subject."""
    return torch.cat(list(files.values(subject, what)))


def frames_of(files: ChunkFiles, what: str) -> int:
    """How many generated frames there are."""
    return next(files.values(TRUTH, what)).shape[1]


def warnings_of(files: ChunkFiles, lost: Iterable[str]) -> Iterator[str]:
    """What a reader of the scores should know besides."""
    missing = sorted(lost)
    if missing:
        yield f"{len(missing)} videos could not be read whole and are left out: {', '.join(missing)}."
    for score, what in (("FVD", "video"), ("FID", "image")):
        if files.has(TRUTH, what):
            dimensions = next(files.values(TRUTH, what)).shape[-1]
            if warning := bias_warning(score, len(files.names), dimensions):
                yield warning
