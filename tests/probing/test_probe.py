"""Linear probes compared with independent implementations."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.probing.layer_features import LayerFeatures
from gpdit_lightning.probing.probe import C_GRID, confidence_interval, fit_probe, probe_layers
from gpdit_lightning.probing.splits import LabelledVideo


def blobs(classes: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return points (n, 3) around one centre per class, on very different scales, and their classes."""
    numbers = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    points = numbers.normal(size=(count, 3)) + np.eye(3)[labels % 3] * 1.5
    return (points * [1, 100, 0.01] + [0, 500, 3]).astype(np.float32), labels


def test_predictions_agree_with_another_solver() -> None:
    train, labels = blobs(3, 60, seed=0)
    test, _ = blobs(3, 300, seed=1)
    test[:, 1] += 60  # standardising by the statistics of the test videos would remove this
    x, y = torch.from_numpy(train).double(), torch.from_numpy(labels)
    mean, deviation = x.mean(0), x.std(0, correction=0)
    weight = torch.zeros(3, 3, dtype=torch.double, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.double, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        scores = (x - mean) / deviation @ weight + bias
        value = 0.1 * torch.nn.functional.cross_entropy(scores, y, reduction="sum") + weight.square().sum() / 2
        value.backward()
        return value

    solver.step(loss)
    expected = ((torch.from_numpy(test).double() - mean) / deviation @ weight + bias).argmax(1)
    names = np.array(["a", "b", "c"])
    probe = fit_probe(train, list(names[labels]), [], test, regularisation=0.1)
    assert (probe.predictions == names[expected.numpy()]).mean() > 0.99
    assert len(set(probe.predictions)) == 3
    assert probe[1:] == (0.1, None)


def test_regularisation_is_selected_over_whole_groups() -> None:
    numbers = np.random.default_rng(0)
    # Ten copies of each of 20 points with arbitrary classes: predictable only from a copy in the training split.
    points = numbers.normal(size=(20, 50)).astype(np.float32).repeat(10, axis=0)
    labels = [str(number % 2) for number in range(20) for _ in range(10)]
    groups = [str(number) for number in range(20) for _ in range(10)]
    probe = fit_probe(points, labels, groups, points)
    assert probe.C in C_GRID
    assert probe.validation is not None
    assert probe.validation < 0.8
    singles = [str(number) for number in range(200)]
    assert fit_probe(points, labels, singles, points).validation == 1
    with pytest.raises(InputError, match="class 'b' has one group of training videos"):
        fit_probe(points[:30], ["a"] * 20 + ["b"] * 10, groups[:30], points)


def test_the_interval_is_binomial_over_groups() -> None:
    correct = np.arange(50) < 35
    groups = [str(number) for number in range(50)]
    expected = binom.ppf([0.025, 0.975], 50, 0.7) / 50
    interval = confidence_interval(correct, groups)
    assert interval == pytest.approx(expected, abs=0.021)
    assert confidence_interval(correct.repeat(4), list(np.repeat(groups, 4))) == pytest.approx(expected, abs=0.021)
    ungrouped = confidence_interval(correct.repeat(4), [str(number) for number in range(200)])
    assert ungrouped == pytest.approx(binom.ppf([0.025, 0.975], 200, 0.7) / 200, abs=0.006)
    assert confidence_interval([True, True, True], ["a", "a", "b"]) == (1, 1)
    assert interval == confidence_interval(correct, groups)


def labelled(count: int, seed: int) -> list[LabelledVideo]:
    """Return videos of two random classes, three per group; a third of the groups is for testing."""
    numbers = np.random.default_rng(seed)
    return [
        LabelledVideo(
            Path(str(number)), "ab"[numbers.integers(2)], str(number // 3), "test" if number % 9 < 3 else "train"
        )
        for number in range(count)
    ]


def test_each_layer_is_scored_on_the_readable_test_videos() -> None:
    videos = labelled(90, seed=0)
    numbers = np.random.default_rng(1)
    features = numbers.normal(size=(90, 2, 5)).astype(np.float32)
    features[:, 1, 0] += [10 * (video.label == "b") for video in videos]
    order = numbers.permutation(90)[:85]
    readable = LayerFeatures(features[order], [videos[index].path for index in order], 0)
    uninformative, informative = probe_layers(readable, videos)
    assert (uninformative.layer, informative.layer) == (0, 1)
    assert (informative.accuracy, informative.interval, informative.validation) == (1, (1, 1), 1)
    assert uninformative.interval[0] < uninformative.accuracy < uninformative.interval[1]
    assert uninformative.accuracy < 0.75
    train = [video for video in videos if video.split == "train"]
    with pytest.raises(InputError, match="are training videos, and none are left to test on: add test videos"):
        probe_layers(readable, train)


def test_labels_of_test_videos_have_no_effect_on_the_probe() -> None:
    videos = labelled(300, seed=2)
    features = np.random.default_rng(3).normal(size=(300, 1, 40)).astype(np.float32)
    features[:, 0, 0] += [10 * (video.label == "b" and video.split == "train") for video in videos]
    (score,) = probe_layers(LayerFeatures(features, [video.path for video in videos], 0), videos)
    assert score.validation == pytest.approx(1, abs=0.02)
    assert 0.3 < score.accuracy < 0.7
