"""Preparation on a Ray cluster gives the same shards."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gpdit_lightning.media.video_writer import write_video
from gpdit_lightning.preparation import PrepareOptions, prepare
from gpdit_lightning.preparation.records import Records

ray = pytest.importorskip("ray.data", reason="the extra `ray` is not installed")


@pytest.fixture
def options(tmp_path: Path) -> PrepareOptions:
    numbers = np.random.default_rng(0)
    (tmp_path / "videos").mkdir()
    for number in range(5):
        pixels = numbers.integers(0, 255, (10, 3, 16, 24), dtype=np.uint8)
        write_video(tmp_path / "videos" / f"{number}.mp4", torch.from_numpy(pixels), fps=24)
    (tmp_path / "videos" / "broken.mp4").write_bytes(b"no video")
    sizes = {"stride": 1, "clip_frames": 5, "video_sizes": ["16x24"], "shard_size": 3, "part_size": 2, "batch_size": 2}
    return PrepareOptions(
        out=tmp_path / "out", videos=[tmp_path / "videos"], codec="pca", workers=1, device="cpu", **sizes
    )


@pytest.mark.slow
def test_ray_finishes_a_preparation_with_the_same_shards(options: PrepareOptions) -> None:
    without_ray = prepare(options)
    assert without_ray is not None
    records = Records(options.out)
    assert len(records.parts) == 3
    # One part is finished, as if a process had been killed afterwards.
    by_ray = replace(options, out=options.out.with_name("by_ray"), ray=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[prepare.__module__], "_write_manifest", lambda *_: None)
        patch.setattr(Records, "unfinished_parts", property(lambda self: [1] if not self.is_finished(1) else []))
        prepare(replace(by_ray, ray=False))
    assert Records(by_ray.out).unfinished_parts == [0, 2]
    with_ray = prepare(by_ray)
    assert with_ray is not None
    assert with_ray.shards == without_ray.shards
    assert with_ray.skipped == without_ray.skipped == 1
    assert with_ray.validation == without_ray.validation
