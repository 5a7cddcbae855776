"""Bytes that training takes on each GPU, computed from the configurations of the backbone and the run.

Tensors are counted, without the rounding of an allocator.
"""

from dataclasses import dataclass
from typing import NamedTuple

from gpdit_lightning.estimation.flops import PassShape
from gpdit_lightning.model import GPDiTConfig

# Elements of one of DeepSpeed's reduce buckets (Lightning's default), and of the weights that ZeRO-3 leaves gathered at
# once (DeepSpeed's default of stage3_max_live_parameters).
REDUCE_BUCKET, LIVE_PARAMETERS = 200_000_000, 1_000_000_000


class BytesPerValue(NamedTuple):
    """Bytes of a value.

    Attributes:
        weight: of weights and gradients, and of the residual stream and the norms, which have the weights' dtype.
        product: of the inputs and outputs of matrix products and attention.
    """

    weight: int
    product: int


AUTOCAST, BF16, FLOAT32 = BytesPerValue(4, 2), BytesPerValue(2, 2), BytesPerValue(4, 4)


@dataclass(frozen=True)
class ShardingStrategy:
    """What is sharded across the ranks.

    Attributes:
        name: for reports.
        option: the value of `trainer.strategy`; empty where this library does not offer it.
        stage: as ZeRO counts: 0 nothing is sharded; 1 optimizer state, float32 master weights and the averaged weights;
            2 gradients too; 3 weights too.
        deepspeed: DeepSpeed shards, whose weights are copies in the precision of the products beside float32 master
            weights; otherwise torch, which shards float32 weights and casts what it gathers.
        offload: what is sharded is in host memory.
    """

    name: str
    option: str
    stage: int = 0
    deepspeed: bool = False
    offload: bool = False


STRATEGIES = (
    ShardingStrategy("DDP", "auto"),
    ShardingStrategy("ZeRO-1", "", stage=1, deepspeed=True),
    ShardingStrategy("ZeRO-2", "zero2", stage=2, deepspeed=True),
    ShardingStrategy("ZeRO-2, offloaded", "zero2_offload", stage=2, deepspeed=True, offload=True),
    ShardingStrategy("ZeRO-3", "zero3", stage=3, deepspeed=True),
    ShardingStrategy("ZeRO-3, offloaded", "zero3_offload", stage=3, deepspeed=True, offload=True),
    ShardingStrategy("FSDP2", "fsdp2", stage=3),
)


def parameter_count(config: GPDiTConfig) -> int:
    """Parameters of a :class:`~gpdit_lightning.GPDiT`."""
    patch_values = config.latent_channels * config.patch_size**2
    ends = 2 * patch_values * config.width + config.width + patch_values
    condition = config.classes or config.text_width
    prefix = (condition + 1) * config.width if condition else 0  # also an embedding of no class, or the bias
    return config.layers * _parameters_of_block(config) + config.width + ends + prefix


def _parameters_of_block(config: GPDiTConfig) -> int:
    return _products_of_block(config) + 2 * config.width + 2 * config.head_width


def _products_of_block(config: GPDiTConfig) -> int:
    """Weights of the matrix products of one block."""
    return 4 * config.width**2 + 2 * config.width * config.mlp_width


def held_bytes(config: GPDiTConfig, strategy: ShardingStrategy, precision: BytesPerValue, ranks: int) -> dict[str, int]:
    """Bytes that are held on each GPU throughout training, and in a rank's host memory instead.

    Adam's state is two values per parameter. DeepSpeed shards it, float32 master weights, and the averaged weights;
    from stage 2 on it accumulates float32 gradients of its own shard only (`training/strategies/zero.py`). FSDP2 shards
    the same but needs no master weights, since its weights are float32 (`training/strategies/fsdp.py`). The buffers
    are counted at their largest.

    Args:
        config: of the backbone.
        strategy: what is sharded.
        precision: of the weights in the products, and of their gradients.
        ranks: GPUs.

    Returns:
        Bytes by part: `weights`, `gradients`, `optimizer`, `average`, `buffers` and `host_memory`.
    """
    parameters = parameter_count(config)
    whole, share = precision.weight * parameters, 4 * parameters // ranks
    if strategy.stage == 0:
        held = {"weights": whole, "gradients": whole, "optimizer": 2 * whole, "average": 4 * parameters}
        # Copies of the gradients to reduce, as DDP's gradient_as_bucket_view is off.
        return held | {"buffers": whole if ranks > 1 else 0, "host_memory": 0}
    if not strategy.deepspeed:
        held = {"weights": share, "gradients": share, "optimizer": 2 * share, "average": share}
        # A block's gathered weights, the next block's, the block's gradients, and these in float32 by rank.
        gathered = (3 * precision.weight + 4) * _parameters_of_block(config)
        return held | {"buffers": gathered, "host_memory": 0}
    held = {
        "weights": whole // ranks if strategy.stage == 3 else whole,
        "gradients": share if strategy.stage >= 2 else whole,
        "optimizer": 3 * share,
        "average": share,
    }
    moved = [name for name in held if strategy.offload and (name != "weights" or strategy.stage == 3)]
    host_memory = sum(held[name] for name in moved)
    buffers = _deepspeed_buffers(parameters, strategy.stage, precision, ranks)
    return held | dict.fromkeys(moved, 0) | {"buffers": buffers, "host_memory": host_memory}


