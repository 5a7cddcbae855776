"""Clips of many input files, read by several processes in an order that is independent of their number."""

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from gpdit_lightning.data.workers import ignore_signals, signals_delayed
from gpdit_lightning.errors import InputError
from gpdit_lightning.options.prepare import INTERLEAVED_FILES, PrepareOptions
from gpdit_lightning.preparation.clips import ClipReader, EndOfFile, Item, SampleId
from gpdit_lightning.preparation.input_files import InputFile


class InterleavedFiles(IterableDataset[Item | None]):
    """The items of many files, of which `INTERLEAVED_FILES` = 16 are read in turn.

    Stream s reads the files s, s + 16, s + 32, ... one after another, and a round takes one item from each stream. A
    stream that has ended gives None while others of its process continue. A DataLoader takes items from its processes
    in turn, and each process has equally many streams; so the order without the Nones is the same for every number of
    processes that divides 16.

    Args:
        files: what to read.
        reader: reads a file.
    """

    def __init__(self, files: Sequence[InputFile], reader: ClipReader) -> None:
        self.files, self.reader = files, reader

    def __iter__(self) -> Iterator[Item | None]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        streams = [self._stream(number) for number in range(first, INTERLEAVED_FILES, step)]
        while True:
            items = [next(stream, None) for stream in streams]
            if all(item is None for item in items):
                return
            yield from items

    def _stream(self, number: int) -> Iterator[Item]:
        for index in range(number, len(self.files), INTERLEAVED_FILES):
            yield from self.reader.items(index, self.files[index])


def read_clips(
    files: Sequence[InputFile],
    options: PrepareOptions,
    temporal_factor: int,
    workers: int,
    encoded: AbstractSet[SampleId] = frozenset(),
) -> Iterator[Item]:
    """The items of the files; the same for every number of workers.

    Args:
        files: what to read.
        options: how to cut and scale.
        temporal_factor: of the codec: pixel frames per latent frame after the first.
        workers: decoding processes, a divisor of `INTERLEAVED_FILES`; 0 reads in this process.
        encoded: samples that are in complete shards already.

    Raises:
        InputError: a decoding process was killed.
    """
    loader: DataLoader[Item | None] = DataLoader(
        InterleavedFiles(files, ClipReader(options, temporal_factor, encoded)),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=ignore_signals if workers else None,
    )
    ended: set[int] = set()
    try:
        with signals_delayed():
            items = iter(loader)  # starts the processes
        for item in items:
            if isinstance(item, EndOfFile):
                ended.add(item.file)
            if item is not None:
                yield item
    except RuntimeError as error:  # what a DataLoader raises when one of its processes is gone
        if "DataLoader worker" not in str(error):
            raise
        names = ", ".join(files[index].name for index in _current_files(len(files), ended))
        raise InputError(
            f"A decoding process was killed while one of these was read: {names}; if memory or shared memory ran out, "
            "run the same command with fewer --workers, else remove the file that FFmpeg cannot decode."
        ) from None


def _current_files(count: int, ended: AbstractSet[int]) -> Iterator[int]:
    """The file that each stream is at: its first that has not ended."""
    for stream in range(INTERLEAVED_FILES):
        yield from [index for index in range(stream, count, INTERLEAVED_FILES) if index not in ended][:1]
