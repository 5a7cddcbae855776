"""Decoding: damaged videos, times, and beginnings that refer to what was cut away."""

from collections.abc import Callable
from pathlib import Path

import av
import pytest
import torch.nn.functional as F
from torch import Tensor

from gpdit_lightning.media.video import (
    DamagedVideoError,
    check_intact,
    count_frames,
    iterate_frames,
)
from tests.media.encoding import encode, moving_texture, rgb_frame
from tests.media.videos import read_video

FRAMES, KEYFRAMES = 40, 15


def encode_texture(path: Path, codec: str, options: dict[str, str]) -> None:
    frames = [rgb_frame(pixels) for pixels in moving_texture(FRAMES, 96, 128)]
    encode(path, frames, codec, {"g": str(KEYFRAMES), **options})


def rewrite(path: Path, change: Callable[[int, bytearray], bytearray | None]) -> None:
    """Copy the packets of a video; `change` takes the number of a packet, and returns new content or None."""
    packets = []
    with av.open(str(path)) as source:
        stream = source.streams.video[0]
        with av.open(str(path.with_stem("new")), "w") as target:
            copy = target.add_stream_from_template(stream)
            for number, packet in enumerate(packet for packet in source.demux(stream) if packet.size):
                content = change(number, bytearray(packet))
                if content is not None:
                    new = av.Packet(bytes(content))
                    new.pts, new.dts, new.time_base = packet.pts, packet.dts, packet.time_base
                    new.is_keyframe, new.stream, new.duration = packet.is_keyframe, copy, packet.duration
                    packets.append(new)
                    target.mux(new)
    path.with_stem("new").replace(path)


def frames_before_damage(path: Path) -> tuple[list[Tensor], DamagedVideoError | None]:
    frames = []
    try:
        for frame in iterate_frames(path):
            frames.append(frame.pixels)
    except DamagedVideoError as error:
        return frames, error
    return frames, None


def largest_difference(frame: Tensor, intact: Tensor) -> float:
    """Return the largest mean difference of two frames (3, H, W) within a block of 8x8 pixels."""
    difference = (frame.float() - intact.float()).abs().mean(0)[None, None]
    return F.avg_pool2d(difference, 8).max().item()


@pytest.mark.parametrize("packet", [7, 22, 31])
@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"crf": "20", "bf": "3"}),
        ("a.ts", "libx264", {"crf": "20", "bf": "0"}),
        ("a.avi", "mpeg4", {"b": "600000", "bf": "2"}),
        ("a.mpg", "mpeg2video", {"b": "900000", "bf": "2"}),
        ("a.flv", "flv", {"b": "600000"}),
        ("a.mkv", "ffv1", {"slicecrc": "1"}),
    ],
)
def test_frames_end_before_the_first_damaged_one(
    tmp_path: Path, name: str, codec: str, options: dict[str, str], packet: int
) -> None:
    path = tmp_path / name
    encode_texture(path, codec, options)
    intact = read_video(path)

    def overwrite(number: int, content: bytearray) -> bytearray:
        middle = len(content) // 2
        if number == packet:
            content[middle : middle + 40] = bytes(range(215, 255))[: len(content) - middle]
        return content

    rewrite(path, overwrite)
    frames, error = frames_before_damage(path)
    assert error is not None
    assert error.frame == len(frames) == count_frames(path)
    assert str(error).startswith(f"{path} is damaged at frame {len(frames)} (")
    assert packet - 4 <= len(frames) <= packet + 1
    for frame, expected in zip(frames, intact, strict=False):
        assert largest_difference(frame, expected) < 6
    with pytest.raises(DamagedVideoError):
        check_intact(path)
