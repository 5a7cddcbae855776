"""Latent frames as tokens: square patches of latent pixels, row after row."""

from torch import Tensor


def patchify(latents: Tensor, patch: int) -> Tensor:
    """(B, F, C, H, W) -> (B, F, N, C * patch * patch), tokens in row-major order."""
    rows, columns = latents.shape[-2] // patch, latents.shape[-1] // patch
    x = latents.unflatten(-2, (rows, patch)).unflatten(-1, (columns, patch))  # B F C rows patch columns patch
    return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)


def unpatchify(x: Tensor, patch: int, rows: int, columns: int) -> Tensor:
    """Inverse of :func:`patchify`: (B, F, rows * columns, C * patch * patch) -> (B, F, C, H, W)."""
    x = x.unflatten(2, (rows, columns)).unflatten(-1, (-1, patch, patch))  # B F rows columns C patch patch
    return x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4)
