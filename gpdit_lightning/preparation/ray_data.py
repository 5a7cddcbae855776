"""Encoding of the parts of a preparation on a Ray cluster, with Ray Data (the optional extra `ray`).

The output folder and the input files must have the same paths on all machines of the cluster.
"""

from collections.abc import Sequence
from typing import Any

from gpdit_lightning.errors import InputError, message_line
from gpdit_lightning.options.prepare import PrepareOptions
from gpdit_lightning.preparation.encode import Progress
from gpdit_lightning.preparation.input_files import InputFile
from gpdit_lightning.preparation.parts import encode_if_unlocked, load_checked_codec, worker_count
from gpdit_lightning.preparation.records import Records


class PartWorker:
    """Encoder of parts in a process of the cluster; it loads the codec once.

    Args:
        options: options of the preparation.
        files: all input files.
    """

    def __init__(self, options: PrepareOptions, files: Sequence[InputFile]) -> None:
        self.options, self.codec, self.records = options, load_checked_codec(options), Records(options.out)
        self.by_name = {file.name: file for file in files}

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Encode the parts `batch["part"]`."""
        for part in batch["part"].tolist():
            progress = Progress(len(self.records.files_of_part(part)), hidden=True)
            encode_if_unlocked(part, self.options, self.records, self.by_name, self.codec, progress)
        return batch


def encode_parts_by_ray(options: PrepareOptions, records: Records, files: Sequence[InputFile]) -> None:
    """Encode the unfinished parts, each on the next free machine.

    Args:
        options: options of the preparation.
        records: records of the preparation.
        files: all input files.

    Raises:
        InputError: Ray is not installed, or a part failed.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError(f"Ray cannot be imported ({error}): pip install 'gpdit_lightning[ray]'.") from None
    ray.init(ignore_reinit_error=True)
    parts = records.unfinished_parts
    if not parts:
        return
    resources = ray.cluster_resources()
    on_gpu = options.device != "cpu" and resources.get("GPU", 0) > 0
    cores = min(max(1, worker_count(options)), int(resources["CPU"]))
    processes = int(resources["GPU"]) if on_gpu else int(resources["CPU"]) // cores
    dataset = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
    encoded = dataset.map_batches(
        PartWorker,
        fn_constructor_args=(options, files),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=max(1, min(processes, len(parts)))),
        num_cpus=cores,
        num_gpus=1 if on_gpu else 0,
    )
    try:
        encoded.materialize()
    except ray.exceptions.RayError as error:
        reason = message_line(error, -1)
        raise InputError(f"{reason} Complete shards are kept: run the same command again.") from None
