"""Contexts of generated videos, and the choices with which they are read."""

import logging
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from torch import Tensor

from gpdit_lightning.codecs import Codec
from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import Size
from gpdit_lightning.media.timing import frame_rate
from gpdit_lightning.model.layout import BlockLayout
from gpdit_lightning.names import counted
from gpdit_lightning.specs import FRAME_RATE

log = logging.getLogger(__name__)

DEFAULT_FPS = 24  # of images, which have no frame rate
MAX_NAME_LENGTH = 56  # characters, of up to four bytes each, which leaves room for an extension in a file name
MAX_LABEL_LENGTH = 200  # bytes of a class name in the name of a file, with room for a number and an extension


@dataclass(frozen=True)
class ContextSettings:
    """How contexts are read: stride and sizes of the model's training clips, and the user's choices.

    Attributes:
        frames: pixel frames of a context, T = 1 + temporal_factor k; 0 if the model takes no context.
        may_be_shorter: whether a video with fewer frames gives a shorter context; otherwise it is refused.
        stride: distance between the frames of a video that are used.
        sizes: possible (height, width); each context takes the one closest in aspect ratio.
        ground_truth_frames: maximum number of frames after the context to read as ground truth.
        start: time in seconds, by the time stamps of the video, at which the context begins. None: the context ends at
            the last frame of the video, and there is no ground truth.
        fps: frames per second of images; None for `DEFAULT_FPS`.
        video_fps: frames per second to which videos are resampled in time before the stride counts, as the training
            clips were; None to count the frames as they are stored.
        layout: the blocks of the model, of which a context consists; None: frames.

    Raises:
        InputError: `start` is negative or not finite, or `fps` is not positive and finite.
    """

    frames: int
    stride: int
    sizes: tuple[Size, ...]
    ground_truth_frames: int = 0
    start: float | None = None
    fps: float | None = None
    video_fps: float | None = None
    may_be_shorter: bool = False
    layout: BlockLayout | None = None

    def __post_init__(self) -> None:
        if self.start is not None and not 0 <= self.start < math.inf:
            raise InputError(f"--start is {self.start}: give a time in seconds, at least 0.")
        if self.fps is not None and not FRAME_RATE.accepts(self.fps):
            raise InputError(f"--fps is {self.fps}: give frames per second, from 0.001 to 100,000.")

    def encodable_frames(self, available: int, codec: Codec) -> int:
        """Return the largest number of pixel frames, at most `available`, that a context can have; 0 if there is none.

        They are those of whole blocks of the model.
        """
        latents = codec.latent_frames(codec.encodable_frames(available)) if available else 0
        if self.layout is not None:
            latents = self.layout.context_length(latents)
        return codec.pixel_frames(latents) if latents else 0

    def source_fps(self, recorded: float | None = None) -> Fraction:
        """Return the frames per second of a source before the stride: the recorded rate if there is one, else `fps`."""
        return frame_rate(recorded or self.fps or DEFAULT_FPS)

    def frame_rate(self) -> Fraction:
        """Return the frames per second of a result whose context has no recorded rate."""
        return self.source_fps() / self.stride

    def context_frames(self, available: int, path: Path | str, codec: Codec) -> int:
        """Return the number of pixel frames of the context of a video that has `available` frames at the stride.

        Raises:
            InputError: the video is too short.
        """
        if available >= self.frames:
            return self.frames
        frames = self.encodable_frames(available, codec)
        if not self.may_be_shorter or not frames:
            raise self.too_short_error(path, available, codec)
        log.info(
            "%s has %s at stride %d: its context has %s instead of %d",
            path,
            counted(available, "frame"),
            self.stride,
            counted(frames, "frame"),
            self.frames,
        )
        return frames

    def too_short_error(self, path: Path | str, frames: int, codec: Codec) -> InputError:
        """Return the error for a source with too few frames for a context."""
        earlier = ", an earlier --start" if self.start else ""
        most = self.encodable_frames(frames, codec)
        fewer = f" or at most {most} --context_frames" if most else ""
        return InputError(
            f"{path} has {counted(frames, 'frame')} at stride {self.stride}, but the context needs "
            f"{self.frames}: give a longer video{earlier}{fewer}."
        )

    def check_one_frame(self, path: Path | str, codec: Codec) -> None:
        """Raise InputError if an image, which is one frame, is no whole block of the model."""
        if not self.encodable_frames(1, codec):
            assert self.layout is not None
            raise InputError(
                f"{path} is one frame, but the first block of the model has {self.layout.first_frames} latent frames "
                f"({codec.pixel_frames(self.layout.first_frames)} frames of a video): give a video, or no context."
            )

    def check_no_start(self, path: Path | str) -> None:
        """Raise InputError if a time is chosen in a source that has none."""
        if self.start:
            raise InputError(f"{path} has no frame at {self.start:g} s: give --start for videos only.")


@dataclass(frozen=True)
class VideoContext:
    """The beginning of one video to generate.

    Attributes:
        name: short name that can be used in a file name, unique among the contexts read together.
        pixels: (T, 3, H, W) uint8; T = 0 for a video that is generated from noise alone.
        ground_truth: (at most `ContextSettings.ground_truth_frames`, 3, H, W) uint8, the frames of the source after
            `pixels`.
        fps: frames per second of the result, with the stride taken into account.
        latents: (k, C, h, w) float32, raw, if the source is a shard; `pixels` are decoded from them.
        label: the label that a shard records for its sample.
    """

    name: str
    pixels: Tensor
    ground_truth: Tensor
    fps: Fraction
    latents: Tensor | None = None
    label: str | None = None


def unique_names(contexts: Sequence[VideoContext]) -> list[VideoContext]:
    """Return contexts with unique names: a repeated name gets a number."""
    named: dict[str, VideoContext] = {}
    for context in contexts:
        name, number = context.name, 1
        while name in named:
            number += 1
            name = f"{context.name}-{number}"
        named[name] = replace(context, name=name)
    return list(named.values())


def folder_name(label: str) -> str:
    """Return the name of the folder of a class: its label, unless it cannot be the name of a folder and of files."""
    is_name = label.isprintable() and "/" not in label and not label.startswith(".")
    return label if is_name and len(os.fsencode(label)) <= MAX_LABEL_LENGTH else name_for_files(label)


def name_for_files(text: str) -> str:
    """Replace characters that do not belong in a file name by dashes, and shorten the result."""
    return re.sub(r"[^\w.-]+", "-", text)[:MAX_NAME_LENGTH].strip("-.") or "context"
