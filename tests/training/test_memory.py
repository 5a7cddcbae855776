"""The closed forms against what autograd really keeps, and against the bytes of a real run."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.data.datamodule import LatentDataModule, SourceConfig
from gpdit_lightning.stages import GPDiTStage
from gpdit_lightning.training.ema import EMA
from gpdit_lightning.training.memory import (
    AUTOCAST,
    BF16,
    FLOAT32,
    STRATEGIES,
    Precision,
    activation_bytes,
    held_bytes,
    parameter_count,
)

# B, B', F, h, w, K
SHAPES = [(2, 2, 3, 16, 16, 1), (2, 1, 3, 16, 16, 2), (2, 0, 2, 16, 16, 1), (8, 0, 1, 16, 16, 1)]
PRECISIONS = [AUTOCAST, FLOAT32, BF16]


class FusedNorm(torch.autograd.Function):
    """Keeps what CUDA's keeps (_fused_rms_norm in torch's derivatives.yaml): input, weight, one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed, inner = (x * scale).to(x.dtype), gradient * weight
        through = (inner - normed * (inner * normed).mean(-1, keepdim=True)) * scale.to(x.dtype)
        return through, (gradient * normed).flatten(0, -2).sum(0), None


@pytest.fixture(autouse=True)
def norms_as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: FusedNorm.apply(x, weight, eps))


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that come into being inside and are still there, and the most there ever were."""

    def __init__(self, ignored: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in ignored}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return result

    def gone(self, key: int, count: int) -> None:
        self.seen.discard(key)
        self.now -= count


def forward(config: GPDiTConfig, shape: tuple[int, ...], precision: Precision) -> tuple[GPDiT, Callable[[], Tensor]]:
    clips, context, frames, height, width, draws = shape
    model = GPDiT(config).to(torch.float32 if precision.weight == 4 else torch.bfloat16)
    noisy = torch.randn(draws * clips, frames, config.latent_channels, height, width)
    theta = torch.rand(draws * clips, frames)
    clean = torch.randn(context, frames, config.latent_channels, height, width) if context else None

    def run() -> Tensor:
        # As Lightning's MixedPrecision does it: without the cache.
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == AUTOCAST, cache_enabled=False):
            return model(noisy, theta, clean, draws=draws)

    return model, run


def saved_bytes(config: GPDiTConfig, shape: tuple[int, ...], precision: Precision) -> int:
    """Bytes that autograd keeps after a forward pass, parameters excepted."""
    model, run = forward(config, shape, precision)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()  # noqa: F841  (the graph must live)
    return sum(count for key, count in found.items() if key not in parameters)


@pytest.mark.parametrize(("variant", "checkpointing"), [("of2", False), ("of", False), ("of2", True)])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_one_more_block_keeps(
    shape: tuple[int, ...], precision: Precision, variant: str, checkpointing: bool
) -> None:
    configs = [
        GPDiTConfig(size="tiny", layers=layers, attention=variant, activation_checkpointing=checkpointing)
        for layers in (2, 3)
    ]
    expected, found = (
        count(configs[1], *rest) - count(configs[0], *rest)  # type: ignore[operator]
        for count, rest in ((activation_bytes, (*shape, precision)), (saved_bytes, (shape, precision)))
    )
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("fields", [{"width": 384, "heads": 4, "mlp_width": 768}, {"time_site": "branch_inverse"}])
def test_what_a_block_keeps_in_other_architectures(fields: dict[str, Any]) -> None:
    shape, configs = (2, 1, 3, 8, 12, 1), [GPDiTConfig(size="tiny", layers=layers, **fields) for layers in (2, 3)]
    expected = activation_bytes(configs[1], *shape) - activation_bytes(configs[0], *shape)
    found = saved_bytes(configs[1], shape, AUTOCAST) - saved_bytes(configs[0], shape, AUTOCAST)
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_peak_of_forward_and_backward(shape: tuple[int, ...], precision: Precision, checkpointing: bool) -> None:
    """Of a second micro-batch, to whose gradients it adds."""
    config = GPDiTConfig(size="tiny", activation_checkpointing=checkpointing)
    model, run = forward(config, shape, precision)
    run().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with LiveBytes([*model.parameters(), *gradients]) as live:
        run().sum().backward()
    assert live.peak == pytest.approx(activation_bytes(config, *shape, precision), rel=0.06)


@pytest.mark.parametrize("size", ["tiny", "B", "H"])
def test_parameter_count(size: str) -> None:
    config = GPDiTConfig.preset(size)
    with torch.device("meta"):
        model = GPDiT(config)
    assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())


class Bytes(Callback):
    """What a run holds in the end."""

    def __init__(self, ema: EMA) -> None:
        self.ema, self.found = ema, dict[str, int]()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.found["weights"] = sum(p.nbytes for p in pl_module.parameters())
        self.found["gradients"] = sum(p.grad.nbytes for p in pl_module.parameters() if p.grad is not None)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        states = trainer.optimizers[0].state.values()
        moments = [value for state in states for value in state.values() if value.ndim > 0]  # not the step counts
        self.found["optimizer"] = sum(moment.nbytes for moment in moments)
        self.found["average"] = sum(weight.nbytes for weight in self.ema.average.values())


def test_what_a_run_holds(
    tiny_config: GPDiTConfig, tiny_shards: Path, fit: Callable[..., Trainer], tmp_path: Path
) -> None:
    ema = EMA()
    counter = Bytes(ema)
    data = LatentDataModule(videos=SourceConfig(manifests=[str(tiny_shards)], batch_size=4))
    fit(GPDiTStage(tiny_config), data, tmp_path, 1, [ema, counter], precision="bf16-mixed")
    expected = held_bytes(parameter_count(tiny_config), STRATEGIES[0], AUTOCAST, ranks=1)
    assert counter.found == {name: expected[name] for name in counter.found}


def test_what_zero_spreads() -> None:
    """ZeRO (arXiv:1910.02054, section 3): 16 bytes a parameter, of which ever more are divided by the ranks."""
    count, ranks = 10**9, 64
    held = {s.option: held_bytes(count, s, BF16, ranks) for s in STRATEGIES}
    names = ("weights", "gradients", "optimizer")
    assert sum(held[""][name] for name in names) == (2 + 2 + 12 / ranks) * count
    assert sum(held["zero2"][name] for name in names) == (2 + 16 / ranks) * count  # our gradients are float32
    assert sum(held["zero3"][name] for name in names) == 18 / ranks * count
    assert held["zero3_offload"]["main_memory"] == (18 + 4) / ranks * count
    assert held["zero2_offload"]["weights"] == 2 * count
