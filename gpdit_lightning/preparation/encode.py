"""One part of the sources to complete shards: clips through the codec, in batches of one shape."""

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
from gpdit_lightning.preparation.clips import Clip, Done, End, Identity, Skipped, identity_of, read
from gpdit_lightning.preparation.input_files import InputFile
from gpdit_lightning.preparation.options import PrepareOptions
from gpdit_lightning.preparation.records import PartResult

SHARD_NAME = re.compile(
    rf"({'|'.join(get_args(Split))})-({'|'.join(get_args(Kind))})-(\d+)x(\d+)x(\d+)-(\d{{5}})-\d{{5}}"
)
REFRESH = 0.5  # seconds between changes of what the bar says

Bucket = tuple[Split, Kind, Shape]


class Progress:
    """The bar of a process: sources, samples a second, what was left out, time left.

    Args:
        sources: to go through.
        hidden: show nothing.
    """

    def __init__(self, sources: int, hidden: bool = False) -> None:
        # None: shown in a terminal alone.
        self._bar = tqdm(total=sources, unit=" sources", smoothing=0.05, disable=True if hidden else None)
        self._samples = self._skipped = 0
        self._begin = self._shown = time.monotonic()

    def add(self, sources: int = 0, samples: int = 0, skipped: int = 0) -> None:
        """Count what was done."""
        self._samples += samples
        self._skipped += skipped
        self._bar.update(sources)
        now = time.monotonic()
        if now - self._shown > REFRESH:
            rate = self._samples / (now - self._begin)
            self._bar.set_postfix_str(f"{self._samples} clips, {rate:.1f} clips/s, {self._skipped} left out")
            self._shown = now

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


class Known(NamedTuple):
    """What the result of a part needs to know of a sample that is in a complete shard."""

    split: Split
    label: str | None


def encode_part(
    part: int, sources: Sequence[InputFile], options: PrepareOptions, codec: Codec, workers: int, progress: Progress
) -> PartResult:
    """Write the shards of a part, behind those of it that are complete already.

    Samples stand in the order in which `clips.read` gives them, and no batch runs over the end of a shard, so that each
    is encoded in the same company: a part that was interrupted ends with the shards that it would have had.

    Args:
        part: its number.
        sources: its sources.
        options: how to cut, scale and pack.
        codec: the codec.
        workers: decoding processes.
        progress: told of everything.

    Raises:
        InputError: a complete shard of this part is damaged.
    """
    complete, done = complete_shards(part, options.out, codec.latent_channels)
    waiting: dict[Bucket, list[Clip]] = defaultdict(list)
    used: dict[str, Known] = {}  # by the name of the recording or picture
    fruitful: set[int] = set()
    labels: set[str] = set()
    skipped: list[dict[str, str]] = []

    def count(source: int, name: str, known: Known) -> None:
        used[name] = known
        fruitful.add(source)
        labels.update([known.label] if known.label is not None else [])

    def skip(name: str, reason: str) -> None:
        skipped.append({"source": name, "reason": reason})
        progress.add(skipped=1)

    with ShardSetWriter(options.out, options.shard_size, part, complete) as writer:

        def flush(bucket: Bucket) -> None:
            split, kind, _ = bucket
            clips = waiting.pop(bucket)
            latents = codec.encode(torch.stack([clip.pixels for clip in clips])).cpu().numpy()
            for clip, latent in zip(clips, latents, strict=True):
                name = clip.metadata["source"]
                try:
                    writer.write(split, kind, latent, clip.metadata)
                except InputError as error:
                    skip(name, str(error))
                else:
                    count(clip.source, name, Known(split, clip.metadata.get("label")))
                    progress.add(samples=1)

        for item in read(sources, options, codec.temporal_factor, workers, done.keys()):
            match item:
                case Clip():
                    bucket = item.split, sources[item.source].kind, codec.latent_shape(item.pixels.shape)
                    waiting[bucket].append(item)
                    if len(waiting[bucket]) == min(options.batch_size, writer.room(*bucket)):
                        flush(bucket)
                case Done():
                    count(item.source, item.identity[0], done[item.identity])
                case Skipped():
                    skip(item.name, item.reason)
                case End():
                    progress.add(sources=1)
        for bucket in list(waiting):
            flush(bucket)
        shards = writer.close()
    by_split = Counter(known.split for known in used.values())
    return PartResult(
        shards=shards,
        used={split: by_split[split] for split in get_args(Split)},
        labels=tuple(sorted(labels)),
        skipped=tuple(skipped),
        lost=tuple(source.name for place, source in enumerate(sources) if place not in fruitful),
    )


def complete_shards(part: int, folder: Path, channels: int) -> tuple[list[ShardEntry], dict[Identity, Known]]:
    """What an interrupted run left of a part: its complete shards and what is in them; the rest is removed.

    Raises:
        InputError: one of them is damaged.
    """
    shards: list[ShardEntry] = []
    samples: dict[Identity, Known] = {}
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
            samples[identity_of(metadata)] = Known(entry.split, metadata.get("label"))
        shards.append(entry)
    return shards, samples
