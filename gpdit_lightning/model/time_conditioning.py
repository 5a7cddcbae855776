"""Rotation time conditioning without parameters (GPDiT, section 4.2)."""

import torch
from torch import Tensor

from gpdit_lightning.model.config import TimeSite


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs of `x` (..., D) counter-clockwise; `cos`, `sin` broadcast against (..., D / 2).

    Channel k is paired with channel k + D/2, which is contiguous in memory; pairs of neighbouring channels would give
    the same family of functions. Computed in the precision of `cos`, returned in that of `x`.
    """
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


class TimeRotation:
    """The time conditioning of one pass: R(theta) of its frame multiplies each hidden channel pair of a token.

    R(theta) = [[cos theta, sin theta], [-sin theta, cos theta]] is the matrix of GPDiT, section 4.2, with which noising
    rotates (x0, eps). The paper applies the reverse rotation, R(theta)^-1, to the hidden states. The two signs give the
    same family of functions: exchanging the channels of all pairs turns one into the other, and the weights before and
    after absorb this permutation. The sign here must not change, since trained weights depend on it.

    Clean tokens have theta = 0 and are unchanged. `config.time_site` determines which of the four methods rotate.

    Args:
        theta: (tokens,) radians, one per token of the packed sequence.
        site: see :class:`~gpdit_lightning.GPDiTConfig`.
    """

    def __init__(self, theta: Tensor, site: TimeSite) -> None:
        self.site = site
        self.cos = theta.cos()[:, None]
        self.sin = theta.sin()[:, None]

    def _rotate(self, x: Tensor) -> Tensor:
        # The last block drops the clean tokens, which come first: its noisy tokens are the tail of the table.
        return rotate_pairs(x, self.cos[-len(x) :], -self.sin[-len(x) :])

    def at_input(self, x: Tensor) -> Tensor:
        """Rotate after the patch embedding."""
        return self._rotate(x) if self.site == "input" else x

    def at_block(self, x: Tensor) -> Tensor:
        """Rotate the residual stream before a block."""
        return self._rotate(x) if self.site == "residual" else x

    def at_branch_input(self, x: Tensor) -> Tensor:
        """Rotate after the norm of attention, MLP and output layer, where DiT scales and shifts."""
        return self._rotate(x) if self.site in ("branch", "branch_inverse") else x

    def at_branch_output(self, x: Tensor) -> Tensor:
        """Rotate by R(theta)^-1 before a branch is added to the residual stream."""
        if self.site != "branch_inverse":
            return x
        return rotate_pairs(x.to(self.cos.dtype), self.cos[-len(x) :], self.sin[-len(x) :])
