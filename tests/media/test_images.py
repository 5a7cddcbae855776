import io
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import (
    CONTEXT_COLOUR,
    GENERATED_COLOUR,
    closest_size,
    parse_size,
    read_image,
    resize_and_crop,
    strip_frame_numbers,
    with_border,
    write_animation,
    write_sheet,
    write_strip,
)

PAPER_SIZES = [(256, 256), (192, 320), (320, 192)]


def test_closest_size_is_chosen_by_aspect_and_ties_by_order() -> None:
    cases = {
        (99, 99): (256, 256),
        (240, 320): (192, 320),
        (320, 240): (320, 192),
        (9, 16): (192, 320),
        (9, 11): (256, 256),
    }
    for (height, width), expected in cases.items():
        assert closest_size(height, width, PAPER_SIZES) == expected
    assert closest_size(100, 100, [(192, 320), (320, 192)]) == (192, 320)
    assert closest_size(100, 100, [(320, 192), (192, 320)]) == (320, 192)
    with pytest.raises(InputError, match="no sizes"):
        closest_size(1, 1, [])


def test_parse_size() -> None:
    assert parse_size("192x320") == (192, 320)
    for text in ("192", "192x", "0x8", "ax8", "8x8x8"):
        with pytest.raises(InputError, match="HEIGHTxWIDTH"):
            parse_size(text)
    assert parse_size("8192x8192") == (8192, 8192)
    with pytest.raises(InputError, match="'65536x65536' has more than 67108864 pixels: give a smaller one"):
        parse_size("65536x65536")


@pytest.mark.parametrize(("height", "width"), [(40, 100), (100, 40), (17, 33), (64, 64), (16, 24)])
def test_crop_is_the_scaled_centre(height: int, width: int) -> None:
    # The gray level rises by 2 per pixel to the right, so a column's level shows where it comes from.
    pixels = (torch.arange(width) * 2).to(torch.uint8).expand(2, 3, height, width).contiguous()
    result = resize_and_crop(pixels, (16, 24))
    assert result.shape == (2, 3, 16, 24)
    scale = max(16 / height, 24 / width)
    columns = result[0, 0, 8].float()
    assert columns.mean().item() == pytest.approx(width - 1, abs=2 / scale)  # the crop is centred
    slopes = (columns[20] - columns[3]) / 17
    assert slopes.item() == pytest.approx(2 / scale, rel=0.1)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(40, 1000, (64, 64)), (40, 1001, (64, 64)), (300, 7, (96, 160)), (900, 61, (48, 64)), (1, 99, (16, 16))],
)
def test_extreme_aspect_ratios_are_scaled_as_others(
    monkeypatch: pytest.MonkeyPatch, height: int, width: int, size: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 3, max(1, height // 4), max(1, width // 4), generator=generator)
    pixels = torch.nn.functional.interpolate(255 * coarse, (height, width), mode="bilinear").byte()
    region = resize_and_crop(pixels, size).int()
    monkeypatch.setattr("gpdit_lightning.media.images.MAX_EXCESS", 1e9)
    difference = (region - resize_and_crop(pixels, size).int()).abs()
    assert difference.max() <= 2
    assert difference.float().mean() < 0.3


def test_memory_of_scaling_is_bounded_by_input_and_result() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for height, width in ((1, 60000), (60000, 1), (2, 30000)):
        result = resize_and_crop(torch.full((1, 3, height, width), 77, dtype=torch.uint8), (256, 256))
        assert (result == 77).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB; the scaled image has 11 GB


def test_downscaling_is_antialiased() -> None:
    stripes = (torch.arange(64) % 2 * 255).to(torch.uint8).expand(1, 3, 64, 64).contiguous()
    assert resize_and_crop(stripes, (16, 16))[..., 4:12].float().sub(127.5).abs().max() < 20


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:10, :10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    image = read_image(tmp_path / "a.png")
    assert image.shape == (1, 3, 30, 20)
    assert image[0, 0, 0, -1] == 255
    assert image[0, 0, 0, 0] == 0


def test_grayscale_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 77).save(tmp_path / "gray.png")
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "gray.png")[0, :, 0, 0].tolist() == [77, 77, 77]
    assert read_image(tmp_path / "clear.png")[0, :, 0, 0].tolist() == [255, 255, 255]


