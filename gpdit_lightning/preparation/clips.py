"""Reading of one input file as clips: uint8 pixels at the size to encode, with metadata."""

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpdit_lightning.data.shard_entry import Split
from gpdit_lightning.errors import InputError, ResourceError, TransientError
from gpdit_lightning.media.images import (
    Size,
    adm_resize_and_crop,
    closest_size,
    parse_size,
    read_image,
    resize_and_crop,
)
from gpdit_lightning.media.timing import fps_of_clip, frame_rate, uneven_intervals
from gpdit_lightning.media.video import DamagedVideoError, VideoFrame, check_intact, iterate_frames, video_info
from gpdit_lightning.names import counted, number_in
from gpdit_lightning.options.prepare import PrepareOptions
from gpdit_lightning.preparation.input_files import InputFile, annotation_metadata
from gpdit_lightning.preparation.shots import mark_cuts
from gpdit_lightning.preparation.splits import is_held_out
from gpdit_lightning.preparation.tars import TarSample, containing_file, iterate_samples
from gpdit_lightning.retries import retried_iterator, transient_error


class SampleId(NamedTuple):
    """Identity of a sample within a data set."""

    source: str
    """Name of the input file; TAR/KEY for an image in a tar."""
    first_frame: int | None
    """Number of the first frame of a clip; None for an image."""

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any]) -> "SampleId":
        """Return the identity of the sample with these metadata."""
        return cls(metadata["source"], metadata.get("first_frame"))


@dataclass(frozen=True)
class Clip:
    """Pixels of one sample; an image is a clip of one frame."""

    file: int
    """Index of the input file."""
    split: Split
    pixels: Tensor
    """uint8 (T, 3, H, W)."""
    metadata: dict[str, Any]


@dataclass(frozen=True)
class EncodedClip:
    """Placeholder, in the order of the clips, for a clip that is already in a complete shard."""

    file: int
    id: SampleId


@dataclass(frozen=True)
class SkippedInput:
    """An input file, or an image in a tar, that cannot be used."""

    file: int
    name: str
    reason: str
    retry: bool = False
    """Whether the next preparation reads it again, since the reason may pass."""


@dataclass(frozen=True)
class Note:
    """A remark on an input file, or an image in a tar, that is used: a part of it could not be."""

    file: int
    name: str
    reason: str


@dataclass(frozen=True)
class EndOfFile:
    """End of an input file."""

    file: int


Item = Clip | EncodedClip | SkippedInput | Note | EndOfFile


class Frame(NamedTuple):
    """A frame of a video, at the size to encode."""

    number: int
    """Index in the video, from 0."""
    time: float
    """Seconds after the first frame of the video."""
    pixels: Tensor
    """uint8 (3, H, W)."""
    begins_shot: bool