def _deepspeed_buffers(parameters: int, stage: int, precision: BytesPerValue, ranks: int) -> int:
    """Bytes of DeepSpeed's buffers to reduce gradients and, at stage 3, to gather weights."""
    reduced = min(parameters, REDUCE_BUCKET)
    if stage == 3:
        # One bucket, a copy of it ordered by rank, both float32; and the weights that stay gathered.
        return 4 * (REDUCE_BUCKET + reduced) + precision.weight * min(parameters, LIVE_PARAMETERS)
    # One bucket is filled while another is reduced: as one flat copy, and that in float32.
    buffers = 2 * precision.weight * REDUCE_BUCKET + precision.weight * reduced
    if precision.weight == 4:
        return buffers + 4 * parameters // ranks  # the gradients of this micro-batch beside the accumulated ones
    return buffers + 4 * reduced


def step_bytes(config: GPDiTConfig, strategy: ShardingStrategy, ranks: int) -> int:
    """Bytes of temporary values of an optimizer step, when there are no activations.

    On CUDA, torch's Adam updates all parameters at once, and so holds the square roots of all second moments.
    DeepSpeed's stage 3 also makes a flat copy of its gradients. (Validation takes as much as the roots: a copy of the
    weights, while the average is in their place.)
    """
    if strategy.offload:
        return 0
    roots = 4 * parameter_count(config) // (ranks if strategy.stage else 1)
    return 2 * roots if strategy.deepspeed and strategy.stage == 3 else roots


def activation_bytes(config: GPDiTConfig, shape: PassShape, precision: BytesPerValue = AUTOCAST) -> int:
    """Peak bytes of the activations of one forward and backward pass, without weights and their gradients.

    Autograd keeps the inputs of products and norms, and of attention query, key, value, result and one number per row
    and head. Without activation checkpointing the peak is at the end of the forward pass. With it, the peak is in the
    backward pass of a block, when the inputs of all blocks and everything inside this one are held.

    A norm is CUDA's fused kernel, which keeps its input and one number per row; on the CPU it keeps its result too.
    Not counted: tables of cosines, the batch, the token of a label, and what torch.compile saves.

    Args:
        config: the architecture, and whether it checkpoints activations.
        shape: of the pass.
        precision: float32 weights with bf16 products are autocast, which casts before every product.
    """
    noisy = shape.noisy_tokens(config)
    packed = shape.clean_tokens(config) + noisy
    patch_values = config.latent_channels * config.patch_size**2
    inputs = config.layers * config.width * packed * precision.weight + patch_values * packed * precision.product
    inner = _bytes_inside_block(config, shape, precision, queries=packed) if config.layers > 1 else 0
    last = _bytes_inside_block(config, shape, precision, queries=noisy)
    # Gradients inside an MLP: one of its hidden layer, two of the residual stream; and that of its first weights.
    in_mlp = config.mlp_width * precision.product + 2 * config.width * precision.weight
    first_weights = config.width * config.mlp_width * precision.weight
    if config.activation_checkpointing:
        return inputs + max(inner, last) + packed * in_mlp + first_weights
    output = noisy * config.width * (precision.weight + precision.product)
    return inputs + (config.layers - 1) * inner + last + output + noisy * in_mlp + first_weights


def _bytes_inside_block(config: GPDiTConfig, shape: PassShape, precision: BytesPerValue, queries: int) -> int:
    """Bytes that autograd keeps inside a block, without its input; `queries` of its tokens have queries."""
    noisy = shape.noisy_tokens(config)
    packed = shape.clean_tokens(config) + noisy
    # A noisy frame i > 0 with context attends to copies: the keys of the i clean frames before it, then its own.
    joined_frames = sum(frame + 1 for frame in shape.noisy if frame)
    joined = shape.draws * shape.context_clips * joined_frames * shape.tokens(config)
    # The others attend to their own keys with positions and, where there is a condition, to a copy of their values
    # after its own: both are computed, and kept, for all noisy frames at once.
    own = noisy if 0 in shape.noisy or shape.context_clips < shape.clips else 0
    copied = own if config.classes or config.text_width else 0
    cast = precision.weight != precision.product
    products = config.width * (
        packed  # the input of the key-value projection
        + (queries if cast else 0)  # that of the query projection: the same tensor, but cast a second time
        + 2 * packed  # keys and values as projected
        + (0 if cast else queries)  # queries as projected, which their norm keeps (of the keys: no second time)
        + queries  # queries with positions
        + (queries - noisy + own)  # and keys, of clean and of noisy frames
        + 2 * joined
        + copied
        + 2 * queries  # the result of attention, and packed for its projection
        + queries  # the input of the MLP
    )
    products += config.mlp_width * 2 * queries  # before and after GELU
    products += _products_of_block(config) if cast else 0  # cast weights: Lightning's autocast does not share them
    stream = config.width * queries  # between attention and MLP
    stream += config.width * (packed + queries) if cast else 0  # keys and queries in the norms' precision
    rows = config.heads * (packed + 2 * queries)  # of the norms of keys and queries, and of attention, in float32
    return precision.product * products + precision.weight * stream + 4 * rows
