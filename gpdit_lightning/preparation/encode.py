"""Encoding of one part: its input files are read as clips, encoded in batches of one shape, and written to shards."""

import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from gpdit_lightning.codecs import Codec
from gpdit_lightning.data.shard_entry import LATENT_ONLY, SHARD_NAME, ArrayName, Kind, ShardEntry, Split
from gpdit_lightning.data.shard_writer import ShardSetWriter
from gpdit_lightning.data.shards import Shape, ShardReader, build_index, index_path, shard_entry
from gpdit_lightning.errors import InputError, TransientError
from gpdit_lightning.media.finding import LeftOut
from gpdit_lightning.names import as_text
from gpdit_lightning.options.prepare import PrepareOptions
from gpdit_lightning.preparation.clips import Clip, EncodedClip, EndOfFile, Item, Note, SampleId, SkippedInput
from gpdit_lightning.preparation.input_files import InputFile
from gpdit_lightning.preparation.interleave import read_clips
from gpdit_lightning.preparation.record_formats import PartResult
from gpdit_lightning.preparation.records import Records
from gpdit_lightning.progress import progress_bar

REFRESH_SECONDS = 0.5  # between changes of the text of the progress bar

ShardType = tuple[Split, Kind, Shape]
"""Properties that all samples of a shard share."""


class Progress:
    """Progress bar of a process: input files, clips per second, skipped inputs, remaining time.

    Args:
        files: number of input files.
        hidden: whether to show nothing.
    """

    def __init__(self, files: int, hidden: bool = False) -> None:
        # With disable=None the bar is shown in a terminal only.
        self._bar = progress_bar(total=files, unit=" files", smoothing=0.05, disable=True if hidden else None)
        self._clips = self._skipped = 0
        self._start = self._shown = time.monotonic()

    def add(self, files: int = 0, clips: int = 0, skipped: int = 0) -> None:
        """Add to the counts of finished files, encoded clips and skipped inputs."""
        self._clips += clips
        self._skipped += skipped
        self._bar.update(files)
        now = time.monotonic()
        if now - self._shown > REFRESH_SECONDS:
            rate = self._clips / (now - self._start)
            self._bar.set_postfix_str(f"{self._clips} clips, {rate:.1f} clips/s, {self._skipped} skipped")
            self._shown = now

    def close(self) -> None:
        """Close the bar; its last state stays visible."""
        self._bar.close()


class StoredSample(NamedTuple):
    """Split and label of a sample in a shard."""

    split: Split
    label: str | None


def encode_part(
    part: int,
    files: Sequence[InputFile],
    options: PrepareOptions,
    records: Records,
    codec: Codec,
    workers: int,
    progress: Progress,
) -> PartResult:
    """Write the shards of a part that are not complete yet.

    Samples are written in the order of `read_clips`, and no batch extends over the end of a shard. Therefore a resumed
    part encodes every sample in the same batch, and produces the same shards, as an uninterrupted run.

    Args:
        part: number of the part.
        files: input files of the part.
        options: options for cutting, scaling and sharding.
        records: records of the preparation, in which each shard is recorded when it is complete.
        codec: codec that encodes the clips.
        workers: number of decoding processes.
        progress: progress bar to update.

    Raises:
        InputError: a complete shard of this part is damaged, or has samples of other input files.
    """
    complete, stored = complete_shards(part, options, records.shards(part), codec.latent_channels)
    names = {file.name for file in files}
    for id in stored:
        if names.isdisjoint((id.source, *map(str, PurePosixPath(id.source).parents))):  # a parent may be a tar
            raise InputError(
                f"the shards of part {part} in {options.out} have a sample of {id.source}, which is no input file of "
                f"that part: delete *-{part:05d}-*.tar there and run the same command again."
            )
    record = partial(records.record_shards, part)
    with ShardSetWriter(options.out, options.shard_size, part, complete, record) as writer:
        encoder = PartEncoder(files, options, codec, stored, writer, progress)
        for item in read_clips(files, options, codec.temporal_factor, workers, stored.keys()):
            encoder.add(item)
        encoder.encode_remaining()
        return encoder.result(writer.close())


