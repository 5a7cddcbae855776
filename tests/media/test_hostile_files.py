"""Files whose headers demand memory or time out of proportion to their size, and damage that only a checksum shows."""

import gc
import io
import os
import re
import resource
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gpdit_lightning.errors import InputError
from gpdit_lightning.media import containers, decoding
from gpdit_lightning.media.finding import is_image
from gpdit_lightning.media.image_headers import MAX_SCANS
from gpdit_lightning.media.images import read_image
from gpdit_lightning.media.video import DamagedVideoError, check_intact, count_frames, iterate_frames, video_info
from tests.media.encoding import encode, moving_texture, rgb_frame

FRAMES = 20
BOMB = zlib.compress(bytes(2**25), 9)  # 32 MiB in 32 KiB


@pytest.fixture(scope="module")
def mp4(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("mp4") / "a.mp4"
    encode(path, [rgb_frame(pixels) for pixels in moving_texture(FRAMES)])
    return path.read_bytes()


@pytest.fixture(scope="module")
def apng(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("apng") / "a.apng"
    encode(path, [rgb_frame(pixels, "rgb24") for pixels in moving_texture(FRAMES)], "apng")
    return path.read_bytes()


def box(kind: bytes, *contents: bytes) -> bytes:
    content = b"".join(contents)
    return struct.pack(">I", 8 + len(content)) + kind + content


def with_edits(content: bytes, edits: int) -> bytes:
    """Replace the edit list of the one track of an mp4 by one that plays it several times."""
    moov, trak, edts = (content.index(kind) - 4 for kind in (b"moov", b"trak", b"edts"))
    old = struct.unpack_from(">I", content, edts)[0]
    new = box(b"edts", box(b"elst", struct.pack(">II", 0, edits), struct.pack(">IiI", 1000, 0, 65536) * edits))
    changed = bytearray(content)
    for place in (moov, trak):
        struct.pack_into(">I", changed, place, struct.unpack_from(">I", content, place)[0] + len(new) - old)
    changed[edts : edts + old] = new
    return bytes(changed)


def with_samples(content: bytes, samples: int) -> bytes:
    """State this number of samples of one byte in the table of sample sizes of an mp4."""
    changed, place = bytearray(content), content.index(b"stsz")
    struct.pack_into(">II", changed, place + 8, 1, samples)
    return bytes(changed)


def with_entries(content: bytes, table: bytes, entries: int) -> bytes:
    """State this number of entries in a table of an mp4 that keeps its length."""
    changed = bytearray(content)
    struct.pack_into(">I", changed, content.index(table) + 8, entries)
    return bytes(changed)


def with_fragment(content: bytes, samples: int) -> bytes:
    run = box(b"trun", struct.pack(">II", 0, samples))
    track = box(b"traf", box(b"tfhd", struct.pack(">II", 0, 1)), run)
    return content + box(b"moof", box(b"mfhd", struct.pack(">II", 0, 9)), track)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_chunk(content: bytes, kind: bytes, start: bytes, packed: bytes) -> bytes:
    return content[:33] + chunk(kind, start + packed) + content[33:]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: with_samples(content, 2**31), "states 2147483648 samples in a file of"),
        (lambda content: with_fragment(content, 2**32 - 1), "samples in a file of"),
        (lambda content: with_entries(content, b"stts", 2**31), "states 2147483648 entries in a table stts of"),
        (lambda content: with_entries(content, b"stsc", 2**28), "states 268435456 entries in a table stsc of"),
        (lambda content: with_edits(content, 5000), "an edit list of 5000 edits for 20 samples"),
    ],
)
def test_tables_of_an_mp4_are_compared_with_its_size(
    tmp_path: Path, mp4: bytes, change: Callable[[bytes], bytes], reason: str
) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(change(mp4))
    with pytest.raises(InputError, match=f"{path} .*{reason}"):
        video_info(path)


def test_intact_tables_are_accepted(tmp_path: Path, mp4: bytes) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(with_edits(mp4, 1))
    assert count_frames(path) == FRAMES
    path.write_bytes(with_edits(mp4, 3))
    assert count_frames(path) > FRAMES


