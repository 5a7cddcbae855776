"""Agreement of the ranks of a training: each reads recipe, manifests and checkpoints for itself, on its node."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from gpdit_lightning.data.selection import and_list
from gpdit_lightning.errors import InputError

NO_TEXTS: Mapping[str, str] = MappingProxyType({})


def check_same_on_ranks(trainer: Any, facts: Mapping[str, Any], texts: Mapping[str, str] = NO_TEXTS) -> None:
    """Check that all ranks have the same facts; every rank calls it at the same moment.

    Args:
        trainer: the trainer, with its process group.
        facts: what this rank has read, by name; values that can be pickled and compared.
        texts: what the message calls a fact on this rank, such as the path of a file; by default its name.

    Raises:
        InputError: a rank differs from the first one; on all ranks.
    """
    first: dict[str, Any] = trainer.strategy.broadcast(dict(facts))
    differs = [name not in facts or facts[name] != value for name, value in first.items()]
    flags = torch.tensor([facts != first, *differs], dtype=torch.float32, device=trainer.strategy.root_device)
    ranks, *ranks_of_fact = trainer.strategy.reduce(flags, reduce_op="sum").tolist()
    if ranks:
        names = dict.fromkeys(texts.get(name, name) for name, n in zip(first, ranks_of_fact, strict=True) if n)
        raise InputError(
            f"{ranks:.0f} of {trainer.world_size} ranks found another {and_list([*names] or ['recipe'])} than the "
            "first rank: make the same files visible to all nodes, give the same command on each, change no file while "
            "a run starts, and start it again."
        )
