"""Features of every layer, and what a linear classifier makes of them."""

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.codecs import load_codec
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.videos import read_clip
from gpdit_lightning.media.video import write_video
from gpdit_lightning.probing import probe
from gpdit_lightning.probing.probe import (
    C_GRID,
    LayerFeatures,
    confidence_interval,
    extract_layer_features,
    fit_probe,
    probe_layers,
)
from gpdit_lightning.probing.splits import LabelledVideo

CODEC = load_codec("pca")
SIZE = (16, 32)


@pytest.fixture(scope="module")
def model(randomise: Callable[[GPDiT], GPDiT]) -> GPDiT:
    return randomise(GPDiT(GPDiTConfig(size="tiny", layers=2, width=24, heads=2, mlp_width=32))).eval()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five of noise, of which the fourth is too short for five frames three apart, and the third is no video."""
    folder = tmp_path_factory.mktemp("videos")
    numbers = torch.Generator().manual_seed(0)
    paths = [folder / f"{number}.mp4" for number in range(5)]
    for path, length in zip(paths, (13, 16, 0, 8, 14), strict=True):
        if length:
            coarse = torch.randint(256, (length, 3, 2, 4), generator=numbers, dtype=torch.uint8)
            write_video(path, coarse.repeat_interleave(8, 2).repeat_interleave(8, 3), 24)
        else:
            path.write_bytes(b"no video")
    return paths


def by_itself(model: GPDiT, path: Path, moments: list[int]) -> Tensor:
    """LayerFeatures features of one video, (L + 1, D), layer by layer."""
    pixels = read_clip(path, moments[-1] + 1, 1, SIZE)[moments]
    latents = CODEC.encode(pixels[None])
    clean = (latents - CODEC.mean.view(16, 1, 1)) / CODEC.std.view(16, 1, 1)
    with torch.no_grad():
        return torch.stack([model.features(clean, [layer])[layer][0].double().mean((0, 1)) for layer in range(3)])


def pooled(model: GPDiT, videos: list[Path], **options: Any) -> LayerFeatures:
    return extract_layer_features(model, CODEC, videos, SIZE, **{"frames": 5, "batch_size": 2, "workers": 1, **options})


def test_features_are_those_of_each_video_by_itself(
    model: GPDiT, videos: list[Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe.log.parent, "propagate", True)  # the command line switches it off
    with caplog.at_level(logging.WARNING, logger=probe.log.name):
        found = pooled(model, videos)
    assert "2.mp4" in caplog.text
    assert found.paths == [videos[number] for number in (0, 1, 3, 4)]
    assert found.squeezed == 1
    assert found.features.shape == (4, 3, 24)
    assert found.features.dtype == np.float32
    middles = ([0, 3, 6, 9, 12], [1, 4, 7, 10, 13], [0, 2, 4, 5, 7], [0, 3, 6, 9, 12])
    expected = torch.stack([by_itself(model, *pair) for pair in zip(found.paths, middles, strict=True)])
    torch.testing.assert_close(torch.from_numpy(found.features).double(), expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_used_says_why(model: GPDiT, videos: list[Path]) -> None:
    with pytest.raises(InputError, match="None of the 1 videos can be read"):
        pooled(model, videos[2:3])
    with pytest.raises(InputError, match=r"6 pixel frames are not 1 \+ 4 k"):
        pooled(model, videos, frames=6)


def test_a_killed_run_goes_on(
    model: GPDiT, videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, randomise: Callable[..., GPDiT]
) -> None:
    read: Counter[str] = Counter()
    limit = 10

    def counted(path: Path, *arguments: Any, **options: Any) -> Tensor:
        if len(read) == limit:
            raise KeyboardInterrupt
        read[path.stem] += 1
        return read_clip(path, *arguments, **options)

    monkeypatch.setattr(probe, "read_clip", counted)
    monkeypatch.setattr(probe, "CHUNK", 2)
    without = pooled(model, videos)
    assert without.paths == [videos[number] for number in (0, 1, 3, 4)]
    read.clear()
    limit = 3
    with pytest.raises(KeyboardInterrupt):
        pooled(model, videos, cache=tmp_path)
    assert read.keys() == {"0", "1", "2"}
    read.clear()
    resumed = pooled(model, videos, cache=tmp_path)
    assert read.keys() == {"2", "3", "4"}
    assert (resumed.features == without.features).all()
    assert resumed[1:] == without[1:]

    read.clear()
    limit = 10
    assert (pooled(model, videos, cache=tmp_path).features == without.features).all()
    assert not read
    pooled(model, videos, cache=tmp_path, stride=2)  # another clip
    assert len(read) == 5
    read.clear()
    other = randomise(GPDiT(model.config)).eval()
    other.output.weight.data += 1
    pooled(other, videos, cache=tmp_path)  # other weights
    assert len(read) == 5


def blobs(classes: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points (n, 3) around a centre for each class, on scales far apart, and their classes."""
    numbers = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    points = numbers.normal(size=(count, 3)) + np.eye(3)[labels % 3] * 1.5
    return (points * [1, 100, 0.01] + [0, 500, 3]).astype(np.float32), labels


