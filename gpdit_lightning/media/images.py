"""Images: reading, scaling and cropping, borders, strips, sheets and GIFs."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.files import atomic_write
from gpdit_lightning.media.image_colours import to_srgb
from gpdit_lightning.media.image_headers import check_image_file
from gpdit_lightning.names import number_in, printable
from gpdit_lightning.regular_files import BoundedReader
from gpdit_lightning.retries import retried, transient_error
from gpdit_lightning.specs import MAX_FRAME_PIXELS

# The formats that are read, whatever the file's extension. Pillow reads more, but runs Ghostscript for EPS files.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "TIFF", "GIF")

# Border colours of context frames and of generated frames.
CONTEXT_COLOUR, GENERATED_COLOUR = "silver", "orange"

MIN_SIDE = 96  # pixels of the shorter side of an image on a sheet or in an animation
MAX_EXCESS = 8  # scaled pixels per pixel of the cropped result, above which only the region of the result is scaled

Size = tuple[int, int]


@retried
def read_image(file: str | Path | BinaryIO, name: str | None = None, remarks: list[str] | None = None) -> Tensor:
    """Read an image as uint8 (1, 3, H, W) in sRGB, rotated by its EXIF orientation, with transparent areas in white.

    Colours are converted by the file's ICC profile (:func:`to_srgb`). 16-bit grayscale is scaled to 8 bits, 65535 to
    255. Of an animation or a file with several pages, the first image is read.

    Args:
        file: a path or an open binary file.
        name: the image's name in errors, for an open file.
        remarks: gets a sentence if the file contains more images than the one that is read.

    Raises:
        InputError: the file is missing, not an image, damaged, 32-bit grayscale, or too large for Pillow.
        TransientError: three attempts to read it failed for a reason other than its content.
    """
    name = name or str(file)
    try:
        pixels = _read_pixels(file, name, remarks)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        reason = str(error).partition(",")[0]
        raise InputError(f"{name} is too large to read safely ({reason}): scale it down.") from None
    except Exception as error:  # damaged files raise OSError, ValueError, SyntaxError, TypeError or struct.error
        reason, cure = str(error), "replace or remove it"
        if isinstance(error, UnidentifiedImageError):
            unsupported = _unsupported_format(file)
            reason = f"{unsupported} is not supported" if unsupported else "unknown format"
            cure = "convert it to PNG or JPEG" if unsupported else cure
        damaged = InputError(f"{name} is not a readable image ({reason}): {cure}.")
        raise transient_error(error, name) or damaged from None
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


def _read_pixels(file: str | Path | BinaryIO, name: str, remarks: list[str] | None) -> np.ndarray:
    """Return an image as uint8 (H, W, 3); arguments as for `read_image`, errors are those of Pillow."""
    check_image_file(file, name)
    with (
        # Pillow warns about large images, and raises an error from twice that size on.
        warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
        Image.open(file, formats=IMAGE_FORMATS) as image,
    ):
        frames = getattr(image, "n_frames", 1)
        if remarks is not None and frames > 1 and image.format != "MPO":  # which adds previews to a photo
            remarks.append(f"{name} contains {frames} images, of which the first was used.")
        return image_pixels(image, name)


def image_pixels(image: Image.Image, name: str) -> np.ndarray:
    """Return an image of Pillow as uint8 (H, W, 3) in sRGB, as `read_image` does.

    Args:
        image: the image, which is rotated in place by its EXIF orientation.
        name: its name in errors.

    Raises:
        InputError: the image is 32-bit grayscale.
    """
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("I", "F"):
        raise InputError(
            f"{name} is 32-bit grayscale, whose black and white levels are not defined: convert it to 8 or 16 "
            "bits, with black at 0 and white at the maximum."
        )
    colours = to_srgb(image)
    return np.array(on_white(colours) if colours.mode == "RGBA" else colours)


def _unsupported_format(file: str | Path | BinaryIO) -> str | None:
    """Return the name of a common image format that Pillow cannot read, by the first bytes of a file."""
    if isinstance(file, (str, Path)):
        with BoundedReader(Path(file)) as opened:
            return _unsupported_format(opened)
    file.seek(0)
    start = file.read(12)
    if start[4:12] in (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1"):
        return "HEIF"
    return "JPEG XL" if start.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")) else None


def on_white(image: Image.Image) -> Image.Image:
    """Return an RGBA image over a white background, as RGB."""
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def resize_and_crop(pixels: Tensor, size: Size, pixel_aspect: float = 1.0) -> Tensor:
    """Scale frames to cover `size`, keeping their aspect ratio, and crop the centre (GPDiT, section 5.1).

    Memory is bounded by the input and the result, whatever the aspect ratios.

    Args:
        pixels: uint8 (T, 3, H, W).
        size: height and width of the result.
        pixel_aspect: width over height of a pixel of `pixels`; the pixels of the result are square.

    Returns:
        uint8 (T, 3, height, width).
    """
    height, width = pixels.shape[-2:]
    shown_width = width * pixel_aspect
    scale = max(size[0] / height, size[1] / shown_width)
    scaled = max(size[0], round(height * scale)), max(size[1], round(shown_width * scale))
    top, left = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    if scaled[0] * scaled[1] > MAX_EXCESS * size[0] * size[1]:  # 1x60000 pixels would become 256x15,360,000
        steps = width / scaled[1], height / scaled[0]
        box = left * steps[0], top * steps[1], (left + size[1]) * steps[0], (top + size[0]) * steps[1]
        return _resize_region(pixels, box, size)
    if scaled != (height, width):
        pixels = F.interpolate(pixels, scaled, mode="bicubic", antialias=True, align_corners=False)
    return pixels[..., top : top + size[0], left : left + size[1]].contiguous()


def adm_resize_and_crop(pixels: Tensor, size: Size) -> Tensor:
    """Scale an image to cover `size` and crop the centre, as ADM's `center_crop_arr` does with Pillow.

    The image is halved by box averages while both sides are at least twice the size, then scaled by bicubic
    interpolation. Where that takes too much memory (extreme aspect ratios), the result is that of `resize_and_crop`.

    Args:
        pixels: uint8 (1, 3, H, W).
        size: height and width of the result; ADM's are equal.

    Returns:
        uint8 (1, 3, height, width).
    """
    height, width = size
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    scaled = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if scaled[0] * scaled[1] > MAX_EXCESS * height * width:
        return resize_and_crop(pixels, size)
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    cropped = np.array(image.crop((left, top, left + width, top + height)))
    return torch.from_numpy(cropped).permute(2, 0, 1)[None].contiguous()


def _resize_region(pixels: Tensor, box: tuple[float, float, float, float], size: Size) -> Tensor:
    """Scale a region of frames with Pillow's bicubic filter, which needs no memory for the rest of the scaled frames.

    Args:
        pixels: uint8 (T, 3, H, W).
        box: left, top, right and bottom of the region, in pixels.
        size: height and width of the result.
    """
    images = [Image.fromarray(frame.permute(1, 2, 0).cpu().numpy()) for frame in pixels]
    regions = [np.array(image.resize(size[::-1], Image.Resampling.BICUBIC, box)) for image in images]
    return torch.from_numpy(np.stack(regions)).permute(0, 3, 1, 2).contiguous().to(pixels.device)


def closest_size(height: int, width: int, sizes: Sequence[Size]) -> Size:
    """Return the size whose aspect ratio is closest to height / width; the first of equally close ones.

    Raises:
        InputError: `sizes` is empty.
    """
    if not sizes:
        raise InputError("no sizes are configured: give at least one, such as 256x256.")
    return min(sizes, key=lambda size: abs(math.log(height / width) - math.log(size[0] / size[1])))


def parse_size(text: str) -> Size:
    """Parse HEIGHTxWIDTH, such as "192x320".

    Raises:
        InputError: the text has another form, or more pixels than a frame of a video may have.
    """
    sides = [number_in(part) for part in text.lower().split("x")]
    if len(sides) != 2 or not sides[0] or not sides[1]:
        raise InputError(f"the size {text!r} is not HEIGHTxWIDTH in pixels: write it like 192x320.")
    if sides[0] * sides[1] > MAX_FRAME_PIXELS:
        raise InputError(f"the size {text!r} has more than {MAX_FRAME_PIXELS} pixels: give a smaller one.")
    return sides[0], sides[1]


def with_border(pixels: Tensor, colour: str, border: int = 4) -> Tensor:
    """Return a copy of frames with a border drawn over their outermost pixels.

    Args:
        pixels: uint8 (..., 3, H, W).
        colour: a colour name of Pillow.
        border: width of the border in pixels.

    Returns:
        uint8 (..., 3, H, W).
    """
    result = pixels.new_tensor(ImageColor.getrgb(colour)).view(3, 1, 1).expand_as(pixels).clone()
    height, width = pixels.shape[-2:]
    inside = ..., slice(border, height - border), slice(border, width - border)
    result[inside] = pixels[inside]
    return result


def strip_frame_numbers(frames: int, columns: int = 16) -> list[int]:
    """Return the numbers of at most `columns` of `frames` frames, evenly spaced from the first to the last."""
    return sorted({round(position) for position in np.linspace(0, frames - 1, min(columns, frames))})


def write_strip(
    path: str | Path,
    rows: Mapping[str, Tensor],
    columns: int = 16,
    min_side: int = MIN_SIDE,
    context: int = 0,
    frame_numbers: Sequence[int] | None = None,
) -> None:
    """Write a PNG with one labelled row of frames per video.

    Args:
        path: the file.
        rows: label -> uint8 (T, 3, H, W); T may differ between rows. A column shows the same frame number in all rows.
        columns: maximum number of frames shown, chosen by `strip_frame_numbers` from the longest video.
        min_side: smaller frames are enlarged until their shorter side has this many pixels.
        context: number of context frames at the beginning of the videos; their columns are titled "context".
        frame_numbers: the numbers of the frames if `rows` hold only the frames to show; all of them are then shown.

    Raises:
        InputError: no rows, a row without frames, or a row with more frames than `frame_numbers`.
    """
    if not rows or any(len(frames) == 0 for frames in rows.values()):
        raise InputError(f"there are no frames to write to {path}: give every row at least one.")
    longest = max(len(frames) for frames in rows.values())
    if frame_numbers is None:
        frame_numbers = strip_frame_numbers(longest, columns)
        rows = {label: frames[[n for n in frame_numbers if n < len(frames)]] for label, frames in rows.items()}
    elif len(frame_numbers) < longest:
        raise InputError(
            f"{path} has a row of {longest} frames but {len(frame_numbers)} frame numbers: give one per frame."
        )
    titles = [f"context {number}" if number < context else str(number) for number in frame_numbers]
    context_columns = sum(number < context for number in frame_numbers)
    write_sheet(path, titles, [(label, list(frames)) for label, frames in rows.items()], min_side, context_columns)


def write_sheet(
    path: str | Path,
    titles: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Tensor]]],
    min_side: int = MIN_SIDE,
    context_columns: int = 0,
) -> None:
    """Write a PNG with a grid of images, each centred in its cell.

    Args:
        path: the file.
        titles: titles of the columns.
        rows: label and images of each row, uint8 (3, H, W) of any size, at most one per column.
        min_side: smaller images are enlarged until their shorter side has this many pixels.
        context_columns: number of columns, from the left, whose titles are gray.
    """
    rows = [(printable(label), images) for label, images in rows]  # labels may be names of files
    sizes = [_cell_size(image, min_side) for _, images in rows for image in images]
    cell_width, cell_height = max(width for width, _ in sizes), max(height for _, height in sizes)
    gap = 4
    font = _font()
    label_width = round(max(font.getlength(label) for label, _ in rows)) + 3 * gap
    head = 24

    sheet_size = label_width + len(titles) * (cell_width + gap), head + len(rows) * (cell_height + gap)
    sheet = Image.new("RGB", sheet_size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        middle = label_width + column * (cell_width + gap) + cell_width / 2
        draw.text((middle, head / 2), title, "gray" if column < context_columns else "black", font, anchor="mm")
    for row, (label, images) in enumerate(rows):
        top = head + row * (cell_height + gap)
        draw.text((gap, top + cell_height / 2), label, "black", font, anchor="lm")
        for column, image in enumerate(images):
            width, height = _cell_size(image, min_side)
            left = label_width + column * (cell_width + gap) + (cell_width - width) // 2
            sheet.paste(_enlarged(image, (width, height)), (left, top + (cell_height - height) // 2))
    with atomic_write(Path(path)) as temporary:
        sheet.save(temporary, format="PNG")


def write_animation(
    path: str | Path, columns: Mapping[str, Tensor], fps: float, min_side: int = MIN_SIDE, context: int = 0
) -> None:
    """Write an endless GIF with one labelled column per version of the same clips.

    Args:
        path: the file.
        columns: label -> uint8 (B, T, 3, H, W), all of one shape; the clips of a column are stacked vertically.
        fps: frames per second, at most 50, as viewers show no more. A GIF stores durations in hundredths of a second.
        min_side: smaller frames are enlarged until their shorter side has this many pixels.
        context: number of context frames at the beginning; their background is `CONTEXT_COLOUR`, that of the others
            `GENERATED_COLOUR`.

    Raises:
        InputError: no columns, or a column without clips or frames.
    """
    pages = animation_pages(path, columns, min_side, context)
    with atomic_write(Path(path)) as temporary:
        pages[0].save(
            temporary, format="GIF", save_all=True, append_images=pages[1:], duration=max(20, round(1000 / fps)), loop=0
        )


def animation_pages(
    path: str | Path, columns: Mapping[str, Tensor], min_side: int = MIN_SIDE, context: int = 0
) -> list[Image.Image]:
    """Return the frames of an animation, one page per frame; arguments and errors as for `write_animation`."""
    if not columns or any(0 in clips.shape for clips in columns.values()):
        raise InputError(f"there are no frames to write to {path}: give every column at least one clip.")
    first = next(iter(columns.values()))
    cell_width, cell_height = _cell_size(first, min_side)
    border, head = 6, 48
    page_size = border + len(columns) * (cell_width + border), head + len(first) * (cell_height + border)
    font = _font()

    pages = []
    for number in range(first.shape[1]):
        title, colour = ("context", CONTEXT_COLOUR) if number < context else ("generated", GENERATED_COLOUR)
        page = Image.new("RGB", page_size, "white")
        draw = ImageDraw.Draw(page)
        draw.rectangle((0, head - border, *page_size), colour)
        draw.text((page.width / 2, head / 4 - border / 2), f"{title} {number}", "black", font, anchor="mm")
        for column, (label, clips) in enumerate(columns.items()):
            left = border + column * (cell_width + border)
            draw.text((left + cell_width / 2, head * 3 / 4 - border), label, "black", font, anchor="mm")
            for row, frames in enumerate(clips):
                frame = _enlarged(frames[number], (cell_width, cell_height))
                page.paste(frame, (left, head + row * (cell_height + border)))
        pages.append(page)
    return pages


def _font() -> ImageFont.FreeTypeFont:
    """Return the font of labels; Pillow's default font has ASCII characters only."""
    import matplotlib  # takes a quarter of a second to import

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size=13)


def _cell_size(frames: Tensor, min_side: int) -> tuple[int, int]:
    """Return the width and height, in this order, at which frames (..., H, W) are shown."""
    height, width = frames.shape[-2:]
    scale = max(1.0, min_side / min(height, width))
    return round(width * scale), round(height * scale)


def _enlarged(frame: Tensor, cell_size: tuple[int, int]) -> Image.Image:
    """Return a frame (3, H, W) as an image of width and height `cell_size`."""
    return Image.fromarray(frame.permute(1, 2, 0).cpu().numpy()).resize(cell_size, Image.Resampling.BICUBIC)
