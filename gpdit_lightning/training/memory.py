"""Bytes that training takes on each GPU, from the configuration of backbone and run: what `estimate` rests on.

Tensors are counted, not what an allocator rounds them to.
"""

from dataclasses import dataclass
from typing import NamedTuple

from gpdit_lightning.model import GPDiTConfig

# Elements of one of DeepSpeed's reduce buckets (Lightning's default), and of the weights that ZeRO-3 leaves gathered at
# once (DeepSpeed's default of stage3_max_live_parameters).
REDUCE_BUCKET, LIVE_PARAMETERS = 200_000_000, 1_000_000_000


class Precision(NamedTuple):
    """Bytes of a value.

    Attributes:
        weight: of weights and gradients, and of the residual stream and the norms, which follow the weights.
        product: of what matrix products and attention take and give.
    """

    weight: int
    product: int


AUTOCAST, BF16, FLOAT32 = Precision(4, 2), Precision(2, 2), Precision(4, 4)


@dataclass(frozen=True)
class Strategy:
    """How weights, gradients and what the optimiser keeps lie over the ranks.

    Attributes:
        name: for people.
        option: the value of `trainer.strategy`; empty where this library does not offer it.
        zero: the ZeRO stage; at 0 (DDP) every rank has everything.
        offload: what is spread lies in main memory.
    """

    name: str
    option: str
    zero: int = 0
    offload: bool = False


STRATEGIES = (
    Strategy("DDP", "auto"),
    Strategy("ZeRO-1", "", zero=1),
    Strategy("ZeRO-2", "zero2", zero=2),
    Strategy("ZeRO-2, offloaded", "zero2_offload", zero=2, offload=True),
    Strategy("ZeRO-3", "zero3", zero=3),
    Strategy("ZeRO-3, offloaded", "zero3_offload", zero=3, offload=True),
)


def parameter_count(config: GPDiTConfig) -> int:
    """Parameters of a :class:`~gpdit_lightning.GPDiT`."""
    patch_values = config.latent_channels * config.patch_size**2
    norms = config.layers * (2 * config.width + 2 * config.head_width) + config.width
    ends = 2 * patch_values * config.width + config.width + patch_values
    return config.layers * _products_of_block(config) + norms + ends


def _products_of_block(config: GPDiTConfig) -> int:
    """Weights of the matrix products of one block."""
    return 4 * config.width**2 + 2 * config.width * config.mlp_width


def held_bytes(parameters: int, strategy: Strategy, precision: Precision, ranks: int) -> dict[str, int]:
    """What lies on each GPU throughout training, and what a rank keeps in main memory instead.

    Adam keeps two moments. DDP copies gradients into buckets for reduction (its gradient_as_bucket_view is off). ZeRO
    spreads the moments, a float32 master of every weight, and the average beside the masters; from stage 2 on it adds
    up float32 gradients of its part alone (`training/zero.py`).

    Args:
        parameters: of the backbone.
        strategy: how they are spread.
        precision: of weights and gradients.
        ranks: GPUs.

    Returns:
        bytes of the parts `weights`, `gradients`, `optimizer`, `average`, `buffers` and `main_memory`.
    """
    whole = precision.weight * parameters
    if strategy.zero == 0:
        buffers = whole if ranks > 1 else 0
        held = {"weights": whole, "gradients": whole, "optimizer": 2 * whole, "average": 4 * parameters}
        return held | {"buffers": buffers, "main_memory": 0}
    held = {
        "weights": whole // ranks if strategy.zero == 3 else whole,
        "gradients": 4 * parameters // ranks if strategy.zero >= 2 else whole,
        "optimizer": 12 * parameters // ranks,
        "average": 4 * parameters // ranks,
    }
    # Stages 1 and 2 fill one bucket while another is reduced; stage 3 has one, and the weights in use beside it.
    gathered = precision.weight * min(parameters, LIVE_PARAMETERS)
    buffers = 4 * REDUCE_BUCKET + gathered if strategy.zero == 3 else 2 * 4 * REDUCE_BUCKET
    moved = [name for name in held if strategy.offload and (name != "weights" or strategy.zero == 3)]
    main_memory = sum(held[name] for name in moved)
    return held | dict.fromkeys(moved, 0) | {"buffers": buffers, "main_memory": main_memory}


