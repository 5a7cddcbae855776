"""Floating-point operations of the backbone as a function of its configuration, for MFU and estimates."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from gpdit_lightning.model import GPDiTConfig
from gpdit_lightning.model.attention import BlockSizes
from gpdit_lightning.model.layout import BlockLayout, ClipBlocks
from gpdit_lightning.model.streams import LayerPlans, PassBlocks, plan_layers
from gpdit_lightning.model.time_conditioning import FREQUENCIES


@dataclass(frozen=True)
class PassShape:
    """The shapes of the inputs of one `GPDiT.forward`; without noisy frames, of one `GPDiT.features` of all blocks."""

    clips: int
    """B."""
    context_clips: int
    """B', clips with context."""
    frames: int
    """F, latent frames."""
    height: int
    """Height of a latent frame, in latent pixels."""
    width: int
    """Width of a latent frame, in latent pixels."""
    draws: int = 1
    """K, noisy copies of every clip, which share its clean stream."""
    noisy_frames: Sequence[int] | None = None
    """Positions of the noisy frames; None for all F; empty for a pass of the clean stream of all F alone."""

    @property
    def noisy(self) -> Sequence[int]:
        """The positions of the noisy frames."""
        return range(self.frames) if self.noisy_frames is None else self.noisy_frames

    def blocks(self, config: GPDiTConfig) -> BlockSizes:
        """Return the tokens of the clean and of the noisy blocks; clean blocks without a later one are not computed."""
        layout = BlockLayout.of(config, self.height, self.width)
        return _block_sizes(layout, self.frames, tuple(self.noisy), config.causal_in_block)

    def plans(self, config: GPDiTConfig) -> LayerPlans:
        """Return the attention of the layers, with the token of a label as a prefix."""
        layout = BlockLayout.of(config, self.height, self.width)
        if not self.noisy:
            return plan_layers(config, PassBlocks(layout, self.frames, range(layout.count(self.frames))), self.clips, 0)
        clip = ClipBlocks.of(config, self.noisy, self.height, self.width)
        blocks = PassBlocks.of_clip(clip, self.context_clips > 0, self.draws)
        clips = self.context_clips if blocks.clean else 0
        return plan_layers(config, blocks, clips, self.draws * self.clips, int(config.has_prefix))

    def tokens(self, config: GPDiTConfig) -> int:
        """Return the tokens of a frame."""
        return (self.height // config.patch_size) * (self.width // config.patch_size)

    def noisy_tokens(self, config: GPDiTConfig) -> int:
        """Return the tokens of all noisy blocks."""
        return self.draws * self.clips * sum(self.blocks(config).noisy)

    def clean_tokens(self, config: GPDiTConfig) -> int:
        """Return the tokens of all clean blocks."""
        return self.context_clips * sum(self.blocks(config).clean)


# Searches for a run that fits compare many batch sizes of the same frames.
@lru_cache(maxsize=256)
def _block_sizes(layout: BlockLayout, frames: int, noisy_frames: tuple[int, ...], causal_in_block: bool) -> BlockSizes:
    if not noisy_frames:
        return PassBlocks(layout, frames, clean=range(layout.count(frames))).sizes(causal_in_block)
    clip = ClipBlocks(layout, layout.blocks_of(noisy_frames), noisy_frames[-1] + 1)
    return PassBlocks.of_clip(clip).sizes(causal_in_block)


def forward_flops(config: GPDiTConfig, shape: PassShape) -> dict[str, int]:
    """Return the FLOPs of one `GPDiT.forward`; a multiply-add counts as two, and norms, rotations and softmax as none.

    A model with rotation and `classes` has one more token per noisy row, its label; the embedding of a label takes no
    FLOPs.

    Returns:
        FLOPs by part: `embedding`, `attention_projections`, `attention_products`, `mlp` and `output`; unless theta
        rotates, also `modulation`: the embedding of theta and what follows from it.
    """
    rows, width = shape.draws * shape.clips, config.width
    noisy_tokens, clean_tokens = shape.noisy_tokens(config), shape.clean_tokens(config)
    patch_values = config.latent_channels * config.patch_size**2
    has_label = config.has_prefix and config.classes > 0
    prefix_tokens = rows if has_label else 0
    # In the last block of the transformer, prefix and clean tokens have keys and values only, if there are noisy ones.
    packed = prefix_tokens + clean_tokens + noisy_tokens
    whole_layers = config.layers - 1 if noisy_tokens else config.layers
    query_tokens = whole_layers * packed + (config.layers - whole_layers) * noisy_tokens
    key_value_tokens = config.layers * packed
    clean_pairs, noisy_pairs = attention_pairs(config, shape)
    pairs = whole_layers * clean_pairs + config.layers * noisy_pairs
    # The token of a label attends to itself, and all noisy tokens of its row attend to it.
    label_pairs = (config.layers - 1) * prefix_tokens + config.layers * (noisy_tokens if has_label else 0)
    if config.factorized:  # every token attends to its frame in the additional attention of each layer
        query_tokens_of_attention = query_tokens + config.layers * packed
        key_value_tokens += config.layers * packed
        pairs += config.layers * packed * shape.tokens(config)
    else:
        query_tokens_of_attention = query_tokens
    multiply_adds = {
        "embedding": (clean_tokens + noisy_tokens) * patch_values * width,
        "attention_projections": (query_tokens_of_attention + key_value_tokens) * 2 * width**2,
        "attention_products": (pairs + label_pairs) * 2 * width,
        "mlp": query_tokens * 2 * width * config.mlp_width,
        "output": noisy_tokens * width * patch_values,
    }
    if config.time_conditioning != "rotation":
        widths = config.modulation_widths
        values = config.layers * config.num_branches * sum(widths) + sum(widths[:-1])
        of_block = FREQUENCIES * width + width**2 + width * values
        multiply_adds["modulation"] = rows * len(shape.blocks(config).noisy) * of_block
    return {part: 2 * count for part, count in multiply_adds.items()}


def attention_pairs(config: GPDiTConfig, shape: PassShape) -> tuple[int, int]:
    """Return the pairs of a query and a key in a layer, of clean and of noisy queries, without those of a label.

    With factorized attention they are those along time.
    """
    sizes = shape.blocks(config)
    frame = sizes.causal_tokens

    def within(size: int) -> int:
        return size**2 if frame is None else size * (size + frame) // 2

    before, clean = 0, 0
    for size in sizes.clean:
        clean += (size * before if config.attention == "of2" else 0) + within(size)
        before += size
    alone = sum(map(within, sizes.noisy))
    to_context = sum(size * context for size, context in zip(sizes.noisy, sizes.contexts, strict=True))
    noisy = shape.draws * (shape.context_clips * to_context + shape.clips * alone)
    # Along time, a token attends to one token of each frame.
    per_frame = shape.tokens(config) if config.factorized else 1
    return shape.context_clips * clean // per_frame, noisy // per_frame


def training_flops(config: GPDiTConfig, shape: PassShape) -> dict[str, int]:
    """Return the FLOPs of one forward and backward pass by part: three times the forward pass, as is usual for MFU.

    Recomputation (by activation checkpointing or inside an attention kernel) is not counted.
    """
    return {part: 3 * count for part, count in forward_flops(config, shape).items()}
