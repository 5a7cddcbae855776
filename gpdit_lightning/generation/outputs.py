"""Output files of generated videos, written frame by frame, since a long video does not fit in memory."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, get_args

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.files import atomic_write, check_writable
from gpdit_lightning.generation.plans import Clip
from gpdit_lightning.media.images import (
    CONTEXT_COLOUR,
    GENERATED_COLOUR,
    strip_frame_numbers,
    with_border,
    write_animation,
    write_strip,
)
from gpdit_lightning.media.video_writer import VideoWriter
from gpdit_lightning.options.sample import VideoFormat
from gpdit_lightning.path_kinds import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

FORMATS: tuple[VideoFormat, ...] = get_args(VideoFormat)


def output_formats(out: Path, formats: Sequence[str] | None, clips: Sequence[Clip]) -> Sequence[str]:
    """Return the formats to write: the requested ones, else that of the extension of `out`, else mp4 and png.

    Of samples of classes, which have sheets instead of strips, it is mp4 for videos and png for images.

    Args:
        out: a file for one video, or a folder.
        formats: the requested formats, if any.
        clips: all videos.

    Raises:
        InputError: `out` has the extension of a format that cannot be written, or names one file for several videos.
    """
    extension = out.suffix.removeprefix(".")
    if extension not in FORMATS and out.suffix.lower() in (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS):
        extensions = ", ".join(f".{name}" for name in FORMATS)
        raise InputError(f"--out {out} is not of a format that can be written: give a folder, or one of {extensions}.")
    if extension in FORMATS and len(clips) > 1:
        raise InputError(f"--out {out} is one file, but {len(clips)} videos are requested: give a folder.")
    if extension not in FORMATS and clips[0].by_class:
        return formats or (["png"] if clips[0].frames == 1 else ["mp4"])
    return formats or ([extension] if extension in FORMATS and extension != "mp4" else ["mp4", "png"])


def output_path(out: Path, clip: Clip, *, several: bool) -> Path:
    """Return the path of a video's files without extension.

    Args:
        out: a file for one video, or a folder. In it a sample of a class is CLASS/CLASS-NUMBER, so that `prepare` and
            `evaluate` find its label.
        clip: the video.
        several: whether contexts have several videos, which are named by their seeds.
    """
    if out.suffix.removeprefix(".") in FORMATS:
        return out.with_suffix("")
    name = clip.context.name
    if clip.by_class:
        numbered = f"{name}-{clip.sample:05d}"
        return out / numbered if clip.context.label is None else out / name / numbered
    return out / (f"{name}-seed{clip.seed}" if several else name)


def output_paths(path_without_extension: Path, formats: Sequence[str]) -> dict[str, Path]:
    """Return the path of the file of each format, and check that it can be written; nothing is created.

    Raises:
        InputError: no format, an unknown one, or a file that cannot be written.
    """
    if not formats or not set(formats) <= set(FORMATS):
        raise InputError(f"the formats are {', '.join(formats) or 'none'}: choose from {', '.join(FORMATS)}.")
    paths = {name: path_without_extension.with_name(f"{path_without_extension.name}.{name}") for name in formats}
    for path in paths.values():
        check_writable(path)
    return paths


class VideoOutput:
    """Context manager that writes one generated video, in one or more formats.

        with VideoOutput(Path("samples/cat"), ["mp4", "png"], clip, temporal_factor=4) as output:
            for pixels in pieces:
                output.write(pixels)

    When the block ends without an exception, the files contain the context and all frames that were written; without
    any frames there are no files. After an exception, existing files are unchanged.

    Args:
        path_without_extension: common path of the files; missing folders are created.
        formats: some of `FORMATS`. A GIF keeps all frames in memory, a strip only those that it shows.
        clip: its context precedes the generated frames in the files; frames after its number of them are dropped. Of
            one frame of a class, the png is the image itself.
        temporal_factor: pixel frames of each latent frame after the first.
        mark: draw a border over the edges of the mp4's frames, gray for the context and orange for generated frames.
        side_by_side: show the ground truth to the right of the frames, black where it is unknown.

    Attributes:
        paths: the file of each format.
        files: the files, after the block has ended.
        frames_written: number of generated frames so far.

    Raises:
        InputError: as `output_paths`.
    """

    def __init__(
        self,
        path_without_extension: Path,
        formats: Sequence[str],
        clip: Clip,
        *,
        temporal_factor: int,
        mark: bool = False,
        side_by_side: bool = False,
    ) -> None:
        self.files: list[Path] = []
        self.frames_written = 0
        self.paths = output_paths(path_without_extension, formats)
        context = clip.context
        self._context, self._max_frames, self._temporal_factor = context, clip.frames, temporal_factor
        self._is_image = clip.by_class and clip.frames == 1
        self._mark, self._side_by_side = mark, side_by_side
        self._source = torch.cat((context.pixels, context.ground_truth))
        self._strip_numbers = strip_frame_numbers(len(context.pixels) + clip.frames)
        self._kept: dict[int, Tensor] = {}  # frame number -> frame, for the strip or GIF
        self._latents = [] if context.latents is None else [context.latents]
        self._video: VideoWriter | None = None

    def __enter__(self) -> Self:
        self._block = self._writing()
        self._block.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return self._block.__exit__(kind, error, traceback)

    def write(self, pixels: Tensor, latents: Tensor | None = None) -> None:
        """Append generated frames.

        Args:
            pixels: uint8 (T, 3, H, W), T >= 0.
            latents: raw (k, C, h, w), needed for a safetensors file: the latents of `pixels`. In the first call they
                are preceded by those of the context if `context.latents` is None.

        Raises:
            InputError: missing latents, or as `VideoWriter.write`.
        """
        surplus = max(0, self.frames_written + len(pixels) - self._max_frames)
        if "safetensors" in self.paths:
            if latents is None:
                raise InputError(f"{self.paths['safetensors']} stores latents: give those of the frames.")
            kept = len(latents) - surplus // self._temporal_factor
            self._latents.append(latents[:kept].to("cpu", torch.float32, copy=True))
        pixels = pixels[: len(pixels) - surplus].cpu()
        self._append(pixels, self._total, GENERATED_COLOUR)
        self.frames_written += len(pixels)

    @property
    def _total(self) -> int:
        return len(self._context.pixels) + self.frames_written

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Write the mp4 during the block and the other files at its end."""
        with ExitStack() as self._open:
            self._append(self._context.pixels, 0, CONTEXT_COLOUR)
            yield
        if self._video:
            self.files.append(self.paths["mp4"])
        for name, write, content in (
            ("gif", self._write_gif, self._kept),
            ("png", self._write_strip, self._kept),
            ("safetensors", self._write_latents, self._latents),
        ):
            if self._total and content and name in self.paths:
                write(self.paths[name])
                self.files.append(self.paths[name])

    def _append(self, pixels: Tensor, first: int, colour: str) -> None:
        """Append the frames from number `first` on to the mp4, and keep those that the strip or GIF will show."""
        for number, frame in enumerate(pixels, start=first):
            if "gif" in self.paths or ("png" in self.paths and number in self._strip_numbers):
                self._kept[number] = frame.clone()  # a view would keep all of `pixels` in memory
        if "mp4" not in self.paths or len(pixels) == 0:
            return
        if self._video is None:
            self._video = self._open.enter_context(VideoWriter(self.paths["mp4"], self._context.fps))
        self._video.write(self._decorated(pixels, self._source[first : first + len(pixels)], colour))

    def _decorated(self, pixels: Tensor, source: Tensor, colour: str) -> Tensor:
        """Add the border and the frames of the source to frames of the mp4, if requested."""
        if self._mark:
            pixels, source = with_border(pixels, colour), with_border(source, CONTEXT_COLOUR)
        if not self._side_by_side:
            return pixels
        missing = len(pixels) - len(source)
        return torch.cat((pixels, F.pad(source, (0, 0, 0, 0, 0, 0, 0, missing))), dim=-1)

    def _write_gif(self, path: Path) -> None:
        columns = {"generated": torch.stack([self._kept[number] for number in range(self._total)])[None]}
        if 0 < self.frames_written <= len(self._context.ground_truth):
            columns["ground truth"] = self._source[None, : self._total]
        write_animation(path, columns, float(self._context.fps), context=len(self._context.pixels))

    def _write_strip(self, path: Path) -> None:
        if self._is_image:
            with atomic_write(path) as temporary:
                Image.fromarray(self._kept[0].permute(1, 2, 0).numpy()).save(temporary, format="PNG")
            return
        numbers = [number for number in self._strip_numbers if number < self._total]
        rows = {"generated": torch.stack([self._kept[number] for number in numbers])}
        if len(self._context.ground_truth):
            rows["ground truth"] = self._source[[number for number in numbers if number < len(self._source)]]
        write_strip(path, rows, context=len(self._context.pixels), frame_numbers=numbers)

    def _write_latents(self, path: Path) -> None:
        metadata = {"fps": str(self._context.fps), "context_frames": str(len(self._context.pixels))}
        with atomic_write(path) as temporary:
            temporary.write_bytes(save({"latents": torch.cat(self._latents)}, metadata))
