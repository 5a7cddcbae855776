"""Displayed frames: pixel aspect, orientation, colours, transparency, interlacing."""

import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.media import display
from gpdit_lightning.media.images import on_white
from gpdit_lightning.media.video import iterate_frames, video_info
from tests.media.encoding import FULL, LIMITED, encode, moving_texture, plane_frame, rgb_frame
from tests.media.videos import read_video

# Six patches, in two rows of three.
PATCHES = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [200, 200, 30], [128, 128, 128], [235, 235, 235]])


def disk(height: int, width: int, aspect: float, radius: int = 20) -> Tensor:
    """Return a disk that is round if its pixels have this aspect."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    inside = (rows - height / 2) ** 2 + ((columns - width / 2) * aspect) ** 2 < radius**2
    return (inside * 255).to(torch.uint8).expand(3, -1, -1)


def extent(frame: Tensor) -> tuple[int, int]:
    """Return the height and width of what is bright in a frame (3, H, W)."""
    bright = frame[0] > 128
    return int(bright.any(1).sum()), int(bright.any(0).sum())


@pytest.mark.parametrize(
    ("name", "codec", "aspect"),
    [
        ("a.mp4", "libx264", Fraction(2)),
        ("a.mkv", "libx264", Fraction(1, 2)),
        ("a.ts", "libx264", Fraction(64, 51)),
        ("a.avi", "mpeg4", Fraction(12, 11)),
        ("a.mpg", "mpeg2video", Fraction(4, 3)),
    ],
)
def test_pixels_are_square(tmp_path: Path, name: str, codec: str, aspect: Fraction) -> None:
    encode(tmp_path / name, [rgb_frame(disk(96, 128, float(aspect)))] * 3, codec, {"crf": "10"}, aspect)
    frame, info = next(iterate_frames(tmp_path / name)), video_info(tmp_path / name)
    assert frame.pixels.shape == (3, info.height, info.width) == (3, 96, round(128 * aspect))
    for pixels in (frame.pixels, frame.resized((80, 80))):
        height, width = extent(pixels)
        assert abs(height - width) <= 2


def test_container_precedes_codec_and_codec_precedes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    encode(path, [rgb_frame(disk(64, 64, 1))] * 2, aspect=Fraction(2))
    content = bytearray(path.read_bytes())
    offset = content.index(b"pasp") + 4
    for ratio, width in (((3, 1), 192), ((0, 1), 128), ((60000, 1), None)):
        content[offset : offset + 8] = b"".join(value.to_bytes(4, "big") for value in ratio)
        path.write_bytes(content)
        if width:
            assert (video_info(path).height, video_info(path).width) == (64, width)
        else:
            with pytest.raises(InputError, match=r"a\.mp4 states that its pixels are 60000 times as wide as high"):
                video_info(path)


def test_pixel_aspect_and_size_may_change_within_a_video(tmp_path: Path) -> None:
    pieces = []
    for size, aspect in (((96, 128), Fraction(2)), ((96, 128), Fraction(1)), ((64, 128), Fraction(1, 2))):
        encode(tmp_path / "a.h264", [rgb_frame(disk(*size, float(aspect), 16))] * 5, aspect=aspect)
        pieces.append((tmp_path / "a.h264").read_bytes())
    (tmp_path / "a.h264").write_bytes(b"".join(pieces))
    frames = list(iterate_frames(tmp_path / "a.h264"))
    assert [frame.pixel_aspect for frame in frames] == [2] * 5 + [1] * 5 + [Fraction(1, 2)] * 5
    assert {frame.pixels.shape for frame in frames} == {(3, 96, 256)}
    for frame in frames:
        height, width = extent(frame.resized((64, 64)))
        assert abs(height - width) <= 2


CORNERS = torch.tensor([[250, 128], [0, 0]], dtype=torch.uint8).repeat_interleave(24, 0).repeat_interleave(32, 1)


def transformed(image: Tensor, a: int, b: int, c: int, d: int) -> Tensor:
    """Move each pixel of (H, W) as a display matrix says (ISO 14496-12, 6.2.2)."""
    rows, columns = torch.meshgrid(*map(torch.arange, image.shape), indexing="ij")
    x, y = a * columns + c * rows, b * columns + d * rows
    result = torch.empty(image.shape if a else image.shape[::-1], dtype=image.dtype)
    result[y - y.min(), x - x.min()] = image
    return result


@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "libx264"), (".mkv", "libx264"), (".mp4", "libvpx-vp9")])
@pytest.mark.parametrize(
    "matrix",
    [(0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)],
)
def test_rotations_and_flips_are_applied(
    tmp_path: Path, matrix: tuple[int, int, int, int], suffix: str, codec: str
) -> None:
    path = (tmp_path / "a").with_suffix(suffix)
    frames = [rgb_frame(CORNERS.expand(3, -1, -1))] * 2
    encode(path, frames, codec, {"crf": "1", "b": "0"}, matrix=matrix, aspect=Fraction(2))
    frame, expected = next(iterate_frames(path)), transformed(CORNERS, *matrix)
    assert (frame.stored[0].int() - expected.int()).abs().max() <= 8
    assert frame.pixel_aspect == (2 if matrix[0] else Fraction(1, 2))
    assert frame.pixels.shape == (3, *frame.displayed_size) == (3, video_info(path).height, video_info(path).width)
    assert frame.displayed_size == ((48, 128) if matrix[0] else (64, 24))


def test_orientation_in_the_codec_holds_until_the_next_one(tmp_path: Path) -> None:
    bitstream_filter = "h264_metadata=display_orientation=insert:rotate=90"
    frames = [rgb_frame(CORNERS.expand(3, -1, -1))] * 5
    encode(tmp_path / "a.ts", frames, options={"crf": "1", "g": "100"}, filters=[bitstream_filter])
    for pixels in read_video(tmp_path / "a.ts"):
        assert (pixels[0].int() - torch.rot90(CORNERS).int()).abs().max() <= 8


@pytest.mark.parametrize(("angle", "turns"), [(0.6, 0), (89.5, 1), (-90.5, 3), (7, None), (45, None)])
def test_angles_are_multiples_of_90_degrees(tmp_path: Path, angle: float, turns: int | None) -> None:
    path = tmp_path / "a.mp4"
    encode(path, [rgb_frame(CORNERS.expand(3, -1, -1))] * 2, options={"crf": "1"}, matrix=(1, 0, 0, 1))
    content = bytearray(path.read_bytes())
    cos, sin = (round(f(math.radians(angle)) * 2**16) for f in (math.cos, math.sin))
    offset = content.index(b"tkhd") + 4 + 40
    for number, value in enumerate((cos, sin, 0, -sin, cos)):
        content[offset + 4 * number : offset + 4 * number + 4] = value.to_bytes(4, "big", signed=True)
    path.write_bytes(content)
    if turns is None:
        with pytest.raises(InputError, match=rf"a\.mp4 is displayed rotated by {angle:.1f} degrees"):
            video_info(path)
    else:
        expected = torch.rot90(CORNERS, -turns)
        assert (next(iterate_frames(path)).stored[0].int() - expected.int()).abs().max() <= 8


# Weights of red and blue in luma, and FFmpeg's codes of the matrices.
MATRICES = {
    "BT.709": (0.2126, 0.0722, 1),
    "BT.601": (0.299, 0.114, 6),
    "SMPTE 240M": (0.212, 0.087, 7),
    "BT.2020": (0.2627, 0.0593, 9),
}


def patch_planes(colours: np.ndarray, height: int, width: int, matrix: str, full: bool, bits: int) -> list[np.ndarray]:
    """Convert the colours of the six patches, in [0, 255], to planes of luma and chroma (ITU-T H.273, 8.3)."""
    red, blue, _ = MATRICES[matrix]
    r, g, b = colours.T / 255
    luma = red * r + (1 - red - blue) * g + blue * b
    chroma = [(b - luma) / (2 - 2 * blue), (r - luma) / (2 - 2 * red)]
    unit = 2 ** (bits - 8)
    if full:
        levels = [luma * (2**bits - 1), *(c * (2**bits - 1) + 128 * unit for c in chroma)]
    else:
        levels = [(luma * 219 + 16) * unit, *((c * 224 + 128) * unit for c in chroma)]
    return [patches(level.round(), height, width) for level in levels]


def patches(levels: np.ndarray, height: int, width: int) -> np.ndarray:
    rows, columns = np.arange(height) * 2 // height, np.arange(width) * 3 // width
    return levels[rows[:, None] * 3 + columns]


def patch_colours(path: Path) -> np.ndarray:
    """Return the colours in the centres of the patches, (6, 3)."""
    pixels = read_video(path)[0].numpy()
    height, width = pixels.shape[1:]
    rows, columns = [height // 4, height * 3 // 4], [width // 6, width // 2, width * 5 // 6]
    return pixels[:, rows][:, :, columns].reshape(3, 6).T.astype(float)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("lines", "matrix", "tagged", "pixel_format"),
    [
        (720, "BT.709", False, "yuv420p"),
        (718, "BT.601", False, "yuv420p"),
        (64, "BT.709", True, "yuv420p"),
        (720, "BT.601", True, "yuv422p"),
        (64, "SMPTE 240M", True, "yuv444p"),
        (63, "BT.2020", True, "yuv420p10le"),
        (720, "BT.709", False, "yuv422p10le"),
    ],
)
def test_colours(tmp_path: Path, lines: int, matrix: str, tagged: bool, pixel_format: str, full: bool) -> None:
    bits = av.VideoFormat(pixel_format, 16, 16).components[0].bits
    frame = plane_frame(pixel_format, patch_planes(PATCHES, lines, 96, matrix, full, bits))
    tags = (MATRICES[matrix][2] if tagged else 2, FULL if full else LIMITED)
    encode(tmp_path / "a.mkv", [frame], "ffv1", tags=tags)
    assert np.abs(patch_colours(tmp_path / "a.mkv") - PATCHES).max() <= 3


@pytest.mark.parametrize(("tags", "scale", "offset"), [((2, LIMITED), 219 / 255, 16), ((2, FULL), 1, 0), ((), 1, 0)])
def test_gray_levels(tmp_path: Path, tags: tuple[int, ...], scale: float, offset: int) -> None:
    levels = patches((PATCHES[:, 0] * scale + offset).round(), 64, 96)
    encode(tmp_path / "a.mkv", [plane_frame("gray", [levels])], "ffv1", tags=tags)
    assert np.abs(patch_colours(tmp_path / "a.mkv") - PATCHES[:, :1]).max() <= 1


@pytest.mark.parametrize("tag", [0, 3], ids=["RGB", "reserved"])
def test_tags_that_cannot_be_true_count_as_none(tmp_path: Path, tag: int) -> None:
    frame = plane_frame("yuv420p", patch_planes(PATCHES, 64, 96, "BT.601", False, 8))
    encode(tmp_path / "a.mkv", [frame], "ffv1", tags=(tag, LIMITED))
    assert np.abs(patch_colours(tmp_path / "a.mkv") - PATCHES).max() <= 3


def test_reserved_byte_of_a_bitmap_is_not_transparency(tmp_path: Path) -> None:
    image = torch.tensor([30, 60, 90, 0], dtype=torch.uint8)[:, None, None].expand(4, 16, 16)
    encode(tmp_path / "a.avi", [rgb_frame(image, "bgra")], "rawvideo")
    assert read_video(tmp_path / "a.avi")[0, :, 8, 8].tolist() == [30, 60, 90]


def test_rgb_is_not_converted(tmp_path: Path) -> None:
    image = torch.randint(0, 256, (3, 64, 96), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    encode(tmp_path / "a.avi", [rgb_frame(image, "gbrp")], "utvideo")
    assert torch.equal(read_video(tmp_path / "a.avi")[0], image)


def test_unsupported_matrix_is_named(tmp_path: Path) -> None:
    frame = plane_frame("yuv420p", [np.full((64, 64), 128)] * 3)
    encode(tmp_path / "a.mkv", [frame], "ffv1", tags=(8, LIMITED))
    with pytest.raises(InputError, match=r"a\.mkv has the colour matrix 8 of ITU-T H\.273, .*: convert it to BT\.709"):
        video_info(tmp_path / "a.mkv")


def test_dolby_vision_without_tags_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode(tmp_path / "a.mkv", [plane_frame("yuv420p10le", [np.full((64, 64), 512)] * 3)], "ffv1")
    video_info(tmp_path / "a.mkv")
    monkeypatch.setattr(display, "read_side_data", lambda _: {"DOVI_RPU_BUFFER": b""})
    with pytest.raises(InputError, match=r"a\.mkv has the colours of Dolby Vision profile 5"):
        video_info(tmp_path / "a.mkv")


def hdr_signal(colours: np.ndarray, transfer: int) -> np.ndarray:
    """Encode sRGB colours (n, 3) as PQ (16) or HLG (18) with white at 203 cd/m2 (ITU-R BT.2100, BT.2408)."""
    values = colours / 255
    light = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    to_2020 = [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]  # BT.2087
    light = light @ np.transpose(to_2020) * 203
    if transfer == 16:
        power = (light / 10000) ** (1305 / 8192)
        return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)
    luminance = light @ [0.2627, 0.6780, 0.0593] / 1000
    scene = light / 1000 * luminance[:, None] ** (1 / 1.2 - 1)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), a * np.log(np.maximum(12 * scene - b, 1e-9)) + c)


@pytest.mark.parametrize("transfer", [16, 18], ids=["PQ", "HLG"])
def test_hdr_is_tone_mapped(tmp_path: Path, transfer: int) -> None:
    planes = patch_planes(hdr_signal(PATCHES, transfer) * 255, 64, 96, "BT.2020", False, 10)
    encode(tmp_path / "a.mkv", [plane_frame("yuv444p10le", planes)], "ffv1", tags=(9, LIMITED, transfer, 9))
    assert np.abs(patch_colours(tmp_path / "a.mkv") - PATCHES).max() <= 3
    bright = np.full((6, 3), 0.75 if transfer == 16 else 1.0)  # 983 and 1000 cd/m2
    planes = patch_planes(bright * 255, 64, 96, "BT.2020", False, 10)
    encode(tmp_path / "a.mkv", [plane_frame("yuv444p10le", planes)], "ffv1", tags=(9, LIMITED, transfer, 9))
    assert patch_colours(tmp_path / "a.mkv").min() >= 254


@pytest.mark.parametrize(("name", "codec"), [("a.mov", "prores_ks"), ("a.webm", "libvpx-vp9")])
def test_tags_of_the_container_complete_those_of_the_codec(tmp_path: Path, name: str, codec: str) -> None:
    is_deep = codec == "prores_ks"
    signal = hdr_signal(PATCHES, 18) * 255
    planes = patch_planes(signal, 64, 96, "BT.2020", False, 10 if is_deep else 8)
    frame = plane_frame("yuv422p10le" if is_deep else "yuv420p", planes)
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, 24, options={} if is_deep else {"crf": "4", "b": "0"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, frame.format.name
        stream.codec_context.colorspace, stream.codec_context.color_range = 9, LIMITED
        stream.codec_context.color_trc, stream.codec_context.color_primaries = 18, 9
        for item in (frame, None):
            container.mux(stream.encode(item))
    assert np.abs(patch_colours(tmp_path / name) - PATCHES).max() <= (3 if is_deep else 12)


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format"),
    [
        ("a.webm", "libvpx-vp9", "yuva420p"),
        ("a.mkv", "libvpx", "yuva420p"),
        ("a.mov", "prores_ks", "yuva444p10le"),
        ("a.mov", "qtrle", "argb"),
        ("a.apng", "apng", "rgba"),
        ("a.mkv", "ffv1", "rgba64le"),
    ],
)
def test_transparent_areas_are_white(tmp_path: Path, name: str, codec: str, pixel_format: str) -> None:
    image = torch.zeros(4, 48, 64, dtype=torch.uint8)
    image[:3] = torch.tensor([250, 0, 250])[:, None, None]  # hidden
    image[:, 16:32] = torch.tensor([30, 200, 30, 255])[:, None, None]
    image[:, 32:] = torch.tensor([0, 0, 0, 128])[:, None, None]
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, 24, options={"auto-alt-ref": "0"} if "vpx" in codec else {})
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixel_format
        stream.metadata["alpha_mode"] = "1"
        for frame in (rgb_frame(image, pixel_format), rgb_frame(image, pixel_format), None):
            container.mux(stream.encode(frame))
    pixels = read_video(tmp_path / name)[-1].int()
    for row, colour in ((8, [255, 255, 255]), (24, [30, 200, 30]), (40, [127, 127, 127])):
        assert pixels[:, row, 32].tolist() == pytest.approx(colour, abs=3)


@pytest.mark.parametrize("disposal", [1, 2, 3])
def test_gif_equals_pillow(tmp_path: Path, disposal: int) -> None:
    images = [Image.new("RGBA", (32, 32)) for _ in range(4)]
    for number, image in enumerate(images):
        image.paste((200, 30, 30 * number, 255), (8 * number, 8, 8 * number + 8, 24))
    path = tmp_path / "a.gif"
    images[0].save(path, save_all=True, append_images=images[1:], disposal=disposal, duration=100)
    frames = read_video(path)
    with Image.open(path) as gif:
        for number, frame in enumerate(frames):
            gif.seek(number)
            assert torch.equal(frame, torch.from_numpy(np.array(on_white(gif.convert("RGBA")))).permute(2, 0, 1))


def interlaced(frames: Tensor) -> Tensor:
    """Weave each pair of frames into one, the earlier one in the upper field."""
    woven = frames[0::2].clone()
    woven[..., 1::2, :] = frames[1::2, ..., 1::2, :]
    return woven


def encode_fields(path: Path, frames: Tensor, field: str, codec: str = "mpeg2video") -> None:
    """Encode frames (T, 3, H, W), marked by FFmpeg's filter `setfield`: prog, tff or bff."""
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frames.shape[3], height=frames.shape[2], format="yuv420p", time_base=Fraction(1, 24)
    )
    graph.link_nodes(source, graph.add("setfield", field), graph.add("buffersink")).configure()
    marked = []
    for number, pixels in enumerate(frames):
        frame = rgb_frame(pixels)
        frame.pts, frame.time_base = number, Fraction(1, 24)
        graph.vpush(frame)
        marked.append(graph.vpull())
    options = {"qmin": "1", "qmax": "1", "b": "50000000"} if codec == "mpeg2video" else {}
    encode(path, marked, codec, options | ({} if field == "prog" else {"flags": "+ildct+ilme"}))


