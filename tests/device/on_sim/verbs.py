"""Whole commands with `--device sim`, compared with those on the CPU; run by tests/device/test_on_sim.py."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from gpdit_lightning import GPDiT
from gpdit_lightning.cli import main
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.shards import ShardReader
from gpdit_lightning.evaluation.report import Report
from tests.cli.sampling import LABELS, make_sampling_folder
from tests.device.simulated import Record, recording

DEVICES = ("cpu", "sim")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, randomise: Callable[[GPDiT], GPDiT]) -> Path:
    """Videos of two classes and models, also one for images."""
    workspace = tmp_path_factory.mktemp("sample")
    make_sampling_folder(workspace, randomise)
    model = GPDiT.from_pretrained(workspace / "unlabelled")
    model.facts = replace(model.facts, data={})
    model.save_pretrained(workspace / "images")
    return workspace


def run(verb: str, device: str, *options: Any) -> Record:
    """Run a command and return what happened on the device."""
    with recording() as record:
        assert main([verb, *map(str, options), "--device", device]) == 0
    return record


def assert_equal(of_cpu: Tensor, of_sim: Tensor, tolerance: float = 1e-3) -> None:
    """Check that results are equal up to rounding."""
    torch.testing.assert_close(of_sim.float(), of_cpu.float(), rtol=1e-3, atol=tolerance)


CONTEXTS = ("videos/jump/0.mp4", "videos/run/1.mp4")


@pytest.mark.parametrize(
    "options",
    [
        ("--context", *CONTEXTS, "--label", LABELS[1], "--label_guidance", 2, "--guidance", 1.5, "--sampler", "adams"),
        ("--label", 0, "--samples", 2, "--precision", "bf16"),
        ("--context", "latents/train-video-5x4x4-00000-00000.tar", "--frames", 24, "--window", 2, "--sinks", 1),
    ],
    ids=["context", "noise", "shard"],
)
def test_sample(workspace: Path, tmp_path: Path, options: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    results = {}
    for device in DEVICES:
        out = tmp_path / device
        record = run("sample", device, "--checkpoint=of2", "--steps=2", "--out", out, "--formats=safetensors", *options)
        results[device] = {path.name: load_file(path)["latents"] for path in sorted(out.iterdir())}
    assert record.waits
    assert not record.random
    assert results["cpu"].keys() == results["sim"].keys()
    tolerance = 0.5 if "bf16" in options else 1e-3  # the CPU and the device round other operations
    for name, latents in results["cpu"].items():
        assert_equal(latents, results["sim"][name], tolerance)


class Clips(nn.Module):
    """A video network."""

    def forward(self, videos: Tensor) -> Tensor:
        """Return the mean colours of the first and the last frame."""
        return videos[:, [0, -1]].float().mean((3, 4)).flatten(1)


class Images(nn.Module):
    """An image network with classes."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the mean colours."""
        return pixels.float().mean((2, 3))

    def features_and_probabilities(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean colours, and probabilities that depend on them."""
        features = self(pixels)
        return features, (features / 10).softmax(1)


@pytest.mark.parametrize("context", [0, 5])
def test_evaluate(workspace: Path, tmp_path: Path, context: int) -> None:
    networks = (f"--video_network.kind={__name__}.Clips", f"--image_network.kind={__name__}.Images")
    frames = ("--context_frames", context, "--generated_frames", 5, "--stride", 1)
    for device in DEVICES:
        run(
            "evaluate", device, "--checkpoint", workspace / "of2", "--videos", workspace / "videos", "--data=stripes",
            "--count=2", *frames, "--steps=2", "--guidance=1.5", "--label_guidance=2", *networks,
            "--out", tmp_path / device,
        )  # fmt: skip
    reports = [Report.load(tmp_path / device / "results.json") for device in DEVICES]
    assert reports[0].protocol.labels == reports[1].protocol.labels
    for name, score in reports[0].scores.items():
        assert reports[1].scores[name].mean == pytest.approx(score.mean, rel=1e-2), name


def test_probe_and_features(workspace: Path, tmp_path: Path) -> None:
    videos = tmp_path / "ucf"
    for label, source in zip(LABELS, sorted((workspace / "videos").rglob("*.mp4")), strict=True):
        for group in (1, 2, 8, 9):
            path = videos / label / f"v_{label}_g{group:02d}_c01.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, path)
    features: dict[str, list[Tensor]] = {}
    for device in DEVICES:
        common = ("--checkpoint", workspace / "of2", "--videos", videos)
        run("probe", device, *common, "--frames=5", "--out", tmp_path / f"probe-{device}", "--regularisation=0.1")
        run("features", device, *common, "--layer=1", "--workers=0", "--out", tmp_path / f"features-{device}")
        probed = sorted((tmp_path / f"probe-{device}").rglob("*.safetensors"))
        written = sorted((tmp_path / f"features-{device}").rglob("*.npy"))
        assert len(written) == 8
        features[device] = [load_file(path)["features"] for path in probed]
        features[device] += [torch.from_numpy(np.load(path)) for path in written]
    for of_cpu, of_sim in zip(*features.values(), strict=True):
        assert_equal(of_cpu, of_sim, 1e-2)


def test_transform(workspace: Path, tmp_path: Path) -> None:
    examples = tmp_path / "examples"
    examples.mkdir()
    for number in range(3):
        values = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(values).resize((32, 32), Image.Resampling.BICUBIC).save(examples / f"{number}.png")
    for device in DEVICES:
        run(
            "transform", device, "--checkpoint", workspace / "images", "--examples", examples, "--task=grayscale",
            "--source", examples / "2.png", "--steps=2", "--pairs=1", "--out", tmp_path / f"{device}.png",
        )  # fmt: skip
    of_cpu, of_sim = (np.array(Image.open(tmp_path / f"{device}.png")).astype(int) for device in DEVICES)
    assert abs(of_cpu - of_sim).max() <= 1


def test_prepare(workspace: Path, tmp_path: Path) -> None:
    latents = {}
    for device in DEVICES:
        out = tmp_path / device
        settings = ("--codec=pca", "--video_sizes=32x32", "--workers=0", "--validation_fraction=0", "--labels")
        run("prepare", device, "--videos", workspace / "videos", "--out", out, *settings)
        manifest = Manifest.load(out)
        (shard,) = manifest.shards
        reader = ShardReader(out, shard)
        latents[device] = torch.stack([torch.from_numpy(reader.read(number)[0]) for number in range(2)])
        assert manifest.labels == LABELS
    assert_equal(latents["cpu"], latents["sim"], 1e-2)
    assert json.loads((tmp_path / "cpu" / "manifest.json").read_text())["codec"]["name"] == "pca"
