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
Block = tuple[str, int]  # ("clean" | "noisy", frame), or ("prefix", 0)
Window = tuple[int, int]  # (latest frames seen, first frames that stay visible: the sinks)
Position = tuple[int, int, int]  # (frame, row, column)


def forward(
    parameters: Parameters,
    config: GPDiTConfig,
    noisy: Tensor,
    theta: Tensor,
    clean: Tensor | None = None,
    draws: int = 1,
    condition: Tensor | None = None,
    window: Window | None = None,
) -> Tensor:
    """What `GPDiT.forward` should return: noisy (B, F, C, H, W), theta (B, F), clean (B', F, C, H, W) or None.

    Args:
        condition: (B,) class numbers, -1 for none, or (B, L, text width).
        window: what a rolling cache keeps of the context.
    """
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
        prefix = prefix_tokens(parameters, config, None if condition is None else condition[clip])
        x, angles = transformer(parameters, config, blocks, latents, angles, prefix=prefix, window=window)
        x = turn_hidden(rms_norm(x, parameters["output_norm.weight"], config), angles, config, "branch")
        x = x @ parameters["output.weight"].T + parameters["output.bias"]
        per_block = x[len(prefix) :].chunk(len(blocks))
        outputs.append(
            torch.stack([picture(tokens, config, *noisy.shape[-2:]) for tokens in per_block[-len(frames) :]])
        )
    return torch.stack(outputs)


def prefix_tokens(parameters: Parameters, config: GPDiTConfig, condition: Tensor | None) -> Tensor:
    """The tokens (L, D) that tell a clip's condition; none for a model without conditions."""
    if config.classes:
        return parameters["prefix.embedding.weight"][
            config.classes if condition is None or condition < 0 else int(condition)
        ][None]
    if config.text_width:
        assert condition is not None
        return condition @ parameters["prefix.embedding.weight"].T + parameters["prefix.embedding.bias"]
    return no_prefix(config)


def features(parameters: Parameters, config: GPDiTConfig, clean: Tensor, layer: int) -> Tensor:
    """What `GPDiT.features` should return for one layer: (B, F, N, D)."""
    clips = []
    for clip in clean:
        blocks: list[Block] = [("clean", frame) for frame in range(len(clip))]
        angles = [clip.new_zeros(())] * len(clip)
        x, _ = transformer(parameters, config, blocks, list(clip), angles, no_prefix(config), layer)
        clips.append(torch.stack(x.chunk(len(clip))))
    return torch.stack(clips)


def no_prefix(config: GPDiTConfig) -> Tensor:
    """No prefix."""
    return torch.zeros(0, config.width, dtype=torch.float64)


