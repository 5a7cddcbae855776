"""Memory of training on each GPU, computed from the configurations of the backbone and the run.

The sizes of tensors are counted, without the rounding of an allocator.
"""

from dataclasses import dataclass
from typing import NamedTuple

from gpdit_lightning.estimation.flops import PassShape
from gpdit_lightning.model import GPDiTConfig
from gpdit_lightning.model.attention import AttentionPlan
from gpdit_lightning.model.attention.flex import padded_lengths
from gpdit_lightning.model.attention.xformers_backends import block_lengths
from gpdit_lightning.model.time_conditioning import FREQUENCIES

# Elements of a reduce bucket of DeepSpeed (Lightning's default), and of the weights that ZeRO-3 keeps gathered at a
# time (DeepSpeed's default of stage3_max_live_parameters).
REDUCE_BUCKET, LIVE_PARAMETERS = 200_000_000, 1_000_000_000


PACKED = ("xformers_block_diagonal", "flex_attention")
"""Attention backends that copy the inputs of a layer into one sequence; `auto` is counted as one of the others."""


class BytesPerValue(NamedTuple):
    """Bytes per value, by use.

    Attributes:
        weight: bytes in the weights that the model computes with, and in their gradients.
        product: bytes in the inputs and outputs of matrix products and attention.
    """

    weight: int
    product: int


AUTOCAST, BF16, FLOAT32 = BytesPerValue(4, 2), BytesPerValue(2, 2), BytesPerValue(4, 4)
STREAM_BYTES = 4  # per value of the residual stream and the norms: float32 in every precision (`model/precision.py`)


@dataclass(frozen=True)
class ShardingStrategy:
    """A strategy of sharding a model across ranks.

    Attributes:
        name: name for reports.
        option: value of `trainer.strategy`.
        stage: stage as in ZeRO. 0: nothing is sharded; 2: optimizer state, float32 master weights, averaged weights and
            gradients; 3: also weights.
        deepspeed: whether DeepSpeed shards. Its weights have the precision of the products, beside float32 master
            weights; torch shards float32 weights and casts them when it gathers them.
        offload: whether sharded tensors are kept in host memory.
    """

    name: str
    option: str
    stage: int = 0
    deepspeed: bool = False
    offload: bool = False


STRATEGIES = (
    ShardingStrategy("DDP", "auto"),
    ShardingStrategy("ZeRO-2", "zero2", stage=2, deepspeed=True),
    ShardingStrategy("ZeRO-2, offloaded", "zero2_offload", stage=2, deepspeed=True, offload=True),
    ShardingStrategy("ZeRO-3", "zero3", stage=3, deepspeed=True),
    ShardingStrategy("ZeRO-3, offloaded", "zero3_offload", stage=3, deepspeed=True, offload=True),
    ShardingStrategy("FSDP2", "fsdp2", stage=3),
)


def parameter_count(config: GPDiTConfig) -> int:
    """Return the number of parameters of a :class:`~gpdit_lightning.GPDiT`."""
    patch_values = config.latent_channels * config.patch_size**2
    ends = 2 * patch_values * config.width + config.width + patch_values
    width, condition = config.width, config.classes or config.text_width
    ends += (condition + 1) * width if condition else 0  # one more: the embedding of no class, or the bias
    if config.time_conditioning != "rotation":
        ends += (FREQUENCIES + 1) * width + (width + 1) * width + (width + 1) * sum(config.modulation_widths[:-1])
    return config.layers * parameters_of_block(config) + width + ends


def parameters_of_block(config: GPDiTConfig) -> int:
    """Return the number of parameters of one block."""
    biases = _modulation_values(config)
    norms = 2 * config.width + 2 * config.head_width
    norms += config.width + 2 * config.head_width if config.factorized else 0
    return _products_of_block(config) + norms + biases


