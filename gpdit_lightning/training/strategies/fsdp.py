"""FSDP2: weights, gradients and optimizer state sharded across ranks by torch's `fully_shard`, without DeepSpeed."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from lightning import Trainer
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from gpdit_lightning.errors import InputError
from gpdit_lightning.model import GPDiT
from gpdit_lightning.training import internals
from gpdit_lightning.training.optimizer import reduction_dtype
from gpdit_lightning.training.reduction import reduce_over_ranks
from gpdit_lightning.training.strategies.sharding import ParameterShard, ShardedStrategy

# Methods besides `forward` for which a module's weights must be gathered.
BACKBONE_METHODS, BLOCK_METHODS = ("features", "new_cache", "extend", "denoise"), ("write_cache",)


class FSDPPrecision(Precision):
    """Precision plugin without autocast: `fully_shard` gathers weights in the precision of the computation.

    Args:
        precision: `32-true` or `bf16-mixed`.
    """

    def __init__(self, precision: Any) -> None:
        super().__init__()
        self.precision = precision


class FSDP2(ShardedStrategy, ModelParallelStrategy):
    """Trains with torch's `fully_shard` over all ranks: `fsdp2` as `trainer.strategy`.

    Each rank keeps a shard of every parameter in float32, with its gradient, optimizer state and average; a block's
    weights are gathered, in bf16 with bf16-mixed, while the block computes. Unlike Lightning's ModelParallelStrategy it
    shards the model itself, and a checkpoint is that of any other run. It also runs on the CPU with gloo, for tests.

    Args:
        options: arguments of Lightning's ModelParallelStrategy, except its sizes.
    """

    PRECISION = FSDPPrecision

    def __init__(self, **options: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **options)

    def setup_environment(self) -> None:
        """Connect to the other ranks.

        Raises:
            InputError: gradient clipping by value.
        """
        assert self.lightning_module is not None
        if self.lightning_module.trainer.gradient_clip_algorithm == "value":
            raise InputError("FSDP2 clips gradients by their norm only: leave out trainer.gradient_clip_algorithm.")
        internals.set_data_parallel_size(self, self.num_nodes * self.num_processes)
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Shard the model across ranks for training; for evaluation each rank holds the full model.

        Raises:
            InputError: a parameter is frozen.
        """
        if self.setup_for_evaluation(trainer):
            return
        module = self.lightning_module
        assert module is not None
        self.require_all_trainable(module)
        # The output of the backbone is a view, but nothing is written to it.
        warnings.filterwarnings("ignore", message=".*returned a view tensor.*")
        for part in module.modules():
            if isinstance(part, GPDiT):
                self._shard(part)
        if self.later_weights is not None:
            module.to_empty(device=self.root_device)
        super().setup(trainer)
        names = {parameter: name for name, parameter in module.named_parameters()}
        self.shards = {name: _shard_of(parameter) for parameter, name in names.items()}
        groups = self.inner_optimizer.param_groups
        self.parameter_groups = [[names[parameter] for parameter in group["params"]] for group in groups]
        self.fill_weights()

    def _shard(self, backbone: GPDiT) -> None:
        """Shard each block alone, so that one at a time is gathered, and the other modules of the backbone together."""
        assert self.lightning_module is not None
        mesh = self.device_mesh["data_parallel"]
        policy = MixedPrecisionPolicy(
            param_dtype=self.compute_dtype,
            reduce_dtype=reduction_dtype(self.lightning_module),
            cast_forward_inputs=False,
        )
        for block in backbone.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
            for name in BLOCK_METHODS:
                register_fsdp_forward_method(block, name)
        fully_shard(backbone, mesh=mesh, mp_policy=policy)
        for name in BACKBONE_METHODS:
            register_fsdp_forward_method(backbone, name)

    @property
    def inner_optimizer(self) -> Optimizer:
        """Return torch's optimizer over distributed parameters."""
        return self.optimizers[0]

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Do nothing: gradients are reduced after each micro-batch, since each rank keeps only its shard of them."""
        yield

    def gradient_norm(self) -> Tensor:
        """Return the norm of the gradient, as in the base class."""
        assert self.lightning_module is not None
        gradients = [parameter.grad for parameter in self.lightning_module.parameters() if parameter.grad is not None]
        local = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
        return reduce_over_ranks(torch.nn.utils.get_total_norm(local).square(), "sum").sqrt()

    def skip_step(self) -> None:
        """Remove the gradients: the optimizer skips parameters without a gradient, and their state."""
        self.inner_optimizer.zero_grad()

    def refresh_weights(self) -> None:
        """Free gathered weights, which have their old values."""
        assert self.lightning_module is not None
        for module in self.lightning_module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def teardown(self) -> None:
        """Release the shards."""
        super().teardown()
        self.shards = {}


def _shard_of(parameter: Tensor) -> ParameterShard:
    """Return this rank's shard of a distributed parameter: consecutive rows."""
    assert isinstance(parameter, DTensor)
    ranks, rank = parameter.device_mesh.size(), parameter.device_mesh.get_local_rank()
    first_row = min(math.ceil(parameter.shape[0] / ranks) * rank, parameter.shape[0])  # as torch.chunk splits
    row_size = parameter.numel() // parameter.shape[0]
    return ParameterShard(parameter.shape, first_row * row_size, parameter.to_local().numel(), parameter, 0)
