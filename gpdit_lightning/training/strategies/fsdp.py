"""FSDP2: weights, gradients and moments spread over the ranks by torch's `fully_shard`, without DeepSpeed."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from lightning import Trainer
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from gpdit_lightning.errors import InputError
from gpdit_lightning.model import GPDiT
from gpdit_lightning.training.strategies.sharding import Part, Sharded

# Methods beside `forward` that need a module's weights together.
BACKBONE_METHODS, BLOCK_METHODS = ("features", "new_cache", "extend", "denoise"), ("write_cache",)


class FSDPPrecision(Precision):
    """None of Lightning's autocast: `fully_shard` hands the model its weights in the precision to compute with.

    Args:
        precision: `32-true` or `bf16-mixed`.
    """

    def __init__(self, precision: Any) -> None:
        super().__init__()
        self.precision = precision


class FSDP2(Sharded, ModelParallelStrategy):
    """Trains with torch's `fully_shard` over all ranks: `fsdp2` as `trainer.strategy`.

    Each rank keeps a part of every parameter in float32, with its gradient, moments and average; a block's weights are
    gathered, in bf16 with bf16-mixed, for as long as the block computes. Unlike Lightning's ModelParallelStrategy it
    spreads the model itself, and a checkpoint is the file that one process would write. It also runs on the CPU, by
    gloo: for tests.

    Args:
        options: of Lightning's ModelParallelStrategy, but for its sizes.
    """

    PRECISION = FSDPPrecision

    def __init__(self, **options: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **options)
        self.parts = {}
        self.groups = []

    def setup_environment(self) -> None:
        """Join the other ranks.

        Raises:
            InputError: gradients are to be clipped by value.
        """
        assert self.lightning_module is not None
        if self.lightning_module.trainer.gradient_clip_algorithm == "value":
            raise InputError("FSDP2 clips gradients by their norm only: leave out trainer.gradient_clip_algorithm.")
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Spread the model over the ranks for training; to evaluate it, each rank holds all of it.

        Raises:
            InputError: some parameters are not trained.
        """
        module, accelerator = self.lightning_module, self.accelerator
        assert module is not None
        assert accelerator is not None
        if trainer.state.fn != TrainerFn.FITTING:
            accelerator.setup(trainer)
            self.keep_whole()
            return
        self.all_trained(module)
        # The velocity is a view, but nothing is written into it.
        warnings.filterwarnings("ignore", message=".*returned a view tensor.*")
        for part in module.modules():
            if isinstance(part, GPDiT):
                self._spread(part)
        super().setup(trainer)
        names = {parameter: name for name, parameter in module.named_parameters()}
        self.parts = {name: _part_of(parameter) for parameter, name in names.items()}
        groups = self.inner_optimizer.param_groups
        self.groups = [[names[parameter] for parameter in group["params"]] for group in groups]

    def _spread(self, backbone: GPDiT) -> None:
        """Every block by itself, so that one is gathered at a time, and what lies around them together."""
        mesh = self.device_mesh["data_parallel"]
        policy = MixedPrecisionPolicy(
            param_dtype=self.working_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
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
        """torch's optimiser over distributed parameters."""
        return self.optimizers[0]

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Gradients are reduced after each micro-batch: each rank keeps its part of them only."""
        yield

    def gradient_norm(self) -> Tensor:
        """Norm of the gradient over all ranks before clipping: a scalar."""
        assert self.lightning_module is not None
        gradients = [parameter.grad for parameter in self.lightning_module.parameters() if parameter.grad is not None]
        local = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
        return self.reduce(torch.nn.utils.get_total_norm(local).square(), reduce_op="sum").sqrt()

    def leave_out_step(self) -> None:
        """Take the gradients away: the optimiser leaves such parameters and their moments alone."""
        self.inner_optimizer.zero_grad()

    def weights_changed(self) -> None:
        """Drop what is still gathered of the old weights."""
        assert self.lightning_module is not None
        for module in self.lightning_module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def teardown(self) -> None:
        """Forget the parts."""
        super().teardown()
        self.parts = {}


def _part_of(parameter: Tensor) -> Part:
    """This rank's part of a distributed parameter: whole rows of it, one after another."""
    assert isinstance(parameter, DTensor)
    rows = parameter.device_mesh.size()
    rank = parameter.device_mesh.get_local_rank()
    start = min(-(-parameter.shape[0] // rows) * rank, parameter.shape[0])  # as torch.chunk cuts
    row = parameter.numel() // parameter.shape[0]
    return Part(parameter.shape, start * row, parameter.to_local().numel(), parameter, 0)
