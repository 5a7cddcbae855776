"""The parts of a preparation as a Ray Data pipeline, over all machines of a Ray cluster (the optional extra `ray`).

The cluster's machines share the folder of the shards and that of the sources, under the same paths.
"""

from collections.abc import Sequence
from typing import Any

from gpdit_lightning.errors import InputError
from gpdit_lightning.preparation.encode import Progress
from gpdit_lightning.preparation.input_files import InputFile
from gpdit_lightning.preparation.options import PrepareOptions
from gpdit_lightning.preparation.parts import checked_codec, encode_held, workers_of
from gpdit_lightning.preparation.records import Records


class PartEncoder:
    """Holds the codec and encodes one part after the other; writes what any process would.

    Args:
        options: what to encode, and how.
        sources: all of them.
    """

    def __init__(self, options: PrepareOptions, sources: Sequence[InputFile]) -> None:
        self.options, self.codec, self.records = options, checked_codec(options), Records(options.out)
        self.by_name = {source.name: source for source in sources}

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Encode the parts `batch["part"]`."""
        for part in batch["part"].tolist():
            progress = Progress(len(self.records.of_part(part)), hidden=True)
            encode_held(part, self.options, self.records, self.by_name, self.codec, progress)
        return batch


def encode_parts_by_ray(options: PrepareOptions, records: Records, sources: Sequence[InputFile]) -> None:
    """Encode the parts that are not finished, each by whichever machine is free.

    Raises:
        InputError: Ray is missing, or a part failed.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError(f"Ray cannot be imported ({error}): pip install -e '.[ray]'.") from None
    ray.init(ignore_reinit_error=True)
    parts = records.unfinished()
    if not parts:
        return
    resources = ray.cluster_resources()
    on_gpu = options.device != "cpu" and resources.get("GPU", 0) > 0
    cores = min(max(1, workers_of(options)), int(resources["CPU"]))
    encoders = int(resources["GPU"]) if on_gpu else int(resources["CPU"]) // cores
    dataset = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
    encoded = dataset.map_batches(
        PartEncoder,
        fn_constructor_args=(options, sources),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=max(1, min(encoders, len(parts)))),
        num_cpus=cores,
        num_gpus=1 if on_gpu else 0,
    )
    try:
        encoded.materialize()
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(f"{reason} Complete shards are kept: run the same command again.") from None
