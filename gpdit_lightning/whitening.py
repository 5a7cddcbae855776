"""Whitening of latents by the constants of their codec."""

from torch import Tensor


def whitened(raw: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Whiten latents to mean 0 and standard deviation 1 in each channel.

    Args:
        raw: (..., C, h, w).
        mean: (C,), on any device.
        std: (C,), on any device.
    """
    return (raw - mean.to(raw.device)[:, None, None]) / std.to(raw.device)[:, None, None]


def unwhitened(white: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the inverse of :func:`whitened`."""
    return white * std.to(white.device)[:, None, None] + mean.to(white.device)[:, None, None]
