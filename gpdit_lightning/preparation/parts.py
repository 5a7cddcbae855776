"""Which process encodes which part: its own ones first, then those that no other process holds."""

import math
import os
from collections.abc import Iterable, Mapping

from gpdit_lightning.codecs import Codec, load_codec
from gpdit_lightning.devices import available_cores, available_device, rank_of_process
from gpdit_lightning.media.images import parse_size
from gpdit_lightning.preparation.encode import Progress, encode_part
from gpdit_lightning.preparation.input_files import InputFile
from gpdit_lightning.preparation.options import LANES, PrepareOptions
from gpdit_lightning.preparation.records import Records


def checked_codec(options: PrepareOptions) -> Codec:
    """The codec, on this process's device; raises `InputError` where clips or sizes do not fit it."""
    codec = load_codec(options.codec, options.codec_source, available_device(options.device))
    for frames in (options.clip_frames, options.shortest_clip):
        codec.latent_frames(frames)
    for text in (*options.video_sizes, *options.image_sizes):
        codec.check_frame_size(*parse_size(text))
    return codec


def encode_parts(options: PrepareOptions, records: Records, sources: Iterable[InputFile], codec: Codec) -> None:
    """Encode the parts that this rank should, then those that no other process holds."""
    rank, ranks, local_rank = rank_of_process()
    parts = records.unfinished()
    if rank == 0 and len(parts) < ranks:
        print(f"{len(parts)} parts for {ranks} processes: with a lower --part_size more of them would have work.")
    by_name = {source.name: source for source in sources}
    total = sum(len(records.of_part(part)) for part in parts)
    progress = Progress(math.ceil(total / ranks), hidden=local_rank > 0)
    own = [part for part in parts if part % ranks == rank]
    for part in [*own, *(part for part in parts if part not in own)]:
        encode_held(part, options, records, by_name, codec, progress, own=part in own)
    progress.close()


def encode_held(
    part: int,
    options: PrepareOptions,
    records: Records,
    by_name: Mapping[str, InputFile],
    codec: Codec,
    progress: Progress,
    own: bool = True,
) -> None:
    """Encode a part, unless another process holds it or it is finished.

    Where there are no locks to tell who holds what, each process keeps to its own.
    """
    with records.held(part) as hold:
        if hold.free and (hold.certain or own) and not records.finished(part):
            sources = [source.at(by_name.get(source.name)) for source in records.of_part(part)]
            records.finish(part, encode_part(part, sources, options, codec, workers_of(options), progress))


def workers_of(options: PrepareOptions) -> int:
    """Decoding processes: as asked for, rounded down to what divides the lanes."""
    wanted = options.workers
    if wanted is None:
        wanted = available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) or 1
    return max((count for count in range(1, min(wanted, LANES) + 1) if LANES % count == 0), default=0)
