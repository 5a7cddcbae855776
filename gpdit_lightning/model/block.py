"""A block of the transformer: attention and an MLP on a residual stream (GPDiT, figure 2, middle; ACDiT, figure 4)."""

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn

from gpdit_lightning.model.compilation import MANY_GRAPHS
from gpdit_lightning.model.config import GPDiTConfig
from gpdit_lightning.model.kv_cache import LayerCache
from gpdit_lightning.model.precision import RMSNorm
from gpdit_lightning.model.streams import Streams
from gpdit_lightning.model.time_conditioning import Branch


class MLP(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)
        self.activation = nn.GELU(approximate="tanh")
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.down(self.activation(self.up(x)))


class Attention(nn.Module):
    """RMSNorm and attention with QK-norm.

    The query projection is separate from the key-value projection, since some tokens have no query.
    """

    def __init__(self, config: GPDiTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        width, eps = config.width, config.norm_eps
        self.attention_norm = RMSNorm(width, eps=eps)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.query_norm = RMSNorm(config.head_width, eps=eps)
        self.key_norm = RMSNorm(config.head_width, eps=eps)
        self.attention_output = nn.Linear(width, width, bias=False)

    def update(
        self, x: Tensor, streams: Streams, time: Branch, attend: Callable[..., Tensor], num_kv_only: int = 0
    ) -> Tensor:
        """Return the packed residual stream x (tokens, D) with the output of the attention, less `num_kv_only` tokens.

        Args:
            x: (packed tokens, D).
            streams: the description of the pass.
            time: the time conditioning of this branch.
            attend: function of queries, keys and values.
            num_kv_only: number of tokens, the first ones, without a query.
        """
        h = streams.product_input(self.attention_norm(x), time)
        key, value = self.key_values(h)
        query = self.query_norm(self.query(h[num_kv_only:]).unflatten(-1, (self.heads, -1)))
        attended = attend(query, key, value).flatten(-2)
        return x[num_kv_only:] + time.at_branch_output(self.attention_output(attended))

    def key_values(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (tokens, heads, head width) of (tokens, D)."""
        key, value = self.key_value(h).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        return self.key_norm(key), value


class Block(Attention):
    """Attention and MLP, with the rotation of GPDiT in place of DiT's adaLN, or with another time conditioning.

    With `config.factorized`, an attention within frames (`spatial`) precedes that of this class, which is then along
    time. The class is an attention, and does not contain one, since checkpoints name the weights so.
    """

    def __init__(self, config: GPDiTConfig) -> None:
        super().__init__(config)
        self.mlp_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config.width, config.mlp_width)
        self.spatial = Attention(config) if config.factorized else None
        self.num_branches = config.num_branches
        values = self.num_branches * sum(config.modulation_widths)
        self.modulation = nn.Linear(config.width, values) if values else None

    def forward(
        self, x: Tensor, streams: Streams, num_kv_only: int = 0, layer_cache: LayerCache | None = None
    ) -> Tensor:
        """Update the packed residual stream.

        Args:
            x: (packed tokens, D).
            streams: the description of the pass.
            num_kv_only: number of tokens, the first ones, of which only keys and values are computed, and which are
                dropped: in the last block the prefix and the clean tokens, whose output is not used.
            layer_cache: this block's cache.

        Returns:
            (packed tokens - num_kv_only, D).
        """
        x, (attention, mlp) = self._within_frames(x, streams)
        x = self.update(x, streams, attention, partial(streams.attend, layer_cache=layer_cache), num_kv_only)
        h = streams.product_input(self.mlp_norm(x), mlp)
        return x + mlp.at_branch_output(self.mlp(h))

    def write_cache(self, x: Tensor, streams: Streams, layer_cache: LayerCache) -> None:
        """Append the keys and values of the clean tokens to this block's cache, and compute nothing else."""
        x, (attention, _) = self._within_frames(x, streams)
        h = streams.product_input(self.attention_norm(x), attention)
        layer_cache.update(streams.clean_kv(*self.key_values(h)))

    def _within_frames(self, x: Tensor, streams: Streams) -> tuple[Tensor, Sequence[Branch]]:
        """Apply the attention within frames, if there is one; also return the conditioning of the other branches."""
        x = streams.time.at_block(x)
        branches = streams.time.branches(self.modulation, self.num_branches)
        if self.spatial is not None:
            x = self.spatial.update(x, streams, branches[0], streams.attend_within_frames)
        return x, branches[-2:]


def run_block(
    block: nn.Module, x: Tensor, streams: Streams, num_kv_only: int = 0, layer_cache: LayerCache | None = None
) -> Tensor:
    """`Block.forward`, as a function of the block."""
    return block(x, streams, num_kv_only, layer_cache)


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(run_block, dynamic=False)


def run_compiled_block(
    block: nn.Module, x: Tensor, streams: Streams, num_kv_only: int = 0, layer_cache: LayerCache | None = None
) -> Tensor:
    """:func:`run_block` compiled by `torch.compile`: one graph for each shape of a pass, for all blocks and models.

    There may be many graphs; inner blocks and the last block differ too. DDP's optimizer is disabled, since it would
    split the graphs at DDP's buckets; a block is small enough without it. Both settings apply to this call only.
    """
    with torch._dynamo.config.patch(**MANY_GRAPHS, optimize_ddp=False):
        return _compiled()(block, x, streams, num_kv_only, layer_cache)