def _products_of_block(config: GPDiTConfig) -> int:
    """Return the number of weights in the matrix products of one block."""
    of_attention = (8 if config.factorized else 4) * config.width**2
    return of_attention + 2 * config.width * config.mlp_width + _modulation_values(config) * config.width


def _modulation_values(config: GPDiTConfig) -> int:
    """Return the number of values that the embedding of theta gives a block: shifts or angles, scales and gates."""
    return config.num_branches * sum(config.modulation_widths)


def held_bytes(config: GPDiTConfig, strategy: ShardingStrategy, precision: BytesPerValue, ranks: int) -> dict[str, int]:
    """Return the bytes of persistent tensors on each GPU, and of those in a rank's host memory.

    Adam's state is two values per parameter. DeepSpeed shards the state, the float32 master weights and the averaged
    weights; each rank accumulates float32 gradients of its shard only (`training/strategies/zero.py`).
    FSDP2 shards the same tensors but has no master weights, since its weights are float32
    (`training/strategies/fsdp.py`). Buffers are counted at their largest size.

    Args:
        config: configuration of the backbone.
        strategy: sharding strategy.
        precision: precision of the weights in the products, and of their gradients.
        ranks: number of GPUs.

    Returns:
        Bytes by part: `weights`, `gradients`, `optimizer`, `average`, `buffers` and `host_memory`.
    """
    parameters = parameter_count(config)
    full, shard = precision.weight * parameters, 4 * parameters // ranks
    if strategy.stage == 0:
        held = {"weights": full, "gradients": full, "optimizer": 2 * full, "average": 4 * parameters}
        # DDP copies the gradients that it reduces, since its gradient_as_bucket_view is off.
        return held | {"buffers": full if ranks > 1 else 0, "host_memory": 0}
    if not strategy.deepspeed:
        held = {"weights": shard, "gradients": shard, "optimizer": 2 * shard, "average": shard}
        # The gathered weights of a block and of the next one, and the block's gradients, also in float32 by rank.
        gathered = (3 * precision.weight + 4) * parameters_of_block(config)
        return held | {"buffers": gathered, "host_memory": 0}
    held = {
        "weights": full // ranks if strategy.stage == 3 else full,
        "gradients": shard,
        "optimizer": 3 * shard,
        "average": shard,
    }
    offloaded = [name for name in held if strategy.offload and (name != "weights" or strategy.stage == 3)]
    host_memory = sum(held[name] for name in offloaded)
    buffers = _deepspeed_buffers(parameters, strategy.stage, precision, ranks)
    return held | dict.fromkeys(offloaded, 0) | {"buffers": buffers, "host_memory": host_memory}


def _deepspeed_buffers(parameters: int, stage: int, precision: BytesPerValue, ranks: int) -> int:
    """Return the bytes of DeepSpeed's buffers for reducing gradients and, at stage 3, for gathering weights."""
    reduced = min(parameters, REDUCE_BUCKET)
    if stage == 3:
        # One bucket and a copy of it ordered by rank, both float32; and the gathered weights.
        return 4 * (REDUCE_BUCKET + reduced) + precision.weight * min(parameters, LIVE_PARAMETERS)
    # One bucket is filled while another is reduced, from a flat copy that is then converted to float32.
    buffers = 2 * precision.weight * REDUCE_BUCKET + precision.weight * reduced
    if precision.weight == 4:
        return buffers + 4 * parameters // ranks  # gradients of this micro-batch, beside the accumulated ones
    return buffers + 4 * reduced


def step_bytes(config: GPDiTConfig, strategy: ShardingStrategy, ranks: int) -> int:
    """Return the bytes of temporary tensors of an optimizer step, during which there are no activations.

    Adam's update allocates the square roots of all second moments where it is not fused (it is on CUDA, without fp16),
    and validation as much: a copy of the weights while they are replaced by the average. DeepSpeed's stage 3 also makes
    a flat copy of its gradients.
    """
    if strategy.offload:
        return 0
    roots = 4 * parameter_count(config) // (ranks if strategy.stage else 1)
    return 2 * roots if strategy.deepspeed and strategy.stage == 3 else roots


