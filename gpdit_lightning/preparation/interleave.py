"""Reading of clips from many input files by several processes, in an order that is independent of their number."""

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet

from torch.utils.data import IterableDataset, get_worker_info

from gpdit_lightning.errors import InputError
from gpdit_lightning.options.prepare import INTERLEAVED_FILES, PrepareOptions
from gpdit_lightning.preparation.clips import ClipReader, EndOfFile, Item, SampleId
from gpdit_lightning.preparation.input_files import InputFile
from gpdit_lightning.workers import EndedWorkerError, WorkerLoader


class InterleavedFiles(IterableDataset[Item | None]):
    """Dataset of the items of many files, which reads `INTERLEAVED_FILES` = 16 files in turn.

    Stream s reads files s, s + 16, s + 32, ... one after another, and each round takes one item from every stream. A
    stream that has ended yields None while other streams of its process continue. A DataLoader takes items from its
    processes in turn, and each process has equally many streams. Therefore the order, without the Nones, is the same
    for every number of processes that divides 16.

    Args:
        files: input files.
        reader: reader of one input file.
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
    """Yield the items of the files, in the same order for every number of workers.

    Args:
        files: input files.
        options: options for cutting and scaling.
        temporal_factor: pixel frames per latent frame of the codec, after the first frame.
        workers: number of decoding processes, a divisor of `INTERLEAVED_FILES`; 0 reads in this process.
        encoded: samples that are already in complete shards.

    Raises:
        InputError: a worker process failed or was killed.
    """
    interleaved = InterleavedFiles(files, ClipReader(options, temporal_factor, encoded))
    loader: WorkerLoader[Item | None] = WorkerLoader(interleaved, workers)
    ended: set[int] = set()
    try:
        for item in loader:
            if isinstance(item, EndOfFile):
                ended.add(item.file)
            if item is not None:
                yield item
    except EndedWorkerError as error:
        names = ", ".join(files[index].name for index in _current_files(len(files), ended))
        raise InputError(
            f"{error} It was reading one of these files: {names}. If one of them ends it every time, remove that file."
        ) from None


def _current_files(count: int, ended: AbstractSet[int]) -> Iterator[int]:
    """Yield the index of the file that each stream is reading: its first file that has not ended."""
    for stream in range(INTERLEAVED_FILES):
        yield from [index for index in range(stream, count, INTERLEAVED_FILES) if index not in ended][:1]
