"""Sources to clips of pixels, by several processes, in an order that depends on none of them."""

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from gpdit_lightning.data.manifest import Split
from gpdit_lightning.data.workers import outlive_signals
from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import closest_size, parse_size, read_image, resize_and_crop
from gpdit_lightning.media.video import iterate_frames, video_info
from gpdit_lightning.preparation.input_files import InputFile, held_out
from gpdit_lightning.preparation.options import LANES, PrepareOptions
from gpdit_lightning.preparation.shots import with_cuts
from gpdit_lightning.preparation.tars import iterate_images

# A decoder with several threads may leave other pictures of a damaged video each time.
DECODER_THREADS = 1

# What tells samples apart: the name of the source, and the first frame of a clip.
Identity = tuple[str, int | None]


@dataclass(frozen=True)
class Clip:
    """Pixels of one sample, ready to be encoded."""

    source: int
    """Place of its source in the list."""
    split: Split
    pixels: Tensor
    """uint8 (T, 3, H, W)."""
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Done:
    """A sample that is in a complete shard already: it keeps its turn, so that the order of the others stays."""

    source: int
    identity: Identity


@dataclass(frozen=True)
class Skipped:
    """A part of a source that cannot be used."""

    source: int
    name: str
    reason: str


@dataclass(frozen=True)
class End:
    """A source is read."""

    source: int


Item = Clip | Done | Skipped | End


def identity_of(metadata: dict[str, Any]) -> Identity:
    """What tells a sample from every other of its data set."""
    return metadata["source"], metadata.get("first_frame")


class Lanes(IterableDataset[Item | None]):
    """The items of many sources, `LANES` sources at a time in turn.

    File i belongs to lane i % LANES. Each turn takes one item from every lane; a lane that has ended gives None while
    others of its process go on. So the order without the Nones is the same for every number of processes that divides
    `LANES`: a loader asks its processes in turn, and each of them holds equally many lanes.

    Args:
        sources: what to read.
        options: how to cut and scale.
        factor: pixel frames of a latent frame after the first.
        done: samples that need no pixels.
    """

    def __init__(
        self,
        sources: Sequence[InputFile],
        options: PrepareOptions,
        factor: int,
        done: AbstractSet[Identity] = frozenset(),
    ) -> None:
        self.sources, self.options, self.factor, self.done = sources, options, factor, done

    def __iter__(self) -> Iterator[Item | None]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        lanes = [self._lane(lane) for lane in range(first, LANES, step)]
        while True:
            items = [next(lane, None) for lane in lanes]
            if not any(item is not None for item in items):
                return
            yield from items

    def _lane(self, lane: int) -> Iterator[Item]:
        for place in range(lane, len(self.sources), LANES):
            source = self.sources[place]
            try:
                yield from self._items(place, source)
            except InputError as error:
                yield Skipped(place, source.name, str(error))
            except Exception as error:  # among millions of files one is odd in a way that no library expects
                reason = f"{source.path} could not be used ({type(error).__name__}: {error}): replace or remove it."
                yield Skipped(place, source.name, reason)
            yield End(place)

    def _items(self, place: int, source: InputFile) -> Iterator[Item]:
        if source.kind == "video":
            yield from self._clips(place, source)
        elif source.split is None:
            yield from self._pictures_of_tar(place, source)
        else:
            metadata = {"source": source.name} | _annotation(source)
            if identity_of(metadata) in self.done:
                yield Done(place, identity_of(metadata))
            else:
                yield self._picture(place, source.split, read_image(source.path), metadata)

    def _pictures_of_tar(self, place: int, tar: InputFile) -> Iterator[Item]:
        for sample in iterate_images(tar.path):
            name = f"{tar.name}/{sample.key}"
            if sample.problem:
                yield Skipped(place, name, sample.problem)
            if sample.pixels is None:
                continue
            if (name, None) in self.done:
                yield Done(place, (name, None))
            else:
                split: Split = "validation" if held_out(name, self.options.validation_fraction) else "train"
                yield self._picture(place, split, sample.pixels, {"source": name} | sample.metadata)

    def _picture(self, place: int, split: Split, pixels: Tensor, metadata: dict[str, Any]) -> Clip:
        height, width = pixels.shape[2:]
        size = closest_size(height, width, [parse_size(text) for text in self.options.image_sizes])
        return Clip(place, split, resize_and_crop(pixels, size), metadata | {"pixel_size": list(size)})

    def _clips(self, place: int, source: InputFile) -> Iterator[Item]:
        assert source.split is not None
        options = self.options
        info = video_info(source.path, DECODER_THREADS)
        size = closest_size(info.height, info.width, [parse_size(text) for text in options.video_sizes])
        metadata: dict[str, Any] = {"source": source.name} | _annotation(source)
        metadata |= {"fps": float(info.fps), "stride": options.stride, "pixel_size": list(size)}
        seen = given = 0

        def frames_seen() -> Iterator[tuple[int, Tensor, bool]]:
            nonlocal seen
            for seen, frame in enumerate(self._frames(source), start=1):  # noqa: B007, read afterwards
                yield frame

        try:
            for first, frames in cut_clips(frames_seen(), options, self.factor):
                if len(frames) < options.shortest_clip:
                    continue
                if (source.name, first) in self.done:
                    yield Done(place, (source.name, first))
                else:
                    pixels = torch.cat([resize_and_crop(frame[None], size) for frame in frames])
                    yield Clip(place, source.split, pixels, metadata | {"first_frame": first})
                given += 1
                if given == options.clips_per_video:
                    break
        except InputError as error:
            raise InputError(f"{error} Its first {given} clips were used." if given else str(error)) from None
        if not given:
            uncut = " without a cut" if options.avoid_cuts else ""
            raise InputError(
                f"{source.path} gives {seen} frames at stride {options.stride} and a clip has "
                f"{options.shortest_clip}{uncut}: lower the stride or the clip's length."
            )

    def _frames(self, source: InputFile) -> Iterator[tuple[int, Tensor, bool]]:
        """The frames that count: number in the video, pixels (3, H, W), and whether it begins a shot."""
        stride = self.options.stride
        if not self.options.avoid_cuts:
            for place, frame in enumerate(iterate_frames(source.path, stride=stride, threads=DECODER_THREADS)):
                yield place * stride, frame, False
            return
        first = 0
        for number, (frame, cut) in enumerate(with_cuts(iterate_frames(source.path, threads=DECODER_THREADS))):
            first = number if cut else first
            if (number - first) % stride == 0:
                yield number, frame, cut


