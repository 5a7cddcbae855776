"""Pictures: reading, covering a size, borders, contact sheets."""

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

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# What a file may hold, whatever its name says. Pillow knows more, and would hand an EPS to Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")

# Of the borders around frames that were given and around those that were generated.
CONTEXT_COLOUR, GENERATED_COLOUR = "silver", "orange"

Size = tuple[int, int]


def read_image(picture: str | Path | BinaryIO, name: str | None = None) -> Tensor:
    """A picture as uint8 (1, 3, H, W), turned upright by its EXIF orientation; transparent parts become white.

    Greys of 16 bits are scaled to 8; 0 stays black, and 65535 white.

    Args:
        picture: a path, or an open file of bytes.
        name: what an error calls the picture; not needed for a path.

    Raises:
        InputError: when the file is missing or is no picture, has greys of 32 bits, or is too large for Pillow.
    """
    name = name or str(picture)
    try:
        with (
            # Of pictures that are large and still read; Pillow refuses those of twice the size itself.
            warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
            Image.open(picture, formats=IMAGE_FORMATS) as image,
        ):
            upright = ImageOps.exif_transpose(image)
            if upright.mode in ("I", "F"):
                raise InputError(
                    f"{name} has greys of 32 bits, of which nobody can tell which is black and which white: convert it "
                    "to 8 or 16 bits, over their whole range."
                )
            if upright.mode.startswith("I;16"):
                upright = _of_eight_bits(upright)
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            pixels = np.array(upright.convert("RGB"))
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        reason = str(error).partition(",")[0]
        raise InputError(f"{name} is too large to be read safely ({reason}): scale it down.") from None
    except (
        Exception
    ) as error:  # damaged files were seen to raise OSError, ValueError, SyntaxError, TypeError, struct.error
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise InputError(f"{name} is no readable picture ({reason}): replace or remove it.") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