def test_predictions_are_those_of_the_penalised_likelihood_by_another_solver() -> None:
    train, labels = blobs(3, 60, seed=0)
    test, _ = blobs(3, 300, seed=1)
    test[:, 1] += 60  # statistics of the test half would take this back
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
    found = fit_probe(train, list(names[labels]), [], test, regularisation=0.1)
    assert (found.predictions == names[expected.numpy()]).mean() > 0.99
    assert len(set(found.predictions)) == 3
    assert found[1:] == (0.1, None)


def test_regularisation_is_chosen_over_whole_groups() -> None:
    numbers = np.random.default_rng(0)
    # Ten copies of each of 20 points that have nothing to do with their classes: known if a copy was in training.
    points = numbers.normal(size=(20, 50)).astype(np.float32).repeat(10, axis=0)
    labels = [str(number % 2) for number in range(20) for _ in range(10)]
    groups = [str(number) for number in range(20) for _ in range(10)]
    found = fit_probe(points, labels, groups, points)
    assert found.C in C_GRID
    assert found.validation is not None
    assert found.validation < 0.8
    singles = [str(number) for number in range(200)]
    assert fit_probe(points, labels, singles, points).validation == 1
    with pytest.raises(InputError, match="Class 'b' has one group of training videos"):
        fit_probe(points[:30], ["a"] * 20 + ["b"] * 10, groups[:30], points)


def test_independent_videos_have_the_binomial_interval_and_copies_do_not_narrow_it() -> None:
    correct = np.arange(50) < 35
    groups = [str(number) for number in range(50)]
    expected = binom.ppf([0.025, 0.975], 50, 0.7) / 50
    found = confidence_interval(correct, groups)
    assert found == pytest.approx(expected, abs=0.021)
    assert confidence_interval(correct.repeat(4), list(np.repeat(groups, 4))) == pytest.approx(expected, abs=0.021)
    single = confidence_interval(correct.repeat(4), [str(number) for number in range(200)])
    assert single == pytest.approx(binom.ppf([0.025, 0.975], 200, 0.7) / 200, abs=0.006)
    assert confidence_interval([True, True, True], ["a", "a", "b"]) == (1, 1)
    assert found == confidence_interval(correct, groups)


def labelled(count: int, seed: int) -> list[LabelledVideo]:
    """Videos of two classes, three of a group, a third of the groups held out; labels are drawn."""
    numbers = np.random.default_rng(seed)
    return [
        LabelledVideo(
            Path(str(number)), "ab"[numbers.integers(2)], str(number // 3), "test" if number % 9 < 3 else "train"
        )
        for number in range(count)
    ]


def test_each_layer_is_scored_on_the_held_out_videos_that_could_be_read() -> None:
    videos = labelled(180, seed=0)
    numbers = np.random.default_rng(1)
    features = numbers.normal(size=(180, 2, 5)).astype(np.float32)
    features[:, 1, 0] += [10 * (video.label == "b") for video in videos]
    order = numbers.permutation(180)[:170]
    some = LayerFeatures(features[order], [videos[place].path for place in order], 0)
    nothing, everything = probe_layers(some, videos)
    assert (nothing.layer, everything.layer) == (0, 1)
    assert (everything.accuracy, everything.interval, everything.validation) == (1, (1, 1), 1)
    assert nothing.interval[0] < nothing.accuracy < nothing.interval[1]
    assert nothing.accuracy < 0.75
    only = [video for video in videos if video.split == "train"]
    with pytest.raises(InputError, match="The test half holds 0 groups"):
        probe_layers(some, only)


def test_test_labels_that_mean_nothing_cannot_be_predicted() -> None:
    videos = labelled(300, seed=2)
    features = np.random.default_rng(3).normal(size=(300, 1, 40)).astype(np.float32)
    features[:, 0, 0] += [10 * (video.label == "b" and video.split == "train") for video in videos]
    (score,) = probe_layers(LayerFeatures(features, [video.path for video in videos], 0), videos)
    assert score.validation == pytest.approx(1, abs=0.02)
    assert 0.3 < score.accuracy < 0.7
