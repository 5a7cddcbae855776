"""Linear probing (GPDiT, section 5.3): a linear classifier on the frozen features of each layer.

Shapes: n training and m test videos, D hidden width.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpdit_lightning.errors import InputError
from gpdit_lightning.probing.layer_features import LayerFeatures
from gpdit_lightning.probing.splits import LabelledVideo, check_splits
from gpdit_lightning.progress import progress_bar

# Inverse strengths of the penalty among which cross-validation selects. The paper states none.
C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 5  # of cross-validation, at most
RESAMPLES = 10_000  # of the bootstrap


class Probe(NamedTuple):
    """Predictions of a trained classifier for the test videos.

    Attributes:
        predictions: predicted class of each video.
        C: inverse strength of the L2 penalty.
        validation: cross-validation accuracy with this C; None if C was given.
    """

    predictions: NDArray[np.str_]
    C: float
    validation: float | None


def fit_probe(
    train: NDArray[np.float32],
    labels: Sequence[str],
    groups: Sequence[str],
    test: NDArray[np.float32],
    regularisation: float | None = None,
) -> Probe:
    """Fit a logistic regression on features that are standardised by the statistics of the training videos.

    The labels of the test videos are not an argument, so they cannot affect the fit.

    Args:
        train: features of the training videos, (n, D).
        labels, groups: of the training videos.
        test: features of the test videos, (m, D).
        regularisation: C, the inverse strength of the L2 penalty. None selects the value of `C_GRID` with the highest
            cross-validation accuracy over whole groups of training videos, the smallest if several are equal. Each
            fold is standardised by the statistics of its training videos.

    Raises:
        InputError: a class has too few groups to select C.
    """
    # The import takes a second, and trainings import this module for the statistics below.
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=regularisation or 1.0, max_iter=10_000))
    inputs = train.astype(np.float64)
    if regularisation is not None:
        return Probe(classifier.fit(inputs, labels).predict(test.astype(np.float64)), regularisation, None)
    counts = Counter(label for label, _ in set(zip(labels, groups, strict=True)))
    label, fewest = min(counts.items(), key=lambda item: item[1])
    if fewest < 2:
        raise InputError(
            f"class {label!r} has one group of training videos, too few to select the regularisation by "
            "cross-validation: give --regularisation a number."
        )
    search = GridSearchCV(
        classifier,
        {"logisticregression__C": C_GRID},
        scoring="accuracy",
        cv=StratifiedGroupKFold(min(FOLDS, fewest)),
    ).fit(inputs, labels, groups=groups)
    return Probe(
        search.predict(test.astype(np.float64)),
        search.best_params_["logisticregression__C"],
        float(search.best_score_),
    )


def confidence_interval(correct: Sequence[bool] | NDArray[np.bool_], groups: Sequence[str]) -> tuple[float, float]:
    """Return the 95 % interval of an accuracy by the bootstrap over groups, since errors within a group are correlated.

    Args:
        correct: whether the prediction is correct, for each video.
        groups: the group of each video; there must be at least two.

    Returns:
        The 2.5 % and 97.5 % quantiles of the accuracy over `RESAMPLES` draws of as many groups with replacement.
    """
    _, group_indices = np.unique(groups, return_inverse=True)
    sizes = np.bincount(group_indices)
    num_correct = np.bincount(group_indices, weights=correct)
    generator = np.random.default_rng(0)
    counts = generator.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=RESAMPLES)
    low, high = np.quantile(counts @ num_correct / (counts @ sizes), [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class LayerScore:
    """The probe of one layer; 0 is the patch embedding."""

    layer: int
    accuracy: float
    """Top-1 accuracy on the test videos."""
    interval: tuple[float, float]
    """95 % interval of the accuracy, by the bootstrap over test groups."""
    C: float | None
    """Inverse strength of the L2 penalty; None for a fine-tuned classifier, which has none."""
    validation: float | None
    """Cross-validation accuracy over training groups; None if C was given, and for a fine-tuned classifier."""
    top5: float | None = None
    """Top-5 accuracy of a fine-tuned classifier; None for a probe."""


def probe_layers(
    layer_features: LayerFeatures,
    videos: Sequence[LabelledVideo],
    regularisation: float | None = None,
    progress: bool = False,
) -> list[LayerScore]:
    """Fit and test a probe on every layer; return one score per layer.

    Args:
        layer_features: features of the videos.
        videos: with their classes and splits; videos without features are not used.
        regularisation: as for :func:`fit_probe`.
        progress: show a progress bar over layers.

    Raises:
        InputError: too few videos have features (:func:`check_splits`); also as :func:`fit_probe`.
    """
    rows = {path: row for row, path in enumerate(layer_features.paths)}
    videos = [video for video in videos if video.path in rows]
    check_splits(videos)
    train, test = ([video for video in videos if video.split == split] for split in ("train", "test"))
    train_rows, test_rows = ([rows[video.path] for video in split] for split in (train, test))
    labels, groups = [video.label for video in train], [video.group for video in train]
    test_labels, test_groups = np.array([video.label for video in test]), [video.group for video in test]
    scores = []
    for layer in progress_bar(
        range(layer_features.features.shape[1]), desc="probes", unit=" layers", disable=not progress
    ):
        features = layer_features.features[:, layer]
        probe = fit_probe(features[train_rows], labels, groups, features[test_rows], regularisation)
        correct = probe.predictions == test_labels
        interval = confidence_interval(correct, test_groups)
        scores.append(LayerScore(layer, float(correct.mean()), interval, probe.C, probe.validation))
    return scores
