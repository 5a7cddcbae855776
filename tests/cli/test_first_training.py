"""The command that `prepare` proposes: recipe and options, by labels, codec, sizes, number of samples and machine."""

import math
import os
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gpdit_lightning.cli import main
from gpdit_lightning.cli.estimated_recipe import read_recipe
from gpdit_lightning.cli.first_training import first_training
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.shard_entry import ARRAYS, Kind, ShardEntry
from gpdit_lightning.devices import Machine
from gpdit_lightning.estimation.requirements import memory
from gpdit_lightning.specs import CodecSpec
from tests.data.labelled import write_labelled

CPU = Machine("cpu", 1, "cpu", 8 << 30, 2, 8 << 30, bf16=False)
GPUS = Machine("cuda", 6, "H100", 24 << 30, 16, 64 << 30, bf16=True)
WAN = CodecSpec("wan", None, 16, 8, 4, (0.0,) * 16, (1.0,) * 16, "0" * 16)
SD = CodecSpec("sd", None, 4, 8, 1, (0.0,) * 4, (1.0,) * 4, "0" * 16)
BACKBONE = "--model.init_args.backbone"
LAPTOP, GPU = "acdit/imagenet_xl acdit/laptop", "acdit/imagenet_b"


def prepared(
    folder: Path, codec: CodecSpec, *sizes: tuple[int, int, int], count: int = 5, labels: int = 3, arrays: int = 0
) -> Manifest:
    """Write a manifest of `count` samples of each latent size (F, h, w), whose shards are holes of their sizes."""
    shards = []
    for frames, height, width in sizes:
        kind: Kind = "image" if frames == 1 else "video"
        name, shape = f"train-{kind}-{frames}x{height}x{width}-00000", (frames, codec.latent_channels, height, width)
        size = count * (2048 + 2 * len(ARRAYS[arrays]) * math.prod(shape))
        for file in (f"{name}.tar", f"{name}.index.npy"):
            (folder / file).touch()
        os.truncate(folder / f"{name}.tar", size)
        paths = {"path": f"{name}.tar", "index": f"{name}.index.npy", "sha256": "0" * 64, "index_sha256": "0" * 64}
        shards.append(
            ShardEntry(split="train", kind=kind, shape=shape, count=count, bytes=size, arrays=ARRAYS[arrays], **paths)
        )
    names = tuple(f"class {number}" for number in range(labels))
    manifest = Manifest(folder, codec, tuple(shards), labels=names)
    manifest.save()
    return manifest


@pytest.mark.parametrize(
    ("codec", "sizes", "machine", "recipes", "options"),
    [
        (SD, [(1, 8, 8)], CPU, LAPTOP, "classes 3, latent_channels 4"),
        (WAN, [(1, 16, 24), (1, 24, 16)], CPU, LAPTOP, "classes 3"),
        (WAN, [(1, 9, 6)], CPU, LAPTOP, "classes 3, block_shape [1,0,3]"),
        (SD, [(1, 32, 32)], GPUS, LAPTOP, "classes 3, block_shape [1,16,16], latent_channels 4"),
        (SD, [(16, 8, 8)], CPU, "acdit/ucf101_xl acdit/laptop_videos", "classes 3, block_shape [4,0,0], "
         "first_block_frames 0, latent_channels 4"),
        (SD, [(3, 8, 8)], CPU, "ucf101_b labels/ucf101 size/tiny", "classes 3, latent_channels 4"),
        (WAN, [(5, 8, 9)], CPU, "ucf101_b labels/ucf101 size/tiny", "classes 3, patch_size 1"),
        (WAN, [(5, 8, 8), (1, 8, 8)], CPU, "stage2_mixed tiny", "data.labels true, classes 3"),
    ],
)  # fmt: skip
def test_labels_are_used_on_a_laptop_and_with_few_data(
    tmp_path: Path, codec: CodecSpec, sizes: list[tuple[int, int, int]], machine: Machine, recipes: str, options: str
) -> None:
    command = shlex.split(first_training(prepared(tmp_path, codec, *sizes), machine))
    words = [word for recipe in recipes.split() for word in ("--config", f"gpdit:{recipe}")]
    expected = options.replace("block_shape", "model.init_args.backbone.block_shape")
    for name in ("classes", "latent_channels", "first_block_frames", "patch_size"):
        expected = expected.replace(f"{name} ", f"model.init_args.backbone.{name} ")
    words += ["--data_dir", str(tmp_path), *(word for option in expected.split(", ") for word in f"--{option}".split())]
    assert command == ["python", "-m", "gpdit_lightning", "fit", *words]


@pytest.mark.parametrize(
    ("codec", "size", "arrays", "recipe", "options"),
    [
        (SD, (1, 32, 32), 1, "acdit/imagenet_b", ["--data.flips", "null"]),
        (
            WAN,
            (1, 32, 64),
            0,
            "acdit/imagenet_b",
            [f"{BACKBONE}.block_shape", "[1,16,32]", f"{BACKBONE}.latent_channels", "16"],
        ),
        (SD, (16, 32, 32), 0, "acdit/ucf101_xl", [f"{BACKBONE}.size", "B", "--data.posterior", "null"]),
    ],
)
def test_size_b_fits_into_the_memory_of_the_gpus(
    tmp_path: Path, codec: CodecSpec, size: tuple[int, int, int], arrays: int, recipe: str, options: list[str]
) -> None:
    manifest = prepared(tmp_path, codec, size, count=100_000, arrays=arrays)
    command = shlex.split(first_training(manifest, GPUS))
    assert command[4:6] == ["--config", f"gpdit:{recipe}"]
    text = " ".join(command)
    assert " ".join(options) in text
    assert ("data.posterior null" in text) == (arrays == 0)
    devices = 6 if recipe != "acdit/imagenet_b" else 4  # of the 256 or 96 parts of a batch
    assert ("--trainer.devices 4" in text) == (devices == 4)
    run = replace(read_recipe(command[4:]).run, gpus=devices)
    assert memory(run)["total"] <= 0.9 * GPUS.memory
    assert run.backbone.classes == 3


def test_the_proposed_command_trains_on_labelled_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("red car", "Äpfel")
    samples = [(names[number % 2], np.random.default_rng(number).normal(size=(1, 4, 8, 8))) for number in range(6)]
    manifest = write_labelled(tmp_path / "with space", names, samples, codec=replace(SD, name="pca"))
    command = shlex.split(first_training(manifest, CPU))[3:]
    short = ["--trainer.max_steps=1", "--preview.every_steps=0", "--model.init_args.optimizer.warmup_steps=0"]
    assert main([*command, *short, "--model.init_args.optimizer.decay_steps=1", "--data.images.batch_size=2"]) == 0
