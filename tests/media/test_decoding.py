"""Decoding: damaged videos, times, and beginnings that refer to what was cut away."""

import gc
import re
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpdit_lightning.media.containers import open_video
from gpdit_lightning.media.decoding import _Clock
from gpdit_lightning.media.video import DamagedVideoError, check_intact, count_frames, iterate_frames, video_info
from tests.media.encoding import FPS, encode, moving_texture, rgb_frame
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
        ("a.mkv", "libx264", {"crf": "20", "bf": "7", "x264-params": "b-adapt=0"}),
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
    assert packet - 8 <= len(frames) <= packet + 1
    for frame, expected in zip(frames, intact, strict=False):
        assert largest_difference(frame, expected) < 6
    with pytest.raises(DamagedVideoError):
        check_intact(path)


def test_damage_of_vp9_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "a.webm"
    encode_texture(path, "libvpx-vp9", {"b": "300k", "deadline": "realtime", "cpu-used": "8"})
    rewrite(path, lambda number, content: content[: len(content) // 2] if number == 20 else content)
    frames, error = frames_before_damage(path)
    assert error is not None
    assert len(frames) == 20


def test_damage_of_av1_ends_before_the_damaged_frame_though_it_is_reported_later(tmp_path: Path) -> None:
    path = tmp_path / "a.webm"
    encode_texture(path, "libsvtav1", {"crf": "30", "preset": "12"})
    intact, content = read_video(path), bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.is_keyframe][1]
    middle = packet.pos + packet.size // 2
    content[middle : middle + 40] = bytes(range(215, 255))
    path.write_bytes(content)
    frames, error = frames_before_damage(path)
    assert error is not None
    assert len(frames) == round(packet.pts * packet.time_base * FPS)
    assert max(map(largest_difference, frames, intact)) == 0


def test_a_container_that_cannot_be_read_further_ends_a_video_before_the_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.apng"
    encode(path, [rgb_frame(pixels, "rgb24") for pixels in moving_texture(FRAMES)], "apng")
    intact, content = read_video(path), bytearray(path.read_bytes())
    twenty_first = [part.start() for part in re.finditer(b"fcTL", content)][20]
    content[twenty_first + 8 : twenty_first + 16] = b"\xff" * 8  # width and height
    path.write_bytes(content)
    frames, error = frames_before_damage(path)
    assert error is not None
    assert 15 < len(frames) == error.frame <= 20
    assert torch.equal(torch.stack(frames), intact[: len(frames)])


def test_damaged_sound_does_not_end_a_video(tmp_path: Path) -> None:
    path = tmp_path / "a.ts"
    with av.open(str(path), "w") as container:
        video, sound = container.add_stream("libx264", FPS), container.add_stream("mp2", 48000)
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        noise = torch.randint(-9000, 9000, (FRAMES, 1, 4000), generator=torch.Generator().manual_seed(0)).short()
        for pixels, samples in zip(moving_texture(FRAMES), noise.numpy(), strict=True):
            container.mux(video.encode(rgb_frame(pixels)))
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="stereo")
            frame.sample_rate = 48000
            container.mux(sound.encode(frame))
        container.mux([*sound.encode(None), *video.encode(None)])
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for packet in list(container.demux(audio=0))[3:-3:3]:
            content[packet.pos + 60 : packet.pos + 90] = bytes(30)
    path.write_bytes(content)
    frames, error = frames_before_damage(path)
    assert error is None
    assert len(frames) == FRAMES