def _of_eight_bits(image: Image.Image) -> Image.Image:
    """A picture of 16-bit greys, scaled; exact where 8 bits were widened. Pillow itself would clip them at 255."""
    greys = np.array(image).astype(np.int32)
    scaled = ((greys + 128) // 257).astype(np.uint8)
    scaled[greys == image.info.get("transparency", -1)] = 255  # the one grey that a PNG may declare transparent
    return Image.fromarray(scaled)


def resize_and_crop(pixels: Tensor, size: Size) -> Tensor:
    """Scale frames until they just cover `size`, aspect kept, and cut the centre out (GPDiT, section 5.1).

    Args:
        pixels: uint8 (T, 3, H, W).
        size: height and width wanted.

    Returns:
        uint8 (T, 3, height, width).
    """
    height, width = pixels.shape[-2:]
    scale = max(size[0] / height, size[1] / width)
    scaled = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    if scaled != (height, width):
        pixels = F.interpolate(pixels, scaled, mode="bicubic", antialias=True, align_corners=False)
    top, left = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    return pixels[..., top : top + size[0], left : left + size[1]].contiguous()


def closest_size(height: int, width: int, sizes: Sequence[Size]) -> Size:
    """The size whose aspect ratio is closest to height / width; of equally close ones, the first.

    Raises:
        InputError: when `sizes` is empty.
    """
    if not sizes:
        raise InputError("No sizes are configured: give at least one, such as 256x256.")
    return min(sizes, key=lambda size: abs(math.log(height / width) - math.log(size[0] / size[1])))


def parse_size(text: str) -> Size:
    """ "192x320" as (height 192, width 320).

    Raises:
        InputError: for any other form.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"The size {text!r} is not HEIGHTxWIDTH in pixels: write it like 192x320.")
    return int(parts[0]), int(parts[1])


def with_border(pixels: Tensor, colour: str, border: int = 4) -> Tensor:
    """Frames with a border of one colour over the pixels at their edges, such as `CONTEXT_COLOUR`.

    Args:
        pixels: uint8 (..., 3, H, W).
        colour: any name that Pillow knows.
        border: its width in pixels.

    Returns:
        uint8 (..., 3, H, W), a copy.
    """
    paint = pixels.new_tensor(ImageColor.getrgb(colour)).view(3, 1, 1)
    result = paint.expand_as(pixels).clone()
    height, width = pixels.shape[-2:]
    inside = ..., slice(border, height - border), slice(border, width - border)
    result[inside] = pixels[inside]
    return result


def strip_frame_numbers(frames: int, columns: int = 16) -> list[int]:
    """The numbers of at most `columns` of so many frames, evenly spaced from the first to the last."""
    return sorted({round(moment) for moment in np.linspace(0, frames - 1, min(columns, frames))})


def write_strip(
    path: str | Path,
    rows: Mapping[str, Tensor],
    columns: int = 16,
    least_side: int = 96,
    context: int = 0,
    moments: Sequence[int] | None = None,
) -> None:
    """Write a PNG with one labelled row of frames for each video, for looking at samples side by side.

    Args:
        path: the file.
        rows: label -> uint8 (T, 3, H, W); T may differ, a column is one moment in all rows.
        columns: most frames shown, by the `strip_frame_numbers` of the longest video.
        least_side: smaller frames are enlarged until their shorter side has this many pixels.
        context: the first so many frames were given, not generated; the head says so.
        moments: where only the frames to be shown were kept, their numbers in the video; then all are shown.

    Raises:
        InputError: when there is nothing to show, or a row has more frames than `moments` has numbers.
    """
    if not rows or any(len(frames) == 0 for frames in rows.values()):
        raise InputError(f"There are no frames to write to {path}: give every row at least one.")
    longest = max(len(frames) for frames in rows.values())
    if moments is None:
        moments = strip_frame_numbers(longest, columns)
        rows = {label: frames[[moment for moment in moments if moment < len(frames)]] for label, frames in rows.items()}
    elif len(moments) < longest:
        raise InputError(f"{path} has a row of {longest} frames but {len(moments)} moments: give a number for each.")
    titles = [f"context {moment}" if moment < context else str(moment) for moment in moments]
    given = sum(moment < context for moment in moments)
    write_sheet(path, titles, [(label, list(frames)) for label, frames in rows.items()], least_side, given)


def write_sheet(
    path: str | Path,
    titles: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Tensor]]],
    least_side: int = 96,
    given: int = 0,
) -> None:
    """Write a PNG with pictures in rows and columns, each at the centre of its cell.

    Args:
        path: the file.
        titles: of the columns.
        rows: each a label and its pictures, uint8 (3, H, W) of any size, at most one for each column.
        least_side: smaller pictures are enlarged until their shorter side has this many pixels.
        given: the first so many columns are titled in grey.
    """
    sizes = [_cell_size(picture, least_side) for _, pictures in rows for picture in pictures]
    cell_width, cell_height = max(width for width, _ in sizes), max(height for _, height in sizes)
    gap = 4
    font = ImageFont.load_default(size=14)
    label_width = round(max(font.getlength(label) for label, _ in rows)) + 3 * gap
    head = 24

    sheet_size = label_width + len(titles) * (cell_width + gap), head + len(rows) * (cell_height + gap)
    sheet = Image.new("RGB", sheet_size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        middle = label_width + column * (cell_width + gap) + cell_width / 2
        draw.text((middle, head / 2), title, "gray" if column < given else "black", font, anchor="mm")
    for row, (label, pictures) in enumerate(rows):
        top = head + row * (cell_height + gap)
        draw.text((gap, top + cell_height / 2), label, "black", font, anchor="lm")
        for column, picture in enumerate(pictures):
            width, height = _cell_size(picture, least_side)
            left = label_width + column * (cell_width + gap) + (cell_width - width) // 2
            sheet.paste(_enlarged(picture, (width, height)), (left, top + (cell_height - height) // 2))
    with atomic_write(Path(path)) as temporary:
        sheet.save(temporary, format="PNG")


def write_animation(
    path: str | Path, columns: Mapping[str, Tensor], fps: float, least_side: int = 96, context: int = 0
) -> None:
    """Write a GIF that repeats for ever: one labelled column for each of several versions of the same clips.

    Args:
        path: the file.
        columns: label -> uint8 (B, T, 3, H, W), alike in shape; the clips stand one below the other.
        fps: frames a second; a GIF knows hundredths of a second, and viewers show at most 50.
        least_side: smaller frames are enlarged until their shorter side has this many pixels.
        context: the first so many frames were given, not generated: a grey border, orange afterwards.

    Raises:
        InputError: when there is nothing to show.
    """
    if not columns or any(0 in clips.shape for clips in columns.values()):
        raise InputError(f"There are no frames to write to {path}: give every column at least one clip.")
    first = next(iter(columns.values()))
    cell_width, cell_height = _cell_size(first, least_side)
    border, head = 6, 48
    page_size = border + len(columns) * (cell_width + border), head + len(first) * (cell_height + border)
    font = ImageFont.load_default(size=14)

    pages = []
    for moment in range(first.shape[1]):
        title, colour = ("context", CONTEXT_COLOUR) if moment < context else ("generated", GENERATED_COLOUR)
        page = Image.new("RGB", page_size, "white")
        draw = ImageDraw.Draw(page)
        draw.rectangle((0, head - border, *page_size), colour)
        draw.text((page.width / 2, head / 4 - border / 2), f"{title} {moment}", "black", font, anchor="mm")
        for column, (label, clips) in enumerate(columns.items()):
            left = border + column * (cell_width + border)
            draw.text((left + cell_width / 2, head * 3 / 4 - border), label, "black", font, anchor="mm")
            for row, frames in enumerate(clips):
                frame = _enlarged(frames[moment], (cell_width, cell_height))
                page.paste(frame, (left, head + row * (cell_height + border)))
        pages.append(page)
    with atomic_write(Path(path)) as temporary:
        pages[0].save(
            temporary, format="GIF", save_all=True, append_images=pages[1:], duration=max(20, round(1000 / fps)), loop=0
        )


def _cell_size(frames: Tensor, least_side: int) -> tuple[int, int]:
    """Width and height, in this order, at which frames (..., H, W) are shown."""
    height, width = frames.shape[-2:]
    enlarge = max(1.0, least_side / min(height, width))
    return round(width * enlarge), round(height * enlarge)


def _enlarged(frame: Tensor, cell_size: tuple[int, int]) -> Image.Image:
    """A frame (3, H, W) as a picture of width and height `cell_size`."""
    return Image.fromarray(frame.permute(1, 2, 0).cpu().numpy()).resize(cell_size, Image.Resampling.BICUBIC)
