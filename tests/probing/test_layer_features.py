"""Features of every layer and their cache."""

import logging
import os
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.codecs import load_codec
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.videos import read_clip
from gpdit_lightning.media.video_writer import write_video
from gpdit_lightning.probing import layer_features
from gpdit_lightning.probing.layer_features import LayerFeatures, extract_layer_features
from gpdit_lightning.recalled_files import read_with_checksum, save_with_checksum

CODEC = load_codec("pca")
SIZE = (16, 32)


@pytest.fixture(scope="module")
def model(randomise: Callable[[GPDiT], GPDiT]) -> GPDiT:
    return randomise(GPDiT(GPDiTConfig(size="tiny", layers=2, width=24, heads=2, mlp_width=32))).eval()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five files: the third is not a video, and the fourth is too short for five frames at stride three."""
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


def features_of_one(model: GPDiT, path: Path, frame_numbers: list[int]) -> Tensor:
    """Return the features of one video, (L + 1, D), layer by layer."""
    pixels = read_clip(path, frame_numbers[-1] + 1, 1, SIZE)[frame_numbers]
    latents = CODEC.encode(pixels[None])
    clean = (latents - CODEC.mean.view(16, 1, 1)) / CODEC.std.view(16, 1, 1)
    with torch.no_grad():
        return torch.stack([model.features(clean, [layer])[layer][0].double().mean((0, 1)) for layer in range(3)])


def extract(model: GPDiT, videos: list[Path], **options: Any) -> LayerFeatures:
    return extract_layer_features(model, CODEC, videos, SIZE, **{"frames": 5, "batch_size": 2, "workers": 1, **options})


def test_features_equal_those_of_each_video_alone(
    model: GPDiT, videos: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger=layer_features.log.name):
        result = extract(model, videos)
    assert "2.mp4" in caplog.text
    assert result.paths == [videos[number] for number in (0, 1, 3, 4)]
    assert result.num_resampled == 1
    assert result.features.shape == (4, 3, 24)
    assert result.features.dtype == np.float32
    frame_numbers = ([0, 3, 6, 9, 12], [1, 4, 7, 10, 13], [0, 2, 4, 5, 7], [0, 3, 6, 9, 12])
    expected = torch.stack([features_of_one(model, *pair) for pair in zip(result.paths, frame_numbers, strict=True)])
    torch.testing.assert_close(torch.from_numpy(result.features).double(), expected, rtol=1e-4, atol=1e-5)


def test_unusable_videos_and_frames_are_refused(model: GPDiT, videos: list[Path]) -> None:
    with pytest.raises(InputError, match="none of the 1 videos can be read"):
        extract(model, videos[2:3])
    with pytest.raises(InputError, match=r"the number of pixel frames is 6, which is not 1 \+ 4 k"):
        extract(model, videos, frames=6)


def test_a_stopped_run_resumes_from_the_cache(
    model: GPDiT,
    videos: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    randomise: Callable[..., GPDiT],
    caplog: pytest.LogCaptureFixture,
) -> None:
    read: Counter[str] = Counter()
    limit = 10

    def counting_read_clip(path: Path, *arguments: Any, **options: Any) -> Tensor:
        if len(read) == limit:
            raise KeyboardInterrupt
        read[path.stem] += 1
        return read_clip(path, *arguments, **options)

    monkeypatch.setattr(layer_features, "read_clip", counting_read_clip)
    monkeypatch.setattr(layer_features, "VIDEOS_PER_FILE", 2)
    uncached = extract(model, videos)
    assert uncached.paths == [videos[number] for number in (0, 1, 3, 4)]
    read.clear()
    limit = 3
    with pytest.raises(KeyboardInterrupt):
        extract(model, videos, cache=tmp_path)
    assert read.keys() == {"0", "1", "2"}
    read.clear()
    resumed = extract(model, videos, cache=tmp_path)
    assert read.keys() == {"2", "3", "4"}
    assert (resumed.features == uncached.features).all()
    assert resumed[1:] == uncached[1:]

    read.clear()
    limit = 10
    assert (extract(model, videos, cache=tmp_path).features == uncached.features).all()
    assert not read
    damaged, another = sorted(tmp_path.iterdir())[:2]
    content = bytearray(damaged.read_bytes())
    content[-2] ^= 1  # of a value
    for written in (bytes(content), another.read_bytes()):
        read.clear()
        damaged.write_bytes(written)
        assert (extract(model, videos, cache=tmp_path).features == uncached.features).all()
        assert 0 < len(read) <= 2
        reason = "damaged, or of another place (its content is not that of its checksum)"
        assert f"{damaged} is {reason}: it is computed again." in caplog.messages
        caplog.clear()
    read.clear()
    extract(model, videos, cache=tmp_path, stride=2)  # another stride
    assert len(read) == 5
    read.clear()
    other = randomise(GPDiT(model.config)).eval()
    other.output.weight.data += 1
    extract(other, videos, cache=tmp_path)  # other weights
    assert len(read) == 5


def test_features_of_a_replaced_video_of_equal_size_and_time_are_computed_again(
    model: GPDiT, videos: list[Path], tmp_path: Path
) -> None:
    size = 8 + max(path.stat().st_size for path in videos[:2])
    # Boxes that decoders skip make both files equally long.
    contents = [path.read_bytes() + struct.pack(">I4s", size - path.stat().st_size, b"free") for path in videos[:2]]
    video, cache = tmp_path / "video.mp4", tmp_path / "cache"
    results = []
    for content in contents:
        video.write_bytes(content.ljust(size, b"\0"))
        os.utime(video, (0, 0))
        results.append(extract(model, [video], cache=cache).features)
        assert (results[-1] == extract(model, [video]).features).all()
    assert (results[0] != results[1]).any()


@pytest.mark.parametrize("change", [lambda features: features[:, :1], lambda features: features * torch.inf])
def test_features_of_another_shape_or_not_finite_are_computed_again(
    change: Callable[[Tensor], Tensor], model: GPDiT, videos: list[Path], tmp_path: Path
) -> None:
    expected = extract(model, videos[:1], cache=tmp_path)
    (file,) = tmp_path.iterdir()
    tensors, metadata = read_with_checksum(file, ("notes",), "", has_place=True)
    metadata = {"notes": metadata["notes"]}
    save_with_checksum(file, {"features": change(tensors["features"])}, metadata, place=file)  # with a valid checksum
    assert (extract(model, videos[:1], cache=tmp_path).features == expected.features).all()


def test_features_that_are_not_finite_are_refused(model: GPDiT, videos: list[Path]) -> None:
    large = GPDiT(model.config).eval()
    for parameter in large.parameters():
        parameter.data.fill_(3e38)
    with pytest.raises(InputError, match="features are not finite, because of the weights of the model"):
        extract(large, videos[:1])