def test_a_video_cut_before_a_key_frame_begins_with_the_first_complete_frame(tmp_path: Path) -> None:
    path = tmp_path / "a.ts"
    encode_texture(path, "libx264", {"crf": "20", "bf": "2"})
    intact = read_video(path)
    rewrite(path, lambda number, content: None if number < KEYFRAMES // 2 else content)
    frames, error = frames_before_damage(path)
    assert error is None
    assert torch.equal(torch.stack(frames), intact[-len(frames) :])
    assert len(frames) == FRAMES - KEYFRAMES
    assert next(iterate_frames(path)).time == 0


@pytest.mark.parametrize(
    ("stamps", "expected"),
    [
        ([0, 1, 2, 5, 6, 10], [0, 1, 2, 5, 6, 10]),
        ([100, 101, 103, 104], [0, 1, 3, 4]),
        ([0, 1, 1, 2, 3], [0, 1, 1, 2, 3]),
        ([0, 1, 3, 2, 4], [0, 1, 3, 3, 4]),
        ([100, 101, 102, 0, 1, 2], [0, 1, 2, 3, 4, 5]),
        ([0, 1, None, 3, 4], [0, 1, 2, 3, 4]),
        ([None, None, 2, 3], [0, 1, 2, 3]),
        ([0, 1, 10**6, 10**6 + 2], [0, 1, 2, 4]),
    ],
    ids=["uneven", "late_start", "repeated", "out_of_order", "new_start", "missing", "missing_first", "jump"],
)
def test_times_follow_the_time_stamps(tmp_path: Path, stamps: list[int | None], expected: list[int]) -> None:
    encode(tmp_path / "a.mp4", [rgb_frame(torch.zeros(3, 16, 16, dtype=torch.uint8)) for _ in range(9)], "mpeg4")
    with open_video(tmp_path / "a.mp4") as video:
        clock = _Clock(video)
        times = []
        for stamp in stamps:
            frame = av.VideoFrame(16, 16)
            frame.pts, frame.time_base = (None if stamp is None else 10 * stamp), Fraction(1, 10 * FPS)
            times.append(clock.time(frame))
    assert [float(time) * FPS for time in times] == pytest.approx(expected, abs=0.1)
    assert all(later > earlier for earlier, later in pairwise(times))


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.ts", "libx264"), ("a.avi", "libx264"), ("a.avi", "mpeg4")],
)
def test_times_of_files(tmp_path: Path, name: str, codec: str) -> None:
    stamps = [0, 1, 2, 4, 5, 9, 10, 11] if name != "a.avi" else list(range(8))
    frames = [rgb_frame(pixels) for pixels in moving_texture(8)]
    encode(tmp_path / name, frames, codec, {"bf": "2"}, times=[7 + stamp for stamp in stamps])
    frames_read = list(iterate_frames(tmp_path / name))
    assert [frame.number for frame in frames_read] == list(range(8))
    assert [frame.time for frame in frames_read] == pytest.approx([stamp / FPS for stamp in stamps], abs=0.002)
    every_third = list(iterate_frames(tmp_path / name, start=1, stride=3))
    assert [frame.time for frame in every_third] == [frames_read[number].time for number in (1, 4, 7)]


def test_edit_list_shortens_a_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    encode(path, [rgb_frame(pixels) for pixels in moving_texture(24)], "libx264", {"bf": "0", "g": "12"})
    intact = read_video(path)
    content = bytearray(path.read_bytes())
    media_time = content.index(b"elst") + 4 + 12  # version, flags, count, duration, then the start in the media
    timescale = int.from_bytes(content[content.index(b"mdhd") + 16 :][:4], "big")
    content[media_time : media_time + 4] = (5 * timescale // FPS).to_bytes(4, "big")
    path.write_bytes(content)
    frames = list(iterate_frames(path))
    assert torch.equal(torch.stack([frame.pixels for frame in frames]), intact[5:])
    assert [frame.number for frame in frames[:2]] == [0, 1]
    assert frames[0].time == 0
    assert video_info(path).frames == count_frames(path) == 19


def test_decoded_frames_are_freed_without_garbage_collection(tmp_path: Path) -> None:
    encode_texture(tmp_path / "a.mp4", "libx264", {"bf": "0", "refs": "1"})
    gc.collect()
    gc.disable()
    try:
        frames = iterate_frames(tmp_path / "a.mp4")
        for _ in range(30):
            next(frames)
        large = [item for item in gc.get_objects() if isinstance(item, av.VideoFrame) and item.width == 128]
        assert 1 <= len(large) <= 3
    finally:
        gc.enable()
