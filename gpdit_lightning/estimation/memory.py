"""Bytes that training takes on each GPU, from the configuration of backbone and run: what `estimate` rests on.

Tensors are counted, not what an allocator rounds them to.
"""

from dataclasses import dataclass
from typing import NamedTuple

from gpdit_lightning.estimation.flops import PassShape
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
        stage: what is spread, as ZeRO counts: 1 moments, masters and the average, 2 gradients too, 3 weights too; at 0
            every rank has everything.
        deepspeed: DeepSpeed spreads it, which computes with weights of their own beside float32 masters; torch, which
            spreads the float32 weights and casts what it gathers, otherwise.
        offload: what is spread lies in main memory.
    """

    name: str
    option: str
    stage: int = 0
    deepspeed: bool = False
    offload: bool = False


STRATEGIES = (
    Strategy("DDP", "auto"),
    Strategy("ZeRO-1", "", stage=1, deepspeed=True),
    Strategy("ZeRO-2", "zero2", stage=2, deepspeed=True),
    Strategy("ZeRO-2, offloaded", "zero2_offload", stage=2, deepspeed=True, offload=True),
    Strategy("ZeRO-3", "zero3", stage=3, deepspeed=True),
    Strategy("ZeRO-3, offloaded", "zero3_offload", stage=3, deepspeed=True, offload=True),
    Strategy("FSDP2", "fsdp2", stage=3),
)


def parameter_count(config: GPDiTConfig) -> int:
    """Parameters of a :class:`~gpdit_lightning.GPDiT`."""
    patch_values = config.latent_channels * config.patch_size**2
    ends = 2 * patch_values * config.width + config.width + patch_values
    told = config.classes or config.text_width
    prefix = (told + 1) * config.width if told else 0  # also an embedding of no class, or the bias
    return config.layers * _parameters_of_block(config) + config.width + ends + prefix


def _parameters_of_block(config: GPDiTConfig) -> int:
    return _products_of_block(config) + 2 * config.width + 2 * config.head_width


def _products_of_block(config: GPDiTConfig) -> int:
    """Weights of the matrix products of one block."""
    return 4 * config.width**2 + 2 * config.width * config.mlp_width


def held_bytes(config: GPDiTConfig, strategy: Strategy, precision: Precision, ranks: int) -> dict[str, int]:
    """What lies on each GPU throughout training, and what a rank keeps in main memory instead.

    Adam keeps two moments. DeepSpeed shards them, a float32 master of every weight, and the average beside the
    masters; from stage 2 on it accumulates float32 gradients of its own shard alone (`training/strategies/zero.py`).
    FSDP2 shards the same but needs no masters: its weights are float32 (`training/strategies/fsdp.py`). The buffers
    are counted at their fullest.

    Args:
        config: of the backbone.
        strategy: how it is spread.
        precision: of the weights that it computes with, and of their gradients.
        ranks: GPUs.

    Returns:
        bytes of the parts `weights`, `gradients`, `optimizer`, `average`, `buffers` and `main_memory`.
    """
    parameters = parameter_count(config)
    whole, share = precision.weight * parameters, 4 * parameters // ranks
    if strategy.stage == 0:
        held = {"weights": whole, "gradients": whole, "optimizer": 2 * whole, "average": 4 * parameters}
        # Copies of the gradients to reduce, as DDP's gradient_as_bucket_view is off.
        return held | {"buffers": whole if ranks > 1 else 0, "main_memory": 0}
    if not strategy.deepspeed:
        held = {"weights": share, "gradients": share, "optimizer": 2 * share, "average": share}
        # A block's gathered weights, the next one's, its gradients, and these in float32, laid out by rank.
        gathered = (3 * precision.weight + 4) * _parameters_of_block(config)
        return held | {"buffers": gathered, "main_memory": 0}
    held = {
        "weights": whole // ranks if strategy.stage == 3 else whole,
        "gradients": share if strategy.stage >= 2 else whole,
        "optimizer": 3 * share,
        "average": share,
    }
    moved = [name for name in held if strategy.offload and (name != "weights" or strategy.stage == 3)]
    main_memory = sum(held[name] for name in moved)
    buffers = _deepspeed_buffers(parameters, strategy.stage, precision, ranks)
    return held | dict.fromkeys(moved, 0) | {"buffers": buffers, "main_memory": main_memory}


def _deepspeed_buffers(parameters: int, stage: int, precision: Precision, ranks: int) -> int:
    """What DeepSpeed takes to reduce gradients and, at stage 3, to gather weights."""
    reduced = min(parameters, REDUCE_BUCKET)
    if stage == 3:
        # One bucket, a copy of it laid out by rank, both float32; and the weights that stay gathered.
        return 4 * (REDUCE_BUCKET + reduced) + precision.weight * min(parameters, LIVE_PARAMETERS)
    # One bucket is filled while another is reduced: as one flat copy, and that in float32.
    buffers = 2 * precision.weight * REDUCE_BUCKET + precision.weight * reduced
    if precision.weight == 4:
        return buffers + 4 * parameters // ranks  # the gradients of this micro-batch beside the sum of those before it
    return buffers + 4 * reduced


def step_bytes(config: GPDiTConfig, strategy: Strategy, ranks: int) -> int:
    """What an optimizer step takes for itself, when no activations are there.

    On CUDA, torch's Adam takes all parameters at once and with them the roots of all second moments. DeepSpeed's stage
    3 also makes a flat copy of its gradients, beside which it keeps them. (Validation takes as much as the roots: a
    copy of the weights, while the average is in their place.)
    """
    if strategy.offload:
        return 0
    roots = 4 * parameter_count(config) // (ranks if strategy.stage else 1)
    return 2 * roots if strategy.deepspeed and strategy.stage == 3 else roots


def activation_bytes(config: GPDiTConfig, shape: PassShape, precision: Precision = AUTOCAST) -> int:
    """What the backward pass of one `GPDiT.forward` needs at its fullest moment, beside weights and their gradients.

    Autograd keeps the inputs of products and norms, and of attention query, key, value, result and one number per row
    and head. Without activation checkpointing the fullest moment is the end of the forward pass. With it, it is the
    backward pass of a block, when the inputs of all blocks are there and everything inside this one.

    A norm is CUDA's fused kernel, which keeps its input and one number per row; on the CPU it keeps its result too.
    Left out: tables of cosines, the batch, the one token of a label, and whatever torch.compile saves.

    Args:
        config: the architecture; its `activation_checkpointing` counts.
        shape: of the pass.
        precision: float32 weights with bf16 products are autocast, which casts in front of every product.
    """
    patch_values = config.latent_channels * config.patch_size**2
    noisy = shape.noisy_tokens(config)
    packed = shape.clean_tokens(config) + noisy
    # Noisy frame i > 0 with context sees copies: the keys of the i clean frames before it, and its own behind them.
    joined_frames = sum(frame + 1 for frame in shape.noisy if frame)
    joined = shape.draws * shape.context_clips * joined_frames * shape.tokens(config)
    # The others see their own keys with positions, and behind a condition's a copy of their values: both are made, and
    # kept, for all noisy frames at once.
    own = noisy if 0 in shape.noisy or shape.context_clips < shape.clips else 0
    copied = own if config.classes or config.text_width else 0
    cast = precision.weight != precision.product

    def inside(asking: int) -> int:
        """Everything inside a block, except its input; `asking` tokens go on to its output."""
        products = config.width * (
            packed  # the input of the key-value projection
            + (asking if cast else 0)  # that of the query projection: the same tensor, but cast a second time
            + 2 * packed  # keys and values as projected
            + (0 if cast else asking)  # queries as projected, which their norm keeps (of the keys: no second time)
            + asking  # queries with positions
            + (asking - noisy + own)  # and keys, of clean and of noisy frames
            + 2 * joined
            + copied
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
