"""One GPDiT block: frame-causal attention and an MLP on a residual stream (GPDiT, figure 2, middle)."""

from torch import Tensor, nn

from gpdit_lightning.model.config import GPDiTConfig
from gpdit_lightning.model.kv_cache import Memory
from gpdit_lightning.model.streams import Streams


def normed(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """`norm(x)` in the precision of its weight: under autocast `x` is a product in bf16, and positions come next."""
    return norm(x.to(norm.weight.dtype))


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
    """RMSNorm, attention with QK-norm, RMSNorm, MLP; rotation time conditioning where the adaLN of a DiT would be.

    The query projection is apart from the key-value projection, so that tokens which are only looked at need not ask.
    """

    def __init__(self, config: GPDiTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        width, eps = config.width, config.norm_eps
        self.attention_norm = nn.RMSNorm(width, eps=eps)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.query_norm = nn.RMSNorm(config.head_width, eps=eps)
        self.key_norm = nn.RMSNorm(config.head_width, eps=eps)
        self.attention_output = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=eps)
        self.mlp = MLP(width, config.mlp_width)

    def forward(self, x: Tensor, streams: Streams, skip: int = 0, memory: Memory | None = None) -> Tensor:
        """Update the packed residual stream.

        Args:
            x: (packed tokens, D).
            streams: the pass these tokens belong to.
            skip: the first `skip` tokens give keys and values only and leave the stream: the prefix and the clean
                tokens of the last block, whose output nobody needs.
            memory: this block's part of a cache.

        Returns:
            (packed tokens - skip, D).
        """
        rotation = streams.rotation
        x = rotation.at_block(x)
        h = rotation.at_branch_input(self.attention_norm(x))
        key, value = self._key_value(h)
        query = normed(self.query_norm, self.query(h[skip:]).unflatten(-1, (self.heads, -1)))
        attended = streams.attend(query, key, value, memory).flatten(-2)
        x = x[skip:] + rotation.at_branch_output(self.attention_output(attended))
        h = rotation.at_branch_input(self.mlp_norm(x))
        return x + rotation.at_branch_output(self.mlp(h))

    def remember(self, x: Tensor, streams: Streams, memory: Memory) -> None:
        """Only write the clean tokens' keys and values to this block's part of a cache."""
        h = streams.rotation.at_branch_input(self.attention_norm(streams.rotation.at_block(x)))
        streams.context(*self._key_value(h), memory)

    def _key_value(self, h: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.key_value(h).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        return normed(self.key_norm, key), value
