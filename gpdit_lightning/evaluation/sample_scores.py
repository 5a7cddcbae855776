"""Scores of samples from noise alone against statistics of real images or videos, from the files of chunks.

FID and IS are those of all frames together, which for images are the images. Precision and recall are those of images
on Inception's features, as in ADM's evaluation, and those of videos on the features of FVD.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from gpdit_lightning.evaluation.chunk_files import ChunkFiles
from gpdit_lightning.evaluation.chunks import CODEC, GROUND_TRUTH, seed_variant
from gpdit_lightning.evaluation.metrics import Moments, bias_warning, inception_score, precision_recall
from gpdit_lightning.evaluation.reference import Reference, ReferenceRecord, manifold_of
from gpdit_lightning.evaluation.report import Protocol, Report, Score
from gpdit_lightning.evaluation.scores import (
    DISTANCES_PER_CHECK,
    IS_SPLITS,
    MIN_FOR_PRECISION,
    NEIGHBOURS,
    QUANTITIES,
    REFERENCES,
    all_values,
    assign_halves,
    checked_distances,
    concatenate_parts,
    flatten_frames,
    half_of_ground_truth,
    run_self_checks,
)
from gpdit_lightning.names import SCORE_NAMES, counted
from gpdit_lightning.path_kinds import Medium
from gpdit_lightning.progress import progress_bar

HALVES = "half of the truth"  # name in JSON of one half of the real data against the other


def make_reference(
    files: ChunkFiles, record: ReferenceRecord, moments: Moments | None = None, device: str | torch.device = "cpu"
) -> Reference:
    """Compute the statistics of real images or videos, with the scores of real data against real data.

    Args:
        files: of all chunks of real data; there may be none if `moments` are given.
        record: what they are computed from, without scores.
        moments: given ones of image features, which replace those of the files.
        device: on which precision and recall are computed.
    """
    checked = checked_distances(files) if files.paths else {}
    with progress_bar(
        total=DISTANCES_PER_CHECK * len(checked), desc="statistics", unit=" distances", disable=not checked
    ) as bar:
        self_checks = {name: run_self_checks(files, quantity, bar.update) for name, quantity in checked.items()}
    computed = {
        quantity: Moments.of(rows_of(files, GROUND_TRUTH, quantity))
        for quantity in QUANTITIES.values()
        if files.has(GROUND_TRUTH, quantity)
    }
    given = {} if moments is None else {"image": moments}
    manifold: dict[str, Tensor] = {}
    if files.has(GROUND_TRUTH, record.medium):
        manifold[record.medium] = manifold_of(rows_of(files, GROUND_TRUTH, record.medium))
    reference = Reference(record, computed | given, manifold)
    scores = {}
    if halves := scores_of_halves(files, record.medium, device):
        scores[HALVES] = halves
    if files.has_variant(CODEC):
        scores[REFERENCES[CODEC]] = scores_of_variant(files, CODEC, reference, device)
    return replace(reference, record=replace(record, scores=scores, self_checks=self_checks))


def rows_of(files: ChunkFiles, variant: str, quantity: str) -> Iterator[Tensor]:
    """Yield features (rows, n) of all frames, or of all videos, of a variant in blocks of equal size."""
    return concatenate_parts(flatten_frames(files.values(variant, quantity)))


def scores_of_variant(
    files: ChunkFiles,
    variant: str,
    reference: Reference,
    device: str | torch.device = "cpu",
    on_distance: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Return the scores of a variant against the statistics of real data, by key in `names.SCORE_NAMES`.

    Args:
        files: of all chunks that contain the variant.
        variant: generated samples, or real data that were encoded and decoded.
        reference: the statistics.
        device: on which precision and recall are computed.
        on_distance: called after each Frechet distance.
    """
    scores = {}
    for name, quantity in QUANTITIES.items():
        if files.has(variant, quantity) and quantity in reference.moments:
            scores[name] = reference.moments[quantity].distance(Moments.of(rows_of(files, variant, quantity)))
            on_distance()
    if files.has(variant, "classes"):
        scores["is"] = inception_score_of_frames(files, variant)
    for quantity, real in reference.manifold.items():
        if files.has(variant, quantity):
            scores |= precision_and_recall(real.to(device), all_values(files, variant, quantity))
    return scores


def inception_score_of_frames(files: ChunkFiles, variant: str) -> float:
    """Return the IS of all frames of a variant: the mean over splits, of which there are at most `IS_SPLITS`."""
    probabilities = all_values(files, variant, "classes").flatten(0, 1)
    return inception_score(probabilities, min(IS_SPLITS, len(probabilities)))[0]