def combing(frames: Tensor) -> float:
    """Return how far rows differ from both of their neighbours in the same direction."""
    rows = frames.float()
    above, below = rows[..., 1:-1, :] - rows[..., :-2, :], rows[..., 1:-1, :] - rows[..., 2:, :]
    return torch.minimum(above.abs(), below.abs())[above * below > 0].sum().item() / rows.numel()


@pytest.mark.parametrize("field", ["tff", "bff"], ids=["true_order", "wrong_order"])
def test_interlaced_frames_are_deinterlaced(tmp_path: Path, field: str) -> None:
    frames = moving_texture(24)
    encode_fields(tmp_path / "a.mpg", interlaced(frames), field)
    result = read_video(tmp_path / "a.mpg")
    assert len(result) == 12
    assert combing(result[1:-1]) < combing(interlaced(frames)) / 5
    error = (result[1:-1].float() - frames[2:-2:2]).abs().mean()
    assert error < (interlaced(frames)[1:-1].float() - frames[2:-2:2]).abs().mean() / 3
    times = [frame.time for frame in iterate_frames(tmp_path / "a.mpg", stride=2)]
    assert times == pytest.approx([number / 12 for number in range(6)], abs=1e-4)


@pytest.mark.parametrize(("height", "width"), [(2, 64), (6, 64), (7, 64), (64, 4), (64, 5)])
def test_interlaced_frames_of_few_lines_or_columns_are_read(tmp_path: Path, height: int, width: int) -> None:
    """`bwdif` needs planes of 4 lines and 3 columns; those of chroma have half of the lines and columns."""
    encode_fields(tmp_path / "a.mkv", torch.full((4, 3, height, width), 90, dtype=torch.uint8), "tff", "ffv1")
    frames = list(iterate_frames(tmp_path / "a.mkv"))
    assert [frame.pixels.shape for frame in frames] == [(3, height, width)] * 4
    assert all((frame.pixels.int() - 90).abs().max() <= 3 for frame in frames)


def test_progressive_frames_are_not_deinterlaced(tmp_path: Path) -> None:
    frames = moving_texture(12)
    for field in ("prog", "tff"):
        encode_fields(tmp_path / f"{field}.mpg", frames, field)
    with av.open(str(tmp_path / "prog.mpg")) as container:
        decoded = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    assert torch.equal(read_video(tmp_path / "prog.mpg"), torch.stack(decoded).permute(0, 3, 1, 2))
    # Marked as interlaced, but not: the detection needs a few frames.
    difference = (read_video(tmp_path / "tff.mpg").float() - read_video(tmp_path / "prog.mpg")).abs().mean((1, 2, 3))
    assert difference[4:-1].max() < 2
