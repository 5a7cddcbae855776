"""From the input files of one part to complete shards: clips through the codec, in batches of one shape."""

import re
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
from tqdm import tqdm

from gpdit_lightning.codecs import Codec
from gpdit_lightning.data.manifest import Kind, ShardEntry, Split
from gpdit_lightning.data.shard_writer import ShardSetWriter
from gpdit_lightning.data.shards import Shape, ShardReader, described, index_of
from gpdit_lightning.errors import InputError
from gpdit_lightning.options.prepare import PrepareOptions
from gpdit_lightning.preparation.clips import Clip, EncodedClip, EndOfFile, Item, SampleId, SkippedInput
from gpdit_lightning.preparation.input_files import InputFile
from gpdit_lightning.preparation.interleave import read_clips
from gpdit_lightning.preparation.records import PartResult

SHARD_NAME = re.compile(
    rf"({'|'.join(get_args(Split))})-({'|'.join(get_args(Kind))})-(\d+)x(\d+)x(\d+)-(?P<part>\d{{5}})-\d{{5}}"
)
REFRESH = 0.5  # seconds between changes of the text of the progress bar

Bucket = tuple[Split, Kind, Shape]


class Progress:
    """The progress bar of a process: input files, clips per second, skipped inputs, time left.

    Args:
        files: number of input files.
        hidden: show nothing.
    """

    def __init__(self, files: int, hidden: bool = False) -> None:
        # None: shown in a terminal only.
        self._bar = tqdm(total=files, unit=" files", smoothing=0.05, disable=True if hidden else None)
        self._clips = self._skipped = 0
        self._start = self._shown = time.monotonic()

    def add(self, files: int = 0, clips: int = 0, skipped: int = 0) -> None:
        """Count what was done."""
        self._clips += clips
        self._skipped += skipped
        self._bar.update(files)
        now = time.monotonic()
        if now - self._shown > REFRESH:
            rate = self._clips / (now - self._start)
            self._bar.set_postfix_str(f"{self._clips} clips, {rate:.1f} clips/s, {self._skipped} skipped")
            self._shown = now

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


class StoredSample(NamedTuple):
    """What the result of a part needs of a sample in a shard."""

    split: Split
    label: str | None


def encode_part(
    part: int, files: Sequence[InputFile], options: PrepareOptions, codec: Codec, workers: int, progress: Progress
) -> PartResult:
    """Write the shards of a part, after those of it that are complete already.

    The samples have the order of `read_clips`, and no batch extends over the end of a shard. So every sample is encoded
    in the same batch as in an uninterrupted run, and an interrupted part ends with the same shards.

    Args:
        part: its number.
        files: its input files.
        options: how to cut, scale and pack.
        codec: the codec.
        workers: decoding processes.
        progress: counts files, clips and skipped inputs.

    Raises:
        InputError: a complete shard of this part is damaged.
    """
    complete, stored = complete_shards(part, options.out, codec.latent_channels)
    with ShardSetWriter(options.out, options.shard_size, part, complete) as writer:
        encoder = PartEncoder(files, options.batch_size, codec, stored, writer, progress)
        for item in read_clips(files, options, codec.temporal_factor, workers, stored.keys()):
            encoder.add(item)
        encoder.encode_waiting()
        return encoder.result(writer.close())