def precision_and_recall(real: Tensor, generated: Tensor) -> dict[str, float]:
    """Return precision and recall of features (rows, n) or (B, 1, n), computed on the device of the real ones.

    The result is empty if there are too few samples.
    """
    generated = generated.flatten(0, -2)
    if min(len(real), len(generated)) <= NEIGHBOURS:
        return {}
    precision, recall = precision_recall(real, generated, NEIGHBOURS)
    return {"precision": precision, "recall": recall}


def scores_of_halves(files: ChunkFiles, medium: Medium, device: str | torch.device = "cpu") -> dict[str, float]:
    """Return the scores of one half of the real data against the other; IS is that of all."""
    sizes = [assign_halves(files.names).count(half) for half in (0, 1)]
    if min(sizes) < 2:
        return {}
    scores = {}
    for name, quantity in QUANTITIES.items():
        if files.has(GROUND_TRUTH, quantity):
            halves = [Moments.of(concatenate_parts(half_of_ground_truth(files, quantity, half))) for half in (0, 1)]
            scores[name] = halves[0].distance(halves[1])
    if files.has(GROUND_TRUTH, "classes"):
        scores["is"] = inception_score_of_frames(files, GROUND_TRUTH)
    if files.has(GROUND_TRUTH, medium):
        first, second = (manifold_of(half_of_ground_truth(files, medium, half)) for half in (0, 1))
        scores |= precision_and_recall(first.to(device), second)
    return scores


def make_sample_report(
    files: ChunkFiles,
    reference: Reference,
    protocol: Protocol,
    unreadable: int = 0,
    device: str | torch.device = "cpu",
) -> Report:
    """Compute the scores of samples, with a progress bar.

    Args:
        files: of all chunks of samples.
        reference: statistics of real data.
        protocol: of the evaluation.
        unreadable: number of real images or videos that could not be read.
        device: on which precision and recall are computed.

    Raises:
        InputError: a feature is not finite.
    """
    seeds = [seed_variant(seed) for seed in protocol.seeds]
    distances = sum(files.has(seeds[0], quantity) for quantity in QUANTITIES.values())
    with progress_bar(total=distances * len(seeds), desc="scoring", unit=" distances", disable=not distances) as bar:
        of_seeds = [scores_of_variant(files, seed, reference, device, bar.update) for seed in seeds]
    record = reference.record
    references = {
        name: scores
        for name, scores in record.scores.items()
        if name == HALVES or record.codec_sha256 == protocol.codec_sha256
    }
    return Report(
        protocol,
        scores={name: Score.of([scores[name] for scores in of_seeds]) for name in of_seeds[0]},
        references={
            name: {score: Score.of([value]) for score, value in scores.items()} for name, scores in references.items()
        },
        self_checks={
            name: checks for name, checks in record.self_checks.items() if files.has(seeds[0], QUANTITIES[name])
        },
        warnings=tuple(sample_warnings(files, reference, protocol, unreadable)),
    )


def sample_warnings(files: ChunkFiles, reference: Reference, protocol: Protocol, unreadable: int) -> Iterator[str]:
    """Yield sentences on the limitations of the scores."""
    variant, samples = seed_variant(protocol.seeds[0]), len(files.names)
    if unreadable:
        are = "is" if unreadable == 1 else "are"
        yield f"{counted(unreadable, 'real file')} could not be read completely and {are} left out."
    if files.has(variant, "classes"):
        probabilities = next(files.values(variant, "classes"))
        frames, classes = samples * probabilities.shape[1], probabilities.shape[-1]
        if frames < IS_SPLITS * classes:
            per_split = max(1, frames // IS_SPLITS)
            yield f"IS of {frames:,} images in splits of {per_split:,} cannot exceed {per_split:,}."
    for quantity in reference.manifold:
        fewest = min(samples, len(reference.manifold[quantity]))
        if files.has(variant, quantity) and fewest < MIN_FOR_PRECISION:
            yield (
                f"precision and recall of {fewest:,} samples are not meaningful: with so few, most samples lie in the "
                "manifold of the other set."
            )
    for name, quantity in QUANTITIES.items():
        if files.has(variant, quantity) and quantity in reference.moments:
            values, moments = next(files.values(variant, quantity)), reference.moments[quantity]
            rows = samples * (values.shape[1] if values.ndim == 3 else 1)
            fewest = min(rows, moments.samples or rows)
            if warning := bias_warning(SCORE_NAMES[name].split()[0], fewest, values.shape[-1]):
                yield warning
            checks = reference.record.self_checks.get(name)
            if checks and not checks.passed:
                yield f"{SCORE_NAMES[name].split()[0]} fails its self-checks: {'; '.join(checks.failures)}."