def step_bytes(parameters: int, strategy: Strategy, precision: Precision, ranks: int) -> int:
    """What an optimizer step takes for itself, when no activations are there.

    On CUDA, torch's Adam takes all parameters at once and with them the roots of all second moments; ZeRO also makes
    a flat copy of its gradients. (Validation takes as much as the roots: a copy of the weights, while the average is
    in their place.)
    """
    if strategy.zero == 0:
        return precision.weight * parameters
    return 0 if strategy.offload else 8 * parameters // ranks


def activation_bytes(
    config: GPDiTConfig,
    clips: int,
    context_clips: int,
    frames: int,
    height: int,
    width: int,
    draws: int = 1,
    precision: Precision = AUTOCAST,
) -> int:
    """What the backward pass of one `GPDiT.forward` needs at its fullest moment, beside weights and their gradients.

    Autograd keeps the inputs of products and norms, and of attention query, key, value, result and one number per row
    and head. Without activation checkpointing the fullest moment is the end of the forward pass. With it, it is the
    backward pass of a block, when the inputs of all blocks are there and everything inside this one.

    A norm is CUDA's fused kernel, which keeps its input and one number per row; on the CPU it keeps its result too.
    Left out: tables of cosines, the batch, and whatever torch.compile saves.

    Args:
        config: the architecture; its `activation_checkpointing` counts.
        clips: B.
        context_clips: B', how many of them have context.
        frames: F, latent frames.
        height, width: of a latent frame, in latent pixels.
        draws: K, noisy copies of every clip, that share its one clean stream.
        precision: float32 weights with bf16 products are autocast, which casts in front of every product.
    """
    tokens = (height // config.patch_size) * (width // config.patch_size)
    patch_values = config.latent_channels * config.patch_size**2
    noisy = draws * clips * frames * tokens
    packed = context_clips * (frames - 1) * tokens + noisy
    # Noisy frame i > 0 with context sees copies: the keys of the i clean frames before it, and its own behind them.
    joined = draws * context_clips * (frames * (frames + 1) // 2 - 1) * tokens
    cast = precision.weight != precision.product

    def inside(asking: int) -> int:
        """Everything inside a block, except its input; `asking` tokens go on to its output."""
        products = config.width * (
            packed  # the input of the key-value projection
            + (asking if cast else 0)  # that of the query projection: the same tensor, but cast a second time
            + 2 * packed  # keys and values as projected
            + (0 if cast else asking)  # queries as projected, which their norm keeps (of the keys: no second time)
            + 2 * asking  # queries and keys with positions
            + 2 * joined
            + 2 * asking  # the result of attention, and packed for its projection
            + asking  # the input of the MLP
        )
        products += config.mlp_width * 2 * asking  # before and after GELU
        products += _products_of_block(config) if cast else 0  # cast weights: Lightning's autocast does not share them
        stream = config.width * asking  # between attention and MLP
        stream += config.width * (packed + asking) if cast else 0  # keys and queries in the norms' precision
        rows = config.heads * (packed + 2 * asking)  # of the norms of keys and queries, and of attention, in float32
        return precision.product * products + precision.weight * stream + 4 * rows

    inputs = config.layers * config.width * packed * precision.weight + patch_values * packed * precision.product
    inner, last = inside(packed) if config.layers > 1 else 0, inside(noisy)
    # Gradients on their way through an MLP: one of its hidden layer, two of the stream; and that of its first weights.
    passing = config.mlp_width * precision.product + 2 * config.width * precision.weight
    new = config.width * config.mlp_width * precision.weight
    if config.activation_checkpointing:
        return inputs + max(inner, last) + packed * passing + new
    output = noisy * config.width * (precision.weight + precision.product)
    return inputs + (config.layers - 1) * inner + last + output + noisy * passing + new