def cut_clips(
    frames: Iterator[tuple[int, Tensor, bool]], options: PrepareOptions, factor: int
) -> Iterator[tuple[int, list[Tensor]]]:
    """Cut frames into clips of `clip_frames`; what is left at the end of a shot is one of 1 + 4k, however short.

    Args:
        frames: number in the video, pixels (3, H, W), and whether the frame begins a shot.
        options: how long clips are, and how far apart they begin.
        factor: pixel frames of a latent frame after the first.

    Yields:
        The number of the first frame, and the frames. What is left is given only if it has frames that no clip has.
    """
    kept: list[tuple[int, Tensor]] = []
    taken = 0  # of the kept frames, those that a clip has already; below 0: frames to leave out first

    def rest() -> Iterator[tuple[int, list[Tensor]]]:
        length = len(kept) - (len(kept) - 1) % factor
        if length > max(taken, 0):
            yield kept[0][0], [frame for _, frame in kept[:length]]

    for number, frame, begins_shot in frames:
        if begins_shot:
            yield from rest()
            kept, taken = [], 0
        if taken < 0:
            taken += 1
            continue
        kept.append((number, frame))
        if len(kept) == options.clip_frames:
            yield kept[0][0], [frame for _, frame in kept]
            kept = kept[options.step :]
            taken = options.clip_frames - options.step
    yield from rest()


def read(
    sources: Sequence[InputFile], options: PrepareOptions, factor: int, workers: int, done: AbstractSet[Identity]
) -> Iterator[Item]:
    """The items of the sources, read by `workers` processes; the same for each number of them.

    Args:
        sources: what to read.
        options: how to cut and scale.
        factor: pixel frames of a latent frame after the first.
        workers: a divisor of `LANES`, or 0 to read in this process.
        done: samples that need no pixels.

    Raises:
        InputError: one of the processes was killed.
    """
    lanes = Lanes(sources, options, factor, done)
    loader: DataLoader[Item | None] = DataLoader(
        lanes, batch_size=None, num_workers=workers, worker_init_fn=outlive_signals if workers else None
    )
    ended: set[int] = set()
    try:
        for item in loader:
            if isinstance(item, End):
                ended.add(item.source)
            if item is not None:
                yield item
    except RuntimeError as error:  # what a loader raises when one of its processes is gone
        if "DataLoader worker" not in str(error):
            raise
        under_way = [
            next((i for i in range(lane, len(sources), LANES) if i not in ended), None) for lane in range(LANES)
        ]
        names = ", ".join(sources[place].name for place in under_way if place is not None)
        raise InputError(
            f"A decoding process was killed while these were read: {names}; if memory or shared memory ran out, run "
            "the same command with fewer --workers, else take the file away that FFmpeg cannot bear."
        ) from None


def _annotation(source: InputFile) -> dict[str, Any]:
    """What is known of a source, for its samples' metadata."""
    known: dict[str, Any] = {"label": source.label} if source.label is not None else {}
    if source.captions:
        known["caption"] = source.captions[0]
    if len(source.captions) > 1:
        known["captions"] = list(source.captions)
    return known
