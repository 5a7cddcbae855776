"""Samples from noise alone: their labels, noise, features and class probabilities, chunk by chunk.

A chunk has fixed samples, and label and noise of a sample are functions of its number. So results do not depend on the
number of processes, and a process may stop at any time.

Shapes: B samples of a chunk, T pixel frames.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpdit_lightning.codecs import Codec
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.chunks import EvaluationSettings, MetricNetworks, by_variant, measure, seed_variant
from gpdit_lightning.generation import ClipInputs, continue_video
from gpdit_lightning.generation.contexts import folder_name
from gpdit_lightning.generation.plans import sample_seed
from gpdit_lightning.model import GPDiT
from gpdit_lightning.options.evaluate import LabelRule
from gpdit_lightning.randomness import SAMPLE_LABEL, generator


class SampleChunk(NamedTuple):
    """Samples that are evaluated as one batch.

    Attributes:
        numbers: of the samples.
        labels: class number and label of each sample; None without labels.
    """

    numbers: range
    labels: tuple[tuple[int, str], ...] | None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the samples, CLASS/CLASS-NUMBER."""
        if self.labels is None:
            return tuple(f"sample-{number:05d}" for number in self.numbers)
        folders = [folder_name(label) for _, label in self.labels]
        return tuple(f"{name}/{name}-{number:05d}" for number, name in zip(self.numbers, folders, strict=True))


def split_samples(
    samples: int, size: int, classes: Sequence[str], class_of: Callable[[int], int] | None
) -> list[SampleChunk]:
    """Divide sample numbers into chunks of `size`; the last one may be smaller.

    Args:
        samples: their number.
        size: samples of a chunk.
        classes: labels of the model.
        class_of: from the number of a sample to its class number; None without labels.
    """
    chunks = []
    for start in range(0, samples, size):
        numbers = range(start, min(start + size, samples))
        classes_of_chunk = class_of and [class_of(number) for number in numbers]
        labels = classes_of_chunk and tuple((number, classes[number]) for number in classes_of_chunk)
        chunks.append(SampleChunk(numbers, labels or None))
    return chunks


def class_drawer(rule: LabelRule, classes: Sequence[str], counts: Mapping[str, int]) -> Callable[[int], int]:
    """Return the function from the number of a sample to its class number.

    Args:
        rule: balanced (number modulo classes), uniform or data (independent draws, uniform or by frequencies).
        classes: labels of the model.
        counts: number of real images or videos of each label, for the rule `data`.

    Raises:
        InputError: the rule is `data`, and labels of the data are unknown or no classes of the model.
    """
    if rule == "balanced":
        return lambda number: number % len(classes)
    if rule == "data":
        unknown = [label for label in counts if label not in classes]
        if unknown or not counts:
            problem = f"have the label {unknown[0]!r}, which is no class of the model" if unknown else "have no labels"
            raise InputError(
                f"--sample_labels is data, but the real images or videos {problem}: give labels by --annotations or "
                "folders, or --sample_labels balanced."
            )
    weights = np.array([counts.get(label, 0) if rule == "data" else 1 for label in classes])
    ends = np.cumsum(weights)  # integers, so that no rounding depends on the machine

    def draw(number: int) -> int:
        return int(np.searchsorted(ends, generator(0, SAMPLE_LABEL, number).integers(ends[-1]), side="right"))

    return draw


def label_sentence(rule: LabelRule, classes: int, counts: Mapping[str, int]) -> str:
    """Return how labels are drawn, for a report; `classes` is their number, `counts` as for :func:`class_drawer`."""
    sha256 = hashlib.sha256(json.dumps(sorted(counts.items())).encode()).hexdigest()
    return {
        "balanced": f"of sample number i, class i modulo {classes:,}",
        "uniform": f"drawn uniformly and independently from {classes:,} classes by the number of the sample",
        "data": "drawn independently by the class frequencies of the real data and by the number of the sample; "
        f"sha256 of the frequencies `{sha256}`",
    }[rule]


def evaluate_samples_of_chunk(
    chunk: SampleChunk,
    settings: EvaluationSettings,
    model: GPDiT,
    codec: Codec,
    networks: MetricNetworks,
    on_variant: Callable[[str, Sequence[str], Tensor], None] = lambda variant, names, videos: None,
) -> tuple[Sequence[str], dict[str, Tensor]]:
    """Generate the samples of a chunk, and compute their features and class probabilities.

    Args:
        chunk: the samples.
        settings: of the evaluation, without a context.
        model: in evaluation mode.
        codec: of the model.
        networks: of the scores.
        on_variant: called for each seed with its variant, the names of the samples, and the samples, uint8
            (B, T, 3, H, W).

    Returns:
        The names, and the results of :func:`chunks.measure` by "VARIANT/QUANTITY".

    Raises:
        InputError: as :func:`continue_video` and the networks.
    """
    labels = chunk.labels or [(None, None)] * len(chunk.numbers)
    condition = None if chunk.labels is None else torch.tensor([number for number, _ in chunk.labels])
    empty = torch.zeros((len(chunk.numbers), 0, 3, *settings.size), dtype=torch.uint8)
    results: dict[str, Tensor] = {}
    for seed in settings.seeds:
        pairs = zip(chunk.numbers, labels, strict=True)
        inputs = ClipInputs([sample_seed(seed, label, number) for number, (_, label) in pairs], condition)
        frames, variant = settings.generated_frames, seed_variant(seed)
        samples = continue_video(model, codec, empty, frames, settings.generation, inputs).pixels
        on_variant(variant, chunk.names, samples)
        results |= by_variant(variant, measure(samples, samples, settings, networks))
    return chunk.names, results
