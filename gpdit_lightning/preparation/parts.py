"""Distribution of parts to processes: a process encodes the parts of its rank first, then any unlocked part."""

import math
from collections.abc import Iterable, Mapping

from gpdit_lightning.codecs import Codec, load_codec
from gpdit_lightning.devices import available_cores, available_device, environment_number, rank_of_process
from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import parse_size
from gpdit_lightning.options.prepare import INTERLEAVED_FILES, PrepareOptions
from gpdit_lightning.preparation.encode import Progress, encode_part
from gpdit_lightning.preparation.input_files import InputFile
from gpdit_lightning.preparation.records import Records


def load_checked_codec(options: PrepareOptions) -> Codec:
    """Load the codec on this process's device; raises InputError if it does not support the clip lengths or sizes."""
    codec = load_codec(options.codec, options.codec_source, available_device(options.device))
    codec.latent_frames(options.clip_frames, "--clip_frames")
    codec.latent_frames(options.shortest_clip, "--least_clip_frames")
    if options.posterior and not codec.has_posterior:
        raise InputError(
            f"--posterior is given, but codec {codec.name} has no posterior: leave it out, or use sd or wan."
        )
    for text in (*options.video_sizes, *options.image_sizes):
        codec.check_frame_size(*parse_size(text))
    return codec


def encode_parts(options: PrepareOptions, records: Records, files: Iterable[InputFile], codec: Codec) -> None:
    """Encode the parts of this rank, then those that no other process has locked.

    Args:
        options: options of the preparation.
        records: records of the preparation.
        files: current input files.
        codec: codec on the device of this process.
    """
    rank, ranks, local_rank = rank_of_process()
    parts = records.unfinished_parts
    if rank == 0 and len(parts) < ranks:
        print(
            f"only {len(parts)} parts for {ranks} processes, so {ranks - len(parts)} processes are idle: lower "
            "--part_size before the next preparation."
        )
    by_name = {file.name: file for file in files}
    total = sum(len(records.files_of_part(part)) for part in parts)
    progress = Progress(math.ceil(total / ranks), hidden=local_rank > 0)
    assigned = [part for part in parts if part % ranks == rank]
    for part in [*assigned, *(part for part in parts if part not in assigned)]:
        encode_if_unlocked(part, options, records, by_name, codec, progress, assigned=part in assigned)
    progress.close()


def encode_if_unlocked(
    part: int,
    options: PrepareOptions,
    records: Records,
    by_name: Mapping[str, InputFile],
    codec: Codec,
    progress: Progress,
    assigned: bool = True,
) -> None:
    """Encode a part, unless it is finished or another process is encoding it.

    On a file system without locks, each process encodes only the parts of its rank.

    Args:
        part: number of the part.
        options: options of the preparation.
        records: records of the preparation.
        by_name: current input files by name.
        codec: codec on the device of this process.
        progress: progress bar to update.
        assigned: whether the part belongs to this rank.
    """
    with records.lock_part(part) as lock:
        if lock.acquired and (lock.exclusive or assigned) and not records.is_finished(part):
            files = [file.input_file(by_name.get(file.name)) for file in records.files_of_part(part)]
            result = encode_part(part, files, options, records, codec, worker_count(options), progress)
            records.record_result(part, result)


def worker_count(options: PrepareOptions) -> int:
    """Return the number of decoding processes: `options.workers`, by default one per core of this rank.

    It is rounded down to a divisor of `INTERLEAVED_FILES`, so that all processes read equally many files.
    """
    requested = options.workers
    if requested is None:
        requested = available_cores() // environment_number("LOCAL_WORLD_SIZE", 1, least=1) or 1
    divisors = (count for count in range(1, INTERLEAVED_FILES + 1) if INTERLEAVED_FILES % count == 0)
    return max((count for count in divisors if count <= requested), default=0)
