"""Which files are videos, and which of their streams is shown."""

import os
import shutil
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from PIL import Image

from gpdit_lightning.errors import InputError
from gpdit_lightning.media.containers import is_video
from gpdit_lightning.media.video import count_frames, iterate_frames, video_info
from gpdit_lightning.path_kinds import VIDEO_EXTENSIONS
from tests.media.encoding import encode, moving_texture, rgb_frame

CONTAINERS = {
    "a.MTS": ("mpegts", "libx264"),
    "a.3gp": ("3gp", "mpeg4"),
    "a.mxf": ("mxf", "mpeg2video"),
    "a.vob": ("vob", "mpeg2video"),
    "a.m2ts": ("mpegts", "libx264"),
    "a.ogv": ("ogv", "libvpx"),
    "a.asf": ("asf", "wmv2"),
    "a.f4v": ("f4v", "libx264"),
    "a.y4m": ("yuv4mpegpipe", "wrapped_avframe"),
    "a.apng": ("apng", "apng"),
    "a.nut": ("nut", "ffv1"),
    "a.ivf": ("ivf", "libvpx-vp9"),
    "a.h264": ("h264", "libx264"),
    "a.m2v": ("mpeg2video", "mpeg2video"),
    "a.recording": ("mov", "libx264"),
    "without_extension": ("matroska", "libx264"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_whatever_ffmpeg_reads_as_video_is_a_video(tmp_path: Path, name: str) -> None:
    container_format, codec = CONTAINERS[name]
    pixel_format = "rgb24" if codec == "apng" else "yuv420p"
    with av.open(str(tmp_path / name), "w", format=container_format) as container:
        stream = container.add_stream(codec, 24)
        stream.width, stream.height, stream.pix_fmt = 96, 64, pixel_format
        for pixels in moving_texture(10):
            container.mux(stream.encode(rgb_frame(pixels, pixel_format)))
        container.mux(stream.encode(None))
    assert is_video(tmp_path / name)
    assert (Path(name).suffix.lower() in VIDEO_EXTENSIONS) == (name not in ("a.recording", "without_extension"))
    info = video_info(tmp_path / name)
    assert (info.height, info.width) == (64, 96)
    assert count_frames(tmp_path / name) == 10


def test_other_files_are_no_videos(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "image.dat", format="PNG")
    Image.new("RGB", (16, 16)).save(tmp_path / "image.jpg")
    (tmp_path / "notes.txt").write_text("a text, which FFmpeg would show as an image of characters " * 100)
    (tmp_path / "notes.nfo").write_text("a text " * 100)
    (tmp_path / "list").write_text("ffconcat version 1.0\nfile film.mp4\n")
    encode(tmp_path / "film.mp4", [rgb_frame(torch.zeros(3, 16, 16, dtype=torch.uint8))] * 2)
    (tmp_path / "weights.bin").write_bytes(bytes(range(256)) * 1000)
    (tmp_path / "empty").write_bytes(b"")
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", 8000)
        frame = av.AudioFrame.from_ndarray(torch.zeros(1, 800, dtype=torch.int16).numpy(), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    shutil.copy(tmp_path / "sound.wav", tmp_path / "sound")
    assert [path.name for path in sorted(tmp_path.iterdir()) if is_video(path)] == ["film.mp4"]
    # FFmpeg would wait for the next file of a live stream.
    (tmp_path / "live.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:0.5,\nempty\n")
    for name in ("list", "live.m3u8"):
        with pytest.raises(InputError, match=f"{name} is a list of other files and contains no video"):
            video_info(tmp_path / name)
    with pytest.raises(InputError, match=r"notes\.nfo contains no video"):
        video_info(tmp_path / "notes.nfo")


@pytest.mark.parametrize("film", [True, False])
def test_a_cover_image_is_never_the_video(tmp_path: Path, film: bool) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", 24)
        cover.width = cover.height = 80
        cover.pix_fmt = "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        streams = [container.add_stream("libx264", 24)] if film else []
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        container.mux(cover.encode(rgb_frame(torch.zeros(3, 80, 80, dtype=torch.uint8), "yuvj420p")))
        container.mux(cover.encode(None))
        for stream in streams:
            for pixels in moving_texture(10):
                container.mux(stream.encode(rgb_frame(pixels)))
            container.mux(stream.encode(None))
    if film:
        info = video_info(path)
        assert (info.height, info.width, info.fps, info.frames) == (64, 96, Fraction(24), 10)
        assert next(iterate_frames(path)).pixels.shape == (3, 64, 96)
    else:
        with pytest.raises(InputError, match=r"a\.mp4 contains a cover image but no video: remove it"):
            video_info(path)


@pytest.mark.parametrize(
    "name", ["clip:1.mp4", "http:clip.mp4", "line\u2028break.mp4", os.fsdecode(b"caf\xe9.mp4"), "%03d.mp4"]
)
def test_any_file_name_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    encode(tmp_path / "a.mp4", [rgb_frame(pixels) for pixels in moving_texture(3)])
    (tmp_path / "a.mp4").rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert count_frames(Path(name)) == 3
