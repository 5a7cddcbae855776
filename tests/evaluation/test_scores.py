"""Scores of stored results compared with an independent implementation."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from gpdit_lightning.diffusion import Guidance, NoiseSchedule
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.chunk_files import ChunkFiles, write_chunk
from gpdit_lightning.evaluation.report import Protocol, Report
from gpdit_lightning.evaluation.scores import make_report

VIDEOS, POSITIONS, CHECKED = 43, 3, 20
NAMES = [f"video {number}" for number in range(VIDEOS)]
GROUND_TRUTH, CODEC, REPEATED = "the truth", "the truth through the codec", "the last given frame repeated"
SHAPES = {"video": (4,), "image": (POSITIONS, 5), "classes": (POSITIONS, 6), "psnr": (), "ssim": ()}
PROTOCOL = Protocol(
    data="toys", choice="all", split_sha256="0", videos=VIDEOS, context_frames=5, generated_frames=POSITIONS,
    fvd_frames="all", size=(32, 32), stride=1, resize="none", sampler="rotation", steps=2, guidance=Guidance(),
    schedule=NoiseSchedule(), seeds=(0, 9), window=None, precision="32", checkpoint="none", checkpoint_sha256="0",
    step=1, weights="ema", codec="pca", codec_sha256="0", networks={}, versions={}, hardware="none",
)  # fmt: skip
Results = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def results() -> Results:
    """Correlated features far from zero; the distance to the ground truth rises from variant to variant."""
    numbers = np.random.default_rng(5)
    distorted = [
        f"{kind} {level}" for kind, levels in (("noise", (8, 16, 32)), ("blur", (1, 2, 4))) for level in levels
    ]
    results: Results = {}
    for step, variant in enumerate(["truth", "codec", "repeated", "seed 0", "seed 9", *distorted]):
        for quantity, shape in SHAPES.items():
            count = CHECKED if variant in distorted else VIDEOS
            values = numbers.normal(size=(count, *shape))
            if quantity in ("video", "image"):
                values = values @ numbers.normal(size=(shape[-1], shape[-1])) + 30 + 2 * step
            if quantity == "classes":
                values = np.exp(2 * values) / np.exp(2 * values).sum(-1, keepdims=True)
            results[f"{variant}/{quantity}"] = values.astype(np.float32)
    return results


def files_of(folder: Path, results: Results, size: int, only: str = "") -> ChunkFiles:
    """Write the results in chunks of `size` videos; only keys that contain `only`."""
    paths = []
    for start in range(0, VIDEOS, size):
        parts = {key: values[start : start + size] for key, values in results.items() if only in key}
        tensors = {key: torch.from_numpy(part) for key, part in parts.items() if len(part)}
        paths.append(folder / f"{size}" / f"{start:06d}.safetensors")
        write_chunk(paths[-1], NAMES[start : start + size], tensors, {})
    return ChunkFiles(paths, {})


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    first, second = first.astype(np.float64), second.astype(np.float64)
    root = scipy.linalg.sqrtm(np.cov(first.T) @ np.cov(second.T)).real
    means = ((first.mean(0) - second.mean(0)) ** 2).sum()
    return means + np.trace(np.cov(first.T) + np.cov(second.T) - 2 * root)


def inception_score(classes: np.ndarray) -> float:
    """Return the mean over ten splits, in the random order of torch for seed 0."""
    classes = classes.astype(np.float64)[torch.randperm(VIDEOS, generator=torch.Generator().manual_seed(0)).numpy()]
    scores = []
    for split in np.array_split(classes, 10):
        divergences = [(row * np.log(row / split.mean(0))).sum() for row in split]
        scores.append(np.exp(np.mean(divergences)))
    return float(np.mean(scores))


def fraction_covered(samples: np.ndarray, centres: np.ndarray) -> float:
    def distance(first: np.ndarray, second: np.ndarray) -> float:
        return np.sqrt(((first.astype(np.float64) - second.astype(np.float64)) ** 2).sum())

    radii = [sorted(distance(centre, other) for other in centres)[3] for centre in centres]
    inside = [
        any(distance(sample, c) <= radius for c, radius in zip(centres, radii, strict=True)) for sample in samples
    ]
    return float(np.mean(inside))


def expected(results: Results, variant: str) -> dict[str, float]:
    def of(quantity: str, variant: str = variant) -> np.ndarray:
        return results[f"{variant}/{quantity}"]

    scores = {
        "fid": np.mean([frechet(of("image", "truth")[:, i], of("image")[:, i]) for i in range(POSITIONS)]),
        "is": np.mean([inception_score(of("classes")[:, i]) for i in range(POSITIONS)]),
        "fvd": frechet(of("video", "truth"), of("video")),
        "precision": fraction_covered(of("video"), of("video", "truth")),
        "recall": fraction_covered(of("video", "truth"), of("video")),
    }
    if variant != "truth":
        scores |= {quantity: of(quantity).astype(np.float64).mean() for quantity in ("psnr", "ssim")}
    return scores


@pytest.mark.parametrize("size", [7, VIDEOS])
def test_scores_equal_an_independent_implementation(results: Results, tmp_path: Path, size: int) -> None:
    report = make_report(files_of(tmp_path, results, size), PROTOCOL)
    first, second = expected(results, "seed 0"), expected(results, "seed 9")
    assert list(report.scores) == list(first)
    for name, score in report.scores.items():
        assert score.per_seed == pytest.approx((first[name], second[name]), rel=1e-8), name
        assert score.mean == pytest.approx((first[name] + second[name]) / 2, rel=1e-8)
        assert score.deviation == pytest.approx(abs(first[name] - second[name]) / 2**0.5, rel=1e-6, abs=1e-8)
    for label, variant in ((GROUND_TRUTH, "truth"), (CODEC, "codec"), (REPEATED, "repeated")):
        scores = {name: score.mean for name, score in report.references[label].items()}
        assert scores == pytest.approx(expected(results, variant), rel=1e-8, abs=1e-6)
    perfect = report.references[GROUND_TRUTH]
    assert (perfect["precision"].mean, perfect["recall"].mean) == (1, 1)
    assert 0 <= perfect["fid"].mean < 1e-8 > perfect["fvd"].mean
    assert not warnings_of(report)


def test_self_checks_compare_halves_and_distorted_ground_truth(results: Results, tmp_path: Path) -> None:
    report = make_report(files_of(tmp_path, results, 16), PROTOCOL)
    second = np.array([hashlib.sha256(name.encode()).digest()[0] % 2 == 1 for name in NAMES])
    assert list(report.self_checks) == ["fvd", "fid"]
    for name, quantity in (("fvd", "video"), ("fid", "image")):
        ground_truth, checks = results[f"truth/{quantity}"], report.self_checks[name]

        def flat(values: np.ndarray) -> np.ndarray:
            return values.reshape(-1, values.shape[-1])

        assert checks.itself == pytest.approx(0, abs=1e-8)
        assert checks.halves == pytest.approx(frechet(flat(ground_truth[~second]), flat(ground_truth[second])))
        for kind, distances in checks.by_distortion.items():
            for level, distance in distances:
                other = results[f"{kind} {level:g}/{quantity}"]
                assert distance == pytest.approx(frechet(flat(ground_truth[:CHECKED]), flat(other)))
        assert checks.passed


def test_without_distorted_videos_there_are_no_self_checks(results: Results, tmp_path: Path) -> None:
    plain = {key: values for key, values in results.items() if not key.startswith(("noise", "blur"))}
    report = make_report(files_of(tmp_path, plain, 16), PROTOCOL)
    assert not report.self_checks
    assert not warnings_of(report)


def test_scores_without_a_network_are_left_out(results: Results, tmp_path: Path) -> None:
    for only, names in (("video", {"fvd", "precision", "recall"}), ("image", {"fid"}), ("psnr", set())):
        kept = {key: values for key, values in results.items() if key.endswith((only, "psnr", "ssim"))}
        report = make_report(files_of(tmp_path / only, kept, 16), PROTOCOL)
        assert report.scores.keys() == names | {"psnr", "ssim"}
        assert report.references[GROUND_TRUTH].keys() == names


def warnings_of(report: Report) -> list[str]:
    """Return the warnings, except those for any small set of videos."""
    return [line for line in report.warnings if not line.startswith(("IS of ", "precision and recall of"))]


def first_videos(results: Results, count: int) -> Results:
    return {key: values[:count] for key, values in results.items()}


def test_failed_checks_and_unreadable_videos_are_reported(results: Results, tmp_path: Path) -> None:
    worse = results | {"blur 1/video": results["blur 4/video"] + 50}
    (warning,) = warnings_of(make_report(files_of(tmp_path / "worse", worse, 16), PROTOCOL))
    assert warning.startswith("FVD fails its self-checks: the distance at blur 2 is ")
    (warning,) = warnings_of(make_report(files_of(tmp_path, results, 16), PROTOCOL, unreadable={"b.mp4", "a.mp4"}))
    assert warning == "2 videos could not be read completely and are left out: a.mp4, b.mp4."


@pytest.mark.parametrize("count", [3, 4])
def test_few_videos_give_warnings_instead_of_self_checks(results: Results, tmp_path: Path, count: int) -> None:
    write_chunk(
        tmp_path / "few.safetensors",
        ["video 0", "video 1", "video 2", "video 5"][:count],  # three of them are in one half
        {key: torch.from_numpy(values) for key, values in first_videos(results, count).items()},
        {},
    )
    report = make_report(ChunkFiles([tmp_path / "few.safetensors"], {}), PROTOCOL)
    assert ("precision" in report.scores) == (count == 4)
    assert {"fid", "fvd", "is"} <= report.scores.keys()
    assert not report.self_checks
    assert "IS of " in " ".join(report.warnings)
    assert "in splits of 1 cannot exceed 1." in " ".join(report.warnings)
    assert f"precision and recall of {count} videos are not meaningful" in " ".join(report.warnings)
    assert f"FVD of {count} samples in 4 dimensions" in " ".join(report.warnings)
    assert "there are too few videos for self-checks of FVD." in report.warnings
    assert f"FID of {count} samples in 5 dimensions" in " ".join(report.warnings)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_videos_are_refused(results: Results, tmp_path: Path, count: int) -> None:
    tensors = {key: torch.from_numpy(values) for key, values in first_videos(results, count).items()} if count else {}
    write_chunk(tmp_path / "few.safetensors", NAMES[:count], tensors, {})
    with pytest.raises(InputError, match=f"{count} videos could be read, but scores need at least 2"):
        make_report(ChunkFiles([tmp_path / "few.safetensors"], {}), PROTOCOL)


def test_features_that_are_not_finite_are_refused(results: Results, tmp_path: Path) -> None:
    broken = results | {"seed 9/video": results["seed 9/video"] * np.float32("nan")}
    with pytest.raises(InputError, match="not finite"):
        make_report(files_of(tmp_path, broken, 16), PROTOCOL)
