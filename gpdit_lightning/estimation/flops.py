"""Floating-point operations of the backbone as a function of its configuration, for MFU and estimates."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gpdit_lightning.model import GPDiTConfig

# Dense bf16 FLOP/s with float32 accumulation, from the manufacturers' data sheets, which often print twice as much: the
# figure with structured sparsity. The first entry whose words all appear in the name of the device is used.
PEAK_BF16_FLOPS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800 PCIe", 756e12),
    ("H800", 989e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 150e12),
    ("A30", 165e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 6000 Ada", 364e12),
    ("RTX A6000", 155e12),
    ("RTX 5090", 209.5e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
    ("MI325X", 1307e12),
    ("MI300X", 1307e12),
)
# Names with these words are of a part of a GPU (MIG), or of another chip of the same number.
OTHER_DEVICES = {"mig", "laptop", "mobile", "d", "ti"}


@dataclass(frozen=True)
class PassShape:
    """The shapes of the inputs of one `GPDiT.forward`."""

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
    """Positions of the noisy frames; None for all F."""

    @property
    def noisy(self) -> Sequence[int]:
        """The positions of the noisy frames."""
        return range(self.frames) if self.noisy_frames is None else self.noisy_frames

    @property
    def clean_frames(self) -> int:
        """The number of clean frames of a clip with context; those without a later noisy frame are not computed."""
        return self.noisy[-1]

    def tokens(self, config: GPDiTConfig) -> int:
        """Return the tokens of a frame."""
        return (self.height // config.patch_size) * (self.width // config.patch_size)

    def noisy_tokens(self, config: GPDiTConfig) -> int:
        """Return the tokens of all noisy frames."""
        return self.draws * self.clips * len(self.noisy) * self.tokens(config)

    def clean_tokens(self, config: GPDiTConfig) -> int:
        """Return the tokens of all clean frames."""
        return self.context_clips * self.clean_frames * self.tokens(config)


def forward_flops(config: GPDiTConfig, shape: PassShape) -> dict[str, int]:
    """Return the FLOPs of one `GPDiT.forward`; a multiply-add counts as two, and norms, rotations and softmax as none.

    A model with `classes` has one more token per noisy row, its label; the embedding of a label takes no FLOPs.

    Returns:
        FLOPs by part: `embedding`, `attention_projections`, `attention_products`, `mlp` and `output`.
    """
    clips, context_clips, draws, clean_frames = shape.clips, shape.context_clips, shape.draws, shape.clean_frames
    tokens, noisy_tokens, clean_tokens = shape.tokens(config), shape.noisy_tokens(config), shape.clean_tokens(config)
    patch_values = config.latent_channels * config.patch_size**2
    prefix_tokens = draws * clips if config.classes else 0
    # In the last block, prefix and clean tokens have keys and values only.
    packed = prefix_tokens + clean_tokens + noisy_tokens
    query_tokens = (config.layers - 1) * packed + noisy_tokens
    key_value_tokens = config.layers * packed

    clean_pairs = {"of2": clean_frames * (clean_frames + 1) // 2, "of": clean_frames}[config.attention]
    key_frames = sum(frame + 1 for frame in shape.noisy)  # a noisy frame attends to earlier clean frames and to itself
    noisy_pairs = draws * (context_clips * key_frames + (clips - context_clips) * len(shape.noisy))
    frame_pairs = (config.layers - 1) * context_clips * clean_pairs + config.layers * noisy_pairs
    # The token of a label attends to itself, and all noisy tokens of its row attend to it.
    label_pairs = (config.layers - 1) * prefix_tokens + config.layers * (noisy_tokens if config.classes else 0)

    multiply_adds = {
        "embedding": (clean_tokens + noisy_tokens) * patch_values * config.width,
        "attention_projections": (query_tokens + key_value_tokens) * 2 * config.width**2,
        "attention_products": (frame_pairs * tokens**2 + label_pairs) * 2 * config.width,
        "mlp": query_tokens * 2 * config.width * config.mlp_width,
        "output": noisy_tokens * config.width * patch_values,
    }
    return {part: 2 * count for part, count in multiply_adds.items()}


def training_flops(config: GPDiTConfig, shape: PassShape) -> dict[str, int]:
    """Return the FLOPs of one forward and backward pass by part: three times the forward pass, as is usual for MFU.

    Recomputation (by activation checkpointing or inside an attention kernel) is not counted.
    """
    return {part: 3 * count for part, count in forward_flops(config, shape).items()}


def peak_bf16_flops(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s of a GPU by its name in PyTorch; None if it is not in the table."""
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    if words & OTHER_DEVICES:
        return None
    for name, peak in PEAK_BF16_FLOPS:
        if words.issuperset(name.lower().split()):
            return peak
    return None