def test_16_bit_grayscale_is_scaled_and_32_bit_refused(tmp_path: Path) -> None:
    """In PNG and TIFF, in both byte orders, with EXIF rotation, and with a transparent gray level."""
    levels = np.array([[0, 257, 1000, 32768], [40000, 65278, 65407, 65535]], np.uint16)
    expected = np.rint(levels / 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, order, options in (
        ("a.png", "<", {}),
        ("a.tif", "<", {}),
        ("big.tif", ">", {}),
        ("turned.png", "<", {"exif": exif}),
        ("turned.tif", "<", {"exif": exif, "compression": "tiff_lzw"}),
    ):
        mode = "I;16B" if order == ">" else "I;16"
        Image.frombytes(mode, (4, 2), levels.astype(f"{order}u2").tobytes()).save(tmp_path / name, **options)
        rotated = np.rot90(expected, -1) if options else expected
        for channel in read_image(tmp_path / name)[0]:
            assert np.array_equal(channel, rotated)
    Image.fromarray(np.arange(256, dtype=np.uint16)[None] * 257).save(tmp_path / "wide.png", transparency=5 * 257)
    exact = np.arange(256)
    exact[5] = 255
    assert np.array_equal(read_image(tmp_path / "wide.png")[0, 2, 0], exact)
    for kind in (np.int32, np.float32):
        Image.fromarray(levels.astype(kind)).save(tmp_path / "deep.tif")
        with pytest.raises(InputError, match=r"deep\.tif is 32-bit grayscale.*: convert it to 8 or 16 bits"):
            read_image(tmp_path / "deep.tif")


@pytest.mark.filterwarnings("error")
def test_too_large_image_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (8, 6), 77).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    assert (read_image(tmp_path / "a.png") == 77).all()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(InputError, match=r"a\.png is too large to read safely \(Image size .*\): scale it down"):
        read_image(tmp_path / "a.png")


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:900])
    (tmp_path / "text.jpg").write_text("not an image")
    Image.new("L", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "eps.jpg")  # for which Pillow would run Ghostscript
    for name, reason in (("cut.png", ""), ("text.jpg", "unknown format"), ("absent.png", ""), ("eps.jpg", "unknown f")):
        with pytest.raises(InputError, match=rf"{name} is not a readable image \({reason}"):
            read_image(tmp_path / name)


def test_image_is_read_from_an_open_file(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((24, 16), 50).save(tmp_path / "a.jpg", exif=exif)
    content = (tmp_path / "a.jpg").read_bytes()
    assert torch.equal(read_image(io.BytesIO(content)), read_image(tmp_path / "a.jpg"))
    with pytest.raises(InputError, match=r"^a\.jpg of b\.tar is not a readable image \(.*truncated.*\): replace"):
        read_image(io.BytesIO(content[:-50]), "a.jpg of b.tar")
    with pytest.raises(InputError, match=r"^c\.jpg is not a readable image \(unknown format\): replace"):
        read_image(io.BytesIO(b"text"), "c.jpg")


def test_first_of_several_images_is_read_and_the_others_are_remarked(tmp_path: Path) -> None:
    pages = [Image.new("RGB", (8, 8), colour) for colour in ((200, 30, 30), (30, 200, 30), (30, 30, 200))]
    for name, options in (("a.tif", {}), ("a.png", {}), ("a.webp", {"lossless": True}), ("a.avif", {})):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:], **options)
        remarks: list[str] = []
        assert read_image(tmp_path / name, remarks=remarks)[0, :, 0, 0].tolist() == pytest.approx([200, 30, 30], abs=3)
        assert remarks == [f"{tmp_path / name} contains 3 images, of which the first was used."]
    pages[0].save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=pages[1:])  # a photo with previews
    remarks = []
    assert read_image(tmp_path / "phone.jpg", remarks=remarks)[0, :, 0, 0].tolist() == pytest.approx(
        [200, 30, 30], abs=3
    )
    assert remarks == []


