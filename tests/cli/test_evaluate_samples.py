"""`evaluate` of samples from noise alone, with scores by independent computations in numpy and scipy."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

from gpdit_lightning import GPDiT
from gpdit_lightning.checkpoints.reading import load_trained_model
from gpdit_lightning.cli import main
from gpdit_lightning.cli.export import scores_of
from gpdit_lightning.cli.parsing import parse
from gpdit_lightning.diffusion import DPMSolver2M, Guidance
from gpdit_lightning.evaluation.metrics import Moments
from gpdit_lightning.evaluation.reference import Reference
from gpdit_lightning.evaluation.report import Report
from gpdit_lightning.evaluation.samples import class_drawer
from gpdit_lightning.generation import ClipInputs, GenerationConfig, continue_video
from gpdit_lightning.generation.plans import sample_seed
from gpdit_lightning.media.video_writer import write_video
from gpdit_lightning.options.evaluate import EvaluateOptions
from tests.cli.sampling import CODEC, LABELS, stripes
from tests.evaluation.scripted import ScriptedI3D, ScriptedInception, saved

REAL, SAMPLES = 30, 21
TEMPERATURE = 0.05  # so that class probabilities differ from image to image


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes, three times as many of the first, and a file that is no image."""
    folder, numbers = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(REAL):
        pixels = numbers.integers(256, size=(4, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        path = folder / LABELS[number % 4 == 0] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    (folder / LABELS[0] / "damaged.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def model(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of the workspace, as if it had been trained on images."""
    model, path = GPDiT.from_pretrained(workspace / "of2"), tmp_path_factory.mktemp("model")
    model.facts = replace(model.facts, geometry=replace(model.facts.geometry, frames=1))
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def inception() -> ScriptedInception:
    torch.manual_seed(0)
    return ScriptedInception(TEMPERATURE)


@pytest.fixture(scope="module")
def command(model: Path, inception: ScriptedInception, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of an evaluation of images, without real images and --out."""
    network = saved(inception, tmp_path_factory.mktemp("network"))
    options = {"checkpoint": model, "samples": SAMPLES, "chunk": 4, "sampler": "dpm2m", "steps": 2}
    options |= {"label_guidance": 1.5, "keep_videos": SAMPLES, "image_network.path": network.path, "data": "ImageNet"}
    return [f"--{name}={value}" for name, value in options.items()]


def evaluate(command: list[str], out: Path, *options: str) -> Report:
    assert main(["evaluate", *command, f"--out={out}", *options]) == 0
    return Report.load(out / "results.json")


@pytest.fixture(scope="module")
def finished(command: list[str], images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an evaluation by one process. Do not change it."""
    out = tmp_path_factory.mktemp("finished")
    evaluate(command, out, f"--images={images}")
    return out


def pixels_of(folder: Path) -> np.ndarray:
    """Return the images of a folder in the order of their numbers: (N, H, W, 3)."""
    paths = sorted(folder.rglob("*.png"), key=lambda path: int(path.stem.rpartition("-")[2]))
    return np.stack([np.asarray(Image.open(path)) for path in paths])


def features_of(pixels: np.ndarray) -> np.ndarray:
    """Return the features of the scripted network: (N, 6)."""
    values = pixels / 255
    return np.concatenate([values.mean((1, 2)), values[:, 0, 0]], 1)


def frechet(mean: np.ndarray, covariance: np.ndarray, features: np.ndarray) -> float:
    """Return the Frechet distance as the authors of FID compute it, with scipy's matrix square root."""
    others, other = features.mean(0), np.cov(features, rowvar=False)
    root = sqrtm(covariance @ other).real
    return float(((mean - others) ** 2).sum() + np.trace(covariance + other - 2 * root))


def frechet_of(real: np.ndarray, features: np.ndarray) -> float:
    return frechet(real.mean(0), np.cov(real, rowvar=False), features)


def covered(samples: np.ndarray, centres: np.ndarray) -> float:
    """Return the fraction of samples within the ball of a centre to its third nearest neighbour, by brute force."""
    radii = np.sort(np.linalg.norm(centres[:, None] - centres, axis=-1), axis=1)[:, 3]
    return float((np.linalg.norm(samples[:, None] - centres, axis=-1) <= radii + 1e-7).any(1).mean())


def inception_score(features: np.ndarray, inception: ScriptedInception) -> float:
    logits = features @ inception.output.weight.detach().numpy().T.astype(float) / TEMPERATURE
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0)).numpy()
    splits = np.array_split(probabilities[order], 10)
    return float(np.mean([np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()) for p in splits]))


def test_scores_of_images_are_those_of_independent_computations(
    finished: Path, images: Path, inception: ScriptedInception
) -> None:
    report = Report.load(finished / "results.json")
    real, samples = features_of(pixels_of(images)), features_of(pixels_of(finished / "videos"))
    assert (len(real), len(samples)) == (REAL, SAMPLES)
    expected = {
        "fid": frechet_of(real, samples),
        "is": inception_score(samples, inception),
        "precision": covered(samples, real),
        "recall": covered(real, samples),
    }
    assert {name: score.mean for name, score in report.scores.items()} == pytest.approx(expected, rel=1e-4)
    assert expected["is"] > 1.001
    decoded = CODEC.decode(CODEC.encode(torch.from_numpy(pixels_of(images)).permute(0, 3, 1, 2)[:, None]))[:, 0]
    through_codec = features_of(decoded.permute(0, 2, 3, 1).numpy())
    assert report.references["the truth through the codec"]["fid"].mean == pytest.approx(
        frechet_of(real, through_codec), rel=1e-3
    )
    halves = report.references["half of the truth"]
    assert halves["is"].mean == pytest.approx(inception_score_of_chunks(finished, inception), rel=1e-4)
    assert halves["fid"].mean == pytest.approx(report.self_checks["fid"].halves)
    assert report.self_checks["fid"].itself < 1e-6


def inception_score_of_chunks(out: Path, inception: ScriptedInception) -> float:
    """Return the IS of the real images in the order of their selection, by the manifold of the reference."""
    return inception_score(Reference.load(out / "reference.safetensors").manifold["image"].double().numpy(), inception)


def test_samples_are_those_of_the_library(finished: Path, model: Path) -> None:
    trained = load_trained_model(model)
    classes = [number % 2 for number in range(SAMPLES)]  # balanced
    seeds = [sample_seed(0, LABELS[label], number) for number, label in enumerate(classes)]
    config = GenerationConfig(DPMSolver2M(2), Guidance(1.0, 1.5))
    empty = torch.zeros(SAMPLES, 0, 3, 32, 32, dtype=torch.uint8)
    inputs = ClipInputs(seeds, torch.tensor(classes))
    expected = continue_video(trained.backbone, CODEC, empty, 1, config, inputs).pixels[:, 0]
    written = pixels_of(finished / "videos").astype(int)
    assert np.abs(written - expected.permute(0, 2, 3, 1).numpy()).max() <= 1
    names = {path.relative_to(finished / "videos").as_posix() for path in (finished / "videos").rglob("*.png")}
    assert {f"seed_0/{LABELS[n % 2]}/{LABELS[n % 2]}-{n:05d}.png" for n in range(SAMPLES)} == names


def without_date(out: Path) -> str:
    content = json.loads((out / "results.json").read_text())
    return json.dumps({name: value for name, value in content.items() if name != "date"})


def test_results_do_not_depend_on_processes_interruptions_and_chunks(
    command: list[str], images: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        assert not (tmp_path / "out" / "results.json").exists()
        monkeypatch.setenv("RANK", str(rank))
        assert main(["evaluate", *command, f"--images={images}", f"--out={tmp_path / 'out'}"]) == 0
    assert without_date(tmp_path / "out") == without_date(finished)
    monkeypatch.undo()
    for path in ("reference/000004.safetensors", "chunks/000008.safetensors", "results.md", "reference.safetensors"):
        (tmp_path / "out" / path).unlink()
    evaluate(command, tmp_path / "out", f"--images={images}")
    assert without_date(tmp_path / "out") == without_date(finished)
    other = evaluate(command, tmp_path / "other", f"--images={images}", "--chunk=9")
    scores = Report.load(finished / "results.json").scores
    assert {name: str(score) for name, score in other.scores.items()} == {
        name: str(score) for name, score in scores.items()
    }


def test_statistics_of_an_earlier_evaluation_give_the_same_scores(
    command: list[str], finished: Path, tmp_path: Path
) -> None:
    before = Report.load(finished / "results.json")
    without_name = [option for option in command if not option.startswith("--data")]
    after = evaluate(without_name, tmp_path / "out", f"--reference={finished}", "--sample_labels=balanced")
    assert after.protocol.data == "ImageNet"
    assert (after.scores, after.references, after.self_checks) == (
        before.scores,
        before.references,
        before.self_checks,
    )
    assert after.protocol.split_sha256 == before.protocol.split_sha256
    assert not (tmp_path / "out" / "reference").exists()
    # The frequencies of the labels are stored too.
    drawn = evaluate(command, tmp_path / "drawn", f"--reference={finished}", "--sample_labels=data")
    draw = class_drawer("data", LABELS, {"jump": 22, "run": 8})
    names = [path.stem for path in (tmp_path / "drawn" / "videos").rglob("*.png")]
    assert sorted(names) == sorted(f"{LABELS[draw(number)]}-{number:05d}" for number in range(SAMPLES))
    assert "by the class frequencies of the real data" in drawn.protocol.labels


def test_other_class_frequencies_of_the_real_data_are_refused(
    command: list[str], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They determine the labels of the samples."""
    table, options = tmp_path / "labels.csv", ("--sample_labels=data", f"--annotations={tmp_path / 'labels.csv'}")
    table.write_text(f"source,label\n{LABELS[0]}/1.png,{LABELS[1]}\n")
    evaluate(command, tmp_path / "out", f"--images={images}", *options)
    evaluate(command, tmp_path / "out", f"--images={images}", *options)
    table.write_text(f"source,label\n{LABELS[0]}/1.png,{LABELS[0]}\n")
    capsys.readouterr()
    assert main(["evaluate", *command, f"--out={tmp_path / 'out'}", f"--images={images}", *options]) == 2
    assert "belongs to an evaluation with another " in capsys.readouterr().err


def test_a_reference_of_adm_gives_moments_and_images(
    command: list[str], images: Path, finished: Path, tmp_path: Path
) -> None:
    """FID with the moments of the file; precision and recall with its images."""
    numbers, pixels = np.random.default_rng(1), pixels_of(images)[:12]
    real = numbers.normal(0.5, 0.2, (50, 6))
    moments = {"mu": real.mean(0), "sigma": np.cov(real, rowvar=False)}
    np.savez(tmp_path / "adm.npz", arr_0=pixels, **moments, mu_s=np.zeros(3), sigma_s=np.eye(3))
    report = evaluate(command, tmp_path / "out", f"--reference={tmp_path / 'adm.npz'}")
    samples = features_of(pixels_of(finished / "videos"))
    assert report.scores["fid"].mean == pytest.approx(frechet(*moments.values(), samples), rel=1e-4)
    assert report.scores["precision"].mean == pytest.approx(covered(samples, features_of(pixels)))
    assert (report.protocol.videos, report.protocol.manifold) == (12, 12)
    np.savez(tmp_path / "moments.npz", **moments)
    alone = evaluate(command, tmp_path / "moments", f"--reference={tmp_path / 'moments.npz'}")
    assert alone.scores.keys() == {"fid", "is"}
    assert alone.scores["fid"] == report.scores["fid"]
    np.savez(tmp_path / "images.npz", pixels)
    only_images = evaluate(command, tmp_path / "images", f"--reference={tmp_path / 'images.npz'}")
    assert only_images.scores["fid"].mean == pytest.approx(frechet_of(features_of(pixels), samples), rel=1e-4)


def test_report_of_images_states_the_protocol_beside_the_table_of_acdit(finished: Path, model: Path) -> None:
    text = (finished / "results.md").read_text()
    assert text.startswith(f"# ImageNet: {SAMPLES} images from noise alone\n")
    assert f"Real images: {REAL} of ImageNet, all, in the order of a hash" in text
    assert f"Precision and recall: of {REAL} real and {SAMPLES} generated images" in text
    assert "1 real file could not be read completely and is left out." in text
    assert "Labels: of sample number i, class i modulo 2." in text
    assert "dpm2m, 2 steps" in text
    assert "| ACDiT-H | AR+Diff | Cont. | 954M | 2.37 | 273.3 | 0.82 | 0.57 | FID-50K, DPM-Solver" in text
    assert (
        f"{SAMPLES} samples, not 50,000; 32x32 pixels, not 256x256; dpm2m with 2 steps, not DPM-Solver with 25" in text
    )
    assert "GPDiT-H" not in text
    assert "real data, one half against the other" in text
    (fid, *_) = scores_of(load_trained_model(model), finished, None)
    generated = f"{SAMPLES} images from noise alone, 32x32, against {REAL} real ones"
    assert fid.protocol == f"{generated}; guidance 1.5 over the label; dpm2m sampler, 2 steps"
    assert "FVD" not in text


def test_clips_have_fvd_and_the_real_number_by_default(workspace: Path, tmp_path: Path) -> None:
    for number in range(6):
        write_video(tmp_path / "real" / LABELS[number == 5] / f"{number}.mp4", stripes(number)[:10], 24)
    network = saved(ScriptedI3D(), tmp_path)
    options = {"checkpoint": workspace / "of2", "videos": tmp_path / "real", "context_frames": 0, "stride": 1}
    options |= {"generated_frames": 10, "steps": 1, "chunk": 4, "keep_videos": 6, "video_network.path": network.path}
    options |= {"sample_labels": "data", "data": "UCF-101", "label_guidance": 2.5}
    report = evaluate([f"--{name}={value}" for name, value in options.items()], tmp_path / "out")
    assert (report.protocol.samples, report.protocol.videos, report.protocol.medium) == (6, 6, "video")
    assert report.scores.keys() == {"fvd", "precision", "recall"}
    assert report.references["the truth through the codec"]["fvd"].mean > 0
    assert len(list((tmp_path / "out" / "videos" / "seed_0").rglob("*.mp4"))) == 6
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| ACDiT-H-LT | AR+Diff. | 954M | 90 | 16 frames of 256x256" in text
    assert "10 frames from noise alone, not 16 from noise alone" in text
    assert "FID and IS need --image_network.path" in text


@pytest.mark.parametrize("rule", ["balanced", "uniform", "data"])
def test_labels_are_functions_of_the_sample_number(rule: str) -> None:
    classes, counts = ("a", "b", "c", "d"), {"b": 700, "d": 300}
    draw = class_drawer(rule, classes, counts)  # type: ignore[arg-type]
    drawn = [draw(number) for number in range(4000)]
    assert drawn[::-1] == [draw(number) for number in reversed(range(4000))]
    expected = {"balanced": [0.25] * 4, "uniform": [0.25] * 4, "data": [0, 0.7, 0, 0.3]}[rule]
    tolerance = 0 if rule == "balanced" else 4 * 0.5 / 4000**0.5  # four standard deviations
    assert np.abs(np.bincount(drawn, minlength=4) / 4000 - expected).max() <= tolerance
    assert (drawn[:8] == [0, 1, 2, 3, 0, 1, 2, 3]) == (rule == "balanced")


def test_moments_are_exact_for_features_far_from_zero() -> None:
    """Where the mean is 1e6 standard deviations, the squares of values lose 12 digits."""
    numbers = np.random.default_rng(0)
    features = 1e6 + numbers.normal(size=(300, 4)) @ numbers.normal(size=(4, 4))
    moments = Moments.of(torch.from_numpy(features).split(70))
    assert moments.samples == 300
    np.testing.assert_allclose(moments.mean.numpy(), features.mean(0), rtol=1e-14)
    np.testing.assert_allclose(moments.covariance.numpy(), np.cov(features, rowvar=False), rtol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--videos=IMAGES"], "has no video files"),
        ([], "nothing is given to compare with: give one of --videos, --images and --reference"),
        (["--images=IMAGES", "--count=32"], "have 31 images, but 32 are needed: add images, or lower --count"),
        (["--images=IMAGES", "--context_frames=5", "--generated_frames=4"], "which needs --videos"),
        (["--images=IMAGES", "--generated_frames=5"], "are videos, which are compared with --videos or --reference"),
        (["--images=FLAT", "--sample_labels=data"], "have the label 'FLAT', which is no class of the model"),
        (["--reference=OBJECTS"], "objects.npz cannot be read (arr_0.npy is an array of Python objects)"),
        (["--reference=SMALL"], "small.npz has images of 16x16 pixels, but samples have 32x32"),
        (["--reference=WIDE"], "wide.npz has moments of 9 features, but the image network has 6"),
        (["--reference=/nowhere.npz"], "nowhere.npz cannot be read"),
        (["--reference=/nowhere"], "/nowhere cannot be read"),
        (["--reference=FINISHED", "--image_network.path=OTHER"], "was computed with the image network"),
    ],
)
def test_references_that_cannot_be_used_are_refused(
    command: list[str],
    images: Path,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{}], dtype=object))
    np.savez(tmp_path / "small.npz", np.zeros((4, 16, 16, 3), np.uint8))
    np.savez(tmp_path / "wide.npz", mu=np.zeros(9), sigma=np.eye(9))
    (tmp_path / "FLAT").mkdir()
    for number in range(2):
        Image.new("RGB", (32, 32)).save(tmp_path / "FLAT" / f"{number}.png")
    places = {"IMAGES": images, "FLAT": tmp_path / "FLAT", "FINISHED": finished}
    places |= {name.upper(): tmp_path / f"{name}.npz" for name in ("objects", "small", "wide")}
    if any("OTHER" in option for option in options):
        places["OTHER"] = Path(str(saved(ScriptedInception(2.0), tmp_path).path))
    given = [f"{name}={places.get(value, value)}" for name, _, value in (option.partition("=") for option in options)]
    assert main(["evaluate", *command, f"--out={tmp_path / 'out'}", *given]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("imagenet", {"label_guidance": 1.5, "samples": 50_000, "sample_labels": "uniform", "image_scaling": "adm"}),
        ("ucf101", {"label_guidance": 2.5, "context_frames": 0, "generated_frames": 16, "sample_labels": "data"}),
    ],
)
def test_recipes_have_the_settings_of_acdit(recipe: str, expected: dict[str, object]) -> None:
    options = parse("evaluate", "", EvaluateOptions, ["--config", f"gpdit:acdit/eval_{recipe}"])
    expected |= {"sampler": "dpm2m", "steps": 25, "guidance": 1.0, "weights": "ema"}
    assert {name: getattr(options, name) for name in expected} == expected