class PartEncoder:
    """Encoder of the clips of one part, in batches of one shape; it also collects the result of the part.

    Args:
        files: input files of the part.
        options: options with the maximum number of clips in a batch, and what is stored of each.
        codec: codec that encodes the clips.
        stored: samples in the complete shards of the part.
        writer: writer of the latents.
        progress: progress bar to update.
    """

    def __init__(
        self,
        files: Sequence[InputFile],
        options: PrepareOptions,
        codec: Codec,
        stored: dict[SampleId, StoredSample],
        writer: ShardSetWriter,
        progress: Progress,
    ) -> None:
        self._files, self._options, self._codec = files, options, codec
        self._stored, self._writer, self._progress = stored, writer, progress
        self._pending: dict[ShardType, list[Clip]] = defaultdict(list)
        self._used: dict[str, StoredSample] = {}  # the last sample of each video or image
        self._files_with_samples: set[int] = set()
        self._labels: set[str] = set()
        self._skipped: list[LeftOut] = []
        self._notes: list[LeftOut] = []

    def add(self, item: Item) -> None:
        """Add an item of `read_clips`, and encode its batch if that is full."""
        match item:
            case Clip():
                shard_type = item.split, self._files[item.file].kind, self._codec.latent_shape(item.pixels.shape)
                self._pending[shard_type].append(item)
                if len(self._pending[shard_type]) == min(self._options.batch_size, self._writer.remaining(*shard_type)):
                    self._encode(shard_type)
            case EncodedClip():
                self._record_sample(item.file, item.id.source, self._stored[item.id])
            case SkippedInput():
                self._skip(item.name, item.reason, item.retry)
            case Note():
                self._notes.append(LeftOut(item.name, as_text(item.reason)))
            case EndOfFile():
                self._progress.add(files=1)

    def encode_remaining(self) -> None:
        """Encode the batches that are not full."""
        for shard_type in list(self._pending):
            self._encode(shard_type)

    def result(self, shards: tuple[ShardEntry, ...]) -> PartResult:
        """Return the result of the part, whose shards are `shards`."""
        by_split = Counter(sample.split for sample in self._used.values())
        unused = [file.name for index, file in enumerate(self._files) if index not in self._files_with_samples]
        return PartResult(
            shards=shards,
            used={split: by_split[split] for split in get_args(Split)},
            labels=tuple(sorted(self._labels)),
            skipped=tuple(self._skipped),
            notes=tuple(self._notes),
            without_samples=tuple(unused),
        )

    def _encode(self, shard_type: ShardType) -> None:
        split, kind, _ = shard_type
        clips, arrays = self._pending.pop(shard_type), stored_arrays(self._options, kind)
        latents = encode_arrays(self._codec, torch.stack([clip.pixels for clip in clips]), arrays).cpu().numpy()
        for clip, latent in zip(clips, latents, strict=True):
            name = clip.metadata["source"]
            try:
                self._writer.write(split, kind, latent, clip.metadata, arrays)
            except InputError as error:
                self._skip(name, str(error))
            else:
                self._record_sample(clip.file, name, StoredSample(split, clip.metadata.get("label")))
                self._progress.add(clips=1)

    def _record_sample(self, file: int, name: str, sample: StoredSample) -> None:
        self._used[name] = sample
        self._files_with_samples.add(file)
        if sample.label is not None:
            self._labels.add(sample.label)

    def _skip(self, name: str, reason: str, retry: bool = False) -> None:
        self._skipped.append(LeftOut(name, as_text(reason), retry))
        self._progress.add(skipped=1)


def stored_arrays(options: PrepareOptions, kind: Kind) -> tuple[ArrayName, ...]:
    """Return what the options store of each latent of a kind."""
    flips = options.flips == "all" or (options.flips == "images" and kind == "image")
    if options.posterior:
        return ("mean", "std", "flipped_mean", "flipped_std") if flips else ("mean", "std")
    return ("mean", "flipped_mean") if flips else LATENT_ONLY


