"""Time conditioning: how noisy tokens receive their angle theta, by its rotation or by an embedding of it.

`TimeRotation`, `AdaLN`, `RotationModulation` and `AddedEmbedding` have the same methods. `branches` gives the functions
that a block of the transformer applies at the input and at the output of each of its branches (attention, MLP), and the
output layer at its input.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpdit_lightning.model.config import GPDiTConfig, TimeSite
from gpdit_lightning.model.precision import product_dtype
from gpdit_lightning.model.prefix import LabelEmbedding


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs of `x` (..., D) counter-clockwise; `cos`, `sin` broadcast against (..., D / 2).

    Channel k is paired with channel k + D/2, which is contiguous in memory; pairs of neighbouring channels would give
    the same family of functions. Computed in the precision of `cos`, returned in that of `x`.
    """
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


class Branch(Protocol):
    """The time conditioning of one branch."""

    def at_branch_input(self, x: Tensor) -> Tensor:
        """Condition the output of the branch's norm: the last tokens of the pass (tokens, D)."""

    def at_branch_output(self, x: Tensor) -> Tensor:
        """Condition the output of the branch (tokens, D) before it is added to the residual stream."""


class TimeConditioning(Protocol):
    """The time conditioning of a pass."""

    def at_input(self, x: Tensor) -> Tensor:
        """Condition the embedded patches."""

    def at_block(self, x: Tensor) -> Tensor:
        """Condition the residual stream before a block of the transformer."""

    def branches(self, modulation: nn.Linear | None, count: int) -> Sequence[Branch]:
        """Return the conditioning of `count` branches.

        Args:
            modulation: the layer of these branches that gives their `GPDiTConfig.modulation_widths` values; None if
                there are none.
            count: number of branches; 0 for the output layer, which has one without a gate.
        """


class Unconditioned:
    """No time conditioning, for a pass of clean tokens only: their theta is 0."""

    def branches(self, modulation: nn.Linear | None, count: int) -> Sequence["Unconditioned"]:
        """Return this for each branch."""
        return (self,) * max(count, 1)

    def _unchanged(self, x: Tensor) -> Tensor:
        return x

    at_input = at_block = at_branch_input = at_branch_output = _unchanged


class StochasticDepth(Unconditioned):
    """Scales of the branches of one block, for a pass of clean tokens only (stochastic depth, arXiv:1603.09382).

    Args:
        scales: (branches, B), by clip.
    """

    def __init__(self, scales: Tensor) -> None:
        self.scales = scales

    def branches(self, modulation: nn.Linear | None, count: int) -> Sequence["Unconditioned"]:
        """Return the scale of each branch."""
        return [ScaledBranch(scale) for scale in self.scales]


