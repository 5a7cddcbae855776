"""Checks before a stage trains."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.stages.agreement import check_ranks


class OtherRank:
    """A strategy of two ranks: the first is at step 4 with the weights `a`; this is the second."""

    root_device = torch.device("cpu")

    def broadcast(self, _: Any) -> dict[str, Any]:
        return {"step": 4, "weights": "a"}

    def reduce(self, differing: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "sum"
        return differing + 0  # the first rank agrees with itself


@pytest.mark.parametrize(("step", "weights"), [(2, "a"), (4, "b"), (4, None), (4, "a")])
def test_ranks_with_different_initial_weights_are_refused(step: int, weights: str | None) -> None:
    trainer: Any = SimpleNamespace(strategy=OtherRank(), global_step=step, world_size=2)
    if (step, weights) == (4, "a"):
        check_ranks(trainer, weights)
        return
    with pytest.raises(
        InputError, match=r"1 of 2 ranks found another checkpoint, .* which is at step 4: make the same files"
    ):
        check_ranks(trainer, weights)
