"""Strategies that shard a model across ranks: ZeRO (DeepSpeed) and FSDP2 (torch)."""

from lightning.pytorch.strategies import StrategyRegistry

from gpdit_lightning.training.strategies.fsdp import FSDP2
from gpdit_lightning.training.strategies.zero import ZeRO

# Lightning's names for DeepSpeed select its DeepSpeedStrategy, which divides accumulated gradients twice. The command
# line replaces them by these names of ZeRO.
ZERO_NAMES = {
    "deepspeed": "zero2",
    "deepspeed_stage_2": "zero2",
    "deepspeed_stage_2_offload": "zero2_offload",
    "deepspeed_stage_3": "zero3",
    "deepspeed_stage_3_offload": "zero3_offload",
}


def register_strategies() -> None:
    """Register `zero2`, `zero3`, `zero2_offload`, `zero3_offload` and `fsdp2` as values of a trainer's `strategy`.

    The command line calls this. Code that constructs a `lightning.Trainer` must call it before, or pass an instance of
    `ZeRO` or `FSDP2`.
    """
    for stage in (2, 3):
        name, description = f"zero{stage}", f"DeepSpeed ZeRO-{stage}"
        StrategyRegistry.register(name, ZeRO, description, override=True, stage=stage)
        StrategyRegistry.register(
            f"{name}_offload", ZeRO, f"{description} with CPU offload", override=True, stage=stage, offload=True
        )
    StrategyRegistry.register("fsdp2", FSDP2, "torch's fully_shard", override=True)
