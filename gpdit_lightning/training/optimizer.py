"""The optimizer and its learning-rate schedule."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gpdit_lightning.errors import InputError

Algorithm = Literal["adamw", "muon"]
GradientReduction = Literal["float32", "bf16"]


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule. Adam and the learning rates are those of GPDiT (5.1); all else is ours."""

    learning_rate: float = 1e-4
    """Peak learning rate (GPDiT 5.1: 1e-4; 2e-5 for long video)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moments of the gradient; the first is also the momentum of Muon."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay; with 0 AdamW is the paper's Adam."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises linearly; the first step has 1 / warmup_steps of the peak."""
    decay: Literal["constant", "cosine", "wsd"] = "constant"
    """After the warm-up: `constant`; `cosine`, a half cosine until the end of the run; or `wsd` (warm-up, stable,
    decay), constant and then a linear decay over the last `decay_steps` (MiniCPM, arXiv:2404.06395, with the linear
    cool-down of Hägele et al., arXiv:2405.18392), so that a longer run can start from any checkpoint of the stable
    part."""
    decay_steps: int = 0
    """Optimizer steps at the end of the run over which `wsd` decays."""
    halvings: float = 0.0
    """Above 0, `wsd` decays exponentially instead of linearly: the learning rate is halved this number of times over
    `decay_steps`, evenly over the steps (6 in ACDiT's code, so that it ends at 1/64 of the peak)."""
    final_learning_rate_fraction: float = 0.0
    """Final learning rate of `cosine` and `wsd`, relative to the peak."""
    algorithm: Algorithm = "adamw"
    """`adamw`; or `muon` for the matrices of the blocks, and AdamW for all other parameters (Jordan et al., 2024, with
    updates as large as AdamW's, so that the same learning rates suit: Liu et al., arXiv:2502.16982). `muon` needs fewer
    steps, above all with small models. It is not available with ZeRO and FSDP2, which split the matrices."""
    layer_decay: float = 1.0
    """Below 1, each layer has this fraction of the learning rate of the layer above it, with `adamw` (ELECTRA,
    arXiv:2003.10555; 0.75 in MAE's fine-tuning, arXiv:2111.06377). The output layer has the whole learning rate, the
    last block one factor, and the patch embedding one more than the first block."""
    decay_vectors: bool = True
    """Whether weight decay acts on vectors too (norms and biases); it does not in MAE, with `adamw`."""
    gradient_reduction: GradientReduction = "float32"
    """Precision in which several ranks add up their gradients: `float32`; or `bf16`, which halves the communication,
    but rounds the gradient of each micro-batch and its sums."""

    def __post_init__(self) -> None:
        if self.algorithm not in get_args(Algorithm):
            raise InputError(
                f"optimizer.algorithm is {self.algorithm}: choose one of {', '.join(get_args(Algorithm))}."
            )
        if self.gradient_reduction not in get_args(GradientReduction):
            raise InputError(
                f"optimizer.gradient_reduction is {self.gradient_reduction}: choose one of "
                f"{', '.join(get_args(GradientReduction))}."
            )
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise InputError(f"optimizer.learning_rate is {self.learning_rate}; it must be positive and finite.")
        if self.warmup_steps < 0:
            raise InputError(f"optimizer.warmup_steps is {self.warmup_steps}; it must not be negative.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"optimizer.betas is {list(self.betas)}; both must lie in [0, 1).")
        if not self.eps > 0:
            raise InputError(f"optimizer.eps is {self.eps}; it must be positive.")
        if not self.weight_decay >= 0:
            raise InputError(f"optimizer.weight_decay is {self.weight_decay}; it must not be negative.")
        if self.decay == "wsd" and self.decay_steps < 1:
            raise InputError(
                f"optimizer.decay is wsd but decay_steps is {self.decay_steps}: set the number of steps at the end of "
                "the run over which the learning rate decays."
            )
        if not 0 <= self.halvings < math.inf:
            raise InputError(f"optimizer.halvings is {self.halvings}; it must be 0 or more, and finite.")
        if self.halvings and (self.decay != "wsd" or self.final_learning_rate_fraction):
            raise InputError(
                f"optimizer.halvings is {self.halvings}, which is an option of the decay wsd and determines the final "
                f"learning rate, but decay is {self.decay} and final_learning_rate_fraction is "
                f"{self.final_learning_rate_fraction}: set wsd and 0, or halvings to 0."
            )
        if not 0 < self.layer_decay <= 1:
            raise InputError(f"optimizer.layer_decay is {self.layer_decay}; it must be above 0 and at most 1.")
        if self.has_groups and self.algorithm == "muon":
            raise InputError(
                "optimizer.algorithm is muon, for which layer_decay must be 1 and decay_vectors true: set algorithm to "
                "adamw, or leave these out."
            )
        if not 0 <= self.final_learning_rate_fraction <= 1:
            raise InputError(
                f"optimizer.final_learning_rate_fraction is {self.final_learning_rate_fraction}; it must lie between 0 "
                "and 1."
            )

    @property
    def has_groups(self) -> bool:
        """Whether parameters differ in their learning rate or weight decay."""
        return self.layer_decay != 1 or not self.decay_vectors

    def rates_of(self, layers_above: int, vectors: bool) -> dict[str, float]:
        """Return the peak learning rate and the weight decay of some parameters.

        Args:
            layers_above: number of layers above theirs.
            vectors: whether they are vectors.
        """
        weight_decay = 0.0 if vectors and not self.decay_vectors else self.weight_decay
        return {"lr": self.learning_rate * self.layer_decay**layers_above, "weight_decay": weight_decay}


def learning_rate_factor(step: int, config: OptimizerConfig, max_steps: int) -> float:
    """Return the learning rate at an optimizer step, relative to the peak."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return 1.0
    remaining = max(0, max_steps - step)
    if config.decay == "cosine":
        decay = 0.5 * (1 - math.cos(math.pi * remaining / max(1, max_steps - config.warmup_steps)))
    else:
        decay = min(1.0, remaining / config.decay_steps)
        if config.halvings:
            decay = 0.5 ** (config.halvings * (1 - decay))
    floor = config.final_learning_rate_fraction
    return floor + (1 - floor) * decay


class MuonAndAdamW(Optimizer):
    """Muon for some matrices and AdamW for all other parameters, as one optimizer with one state dict.

    The first parameter group is that of AdamW, the second that of Muon.

    Args:
        matrices: parameters (rows, columns) for Muon.
        others: parameters for AdamW.
        config: learning rate, decay rates, eps and weight decay.
        fused: AdamW's option.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        config: OptimizerConfig,
        fused: bool | None = None,
    ) -> None:
        rates: dict[str, Any] = {
            "lr": config.learning_rate,
            "eps": config.eps,
            "weight_decay": config.weight_decay,
        }
        adamw = AdamW(others, betas=config.betas, fused=fused, **rates)
        muon = Muon(matrices, momentum=config.betas[0], adjust_lr_fn="match_rms_adamw", **rates)
        self._parts: tuple[Optimizer, ...] = (adamw, muon)
        super().__init__([*adamw.param_groups, *muon.param_groups], {})
        self._share_state()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters; return the value of `closure`, which computes the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of all parameters."""
        super().load_state_dict(state_dict)
        self._share_state()

    def _share_state(self) -> None:
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state


def check_state(optimizer: Optimizer) -> None:
    """Check that a restored optimizer has the state of its algorithm, in the shapes of its parameters.

    torch loads any state, which would fail in the first step. A parameter without a state has had no gradient. Other
    optimizers than those of :func:`build_optimizer` are not checked.

    Raises:
        InputError: a setting or a part of the state is missing, or a part has another shape.
    """
    cure = "use another checkpoint of the run, or begin another run with its weights"
    for number, group in enumerate(optimizer.param_groups if isinstance(optimizer, AdamW | MuonAndAdamW) else ()):
        is_muon = "ns_steps" in group
        for setting in ("lr", "initial_lr", "eps", "weight_decay", "momentum" if is_muon else "betas"):
            if setting not in group:
                raise InputError(f"group {number} of the checkpoint's optimizer state lacks {setting}: {cure}.")
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            for part in ("momentum_buffer",) if is_muon else ("exp_avg", "exp_avg_sq"):
                shape = tuple(getattr(state[part], "shape", ())) if state and part in state else "nothing"
                if state and shape != tuple(parameter.shape):
                    raise InputError(
                        f"the checkpoint's optimizer state has shape {shape} as {part} of a parameter of shape "
                        f"{tuple(parameter.shape)}: {cure}."
                    )


def apply_config(config: OptimizerConfig, optimizer: Optimizer, scheduler: LambdaLR) -> None:
    """Replace the restored settings of an optimizer by those of a recipe.

    The learning rate is computed again; it is bit-equal if the recipe did not change.
    """
    settings = {
        "initial_lr": config.learning_rate,
        "betas": tuple(config.betas),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "momentum": config.betas[0],
    }
    factor = scheduler.lr_lambdas[0](scheduler.last_epoch)
    for group in optimizer.param_groups:
        group |= {name: value for name, value in settings.items() if name in group}
        rates = config.rates_of(group.get("layers_above", 0), group.get("vectors", False))
        group |= rates | {"initial_lr": rates["lr"], "lr": rates["lr"] * factor}
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    config: OptimizerConfig,
    max_steps: int,
    matrices: Iterable[nn.Parameter] = (),
    layers_above: Mapping[nn.Parameter, int] = MappingProxyType({}),
    scales_gradients: bool = False,
) -> tuple[Optimizer, LambdaLR]:
    """Return the optimizer of `parameters` and its schedule, which advances once per optimizer step.

    Args:
        parameters: all parameters to train.
        config: the optimizer's settings.
        max_steps: optimizer steps of the run; -1: no end.
        matrices: those of the parameters that `muon` updates.
        layers_above: number of layers above that of each parameter, for `layer_decay`; 0 for those that are missing.
        scales_gradients: whether a gradient scaler is used, as in fp16; Lightning then clips no gradients for a fused
            optimizer.

    Raises:
        InputError: the schedule decays but the run has no end, or the decay does not fit into the run.
    """
    if config.decay != "constant" and max_steps <= 0:
        raise InputError(f"optimizer.decay is {config.decay} but the run has no end: set trainer.max_steps.")
    if config.decay == "wsd" and config.warmup_steps + config.decay_steps > max_steps:
        raise InputError(
            f"optimizer.warmup_steps = {config.warmup_steps} and decay_steps = {config.decay_steps} do not fit into "
            f"trainer.max_steps = {max_steps}: shorten them, or train for more steps."
        )
    optimizer: Optimizer
    parameters = list(parameters)
    # One kernel updates all parameters; torch's default on CUDA has several, with temporary tensors.
    fused = True if not scales_gradients and all(parameter.is_cuda for parameter in parameters) else None
    if config.algorithm == "muon":
        matrices = list(matrices)
        chosen = set(map(id, matrices))
        optimizer = MuonAndAdamW(matrices, [p for p in parameters if id(p) not in chosen], config, fused)
    else:
        groups = _groups(parameters, config, layers_above) if config.has_groups else parameters
        optimizer = AdamW(
            groups,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=fused,
        )
    return optimizer, LambdaLR(optimizer, partial(learning_rate_factor, config=config, max_steps=max_steps))


def _groups(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, layers_above: Mapping[nn.Parameter, int]
) -> list[dict[str, Any]]:
    """Return the groups of parameters with one learning rate and weight decay; those of the output layer come first.

    The groups keep what `apply_config` needs to compute both again.
    """
    grouped: dict[tuple[int, bool], list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        grouped[layers_above.get(parameter, 0), parameter.ndim < 2].append(parameter)
    return [
        {"params": members, "layers_above": above, "vectors": vectors, **config.rates_of(above, vectors)}
        for (above, vectors), members in sorted(grouped.items(), key=lambda group: group[0])
    ]


def reduction_dtype(module: nn.Module) -> torch.dtype:
    """Return the precision in which ranks add up the gradients of a stage."""
    config = getattr(module, "optimizer_config", None)
    in_bf16 = isinstance(config, OptimizerConfig) and config.gradient_reduction == "bf16"
    return torch.bfloat16 if in_bf16 else torch.float32


def reduce_ddp_gradients_in_bf16(model: nn.Module | None) -> None:
    """Let a model that DDP wraps add up its gradients in bf16; do nothing for any other model."""

    # DDP refuses torch's hook by its name with gloo, where it works.
    def hook(group: Any, bucket: distributed.GradBucket) -> Future[Tensor]:
        return default_hooks.bf16_compress_hook(group, bucket)

    if isinstance(model, DistributedDataParallel):
        model.register_comm_hook(None, hook)
