"""Sheets of generated images and videos by class: PNG files with a grid of samples, written page by page."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from gpdit_lightning.generation.outputs import FORMATS
from gpdit_lightning.generation.plans import Clip
from gpdit_lightning.media.images import strip_frame_numbers, write_sheet

COLUMNS = 10  # images in a row of a sheet
CLIP_COLUMNS = 8  # frames in the row of a clip
ROWS = 24  # of a sheet


class ClassSheets:
    """Context manager that writes `sheet.png`, `sheet-2.png`, ... into a folder, each when it is full.

    A row contains up to `COLUMNS` images of one class, or up to `CLIP_COLUMNS` evenly spaced frames of one video.
    Videos that were not completed are left out.

    Args:
        folder: of the sheets.

    Attributes:
        files: the sheets that were written.
    """

    def __init__(self, folder: Path) -> None:
        self.files: list[Path] = []
        self._folder = folder
        self._frames: dict[Clip, list[Tensor]] = {}  # frames to show of the samples that are not complete
        self._counts: dict[Clip, int] = {}  # number of frames of these samples so far
        self._titles: list[str] = []
        self._rows: list[tuple[str, list[Tensor]]] = []
        self._images: list[tuple[Clip, Tensor]] = []  # of the row that is not full yet

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end_row()
        self._end_page()

    def add(self, clip: Clip, pixels: Tensor) -> None:
        """Add the next frames of a sample; its row is made when it has all frames.

        Args:
            clip: the sample. Those of a class follow each other.
            pixels: uint8 (T, 3, H, W), T >= 0.
        """
        shown, first = strip_frame_numbers(clip.frames, CLIP_COLUMNS), self._counts.get(clip, 0)
        kept = self._frames.setdefault(clip, [])
        kept += [pixels[number - first].clone() for number in shown if first <= number < first + len(pixels)]
        self._counts[clip] = first + len(pixels)
        if self._counts[clip] < clip.frames:
            return
        frames = self._frames.pop(clip)
        del self._counts[clip]
        if clip.frames > 1:
            self._titles = [str(number) for number in shown]
            self._append_row(f"{_class_name(clip)} {clip.sample}", frames)
        else:
            self._append_image(clip, frames[0])

    def _append_image(self, clip: Clip, image: Tensor) -> None:
        if self._images and (len(self._images) == COLUMNS or self._images[0][0].context is not clip.context):
            self._end_row()
        self._images.append((clip, image))

    def _end_row(self) -> None:
        if self._images:
            first, last = self._images[0][0], self._images[-1][0]
            numbers = f"{first.sample}" if first is last else f"{first.sample}-{last.sample}"
            self._titles = [""] * COLUMNS
            self._append_row(f"{_class_name(first)} {numbers}", [image for _, image in self._images])
            self._images.clear()

    def _append_row(self, label: str, images: list[Tensor]) -> None:
        self._rows.append((label, images))
        if len(self._rows) == ROWS:
            self._end_page()

    def _end_page(self) -> None:
        if self._rows:
            number = len(self.files) + 1
            path = self._folder / ("sheet.png" if number == 1 else f"sheet-{number}.png")
            write_sheet(path, self._titles[: max(len(images) for _, images in self._rows)], self._rows)
            self.files.append(path)
            self._rows.clear()


def sheets_of(out: Path, clips: Sequence[Clip]) -> ClassSheets | None:
    """Return the sheets of samples of classes in a folder; None for other videos, and for one output file."""
    return None if out.suffix.removeprefix(".") in FORMATS or not clips[0].by_class else ClassSheets(out)


def _class_name(clip: Clip) -> str:
    return clip.context.label or clip.context.name