@pytest.mark.parametrize(
    ("name", "start", "kind"),
    [
        ("a.heic", b"\0\0\0\x18ftypheic", "HEIF"),
        ("a.heif", b"\0\0\0\x18ftypmif1", "HEIF"),
        ("photo.jpg", b"\0\0\0\x18ftypheix", "HEIF"),
        ("a.jxl", b"\xff\x0a", "JPEG XL"),
        ("b.jxl", b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    ],
)
def test_formats_that_cannot_be_read_are_named(tmp_path: Path, name: str, start: bytes, kind: str) -> None:
    (tmp_path / name).write_bytes(start + bytes(range(256)))
    message = rf"{name} is not a readable image \({kind} is not supported\): convert it to PNG or JPEG\.$"
    with pytest.raises(InputError, match=message):
        read_image(tmp_path / name)
    with pytest.raises(InputError, match=message):
        read_image(io.BytesIO((tmp_path / name).read_bytes()), f"b.tar/{name}")


def test_strip_shows_every_row_enlarged(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    videos = {
        "context": torch.full((2, 3, 16, 16), 200, dtype=torch.uint8),
        "generated": torch.randint(0, 255, (5, 3, 16, 16), generator=generator).to(torch.uint8),
    }
    write_strip(tmp_path / "strip.png", videos)
    with Image.open(tmp_path / "strip.png") as sheet:
        pixels = np.array(sheet)
    assert pixels.shape[0] >= 2 * 96
    assert pixels.shape[1] >= 5 * 96
    # The first row has two frames; the rest of it is white.
    row = pixels[24 + 48]
    assert (row == 200).all(axis=-1).sum() == 2 * 96
    assert (pixels[:, :60] < 100).any()  # the labels
    with pytest.raises(InputError, match="no frames"):
        write_strip(tmp_path / "none.png", {})


def test_strip_of_a_long_video_has_at_most_the_given_columns(tmp_path: Path) -> None:
    write_strip(tmp_path / "strip.png", {"long": torch.zeros(100, 3, 96, 96, dtype=torch.uint8)}, columns=4)
    with Image.open(tmp_path / "strip.png") as sheet:
        assert 4 * 96 < sheet.width < 6 * 96


def test_labels_may_be_any_names_of_files(tmp_path: Path) -> None:
    frames = torch.zeros(1, 3, 96, 96, dtype=torch.uint8)
    write_strip(tmp_path / "odd.png", {"a\nb\udce9": frames})
    write_strip(tmp_path / "shown.png", {r"a\nb\xe9": frames})
    assert (tmp_path / "odd.png").read_bytes() == (tmp_path / "shown.png").read_bytes()


def test_strip_frame_numbers_are_evenly_spaced() -> None:
    assert strip_frame_numbers(100, 4) == [0, 33, 66, 99]
    assert strip_frame_numbers(3, 4) == [0, 1, 2]
    assert strip_frame_numbers(1000, 1) == [0]
    assert strip_frame_numbers(17) == [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16]


def test_strip_of_selected_frames_equals_that_of_the_whole_video(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (50, 3, 96, 96), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    shown = strip_frame_numbers(50, 5)
    whole, kept = {"long": pixels, "short": pixels[:30]}, {"long": pixels[shown], "short": pixels[[0, 12, 24]]}
    write_strip(tmp_path / "whole.png", whole, columns=5, context=13)
    write_strip(tmp_path / "kept.png", kept, columns=2, context=13, frame_numbers=shown)
    assert shown[:3] == [0, 12, 24]
    assert (tmp_path / "kept.png").read_bytes() == (tmp_path / "whole.png").read_bytes()
    with pytest.raises(InputError, match=r"none\.png has a row of 5 frames but 4 frame numbers"):
        write_strip(tmp_path / "none.png", kept, frame_numbers=shown[:4])


def test_border_covers_only_the_edges() -> None:
    pixels = torch.randint(0, 256, (2, 5, 3, 16, 24), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    before = pixels.clone()
    result = with_border(pixels, "orange", border=3)
    assert result.shape == pixels.shape
    assert result.dtype == torch.uint8
    assert torch.equal(pixels, before)
    assert torch.equal(result[..., 3:-3, 3:-3], pixels[..., 3:-3, 3:-3])
    edge = torch.ones(16, 24, dtype=torch.bool)
    edge[3:-3, 3:-3] = False
    assert (result[..., edge] == torch.tensor([255, 165, 0])[:, None]).all()
    assert torch.equal(with_border(pixels, "orange", border=0), pixels)
    assert CONTEXT_COLOUR != GENERATED_COLOUR


def test_colours_of_strips_and_animations(tmp_path: Path) -> None:
    """A GIF has 256 colours per frame: flat areas are exact, others have an error of a few levels and no cast."""
    patches = torch.tensor(((200, 30, 30), (30, 200, 30), (30, 30, 200), (235, 235, 235)), dtype=torch.uint8)
    flat = patches.T.repeat_interleave(24, dim=1)[:, None].expand(3, 96, 96)
    smooth = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = 80 + 80 * torch.nn.functional.interpolate(smooth[None], (96, 96), mode="bilinear")[0]
    frames = torch.stack((flat, smooth.byte()))
    write_animation(tmp_path / "a.gif", {"": frames[None]}, fps=8)
    write_strip(tmp_path / "a.png", {"": frames})
    with Image.open(tmp_path / "a.gif") as animation, Image.open(tmp_path / "a.png") as strip:
        shown = [np.array(animation.convert("RGB"))[48 : 48 + 96, 6 : 6 + 96]]
        animation.seek(1)
        shown.append(np.array(animation.convert("RGB"))[48 : 48 + 96, 6 : 6 + 96])
        sheet = np.array(strip.convert("RGB"))
    assert np.array_equal(shown[0], flat.permute(1, 2, 0))
    error = shown[1].astype(float) - frames[1].permute(1, 2, 0).numpy()
    assert np.abs(error).mean() < 4
    assert np.abs(error.mean(axis=(0, 1))).max() < 0.5
    rows = [row for row in range(len(sheet)) if (sheet[row] == (200, 30, 30)).all(axis=-1).any()]
    assert len(rows) == 96
    for colour in patches:
        assert (sheet[rows[48]] == colour.numpy()).all(axis=-1).sum() == 24


def test_animation_shows_all_frames_and_marks_the_context(tmp_path: Path) -> None:
    left = (torch.arange(2 * 4).view(2, 4, 1, 1, 1) * 10).expand(2, 4, 3, 16, 16).to(torch.uint8)
    right = 200 - left
    write_animation(tmp_path / "a.gif", {"prediction": left, "ground truth": right}, fps=25 / 3, context=2)
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.n_frames == 4  # type: ignore[attr-defined]
        assert animation.info["loop"] == 0  # endless
        for number in range(4):
            animation.seek(number)
            assert animation.info["duration"] == 120
            page = np.array(animation.convert("RGB")).astype(int)
            border, below = page[-3, 100], page[-6 - 48]  # the middle of the lower row
            assert np.abs(below[50] - (4 + number) * 10).max() <= 2
            assert np.abs(below[150] - (200 - (4 + number) * 10)).max() <= 2
            assert np.abs(page[-12 - 96 - 48, 50] - number * 10).max() <= 2
            is_gray = np.ptp(border) < 5
            assert is_gray == (number < 2)
            assert (page[:40] < 100).any()  # the labels
    with pytest.raises(InputError, match="no frames"):
        write_animation(tmp_path / "none.gif", {"prediction": left[:, :0]}, fps=8)


def test_animation_does_not_enlarge_large_frames(tmp_path: Path) -> None:
    clips = torch.zeros(1, 2, 3, 120, 200, dtype=torch.uint8)
    write_animation(tmp_path / "a.gif", {"prediction": clips}, fps=8, context=1)
    with Image.open(tmp_path / "a.gif") as animation:
        assert 200 < animation.width < 220
        assert 120 < animation.height < 200


def test_a_sheet_shows_labels_that_are_not_ascii(tmp_path: Path) -> None:
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    write_sheet(tmp_path / "sheet.png", [""], [(label, [image]) for label in "üéдλ"], min_side=40)
    with Image.open(tmp_path / "sheet.png") as sheet:
        labels = np.asarray(sheet.convert("L"))[24:, : sheet.width - 44]
    assert len({row.tobytes() for row in np.split(labels, 4)}) == 4  # not the same box for a missing letter
