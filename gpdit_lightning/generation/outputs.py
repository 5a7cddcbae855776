"""What becomes of generated frames: files that are written as they come, since a long video fits in no memory."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, get_args

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from gpdit_lightning.codecs import WanCodec
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import atomic_write, check_writable
from gpdit_lightning.generation.contexts import VideoContext
from gpdit_lightning.media.images import (
    CONTEXT_COLOUR,
    GENERATED_COLOUR,
    strip_frame_numbers,
    with_border,
    write_animation,
    write_strip,
)
from gpdit_lightning.media.video import VideoWriter
from gpdit_lightning.options.sample import VideoFormat

FORMATS: tuple[VideoFormat, ...] = get_args(VideoFormat)


def check_formats(formats: Sequence[str]) -> None:
    """Raise `InputError` for a format that `Output` does not know, or none at all."""
    if not formats or not set(formats) <= set(FORMATS):
        raise InputError(f"The formats are {', '.join(formats) or 'none'}: choose from {', '.join(FORMATS)}.")


def output_paths(path_without_ending: Path, formats: Sequence[str]) -> dict[str, Path]:
    """The file of each format, NAME.mp4 and so on; nothing is made.

    Raises:
        InputError: an unknown format, or a place where no file can be written.
    """
    check_formats(formats)
    paths = {name: path_without_ending.with_name(f"{path_without_ending.name}.{name}") for name in formats}
    for path in paths.values():
        check_writable(path)
    return paths


class Output:
    """One clip's files, each whole or not at all.

        with Output(Path("samples/cat"), ["mp4", "png"], context, frames=400) as output:
            for pixels in pieces:
                output.write(pixels)

    A block that ends well leaves files of the context and of whatever frames came, and none where there is neither. One
    that raises leaves no new file.

    Args:
        path_without_ending: the files' common name; folders above it are made.
        formats: some of `FORMATS`. A GIF keeps all frames in memory, a strip those that it shows, latents are small.
        context: what is continued.
        frames: how many are generated at most; more are cut off.
        mark: paint a border over the edges of the mp4's frames: grey if they were given, orange if generated.
        side_by_side: show the truth to their right; black where none is known.
        temporal_factor: pixel frames of each latent frame after the first, of the codec whose latents are written.

    Attributes:
        files: what was written; there when the block has ended.
        written: generated frames so far.

    Raises:
        InputError: as `output_paths`.
    """

    def __init__(
        self,
        path_without_ending: Path,
        formats: Sequence[str],
        context: VideoContext,
        frames: int,
        mark: bool = False,
        side_by_side: bool = False,
        temporal_factor: int = WanCodec.temporal_factor,
    ) -> None:
        self._temporal_factor = temporal_factor
        self.files: list[Path] = []
        self.written = 0
        self._paths = output_paths(path_without_ending, formats)
        self._context, self._frames, self._mark, self._side_by_side = context, frames, mark, side_by_side
        self._given = torch.cat((context.pixels, context.ground_truth))
        self._moments = strip_frame_numbers(len(context.pixels) + frames)
        self._kept: dict[int, Tensor] = {}  # what a strip or GIF will show, by its number in the video
        self._latents = [] if context.latents is None else [context.latents]
        self._video: VideoWriter | None = None

    def __enter__(self) -> Self:
        self._block = self._written()
        self._block.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return self._block.__exit__(kind, error, traceback)

    def write(self, pixels: Tensor, latents: Tensor | None = None) -> None:
        """Add the next generated frames.

        Args:
            pixels: uint8 (T, 3, H, W), T >= 0.
            latents: raw (k, C, h, w), for a safetensors file: those that the pixels are of, behind the context's where
                `context.latents` is None and this is the first call.

        Raises:
            InputError: no latents where they are to be written, or as `VideoWriter.write`.
        """
        surplus = max(0, self.written + len(pixels) - self._frames)
        if "safetensors" in self._paths:
            if latents is None:
                raise InputError(f"{self._paths['safetensors']} holds latents: give those of the frames.")
            kept = len(latents) - surplus // self._temporal_factor
            self._latents.append(latents[:kept].to("cpu", torch.float32, copy=True))
        pixels = pixels[: len(pixels) - surplus].cpu()
        self._add(pixels, len(self._context.pixels) + self.written, GENERATED_COLOUR)
        self.written += len(pixels)

    @property
    def _total(self) -> int:
        return len(self._context.pixels) + self.written

    @contextmanager
    def _written(self) -> Iterator[None]:
        """The files during the block; all but the mp4 are written at its end."""
        with ExitStack() as self._open:
            self._add(self._context.pixels, 0, CONTEXT_COLOUR)
            yield
        if self._video:
            self.files.append(self._paths["mp4"])
        for name, write, content in (
            ("gif", self._write_gif, self._kept),
            ("png", self._write_strip, self._kept),
            ("safetensors", self._write_latents, self._latents),
        ):
            if self._total and content and name in self._paths:
                write(self._paths[name])
                self.files.append(self._paths[name])

    def _add(self, pixels: Tensor, first: int, colour: str) -> None:
        """The next frames of the video, from number `first` on."""
        for number, frame in enumerate(pixels, start=first):
            if "gif" in self._paths or ("png" in self._paths and number in self._moments):
                self._kept[number] = frame.clone()  # a view would keep the frames beside it
        if "mp4" not in self._paths or len(pixels) == 0:
            return
        if self._video is None:
            self._video = self._open.enter_context(VideoWriter(self._paths["mp4"], self._context.fps))
        self._video.write(self._shown(pixels, self._given[first : first + len(pixels)], colour))

    def _shown(self, pixels: Tensor, given: Tensor, colour: str) -> Tensor:
        """Frames as the mp4 shows them."""
        if self._mark:
            pixels, given = with_border(pixels, colour), with_border(given, CONTEXT_COLOUR)
        if not self._side_by_side:
            return pixels
        black = (0,) * 7 + (len(pixels) - len(given),)
        return torch.cat((pixels, F.pad(given, black)), dim=-1)

    def _write_gif(self, path: Path) -> None:
        columns = {"generated": torch.stack([self._kept[number] for number in range(self._total)])[None]}
        if 0 < self.written <= len(self._context.ground_truth):
            columns["truth"] = self._given[None, : self._total]
        write_animation(path, columns, float(self._context.fps), context=len(self._context.pixels))

    def _write_strip(self, path: Path) -> None:
        moments = [moment for moment in self._moments if moment < self._total]
        rows = {"generated": torch.stack([self._kept[moment] for moment in moments])}
        if len(self._context.ground_truth):
            rows["truth"] = self._given[[moment for moment in moments if moment < len(self._given)]]
        write_strip(path, rows, context=len(self._context.pixels), frame_numbers=moments)

    def _write_latents(self, path: Path) -> None:
        notes = {"fps": str(self._context.fps), "context_frames": str(len(self._context.pixels))}
        with atomic_write(path) as temporary:
            temporary.write_bytes(save({"latents": torch.cat(self._latents)}, notes))