def test_a_cut_within_a_fragment_of_an_mp4_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    frames = [rgb_frame(pixels) for pixels in moving_texture(FRAMES)]
    encode(path, frames, options={"g": "4"}, container_options={"movflags": "frag_keyframe+empty_moov"})
    content = path.read_bytes()
    check_intact(path)
    second, third = (match.start() - 4 for match in list(re.finditer(b"moof", content))[1:3])
    whole = struct.unpack_from(">I", content, second)[0]
    for length in (4, 9, whole // 2):  # in the head of its box, and within it
        path.write_bytes(content[: second + length])
        assert count_frames(path) == 4
        with pytest.raises(DamagedVideoError, match="at frame 4"):
            check_intact(path)
    path.write_bytes(content[:third])  # between two fragments: nothing states that others follow
    assert count_frames(path) == 8
    check_intact(path)


@pytest.mark.parametrize(("kind", "start"), [(b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0de\0b\0"), (b"iCCP", b"a\0\0")])
def test_texts_of_an_apng_do_not_unpack_to_more_than_a_limit(
    tmp_path: Path, apng: bytes, kind: bytes, start: bytes
) -> None:
    path = tmp_path / "a.apng"
    path.write_bytes(with_chunk(apng, kind, start, BOMB))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="has texts or a colour profile of more than"):
        video_info(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**14  # 16 MiB
    path.write_bytes(with_chunk(apng, kind, start, zlib.compress(b"words")))
    assert count_frames(path) == FRAMES
    gc.collect()  # PyAV would free the name of a profile twice


def test_large_frames_are_refused_before_they_are_decoded(
    tmp_path: Path, mp4: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(mp4)
    monkeypatch.setattr(containers, "MAX_FRAME_PIXELS", 96 * 64 - 1)
    with pytest.raises(InputError, match="has frames of 96x64 pixels, and at most 6143 are read"):
        video_info(path)
    # A size that only the coded frames have.
    monkeypatch.setattr(containers, "MAX_FRAME_PIXELS", 96 * 64)
    monkeypatch.setattr(containers, "LIMITS", {"max_pixels": "100"})
    with pytest.raises(InputError, match="max pixel count"):
        video_info(path)


def test_an_index_that_repeats_the_same_bytes_ends_a_video(
    tmp_path: Path, mp4: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(with_edits(mp4, 30))
    monkeypatch.setattr(decoding, "MAX_REPETITION", 2)
    with pytest.raises(DamagedVideoError, match="states more packets than"):
        list(iterate_frames(path))


def test_special_files_are_refused_without_being_opened(tmp_path: Path) -> None:
    pipe = tmp_path / "a.png"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero")):
        assert not is_image(path)
        for read in (read_image, video_info):
            with pytest.raises(InputError, match=f"{path} is not a regular file"):
                read(path)


def png(pixels: torch.Tensor, **settings: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG", **settings)
    return file.getvalue()


def test_every_changed_bit_of_the_pixels_of_a_png_is_detected(tmp_path: Path) -> None:
    path, content = tmp_path / "a.png", png(moving_texture(1)[0])
    start = content.index(b"IDAT") + 4
    numbers = np.random.default_rng(0)
    for place in numbers.integers(start, len(content) - 16, 40):  # before IEND
        damaged = bytearray(content)
        damaged[place] ^= 1 << numbers.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=f"{path} is not a readable image"):
            read_image(path)


def test_the_scans_of_a_jpeg_are_limited(tmp_path: Path) -> None:
    path, file = tmp_path / "a.jpg", io.BytesIO()
    Image.fromarray(moving_texture(1)[0].permute(1, 2, 0).numpy()).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    assert read_image(io.BytesIO(content)).shape == (1, 3, 64, 96)
    last = content[content.rindex(b"\xff\xda") : -2]
    path.write_bytes(content[:-2] + last * MAX_SCANS + content[-2:])
    with pytest.raises(InputError, match=f"{path} is a JPEG of {MAX_SCANS + 10} scans"):
        read_image(path)