def activation_bytes(config: GPDiTConfig, shape: PassShape, precision: BytesPerValue = AUTOCAST) -> int:
    """Return the peak bytes of the activations of one forward and backward pass, without weights and their gradients.

    Autograd saves the inputs of products and norms, and of attention the query, key, value, result and one number per
    row and head. Without activation checkpointing the peak is at the end of the forward pass. With it, the peak is in
    the backward pass of a block, when the inputs of all blocks and all activations of this block are saved.

    Norms are assumed to be CUDA's fused kernel, which saves its input and one number per row; on a CPU the result is
    saved too. Not counted: tables of cosines, the batch, the token of a label, and savings by torch.compile.

    Args:
        config: the architecture, and whether activations are checkpointed.
        shape: shape of the pass.
        precision: float32 weights with bf16 products mean autocast, which casts before every product.
    """
    noisy = shape.noisy_tokens(config)
    packed = shape.clean_tokens(config) + noisy
    patch_values = config.latent_channels * config.patch_size**2
    inputs = config.layers * config.width * packed * STREAM_BYTES + patch_values * packed * precision.product
    inner = _bytes_inside_block(config, shape, precision, queries=packed) if config.layers > 1 else 0
    last_queries = noisy or packed  # of the last block
    last = _bytes_inside_block(config, shape, precision, last_queries)
    # In the backward pass of an MLP: gradients of the hidden layer, of two residual streams and of the first weights.
    mlp_gradients = config.mlp_width * precision.product + 2 * config.width * STREAM_BYTES
    first_weights = config.width * config.mlp_width * precision.weight
    if config.activation_checkpointing:
        return inputs + max(inner, last) + packed * mlp_gradients + first_weights
    output = noisy * config.width * (STREAM_BYTES + precision.product)
    return inputs + (config.layers - 1) * inner + last + output + last_queries * mlp_gradients + first_weights


