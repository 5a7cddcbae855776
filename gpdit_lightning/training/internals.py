"""Every private name of Lightning and DeepSpeed that training uses.

Their releases do not promise to keep these names. No other module uses one, apart from the methods that the strategies
override (`OVERRIDDEN_METHODS`). tests/training/test_internals.py fails when a release removes or changes one, and
prints the name and the function here that uses it.
"""

import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from subprocess import Popen
from typing import Any, NamedTuple

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch import Tensor, nn

# (class of lightning.pytorch.strategies, method): overridden or called on `self` in strategies/zero.py.
OVERRIDDEN_METHODS = (
    ("DeepSpeedStrategy", "_format_config"),
    ("DeepSpeedStrategy", "_setup_model_and_optimizer"),
    ("DeepSpeedStrategy", "_initialize_deepspeed_train"),
    ("DeepSpeedStrategy", "_init_deepspeed_distributed"),
    ("DeepSpeedStrategy", "init_deepspeed"),
    ("DeepSpeedStrategy", "set_world_ranks"),
)

# --- Lightning


def attached_trainer(module: LightningModule) -> Trainer | None:
    """Return the trainer of a module, or None if it has none; `module.trainer` would raise."""
    return module._trainer


def disable_signal_handlers(trainer: Trainer) -> None:
    """Keep Lightning from handling SIGTERM: its handler waits for the other ranks, wherever this rank is.

    The broadcast of a signal before each micro-batch, with which Lightning makes the host wait for the device, is left
    out too: no rank has anything to send.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def validation_follows(trainer: Trainer) -> bool:
    """Return whether Lightning will validate after the current micro-batch."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return loop._should_check_val_fx(fetcher) and not loop.val_loop.skip


def is_last_micro_batch(trainer: Trainer) -> bool:
    """Return whether the optimizer steps after the current micro-batch."""
    return not trainer.fit_loop._should_accumulate()


def is_between_steps(trainer: Trainer) -> bool:
    """Return whether no micro-batch of the next optimizer step was computed, while the next one is requested."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready % trainer.accumulate_grad_batches == 0


def end_validation_loader(trainer: Trainer) -> None:
    """End the loader processes of a validation within the training; Lightning would keep them until the next one."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    if loop._data_fetcher is not None:
        loop._data_fetcher.teardown()
        loop._data_fetcher = None


def event_writer(logger: TensorBoardLogger) -> Any:
    """Return the writer of a logger's event files, None before its first use; `logger.experiment` would create one."""
    return logger._experiment


def launched_processes(strategy: Strategy) -> list[Popen[bytes]] | None:
    """Return the processes that Lightning launched for the other ranks of this machine; None if it launches none.

    The list is the launcher's: it no longer watches a process that is removed from it.
    """
    launcher = strategy.launcher
    return launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else None


def has_processes(strategy: Strategy) -> bool:
    """Return whether each rank runs the whole program, as with all launchers except those that fork or spawn it."""
    return isinstance(strategy.launcher, _SubprocessScriptLauncher | None)


def set_process_group_timeout(strategy: Strategy, timeout: timedelta) -> None:
    """Set the time-out of collective operations, unless the recipe gives one; call it before the ranks connect."""
    if getattr(strategy, "_timeout", None) == default_pg_timeout:
        strategy._timeout = timeout  # type: ignore[attr-defined]


def set_data_parallel_size(strategy: ModelParallelStrategy, ranks: int) -> None:
    """Set the number of ranks, which is unknown when the constructor of the strategy takes it."""
    strategy._data_parallel_size = ranks


# --- DeepSpeed


class Location(NamedTuple):
    """The location of this rank's elements of a parameter under ZeRO; the fields of `ParameterShard`."""

    shape: torch.Size
    start: int
    size: int
    storage: Tensor
    offset: int


def prepare_deepspeed(on_cpu: bool) -> None:
    """Reset DeepSpeed's process groups if an earlier run in this process has destroyed torch's.

    Args:
        on_cpu: also skip its shared-memory operator, which takes minutes to compile.
    """
    from deepspeed.utils import groups

    if not torch.distributed.is_initialized():
        groups._release_process_group_references(group=None)
    if on_cpu:
        # By its name in sys.modules: the attribute deepspeed.comm.torch is torch itself.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]


def zero2_locations(optimizer: Any) -> Iterable[tuple[nn.Parameter, Location]]:
    """Yield each parameter and the location of this rank's elements in DeepSpeed's optimizer of ZeRO stage 2."""
    for parameters, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is None:  # all elements are on other ranks
                yield parameter, Location(parameter.shape, 0, 0, flat, 0)
            else:
                shard, offset = mapping.lp_fragment_address, mapping.hp_fragment_address.start
                yield parameter, Location(parameter.shape, shard.start, shard.numel, flat, offset)


def zero3_locations(
    optimizer: Any, parameters: Iterable[nn.Parameter], rank: int
) -> Iterable[tuple[nn.Parameter, Location]]:
    """Yield each parameter and the location of a rank's elements in DeepSpeed's optimizer of ZeRO stage 3."""
    for parameter in parameters:
        attributes: Any = parameter
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = min(size * rank, attributes.ds_numel)
        size = min(size, attributes.ds_numel - start)  # the rest is padding
        yield (
            parameter,
            Location(attributes.ds_shape, start, size, optimizer.fp32_partitioned_groups_flat[group], offset),
        )


def zero2_gradient_norm(optimizer: Any) -> Tensor:
    """Return the norm of the gradient over all ranks, before clipping: a scalar."""
    return optimizer.scaled_global_norm()


def zero3_gradient_norm(optimizer: Any) -> Tensor:
    """Return the norm of the gradient over all ranks, before clipping: a scalar."""
    from deepspeed.runtime.utils import combine_grad_norm_groups

    return combine_grad_norm_groups(optimizer._get_norm_groups())


def skip_zero_step(optimizer: Any, device: torch.device) -> Callable[[], None]:
    """Make DeepSpeed drop the gradients of the current step, as it does where their norm is not finite.

    Returns:
        a function that restores the norm; call it after the step.
    """
    infinite = torch.tensor(float("inf"), device=device)
    optimizer.scaled_global_norm = lambda: infinite  # stage 2
    optimizer._get_norm_groups = lambda: [infinite]  # stage 3

    def restore() -> None:
        del optimizer.scaled_global_norm, optimizer._get_norm_groups

    return restore


def refresh_zero2_weights(optimizer: Any) -> None:
    """Copy the float32 master weights into the weights that the model computes with, on all ranks."""
    optimizer.update_lp_params()


def refresh_zero3_weights(optimizer: Any) -> None:
    """Copy the float32 master weights into the weights that the model computes with, on all ranks."""
    optimizer._partition_all_parameters()  # also the small ones that stay gathered: the next pass gathers them again
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)


def release_zero3_modules() -> None:
    """Drop DeepSpeed's references to modules outside its engine: a global list, and the caches of methods."""
    from deepspeed.runtime.zero import parameter_offload

    parameter_offload.FWD_MODULE_STACK.clear()
    for method in cached_zero3_methods():
        method.cache_clear()


def cached_zero3_methods() -> list[Any]:
    """The methods of DeepSpeed's parameter coordinator that cache their results, and modules with them."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    # They are wrapped for profiling: the cached function is a variable of the wrapper's closure.
    closures = [getattr(method, "__closure__", None) or () for method in vars(PartitionedParameterCoordinator).values()]
    contents = [cell.cell_contents for closure in closures for cell in closure]
    return [content for content in contents if hasattr(content, "cache_clear")]
