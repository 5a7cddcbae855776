"""Which process encodes which part: first the parts assigned to its rank, then those that no other process encodes."""

import math
import os
from collections.abc import Iterable, Mapping

from gpdit_lightning.codecs import Codec, load_codec
from gpdit_lightning.devices import available_cores, available_device, rank_of_process
from gpdit_lightning.media.images import parse_size
from gpdit_lightning.options.prepare import INTERLEAVED_FILES, PrepareOptions
from gpdit_lightning.preparation.encode import Progress, encode_part
from gpdit_lightning.preparation.input_files import InputFile
from gpdit_lightning.preparation.records import Records


def load_checked_codec(options: PrepareOptions) -> Codec:
    """Load the codec on this process's device; raises InputError if the clip lengths or sizes do not suit it."""
    codec = load_codec(options.codec, options.codec_source, available_device(options.device))
    for frames in (options.clip_frames, options.shortest_clip):
        codec.latent_frames(frames)
    for text in (*options.video_sizes, *options.image_sizes):
        codec.check_frame_size(*parse_size(text))
    return codec


def encode_parts(options: PrepareOptions, records: Records, files: Iterable[InputFile], codec: Codec) -> None:
    """Encode the parts of this rank, then those that no other process has locked.

    Args:
        options: how to encode.
        records: of the preparation.
        files: the current input files.
        codec: the codec.
    """
    rank, ranks, local_rank = rank_of_process()
    parts = records.unfinished_parts
    if rank == 0 and len(parts) < ranks:
        print(f"{len(parts)} parts for {ranks} processes: with a lower --part_size more processes would have work.")
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
    """Encode a part, unless another process encodes it or it is finished.

    On a file system without locks each process encodes the parts that are assigned to its rank only.
    """
    with records.lock_part(part) as lock:
        if lock.acquired and (lock.exclusive or assigned) and not records.is_finished(part):
            files = [file.input_file(by_name.get(file.name)) for file in records.files_of_part(part)]
            records.record_result(part, encode_part(part, files, options, codec, worker_count(options), progress))


def worker_count(options: PrepareOptions) -> int:
    """Decoding processes: as requested or one per core of this rank, rounded down to a divisor of the streams."""
    requested = options.workers
    if requested is None:
        requested = available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) or 1
    divisors = (count for count in range(1, INTERLEAVED_FILES + 1) if INTERLEAVED_FILES % count == 0)
    return max((count for count in divisors if count <= requested), default=0)
