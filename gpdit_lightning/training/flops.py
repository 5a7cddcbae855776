"""Floating-point operations of the backbone, counted from its configuration: what MFU and estimates rest on."""

import re
from collections.abc import Sequence

from gpdit_lightning.model import GPDiTConfig

# Dense bf16 FLOP/s of a GPU with float32 accumulation, from the makers' data sheets, without sparsity.
# The first entry whose words all appear in the device's name counts.
PEAK_BF16_FLOPS: tuple[tuple[str, float], ...] = (
    ("B200", 2250e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H800", 989e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 150e12),
    ("A30", 165e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
)


def forward_flops(
    config: GPDiTConfig,
    clips: int,
    context_clips: int,
    frames: int,
    height: int,
    width: int,
    draws: int = 1,
    noisy_frames: Sequence[int] | None = None,
) -> dict[str, int]:
    """FLOPs of one `GPDiT.forward`, a multiply-add counted as two; norms, rotations and softmax are left out.

    A model with `classes` has one token more for each noisy row, its label, at no cost of embedding.

    Args:
        config: the architecture.
        clips: B.
        context_clips: B', how many of them have context.
        frames: F, latent frames.
        height, width: of a latent frame, in latent pixels.
        draws: K, noisy copies of every clip, that share its one clean stream.
        noisy_frames: the positions of the noisy frames; None: all F.

    Returns:
        FLOPs of the parts `embedding`, `attention_projections`, `attention_products`, `mlp` and `output`.
    """
    tokens = (height // config.patch_size) * (width // config.patch_size)
    patch_values = config.latent_channels * config.patch_size**2
    noisy_frames = range(frames) if noisy_frames is None else noisy_frames
    clean_frames = noisy_frames[-1]  # nobody sees the later ones
    noisy_tokens = draws * clips * len(noisy_frames) * tokens
    clean_tokens = context_clips * clean_frames * tokens
    prefix_tokens = draws * clips if config.classes else 0
    # The prefix and the clean tokens of the last block give keys and values only.
    packed = prefix_tokens + clean_tokens + noisy_tokens
    asking = (config.layers - 1) * packed + noisy_tokens
    looked_at = config.layers * packed

    clean_pairs = {"of2": clean_frames * (clean_frames + 1) // 2, "of": clean_frames}[config.attention]
    seen = sum(frame + 1 for frame in noisy_frames)  # the clean ones before it, and itself
    noisy_pairs = draws * (context_clips * seen + (clips - context_clips) * len(noisy_frames))
    frame_pairs = (config.layers - 1) * context_clips * clean_pairs + config.layers * noisy_pairs
    # A label's token sees itself, and is seen by all noisy tokens of its row.
    label_pairs = (config.layers - 1) * prefix_tokens + config.layers * (noisy_tokens if config.classes else 0)

    multiply_adds = {
        "embedding": (clean_tokens + noisy_tokens) * patch_values * config.width,
        "attention_projections": (asking * 2 + looked_at * 2) * config.width**2,
        "attention_products": (frame_pairs * tokens**2 + label_pairs) * 2 * config.width,
        "mlp": asking * 2 * config.width * config.mlp_width,
        "output": noisy_tokens * config.width * patch_values,
    }
    return {part: 2 * count for part, count in multiply_adds.items()}


def training_flops(
    config: GPDiTConfig,
    clips: int,
    context_clips: int,
    frames: int,
    height: int,
    width: int,
    draws: int = 1,
    noisy_frames: Sequence[int] | None = None,
) -> dict[str, int]:
    """FLOPs of one forward and backward pass, by part: three times the forward, as is the custom for MFU.

    Recomputation (activation checkpointing, or inside an attention kernel) is not counted: it is time without progress.
    """
    forward = forward_flops(config, clips, context_clips, frames, height, width, draws, noisy_frames)
    return {part: 3 * count for part, count in forward.items()}


def peak_bf16_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by the name PyTorch gives it; None if it is not in the table."""
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    for name, peak in PEAK_BF16_FLOPS:
        if words.issuperset(name.lower().split()):
            return peak
    return None
