"""Tiny models with random parameters everywhere, and random batches for them."""

import math
from typing import Any

import torch
from torch import Tensor

from gpdit_lightning import GPDiT, GPDiTConfig


def toy_config(**overrides: Any) -> GPDiTConfig:
    """Two layers; a head width that does not divide by three axes and three different RoPE bases."""
    fields: dict[str, Any] = {
        "layers": 2,
        "width": 40,
        "mlp_width": 56,
        "heads": 2,
        "latent_channels": 3,
        "rope_lengths": (16, 40, 300),
    }
    return GPDiTConfig(**{"size": "tiny", **fields, **overrides})


def toy_model(config: GPDiTConfig | None = None, seed: int = 0, **overrides: Any) -> GPDiT:
    """A float64 model with no zero layer, no zero bias and no norm weight of one."""
    model = GPDiT(config or toy_config(**overrides)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else noise / math.sqrt(parameter.shape[1]))
    return model


def toy_batch(
    clips: int = 2,
    context_clips: int | None = None,
    frames: int = 4,
    height: int = 4,
    width: int = 6,
    channels: int = 3,
    seed: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random (noisy, theta, clean); `context_clips` of the `clips` have context, all by default."""
    generator = torch.Generator().manual_seed(seed)
    context_clips = clips if context_clips is None else context_clips

    def latents(count: int) -> Tensor:
        return torch.randn(count, frames, channels, height, width, generator=generator, dtype=torch.float64)

    theta = torch.rand(clips, frames, generator=generator, dtype=torch.float64) * math.pi / 2
    return latents(clips), theta, latents(context_clips)


def assert_near(actual: Tensor | None, expected: Tensor | None, tolerance: float = 1e-9, what: str = "") -> None:
    """Largest difference at most `tolerance` of the largest expected value; None counts as zeros."""
    if actual is None or expected is None:
        assert actual is None or not actual.any(), f"{what}: expected nothing"
        assert expected is None or not expected.any(), f"{what}: got nothing"
        return
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.isfinite().all(), f"{what}: not finite"
    scale = expected.abs().max().item() if expected.numel() else 0.0
    error = (actual.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
    assert error <= tolerance * scale, f"{what}: off by {error:.2e} where the largest value is {scale:.2e}"
