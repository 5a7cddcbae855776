"""Fixtures of prepared data, intact or to be damaged."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from gpdit_lightning.data.manifest import Manifest
from tests.preparation.inspection.prepared import draw_tar, draw_video, prepared


@pytest.fixture(scope="session")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Videos, images and a tar of images, some of them broken or too short; read-only."""
    root = tmp_path_factory.mktemp("prepared")
    for number in range(6):
        draw_video(root / "videos" / ("ball" if number % 2 else "dog") / f"v_{number // 2}_c{number}.mp4")
    draw_video(root / "videos" / "ball" / "same.mp4", frames=9)
    draw_video(root / "videos" / "dog" / "same.mp4", frames=5, height=48, width=32)
    draw_video(root / "videos" / "short.mp4", frames=3)
    (root / "videos" / "broken.mp4").write_bytes(b"no video")
    (root / "images").mkdir()
    for name, size in (("wide", (30, 20)), ("square", (20, 20)), ("tall", (20, 30))):
        Image.new("RGB", size, (200, 100, 50)).save(root / "images" / f"{name}.png")
    draw_tar(root / "tars" / "00000.tar")
    return prepared(
        root,
        images=[root / "images"],
        image_tars=[str(root / "tars")],
        image_sizes=["16x16", "24x16"],
        labels=True,
        validation_fraction=0.2,
    )


@pytest.fixture
def copy(intact: Manifest, tmp_path: Path) -> Path:
    """A copy of the shards that a test may damage."""
    shutil.copytree(intact.directory, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def videos(intact: Manifest) -> Path:
    assert isinstance(intact.directory, Path)
    return intact.directory.parent / "videos"
