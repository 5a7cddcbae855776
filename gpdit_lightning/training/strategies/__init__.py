"""The values of `trainer.strategy` that spread a model over the ranks; importing this module makes them known."""

from lightning.pytorch.strategies import StrategyRegistry

from gpdit_lightning.training.strategies.fsdp import FSDP2
from gpdit_lightning.training.strategies.zero import ZeRO

for _stage in (2, 3):
    StrategyRegistry.register(f"zero{_stage}", ZeRO, f"DeepSpeed ZeRO-{_stage}", stage=_stage)
    StrategyRegistry.register(
        f"zero{_stage}_offload", ZeRO, f"DeepSpeed ZeRO-{_stage} with CPU offload", stage=_stage, offload=True
    )
StrategyRegistry.register("fsdp2", FSDP2, "torch's fully_shard")

# Lightning's names for DeepSpeed mean its own strategy, which divides accumulated gradients twice; recipes get ours.
OF_LIGHTNING = {
    "deepspeed": "zero2",
    "deepspeed_stage_2": "zero2",
    "deepspeed_stage_2_offload": "zero2_offload",
    "deepspeed_stage_3": "zero3",
    "deepspeed_stage_3_offload": "zero3_offload",
}