class ClipReader:
    """Reader of input files as clips.

    Args:
        options: options for cutting and scaling.
        temporal_factor: pixel frames per latent frame of the codec, after the first frame.
        encoded: samples that are already in complete shards.
    """

    def __init__(
        self, options: PrepareOptions, temporal_factor: int, encoded: AbstractSet[SampleId] = frozenset()
    ) -> None:
        self.options, self.temporal_factor, self.encoded = options, temporal_factor, encoded

    def items(self, index: int, file: InputFile) -> Iterator[Item]:
        """Yield the clips of a file, then its end. Unusable input is reported by an item, not by an exception.

        Args:
            index: index of the file, stored in the items.
            file: the input file.

        Raises:
            ResourceError: memory, open files or disk space ran out.
            TransientError: samples of the file were yielded, and reading the rest failed for a reason that may pass.
        """
        has_samples = False
        try:
            for item in self._samples(index, file):
                has_samples |= isinstance(item, Clip | EncodedClip)
                yield item
        except TransientError as error:
            if has_samples or isinstance(error, ResourceError):
                raise
            yield SkippedInput(index, file.name, str(error), retry=True)
        except InputError as error:
            yield SkippedInput(index, file.name, str(error))
        yield EndOfFile(index)

    @retried_iterator
    def _samples(self, index: int, file: InputFile) -> Iterator[Item]:
        """Yield the clips of a file; raises nothing but InputError."""
        try:
            if file.format == "video":
                yield from self._clips_of_video(index, file)
            elif file.format == "tar":
                yield from self._images_of_tar(index, file)
            else:
                yield from self._image(index, file)
        except Exception as error:  # for a damaged file a library may raise any exception
            transient = transient_error(error, file.path) or _changed_error(file)
            if transient or isinstance(error, InputError):
                raise transient or error from None
            raise InputError(
                f"{file.path} could not be used ({type(error).__name__}: {error}): replace or remove it."
            ) from None

    def _image(self, index: int, file: InputFile) -> Iterator[Item]:
        assert file.split is not None
        id = SampleId(file.name, None)
        if id in self.encoded:
            yield EncodedClip(index, id)
        else:
            metadata = {"source": file.name} | file.annotation
            remarks: list[str] = []
            yield self._clip_of_image(index, file.split, read_image(file.path, remarks=remarks), metadata)
            for remark in remarks:
                yield Note(index, file.name, remark)

    def _images_of_tar(self, index: int, tar: InputFile) -> Iterator[Item]:
        for sample in iterate_samples(tar.path):
            name = f"{tar.name}/{sample.key}"
            if sample.problem:
                yield (SkippedInput if sample.pixels is None else Note)(index, name, sample.problem)
            if sample.pixels is None:
                continue
            if (id := SampleId(name, None)) in self.encoded:
                yield EncodedClip(index, id)
            else:
                annotation = tar.images.get(sample.key)
                split = tar.split or annotation.split or self._hashed_split(tar, name, sample)
                try:
                    label = annotation.label or self._label_of_tar_sample(tar, sample)
                except InputError as error:
                    yield SkippedInput(index, name, str(error))
                    continue
                metadata = {"source": name} | sample.metadata | annotation_metadata(label, annotation.captions)
                yield self._clip_of_image(index, split, sample.pixels, metadata)

    def _hashed_split(self, tar: InputFile, name: str, sample: TarSample) -> Split:
        hashed = name if tar.hashed == "name" else sample.sha256
        return "validation" if is_held_out(hashed, self.options.validation_fraction) else "train"

    def _label_of_tar_sample(self, tar: InputFile, sample: TarSample) -> str | None:
        """Return the class of an image in a tar, by its `.cls`, else its folder in the tar, else the tar.

        Raises:
            InputError: the index in its `.cls` is none of the classes that the annotations list.
        """
        classes, text = tar.images.labels, sample.class_text
        if text is not None and text.isdecimal() and classes:
            if (number := number_in(text)) is None or number >= len(classes):
                raise InputError(
                    f"the class of {sample.key} in {tar.path} is {text}, but the annotations list {len(classes)} "
                    "classes, from 0: give the list of classes of these tars."
                )
            return classes[number]
        folder = PurePosixPath(sample.key).parent.name if self.options.labels else ""
        return text or folder or tar.label

    def _clip_of_image(self, index: int, split: Split, pixels: Tensor, metadata: dict[str, Any]) -> Clip:
        height, width = pixels.shape[2:]
        size = closest_size(height, width, [parse_size(text) for text in self.options.image_sizes])
        scale = adm_resize_and_crop if self.options.image_scaling == "adm" else resize_and_crop
        return Clip(index, split, scale(pixels, size), metadata | {"pixel_size": list(size)})

    def _clips_of_video(self, index: int, file: InputFile) -> Iterator[Item]:
        assert file.split is not None
        options = self.options
        info = video_info(file.path)
        size = closest_size(info.height, info.width, [parse_size(text) for text in options.video_sizes])
        metadata: dict[str, Any] = {"source": file.name} | file.annotation
        average = info.fps if options.fps is None else frame_rate(options.fps)
        metadata |= {"fps": float(average), "stride": options.stride, "pixel_size": list(size)}
        if options.damaged_videos == "drop":
            check_intact(file.path)
        intact = _IntactFrames(iterate_frames(file.path, stride=self._decoded_stride, fps=options.fps))
        frames = _CountedFrames(self._selected_frames(intact, size))
        clips, uneven = 0, list[tuple[float, float]]()
        for clip in cut_clips(frames, options, self.temporal_factor):
            if len(clip) < options.shortest_clip:
                continue
            id, times = SampleId(file.name, clip[0].number), [frame.time for frame in clip]
            uneven += filter(None, [uneven_intervals(times)])
            if id in self.encoded:
                yield EncodedClip(index, id)
            else:
                pixels = torch.stack([frame.pixels for frame in clip])
                fps = float(fps_of_clip(times, options.stride, average))
                yield Clip(index, file.split, pixels, metadata | {"fps": fps, "first_frame": id.first_frame})
            clips += 1
            if clips == options.clips_per_video:
                break
        if intact.error:
            if not clips:
                raise intact.error
            yield Note(index, file.name, f"{intact.error} The clips before were used ({clips}).")
        if uneven:
            shortest, longest = min(low for low, _ in uneven), max(high for _, high in uneven)
            yield Note(
                index,
                file.name,
                f"{file.path} has uneven intervals between the frames of {len(uneven)} of its {clips} clips "
                f"({shortest:.3g} to {longest:.3g} s), which were used: --fps resamples videos in time.",
            )
        if not clips:
            uncut = " without a cut" if options.avoid_cuts else ""
            raise InputError(
                f"{file.path} has {counted(frames.count, 'frame')} at stride {options.stride} but a clip needs "
                f"{options.shortest_clip}{uncut}: lower --stride or --least_clip_frames."
            )

    @property
    def _decoded_stride(self) -> int:
        return 1 if self.options.avoid_cuts else self.options.stride

    def _selected_frames(self, frames: Iterator[VideoFrame], size: Size) -> Iterator[Frame]:
        """Yield every `stride`-th frame; with `avoid_cuts` the count restarts at the first frame of each shot.

        Args:
            frames: every `_decoded_stride`-th frame of a video.
            size: height and width of the results.
        """
        if not self.options.avoid_cuts:
            for frame in frames:
                yield Frame(frame.number, frame.time, frame.resized(size), False)
            return
        shot_start = 0
        resized = ((frame.pixels, Frame(frame.number, frame.time, frame.resized(size), False)) for frame in frames)
        for item, begins_shot in mark_cuts(resized):
            shot_start = item.number if begins_shot else shot_start
            if (item.number - shot_start) % self.options.stride == 0:
                yield item._replace(begins_shot=begins_shot)


