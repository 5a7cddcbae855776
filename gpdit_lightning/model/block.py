"""One GPDiT block: frame-causal attention and an MLP on a residual stream (GPDiT, figure 2, middle)."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from gpdit_lightning.model.config import GPDiTConfig
from gpdit_lightning.model.kv_cache import LayerCache
from gpdit_lightning.model.precision import RMSNorm
from gpdit_lightning.model.streams import Streams


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


class Block(nn.Module):
    """RMSNorm, attention with QK-norm, RMSNorm, MLP, with rotation time conditioning in place of DiT's adaLN.

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
        self.mlp_norm = RMSNorm(width, eps=eps)
        self.mlp = MLP(width, config.mlp_width)

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
        rotation = streams.rotation
        x = rotation.at_block(x)
        h = streams.product_input(self.attention_norm(x))
        key, value = self._key_value(h)
        query = self.query_norm(self.query(h[num_kv_only:]).unflatten(-1, (self.heads, -1)))
        attended = streams.attend(query, key, value, layer_cache).flatten(-2)
        x = x[num_kv_only:] + rotation.at_branch_output(self.attention_output(attended))
        h = streams.product_input(self.mlp_norm(x))
        return x + rotation.at_branch_output(self.mlp(h))

    def write_cache(self, x: Tensor, streams: Streams, layer_cache: LayerCache) -> None:
        """Append the keys and values of the clean tokens to this block's cache, and compute nothing else."""
        h = streams.product_input(self.attention_norm(streams.rotation.at_block(x)))
        layer_cache.update(streams.clean_kv(*self._key_value(h)))

    def _key_value(self, h: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.key_value(h).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        return self.key_norm(key), value


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

    Images and videos, clip lengths, numbers of contexts, inner blocks and the last block have more shapes than torch's
    limit of 8 graphs, beyond which it would run eagerly. DDP's optimizer is disabled, since it would split the graphs
    at DDP's buckets; a block is small enough without it. Both settings apply to this call only.
    """
    with torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=1024, optimize_ddp=False):
        return _compiled()(block, x, streams, num_kv_only, layer_cache)