def transformer(
    parameters: Parameters,
    config: GPDiTConfig,
    blocks: list[Block],
    latents: Sequence[Tensor],
    angles: Sequence[Tensor],
    prefix: Tensor,
    layers: int | None = None,
    window: Window | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual stream (tokens, D) of one clip after `layers` blocks (all by default), and its tokens' angles."""
    height, width = latents[0].shape[-2:]
    x = torch.cat([patches(frame, config) for frame in latents])
    x = x @ parameters["patch_embedding.weight"].T + parameters["patch_embedding.bias"]
    places = [(r, c) for r in range(height // config.patch_size) for c in range(width // config.patch_size)]
    sizes = [len(places)] * len(blocks)
    angle = torch.stack([angle for angle, size in zip(angles, sizes, strict=True) for _ in range(size)])
    if len(prefix):
        x, blocks, sizes = torch.cat((prefix, x)), [("prefix", 0), *blocks], [len(prefix), *sizes]
        angle = torch.cat((angle.new_zeros(len(prefix)), angle))
    x = turn_hidden(x, angle, config, "input")
    mask = dense_mask(blocks, config.attention, sizes, window)

    # Where every token stands: for itself, and as every asking block sees it (mostly the same for all of them).
    def positions(frames: Sequence[int]) -> list[Position]:
        return [
            (frame, *spot)
            for frame, block in zip(frames, blocks, strict=True)
            for spot in spots(block, places, len(prefix))
        ]

    own = positions([place_of(block, block, window) for block in blocks])
    seen = [tuple(place_of(block, asking, window) for block in blocks) for asking in blocks]
    tables = {frames: positions(frames) for frames in set(seen)}
    for layer in range(config.layers if layers is None else layers):
        weights = {name.removeprefix(f"blocks.{layer}."): value for name, value in parameters.items()}
        x = turn_hidden(x, angle, config, "residual")
        h = turn_hidden(rms_norm(x, weights["attention_norm.weight"], config), angle, config, "branch")
        h = attention(weights, config, h, sizes, own, seen, tables, mask)
        x = x + turn_hidden(h, angle, config, "branch output")
        h = turn_hidden(rms_norm(x, weights["mlp_norm.weight"], config), angle, config, "branch")
        h = gelu(h @ weights["mlp.up.weight"].T) @ weights["mlp.down.weight"].T
        x = x + turn_hidden(h, angle, config, "branch output")
    return x, angle


def spots(block: Block, places: list[tuple[int, int]], prefix: int) -> list[tuple[int, int]]:
    """(row, column) of a block's tokens; those of a prefix all stand in the corner."""
    return [(0, 0)] * prefix if block[0] == "prefix" else places


def place_of(seen: Block, asking: Block, window: Window | None) -> int:
    """The frame at which a block stands for one that asks."""
    if seen[0] == "prefix":
        return asking[1]  # always in the frame that looks at it
    if window is None or asking[0] == "prefix" or seen[1] >= window[1]:
        return seen[1]
    begins = first_in_window(asking, window)
    return seen[1] if begins <= window[1] else begins - window[1] + seen[1]  # sinks stand right before the window


def first_in_window(asking: Block, window: Window) -> int:
    """The first frame of a window that ends with a clean frame itself, or with the one before a noisy frame."""
    stream, frame = asking
    return frame - window[0] + (stream == "clean")


def attention(
    own: Parameters,
    config: GPDiTConfig,
    h: Tensor,
    sizes: list[int],
    positions: list[Position],
    seen: list[tuple[int, ...]],
    tables: dict[tuple[int, ...], list[Position]],
    mask: Tensor,
) -> Tensor:
    """Masked softmax attention, head after head, and asking block after block: (tokens, D) -> (tokens, D)."""
    width, head_width = config.width, config.width // config.heads
    key_weight, value_weight = own["key_value.weight"][:width], own["key_value.weight"][width:]
    heads = []
    for head in range(config.heads):
        channels = slice(head * head_width, (head + 1) * head_width)
        query = rms_norm(h @ own["query.weight"][channels].T, own["query_norm.weight"], config)
        key = rms_norm(h @ key_weight[channels].T, own["key_norm.weight"], config)
        value = h @ value_weight[channels].T
        query = turn_positions(query, positions, config)
        turned = {frames: turn_positions(key, table, config) for frames, table in tables.items()}
        rows = []
        for asking, frames, visible in zip(query.split(sizes), seen, mask.split(sizes), strict=True):
            scores = asking @ turned[frames].T / math.sqrt(head_width)
            scores = scores.masked_fill(~visible, -math.inf)
            weights = (scores - scores.amax(dim=1, keepdim=True)).exp()
            rows.append(weights / weights.sum(dim=1, keepdim=True) @ value)
        heads.append(torch.cat(rows))
    return torch.cat(heads, dim=1) @ own["attention_output.weight"].T


def sees(variant: str, asking: Block, seen: Block, window: Window | None = None) -> bool:
    """The rule of GPDiT, figure 3, with a prefix that noisy frames see, and a window."""
    (stream, i), (seen_stream, j) = asking, seen
    if asking == seen:
        return True
    if seen_stream == "prefix":
        return stream == "noisy"
    if seen_stream == "noisy" or stream == "prefix" or j >= i:
        return False
    if window is not None and window[1] <= j < first_in_window(asking, window):
        return False
    return stream == "noisy" or variant == "of2"


def dense_mask(blocks: Sequence[Block], variant: str, sizes: Sequence[int], window: Window | None = None) -> Tensor:
    """(tokens of all blocks, tokens of all blocks), True where the row may see the column."""
    rows = []
    for asking, size in zip(blocks, sizes, strict=True):
        visible = [
            sees(variant, asking, seen, window) for seen, count in zip(blocks, sizes, strict=True) for _ in range(count)
        ]
        rows += [torch.tensor(visible)] * size
    return torch.stack(rows)


def turn_pairs(x: Tensor, angles: Sequence[Tensor]) -> Tensor:
    """Turn channel pair (k, k + width / 2) of (tokens, width) counter-clockwise by `angles[k]` (tokens,)."""
    half = x.shape[1] // 2
    first, second = [], []
    for k, angle in enumerate(angles):
        cos, sin = angle.cos(), angle.sin()
        first.append(cos * x[:, k] - sin * x[:, k + half])
        second.append(sin * x[:, k] + cos * x[:, k + half])
    return torch.stack(first + second, dim=1)


def turn_positions(x: Tensor, positions: list[Position], config: GPDiTConfig) -> Tensor:
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


def turn_hidden(x: Tensor, angle: Tensor, config: GPDiTConfig, where: str) -> Tensor:
    """Turn all channel pairs by minus the frame's theta, if the configured site is `where` (back at branch outputs)."""
    sites = {"branch": ("branch", "branch_inverse"), "branch output": ("branch_inverse",)}
    if config.time_site not in sites.get(where, (where,)):
        return x
    sign = 1 if where == "branch output" else -1
    return turn_pairs(x, [sign * angle] * (x.shape[1] // 2))


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