class ScaledBranch(Unconditioned):
    """A branch whose output is multiplied by a number for each clip (B,)."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def at_branch_output(self, x: Tensor) -> Tensor:
        """(tokens, D), packed clip after clip -> the same."""
        return (x.unflatten(0, (len(self.scale), -1)) * self.scale[:, None, None].to(x.dtype)).flatten(0, 1)


class TimeRotation:
    """The time conditioning of one pass: R(theta) of its frame multiplies each hidden channel pair of a token.

    R(theta) = [[cos theta, sin theta], [-sin theta, cos theta]] is the matrix of GPDiT, section 4.2, with which noising
    rotates (x0, eps). The paper applies the reverse rotation, R(theta)^-1, to the hidden states. The two signs give the
    same family of functions: exchanging the channels of all pairs turns one into the other, and the weights before and
    after absorb this permutation. The sign here must not change, since trained weights depend on it.

    Clean tokens have theta = 0 and are unchanged, unless they have context noise. `config.time_site` determines which
    of the four methods rotate.
    All branches are conditioned alike.

    Args:
        theta: (tokens,) radians, one per token of the packed sequence.
        site: see :class:`~gpdit_lightning.GPDiTConfig`.
    """

    def __init__(self, theta: Tensor, site: TimeSite) -> None:
        self.site = site
        self.cos = theta.cos()[:, None]
        self.sin = theta.sin()[:, None]

    @classmethod
    def of_blocks(cls, x: Tensor, site: TimeSite, *angles: tuple[Tensor, Sequence[int]]) -> "TimeRotation":
        """Return the conditioning of packed tokens of which the last ones have angles, and all others theta = 0.

        Args:
            x: (tokens, D), all packed tokens, whose device and precision the angles get.
            site: as above.
            angles: for each stream that has angles, in packed order: (R, S) radians of its blocks, on any device, and
                the tokens of each block.
        """
        per_token = torch.cat([_per_token(theta.to(x.device, x.dtype), sizes) for theta, sizes in angles])
        all_tokens = torch.zeros(len(x), device=x.device, dtype=x.dtype)
        all_tokens[len(x) - len(per_token) :] = per_token
        return cls(all_tokens, site)

    def _rotate(self, x: Tensor) -> Tensor:
        # The last block drops the clean tokens, which come first: its noisy tokens are the tail of the table.
        return rotate_pairs(x, self.cos[-len(x) :], -self.sin[-len(x) :])

    def branches(self, modulation: nn.Linear | None, count: int) -> Sequence["TimeRotation"]:
        """Return this conditioning for each branch."""
        return (self,) * max(count, 1)

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


def _per_token(theta: Tensor, sizes: Sequence[int]) -> Tensor:
    """Repeat the angle of each block for its tokens: (R, S) -> (R * tokens of the blocks,)."""
    if len(set(sizes)) == 1:
        return theta.flatten().repeat_interleave(sizes[0])
    pieces = zip(theta.split(1, dim=1), sizes, strict=True)
    return torch.cat([angle.expand(-1, size) for angle, size in pieces], dim=1).flatten()


FREQUENCIES, MAX_PERIOD = 256, 10_000  # of DiT's embedding of the time step
STEPS = 1000  # the number of time steps whose range theta is scaled to


class TimeEmbedding(nn.Module):
    """Embedding of theta and the class label (DiT, section 3.2; ACDiT, section 4.2).

    DiT embeds the number of a DDPM step, 0 to 999. Here it is theta on the fixed scale of 1000 per pi/2. A schedule is
    a monotone function from its steps to theta, so the embedding tells the same noise levels apart, and a network can
    be used with another schedule than that of its training.

    Args:
        config: an architecture with another `time_conditioning` than rotation.
    """

    def __init__(self, config: GPDiTConfig) -> None:
        super().__init__()
        self.hidden = nn.Linear(FREQUENCIES, config.width)
        self.output = nn.Linear(config.width, config.width)
        self.label = LabelEmbedding(config) if config.classes else None

    def forward(self, theta: Tensor, condition: Tensor | None) -> Tensor:
        """Return the embedding (R, S, D) in the precision of products.

        Args:
            theta: (R, S) radians, in float32 or better, on the device of the weights.
            condition: (R,) class numbers, `NO_LABEL` for none; None: none for all rows. On any device.
        """
        exponents = torch.arange(FREQUENCIES // 2, device=theta.device, dtype=theta.dtype) / (FREQUENCIES // 2)
        angles = theta[..., None] * (STEPS / (math.pi / 2)) * (-math.log(MAX_PERIOD) * exponents).exp()
        dtype = product_dtype(self.hidden.weight)
        embedding = self.output(F.silu(self.hidden(torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype))))
        if self.label is not None:
            embedding = embedding + self.label(condition, len(theta))[:, None].to(dtype)
        return embedding


class NoisyBlocks:
    """The noisy tokens of a pass, which are its last ones, by block.

    Args:
        rows: R, number of noisy rows.
        sizes: tokens of each noisy block of a row.
    """

    def __init__(self, rows: int, sizes: tuple[int, ...]) -> None:
        self.rows, self.sizes = rows, sizes

    def apply(self, x: Tensor, function: Callable[..., Tensor], *values: Tensor) -> Tensor:
        """Apply a function to the noisy tokens and the values of their blocks, and leave all other tokens as they are.

        Args:
            x: (tokens, D), the last tokens of the pass.
            function: (noisy tokens, *values) -> noisy tokens; all arguments broadcast.
            values: each (R, S, D), or (R, S, D / 2) for channel pairs.
        """
        count = self.rows * sum(self.sizes)
        others, noisy = x.split((len(x) - count, count))
        if len(set(self.sizes)) == 1:
            by_block = noisy.unflatten(0, (self.rows, len(self.sizes), -1))
            noisy = function(by_block, *(value[:, :, None].to(x.dtype) for value in values)).flatten(0, 2)
        else:
            pieces = [noisy.unflatten(0, (self.rows, -1)).split(self.sizes, dim=1)]
            pieces += [value.to(x.dtype).split(1, dim=1) for value in values]
            noisy = torch.cat([function(*piece) for piece in zip(*pieces, strict=True)], dim=1).flatten(0, 1)
        return torch.cat((others, noisy)) if len(others) else noisy


class AddedEmbedding(Unconditioned):
    """An embedding that is added to the noisy tokens after the patch embedding, and nothing in the blocks.

    Args:
        embedding: (R, S, D) of each noisy block, from :class:`TimeEmbedding`.
        blocks: the noisy blocks.
    """

    def __init__(self, embedding: Tensor, blocks: NoisyBlocks) -> None:
        self.embedding, self.blocks = embedding, blocks

    def at_input(self, x: Tensor) -> Tensor:
        """Add the embedding."""
        return self.blocks.apply(x, torch.add, self.embedding)


class AdaLN:
    """adaLN-Zero of the noisy tokens (DiT, section 3.2); all other tokens have shift 0, scale 0 and gate 1.

    Args:
        embedding: (R, S, D) of each noisy block, from :class:`TimeEmbedding`.
        blocks: the noisy blocks.
        widths: of the values of a branch, see `GPDiTConfig.modulation_widths`.
    """

    def __init__(self, embedding: Tensor, blocks: NoisyBlocks, widths: tuple[int, ...]) -> None:
        self.embedding, self.blocks, self.widths = F.silu(embedding), blocks, widths

    def at_input(self, x: Tensor) -> Tensor:
        """Leave the embedded patches as they are."""
        return x

    def at_block(self, x: Tensor) -> Tensor:
        """Leave the residual stream as it is."""
        return x

    def branches(self, modulation: nn.Linear | None, count: int) -> Sequence["Modulation"]:
        """Compute the values of each branch."""
        assert modulation is not None
        values = modulation(self.embedding)
        if count == 0:
            shift, scale = values.split(self.widths[:-1], dim=-1)
            return (Modulation(self, shift, scale, None),)
        return [Modulation(self, *branch.split(self.widths, dim=-1)) for branch in values.chunk(count, dim=-1)]

    @staticmethod
    def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """x -> x (1 + scale) + shift."""
        return x * (1 + scale) + shift


class RotationModulation(AdaLN):
    """adaLN-Zero with learned rotations of channel pairs in place of the shifts (arXiv:2505.19122).

    The abstract describes "rotation modulation combined with scaling", with 5.4 % fewer parameters than adaLN: those of
    DiT-S if each shift of D channels becomes D / 2 angles, and scales and gates stay. The authors' code scales before
    it rotates, pairs channel k with channel k + D / 2, and begins with angles of 0. Inferred: the rotation of the
    output layer, which the code makes optional, and gates of 0 at the beginning, as in DiT. The code is for a network
    without norms, which is the subject of the rest of that paper; here the norms stay.
    """

    @staticmethod
    def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """x -> x (1 + scale), whose channel pairs are rotated by the angles `shift` (..., D / 2)."""
        return rotate_pairs(x * (1 + scale), shift.cos(), shift.sin())


def conditioning_by_embedding(config: GPDiTConfig, embedding: Tensor, sizes: tuple[int, ...]) -> AdaLN | AddedEmbedding:
    """Return the time conditioning of a pass by an embedding of theta.

    Args:
        config: an architecture with another `time_conditioning` than rotation.
        embedding: (R, S, D) of each noisy block, from :class:`TimeEmbedding`.
        sizes: tokens of each noisy block.
    """
    blocks = NoisyBlocks(len(embedding), sizes)
    if config.time_conditioning == "embedding":
        return AddedEmbedding(embedding, blocks)
    modulated = AdaLN if config.time_conditioning == "adaln" else RotationModulation
    return modulated(embedding, blocks, config.modulation_widths)


class Modulation:
    """The values of one branch: shift or angles, scale and gate (DiT, section 3.2).

    Args:
        time: the conditioning that they belong to.
        shift: (R, S, D), or the angles (R, S, D / 2).
        scale: (R, S, D).
        gate: (R, S, D); None for the output layer.
    """

    def __init__(self, time: AdaLN, shift: Tensor, scale: Tensor, gate: Tensor | None) -> None:
        self.time, self.shift, self.scale, self.gate = time, shift, scale, gate

    def at_branch_input(self, x: Tensor) -> Tensor:
        """Scale, and shift or rotate, the noisy tokens."""
        return self.time.blocks.apply(x, self.time.modulate, self.shift, self.scale)

    def at_branch_output(self, x: Tensor) -> Tensor:
        """x -> gate x."""
        assert self.gate is not None
        return self.time.blocks.apply(x, torch.mul, self.gate)