class PartEncoder:
    """Encodes the clips of a part in batches of one shape, and counts what its files gave.

    Args:
        files: the input files of the part.
        batch_size: most clips in a batch.
        codec: the codec.
        stored: the samples in its complete shards.
        writer: takes the latents.
        progress: counts files, clips and skipped inputs.
    """

    def __init__(
        self,
        files: Sequence[InputFile],
        batch_size: int,
        codec: Codec,
        stored: dict[SampleId, StoredSample],
        writer: ShardSetWriter,
        progress: Progress,
    ) -> None:
        self._files, self._batch_size, self._codec = files, batch_size, codec
        self._stored, self._writer, self._progress = stored, writer, progress
        self._waiting: dict[Bucket, list[Clip]] = defaultdict(list)
        self._used: dict[str, StoredSample] = {}  # a sample of each video or image
        self._files_with_samples: set[int] = set()
        self._labels: set[str] = set()
        self._skipped: list[dict[str, str]] = []

    def add(self, item: Item) -> None:
        """Take an item of `read_clips`; a batch that is full is encoded."""
        match item:
            case Clip():
                bucket = item.split, self._files[item.file].kind, self._codec.latent_shape(item.pixels.shape)
                self._waiting[bucket].append(item)
                if len(self._waiting[bucket]) == min(self._batch_size, self._writer.room(*bucket)):
                    self._encode(bucket)
            case EncodedClip():
                self._count(item.file, item.id.source, self._stored[item.id])
            case SkippedInput():
                self._skip(item.name, item.reason)
            case EndOfFile():
                self._progress.add(files=1)

    def encode_waiting(self) -> None:
        """Encode the batches that are not full."""
        for bucket in list(self._waiting):
            self._encode(bucket)

    def result(self, shards: tuple[ShardEntry, ...]) -> PartResult:
        """The result of the part, with these shards."""
        by_split = Counter(sample.split for sample in self._used.values())
        unused = [file.name for index, file in enumerate(self._files) if index not in self._files_with_samples]
        return PartResult(
            shards=shards,
            used={split: by_split[split] for split in get_args(Split)},
            labels=tuple(sorted(self._labels)),
            skipped=tuple(self._skipped),
            without_samples=tuple(unused),
        )

    def _encode(self, bucket: Bucket) -> None:
        split, kind, _ = bucket
        clips = self._waiting.pop(bucket)
        latents = self._codec.encode(torch.stack([clip.pixels for clip in clips])).cpu().numpy()
        for clip, latent in zip(clips, latents, strict=True):
            name = clip.metadata["source"]
            try:
                self._writer.write(split, kind, latent, clip.metadata)
            except InputError as error:
                self._skip(name, str(error))
            else:
                self._count(clip.file, name, StoredSample(split, clip.metadata.get("label")))
                self._progress.add(clips=1)

    def _count(self, file: int, name: str, sample: StoredSample) -> None:
        self._used[name] = sample
        self._files_with_samples.add(file)
        if sample.label is not None:
            self._labels.add(sample.label)

    def _skip(self, name: str, reason: str) -> None:
        self._skipped.append({"source": name, "reason": reason})
        self._progress.add(skipped=1)


def complete_shards(part: int, folder: Path, channels: int) -> tuple[list[ShardEntry], dict[SampleId, StoredSample]]:
    """The complete shards that an interrupted run left of a part, and their samples; its other files are removed.

    Raises:
        InputError: one of the shards is damaged.
    """
    shards: list[ShardEntry] = []
    samples: dict[SampleId, StoredSample] = {}
    for path in sorted(folder.glob(f"*-{part:05d}-?????.*")):
        name = SHARD_NAME.fullmatch(path.name.partition(".")[0])
        if name is None:
            continue
        if path.suffix != ".tar":
            if path.suffix == ".partial" or not path.with_name(f"{name.group()}.tar").exists():
                path.unlink()
            continue
        split, kind, *sizes = name.groups()[:5]
        frames, height, width = map(int, sizes)
        shape = (frames, channels, height, width)
        index = index_of(path, shape)
        entry = described(path, split, kind, shape, len(index))  # type: ignore[arg-type]
        reader = ShardReader(folder, entry)
        if not np.array_equal(index, reader.index):
            raise InputError(f"{path} is not what was written: delete it and run the same command again.")
        for number in range(entry.count):
            _, metadata = reader.read(number)
            samples[SampleId.of(metadata)] = StoredSample(entry.split, metadata.get("label"))
        shards.append(entry)
    return shards, samples
