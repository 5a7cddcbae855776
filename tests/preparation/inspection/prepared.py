"""Prepared data for the tests of the inspection, and ways to damage them."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.media.video_writer import write_video
from gpdit_lightning.preparation import PrepareOptions, prepare

SHARD = "train-video-2x2x3-00000-00000"


def draw_video(path: Path, frames: int = 12, height: int = 32, width: int = 48) -> Path:
    """Write a video of a moving random image."""
    numbers = np.random.default_rng(sum(map(ord, path.name)))
    image = torch.from_numpy(numbers.random((1, 3, 5, 7)))
    wide = torch.nn.functional.interpolate(image, (height, width + frames), mode="bilinear")[0]
    pixels = torch.stack([wide[..., frame : frame + width] for frame in range(frames)])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, (pixels * 255).to(torch.uint8), fps=24)
    return path


def draw_tar(path: Path) -> None:
    """Four images with captions; 0002 is broken."""
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as tar:
        for number in range(4):
            image = io.BytesIO(b"" if number != 2 else b"not an image")
            if number != 2:
                Image.new("RGB", (20 + 8 * number, 20), (50 * number, 100, 50)).save(image, "PNG")
            for ending, content in (("png", image.getvalue()), ("txt", f"caption {number}\nof two lines".encode())):
                member = tarfile.TarInfo(f"{number:04d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def prepared(root: Path, **options: Any) -> Manifest:
    """Prepare `root / "videos"` in `root / "out"` with these options."""
    defaults = {
        "codec": "pca",
        "stride": 1,
        "clip_frames": 5,
        "video_sizes": ["16x24", "24x16"],
        "device": "cpu",
        "workers": 0,
    }
    paths = {"out": root / "out", "videos": [root / "videos"]}
    manifest = prepare(PrepareOptions(**defaults | paths | options))
    assert manifest is not None
    return manifest


def latent_offset(folder: Path, name: str, number: int) -> int:
    """Return the offset of a sample's latents in a tar."""
    return int(np.load(folder / f"{name}.index.npy")[number, 0])


def flip_bit(path: Path, offset: int) -> None:
    """Flip one bit of the byte at an offset."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 16
    path.write_bytes(content)
