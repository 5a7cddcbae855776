"""A slow, obviously correct GPDiT in float64: one clip at a time, one dense token mask, loops instead of reshapes.

Written from the papers and from the names in a state dict; it shares no code with the library. Both streams are
computed whole, with nothing skipped: the last clean frame and the clean queries of the last block too.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gpdit_lightning import GPDiTConfig

Parameters = dict[str, Tensor]
Block = tuple[str, int]  # ("clean" | "noisy", frame)


def forward(
    parameters: Parameters,
    config: GPDiTConfig,
    noisy: Tensor,
    theta: Tensor,
    clean: Tensor | None = None,
    draws: int = 1,
) -> Tensor:
    """What `GPDiT.forward` should return: noisy (B, F, C, H, W), theta (B, F), clean (B', F, C, H, W) or None."""
    clips_with_context = 0 if clean is None else draws * len(clean)
    outputs = []
    for clip in range(len(noisy)):
        frames = range(noisy.shape[1])
        blocks: list[Block] = [("noisy", frame) for frame in frames]
        latents = list(noisy[clip])
        angles = list(theta[clip])
        if clip < clips_with_context:
            assert clean is not None
            blocks = [("clean", frame) for frame in frames] + blocks
            latents = list(clean[clip % len(clean)]) + latents
            angles = [torch.zeros_like(angle) for angle in angles] + angles
        x = transformer(parameters, config, blocks, latents, angles)
        x = turn_hidden(rms_norm(x, parameters["output_norm.weight"], config), blocks, angles, config, "branch")
        x = x @ parameters["output.weight"].T + parameters["output.bias"]
        per_block = x.chunk(len(blocks))
        outputs.append(
            torch.stack([picture(tokens, config, *noisy.shape[-2:]) for tokens in per_block[-len(frames) :]])
        )
    return torch.stack(outputs)


def features(parameters: Parameters, config: GPDiTConfig, clean: Tensor, layer: int) -> Tensor:
    """What `GPDiT.features` should return for one layer: (B, F, N, D)."""
    clips = []
    for clip in clean:
        blocks: list[Block] = [("clean", frame) for frame in range(len(clip))]
        angles = [clip.new_zeros(())] * len(clip)
        x = transformer(parameters, config, blocks, list(clip), angles, layers=layer)
        clips.append(torch.stack(x.chunk(len(clip))))
    return torch.stack(clips)


def transformer(
    parameters: Parameters,
    config: GPDiTConfig,
    blocks: Sequence[Block],
    latents: Sequence[Tensor],
    angles: Sequence[Tensor],
    layers: int | None = None,
) -> Tensor:
    """The residual stream (tokens, D) of one clip after `layers` blocks (all of them by default)."""
    height, width = latents[0].shape[-2:]
    x = torch.cat([patches(frame, config) for frame in latents])
    x = x @ parameters["patch_embedding.weight"].T + parameters["patch_embedding.bias"]
    x = turn_hidden(x, blocks, angles, config, "input")
    mask = dense_mask(blocks, config.attention, tokens=len(x) // len(blocks))
    positions = [
        (frame, row, column)
        for _, frame in blocks
        for row in range(height // config.patch_size)
        for column in range(width // config.patch_size)
    ]
    for layer in range(config.layers if layers is None else layers):
        own = {name.removeprefix(f"blocks.{layer}."): value for name, value in parameters.items()}
        x = turn_hidden(x, blocks, angles, config, "residual")
        h = turn_hidden(rms_norm(x, own["attention_norm.weight"], config), blocks, angles, config, "branch")
        h = attention(own, config, h, positions, mask)
        x = x + turn_hidden(h, blocks, angles, config, "branch output")
        h = turn_hidden(rms_norm(x, own["mlp_norm.weight"], config), blocks, angles, config, "branch")
        h = gelu(h @ own["mlp.up.weight"].T) @ own["mlp.down.weight"].T
        x = x + turn_hidden(h, blocks, angles, config, "branch output")
    return x


def attention(
    own: Parameters, config: GPDiTConfig, h: Tensor, positions: list[tuple[int, ...]], mask: Tensor
) -> Tensor:
    """Masked softmax attention, head after head: (tokens, D) -> (tokens, D)."""
    width, head_width = config.width, config.width // config.heads
    key_weight, value_weight = own["key_value.weight"][:width], own["key_value.weight"][width:]
    heads = []
    for head in range(config.heads):
        channels = slice(head * head_width, (head + 1) * head_width)
        query = rms_norm(h @ own["query.weight"][channels].T, own["query_norm.weight"], config)
        key = rms_norm(h @ key_weight[channels].T, own["key_norm.weight"], config)
        value = h @ value_weight[channels].T
        query, key = turn_positions(query, positions, config), turn_positions(key, positions, config)
        scores = (query @ key.T / math.sqrt(head_width)).masked_fill(~mask, -math.inf)
        weights = (scores - scores.amax(dim=1, keepdim=True)).exp()
        heads.append(weights / weights.sum(dim=1, keepdim=True) @ value)
    return torch.cat(heads, dim=1) @ own["attention_output.weight"].T


def sees(variant: str, asking: Block, seen: Block) -> bool:
    """The rule of GPDiT, figure 3."""
    (stream, i), (seen_stream, j) = asking, seen
    if asking == seen:
        return True
    if seen_stream == "noisy":
        return False
    if stream == "noisy":
        return j < i
    return variant == "of2" and j < i


def dense_mask(blocks: Sequence[Block], variant: str, tokens: int) -> Tensor:
    """(tokens of all blocks, tokens of all blocks), True where the row may see the column."""
    mask = torch.zeros(len(blocks) * tokens, len(blocks) * tokens, dtype=torch.bool)
    for a, asking in enumerate(blocks):
        for b, seen in enumerate(blocks):
            mask[a * tokens : (a + 1) * tokens, b * tokens : (b + 1) * tokens] = sees(variant, asking, seen)
    return mask


def turn_pairs(x: Tensor, angles: Sequence[Tensor]) -> Tensor:
    """Turn channel pair (k, k + width / 2) of (tokens, width) counter-clockwise by `angles[k]` (tokens,)."""
    half = x.shape[1] // 2
    first, second = [], []
    for k, angle in enumerate(angles):
        cos, sin = angle.cos(), angle.sin()
        first.append(cos * x[:, k] - sin * x[:, k + half])
        second.append(sin * x[:, k] + cos * x[:, k + half])
    return torch.stack(first + second, dim=1)


def turn_positions(x: Tensor, positions: list[tuple[int, ...]], config: GPDiTConfig) -> Tensor:
    """RoPE-ND (ACDiT, equation 4): segments of channel pairs for (frame, row, column), each with its own base."""
    head_width = x.shape[1]
    side = head_width // 6 * 2  # channels of the row and of the column axis: a third of the head, made even
    widths = (head_width - 2 * side, side, side)
    angles = []
    for axis, (channels, length) in enumerate(zip(widths, config.rope_lengths, strict=True)):
        base = 100 * math.ceil(8 * length / (100 * math.pi))
        for i in range(1, channels // 2 + 1):
            frequency = base ** (-2 * (i - 1) / channels)
            angles.append(torch.tensor([position[axis] * frequency for position in positions], dtype=x.dtype))
    return turn_pairs(x, angles)


def turn_hidden(
    x: Tensor, blocks: Sequence[Block], angles: Sequence[Tensor], config: GPDiTConfig, where: str
) -> Tensor:
    """Turn all channel pairs by minus the frame's theta, if the configured site is `where` (back at branch outputs)."""
    sites = {"branch": ("branch", "branch_inverse"), "branch output": ("branch_inverse",)}
    if config.time_site not in sites.get(where, (where,)):
        return x
    tokens = len(x) // len(blocks)
    sign = 1 if where == "branch output" else -1
    per_token = torch.stack([sign * angle for angle in angles for _ in range(tokens)])
    return turn_pairs(x, [per_token] * (x.shape[1] // 2))


def rms_norm(x: Tensor, weight: Tensor, config: GPDiTConfig) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + config.norm_eps).sqrt() * weight


def gelu(x: Tensor) -> Tensor:
    """GELU's tanh form (Hendrycks and Gimpel, 2016)."""
    return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


def patches(frame: Tensor, config: GPDiTConfig) -> Tensor:
    """(C, H, W) -> (N, C * patch * patch): row after row of patches, each channel after channel."""
    p = config.patch_size
    rows, columns = frame.shape[1] // p, frame.shape[2] // p
    return torch.stack(
        [
            frame[:, row * p : (row + 1) * p, column * p : (column + 1) * p].flatten()
            for row in range(rows)
            for column in range(columns)
        ]
    )


def picture(tokens: Tensor, config: GPDiTConfig, height: int, width: int) -> Tensor:
    """(N, C * patch * patch) -> (C, H, W)."""
    p = config.patch_size
    squares = iter(tokens.view(len(tokens), config.latent_channels, p, p))
    rows = [torch.cat([next(squares) for _ in range(width // p)], dim=2) for _ in range(height // p)]
    return torch.cat(rows, dim=1)