def _bytes_inside_block(config: GPDiTConfig, shape: PassShape, precision: BytesPerValue, queries: int) -> int:
    """Return the bytes that autograd saves inside a block, without its input.

    Args:
        config: the architecture.
        shape: shape of the pass.
        precision: bytes per value.
        queries: number of tokens of the block that have queries.
    """
    noisy = shape.noisy_tokens(config)
    packed = shape.clean_tokens(config) + noisy
    blocks = shape.blocks(config)
    # Noisy blocks without context attend to their own rotated keys and, with a condition, to a copy of their values
    # behind those of the condition. Both are computed and saved for all noisy blocks together.
    packs_layers = config.attention_backend in PACKED
    own_keys = 0 if packs_layers else noisy * (0 in blocks.contexts or shape.context_clips < shape.clips)
    copied_values = own_keys if config.has_prefix else 0
    casts_stream, casts_weights = precision.product != STREAM_BYTES, precision.product != precision.weight
    if config.factorized:
        # Attention along time has copies of its inputs in another order, and of the projected keys and values those
        # that are cast are not saved.
        copied_values = own_keys + queries - noisy - (2 * packed if casts_stream else 0)
    if packs_layers:
        copied_values = -2 * packed if casts_stream else 0  # the copies are saved in place of the projected ones
        plans = shape.plans(config)
        plan = plans.all_queries if queries > noisy else plans.noisy_queries
        copied_keys = _packed_copies(config.attention_backend, plan, queries)
    else:
        copied_keys = queries - noisy + own_keys  # rotated keys of clean and of noisy frames
        copied_keys += 2 * _joined_keys(config, shape, clean_queries=queries > noisy)
    products = config.width * (
        _saved_around_attention(packed, queries, precision) + copied_keys + copied_values + queries  # input of the MLP
    )
    products += config.mlp_width * 2 * queries  # before and after GELU
    products += _products_of_block(config) if casts_weights else 0  # which Lightning's autocast does not cache
    stream = config.width * queries  # between attention and MLP
    norms = packed + queries  # of keys and queries
    if config.factorized:  # attention within frames, over all tokens: also rotated keys, and the stream after it
        within = _packed_copies(config.attention_backend, plans.within_frames, packed) if packs_layers else packed
        products += config.width * (_saved_around_attention(packed, packed, precision) + within)
        products -= config.width * 2 * packed if packs_layers and casts_stream else 0
        stream += config.width * packed
        norms += 2 * packed
    stream += config.width * norms if casts_stream else 0  # inputs of these norms
    if config.modulation_widths:
        # Of all tokens of the pass, though only the noisy ones are scaled and gated: they are a view of the others.
        within_frames = packed if config.factorized else 0
        stream += config.width * (within_frames + packed + queries)  # normed, which scales multiply
        products += config.width * (within_frames + 2 * queries)  # outputs of the branches, which gates multiply
        noisy_blocks = shape.draws * shape.clips * len(blocks.noisy)
        products += noisy_blocks * _modulation_values(config)
        stream += noisy_blocks * config.num_branches * config.width  # 1 + scale
        if config.time_conditioning == "rotation_modulation":  # the scaled noisy tokens, and angles, cosines and sines
            stream += config.num_branches * (config.width * noisy + noisy_blocks * 3 * (config.width // 2))
    # float32 numbers of the norms of keys and queries, and of attention
    rows = config.heads * (norms + queries + (packed if config.factorized else 0))
    return precision.product * products + STREAM_BYTES * stream + 4 * rows


def _saved_around_attention(packed: int, queries: int, precision: BytesPerValue) -> int:
    """Return the tokens that an attention saves in the precision of products, besides its rotated keys and values.

    Args:
        packed: tokens with keys and values.
        queries: tokens with queries.
        precision: bytes per value.
    """
    return (
        packed  # input of the projections to keys, values and queries
        + 2 * packed  # projected keys and values
        + (queries if precision.product == STREAM_BYTES else 0)  # projected queries, saved by their norm like the keys
        + queries  # rotated queries
        + 2 * queries  # result of attention, and its packed copy for the output projection
    )


def _packed_copies(backend: str, plan: AttentionPlan | None, queries: int) -> int:
    """Return the tokens that a backend of whole layers saves in the precision of products, besides queries and result.

    They are the gathered keys and values, or the padded ones with the padding of queries and result.
    """
    assert plan is not None
    if backend == "xformers_block_diagonal":
        return 2 * sum(keys for _, keys in block_lengths(plan))
    padded_queries, padded_keys = padded_lengths(plan)
    return 2 * padded_keys + 2 * (padded_queries - queries)


def _joined_keys(config: GPDiTConfig, shape: PassShape, clean_queries: bool) -> int:
    """Return the number of keys that attention concatenates, which are copies.

    A noisy block after others with context attends to their clean keys and its own. If a frame attends to no later
    frame of its block, each frame has its own copy of these, and of those of its block alone, except the first frame.

    Args:
        config: the architecture.
        shape: shape of the pass.
        clean_queries: whether the clean blocks have queries.
    """
    blocks = shape.blocks(config)
    joined = 0
    for size, context in zip(blocks.noisy, blocks.contexts, strict=True):
        frame = blocks.causal_tokens or size
        own = range(frame, size + 1, frame)  # tokens of the block to which each of its frames attends
        with_context = sum(context + tokens for tokens in own) if context else sum(own[1:])
        rows = shape.context_clips * with_context + (shape.clips - shape.context_clips) * sum(own[1:])
        joined += shape.draws * rows
    if clean_queries and config.attention == "of" and blocks.causal_tokens:
        frame = blocks.causal_tokens
        joined += shape.context_clips * sum(sum(range(2 * frame, size + 1, frame)) for size in blocks.clean)
    return joined
