"""Costs of a checkpoint; the bytes of real ones are compared with them in tests/cli/test_sharded_models.py."""

import pytest

from gpdit_lightning import GPDiTConfig
from gpdit_lightning.estimation.memory import STRATEGIES, parameter_count
from gpdit_lightning.estimation.saving import SavingSpeeds, saving_costs

H = GPDiTConfig(size="H")
BY_OPTION = {strategy.option: strategy for strategy in STRATEGIES}
SPEEDS = SavingSpeeds(copy=2e9, digest=0.5e9, disk=4e9)


@pytest.mark.parametrize("option", ["zero2", "zero3", "zero3_offload", "fsdp2"])
def test_the_stall_is_the_copy_of_a_part(option: str) -> None:
    costs = saving_costs(H, BY_OPTION[option], 8, SPEEDS)
    assert costs.bytes == 16 * parameter_count(H)
    assert costs.copied == costs.bytes // 8
    assert costs.stall == pytest.approx(costs.copied / 2e9)
    assert costs.background == pytest.approx(costs.copied / 0.5e9 + costs.bytes / 4e9)


@pytest.mark.parametrize(("option", "ranks"), [("auto", 1), ("auto", 8), ("zero2_offload", 1), ("fsdp2", 1)])
def test_one_rank_writes_while_the_training_waits(option: str, ranks: int) -> None:
    costs = saving_costs(H, BY_OPTION[option], ranks, SPEEDS)
    assert (costs.copied, costs.background) == (0, 0.0)
    assert costs.stall == pytest.approx(costs.bytes * (1 / 2e9 + 1 / 0.5e9 + 1 / 4e9))