def encode_arrays(codec: Codec, pixels: Tensor, arrays: Sequence[ArrayName]) -> Tensor:
    """Encode clips to the arrays that are stored.

    Args:
        codec: codec that encodes the clips.
        pixels: uint8 (B, T, 3, H, W).
        arrays: A arrays, as in `ShardEntry.arrays`.

    Returns:
        float32 (B, F, A C, h, w), not whitened.
    """
    versions = (pixels, pixels.flip(-1)) if "flipped_mean" in arrays else (pixels,)
    if "std" in arrays:
        return torch.cat([array for version in versions for array in codec.encode_posterior(version)], dim=2)
    return torch.cat([codec.encode(version) for version in versions], dim=2)


def complete_shards(
    part: int, options: PrepareOptions, recorded: Mapping[str, ShardEntry] | None, channels: int
) -> tuple[list[ShardEntry], dict[SampleId, StoredSample]]:
    """Return the complete shards of an interrupted part and their samples; delete its other files.

    Args:
        part: number of the part.
        options: options with the folder of the shards, and what is stored of each latent.
        recorded: the recorded shards by path; None if an earlier version began the part.
        channels: number of latent channels.

    Raises:
        InputError: one of the shards is damaged or was not recorded.
    """
    folder = options.out
    paths = [path for path in sorted(folder.glob(f"*-{part:05d}-?????.*")) if _parse_name(path)]
    for path in paths:
        if path.suffix == ".partial" or not path.with_name(path.name.partition(".")[0] + ".tar").exists():
            path.unlink()
    shards: list[ShardEntry] = []
    samples: dict[SampleId, StoredSample] = {}
    for path in paths:
        if path.suffix == ".tar":
            entry = _shard_entry(path, channels, options)
            if recorded is not None and recorded.get(entry.path) != entry:
                raise InputError(
                    f"{path} is not the shard that the records of its preparation list, so it was changed or belongs "
                    f"to another preparation: delete it and {entry.index} and run the same command again."
                )
            reader = ShardReader(folder, entry)
            for number in range(entry.count):
                with advise_deletion(path.name):
                    _, metadata = reader.read(number)
                if (id := SampleId.from_metadata(metadata)) in samples:
                    raise InputError(
                        f"{path} has a sample of {id.source} that another shard of its part has: delete it and run the "
                        "same command again."
                    )
                samples[id] = StoredSample(entry.split, metadata.get("label"))
            shards.append(entry)
    return shards, samples


@contextmanager
def advise_deletion(shard: str) -> Iterator[None]:
    """Add to an InputError of the block, about a damaged shard of a preparation, that its samples are encoded again."""
    try:
        yield
    except TransientError:
        raise
    except InputError as error:
        raise InputError(
            f"{error} If there is no other copy, delete {shard} and {index_path(Path(shard))} and run the same command "
            "again."
        ) from None


def _shard_entry(path: Path, channels: int, options: PrepareOptions) -> ShardEntry:
    """Return the manifest entry of a complete shard; raises InputError if its index does not match its tar."""
    name = _parse_name(path)
    assert name is not None
    shape = (int(name["frames"]), channels, int(name["height"]), int(name["width"]))
    arrays = stored_arrays(options, name["kind"])  # type: ignore[arg-type]
    if not index_path(path).is_file():
        raise InputError(f"{path} has no index {index_path(path).name}: delete it and run the same command again.")
    with advise_deletion(path.name):
        index = build_index(path, (shape[0], len(arrays) * channels, *shape[2:]))
    entry = shard_entry(path, name["split"], name["kind"], shape, len(index), arrays)  # type: ignore[arg-type]
    if not np.array_equal(index, ShardReader(path.parent, entry).index):
        raise InputError(f"{path} does not match its index: delete it and run the same command again.")
    return entry


def _parse_name(path: Path) -> re.Match[str] | None:
    """Match the name of a file that belongs to a shard; None for other files."""
    return SHARD_NAME.fullmatch(path.name.partition(".")[0])