def _changed_error(file: InputFile) -> TransientError | None:
    """Return an error if the size of a file has changed since it was listed, so that it was read while incomplete."""
    try:
        size = (containing_file(file.path) or file.path).stat().st_size
    except OSError:
        return None
    if size == file.bytes:
        return None
    return TransientError(
        f"{file.path} had {file.bytes} bytes when it was listed and has {size} now: run the same command again when "
        "the file is complete."
    )


class _IntactFrames(Iterator[VideoFrame]):
    """Iterator over the frames of a video that ends, without an exception, before the first damaged one.

    Attributes:
        error: the damage; None if there is none so far.
    """

    def __init__(self, frames: Iterator[VideoFrame]) -> None:
        self._frames = frames
        self.error: DamagedVideoError | None = None

    def __next__(self) -> VideoFrame:
        try:
            return next(self._frames)
        except DamagedVideoError as error:
            self.error = error
            raise StopIteration from None


class _CountedFrames(Iterator[Frame]):
    """Iterator over frames that counts them."""

    def __init__(self, frames: Iterator[Frame]) -> None:
        self._frames, self.count = frames, 0

    def __next__(self) -> Frame:
        frame = next(self._frames)
        self.count += 1
        return frame


def cut_clips(frames: Iterator[Frame], options: PrepareOptions, temporal_factor: int) -> Iterator[list[Frame]]:
    """Cut frames into clips of `clip_frames`.

    The last clip of a shot may be shorter, down to one frame: it has 1 + k `temporal_factor` frames. It is omitted if
    all of its frames are in the clip before.

    Args:
        frames: frames of one video, in order.
        options: options with the length of clips and the distance between their starts.
        temporal_factor: pixel frames per latent frame of the codec, after the first frame.
    """
    window: list[Frame] = []
    used = 0  # frames at the start of the window that are already in a clip
    to_drop = 0  # frames between the last clip and the start of the next

    def rest() -> Iterator[list[Frame]]:
        length = len(window) - (len(window) - 1) % temporal_factor
        if length > used:
            yield window[:length]

    for frame in frames:
        if frame.begins_shot:
            yield from rest()
            window, used, to_drop = [], 0, 0
        if to_drop:
            to_drop -= 1
            continue
        window.append(frame)
        if len(window) == options.clip_frames:
            yield window
            window = window[options.frames_between_starts :]
            used = len(window)
            to_drop = max(0, options.frames_between_starts - options.clip_frames)
    yield from rest()
