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
Window = tuple[int, int]  # (latest frames, first frames that stay visible: the sinks)
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
    clean_theta: Tensor | None = None,
) -> Tensor:
    """What `GPDiT.forward` should return: noisy (B, F, C, H, W), theta (B, F), clean (B', F, C, H, W) or None.

    Args:
        condition: (B,) class numbers, -1 for none, or (B, L, text width).
        window: the context that a rolling cache keeps.
        clean_theta: (B', F) angles of the clean frames; None: 0.
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
            of_clean = torch.zeros_like(theta[clip]) if clean_theta is None else clean_theta[clip % len(clean)]
            angles = [*of_clean, *angles]
        prefix = prefix_tokens(parameters, config, None if condition is None else condition[clip])
        x, angles = transformer(parameters, config, blocks, latents, angles, prefix=prefix, window=window)
        x = rotate_by_theta(rms_norm(x, parameters["output_norm.weight"], config), angles, config, "branch")
        x = x @ parameters["output.weight"].T + parameters["output.bias"]
        per_block = x[len(prefix) :].chunk(len(blocks))
        outputs.append(
            torch.stack([to_image(tokens, config, *noisy.shape[-2:]) for tokens in per_block[-len(frames) :]])
        )
    return torch.stack(outputs)


def prefix_tokens(parameters: Parameters, config: GPDiTConfig, condition: Tensor | None) -> Tensor:
    """The tokens (L, D) of a clip's condition; none for a model without conditions."""
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
    """A prefix of no tokens."""
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
    grid = [(r, c) for r in range(height // config.patch_size) for c in range(width // config.patch_size)]
    sizes = [len(grid)] * len(blocks)
    angle = torch.stack([angle for angle, size in zip(angles, sizes, strict=True) for _ in range(size)])
    if len(prefix):
        x, blocks, sizes = torch.cat((prefix, x)), [("prefix", 0), *blocks], [len(prefix), *sizes]
        angle = torch.cat((angle.new_zeros(len(prefix)), angle))
    x = rotate_by_theta(x, angle, config, "input")
    mask = dense_mask(blocks, config.attention, sizes, window)

    def positions(frames: Sequence[int]) -> list[Position]:
        return [
            (frame, *position)
            for frame, block in zip(frames, blocks, strict=True)
            for position in in_frame_positions(block, grid, len(prefix))
        ]

    # The position of every token as a query, and as a key for each query block (mostly the same for all of them).
    query_positions = positions([key_frame(block, block, window) for block in blocks])
    key_frames = [tuple(key_frame(block, query, window) for block in blocks) for query in blocks]
    key_positions = {frames: positions(frames) for frames in set(key_frames)}
    for layer in range(config.layers if layers is None else layers):
        weights = {name.removeprefix(f"blocks.{layer}."): value for name, value in parameters.items()}
        x = rotate_by_theta(x, angle, config, "residual")
        h = rotate_by_theta(rms_norm(x, weights["attention_norm.weight"], config), angle, config, "branch")
        h = attention(weights, config, h, sizes, query_positions, key_frames, key_positions, mask)
        x = x + rotate_by_theta(h, angle, config, "branch output")
        h = rotate_by_theta(rms_norm(x, weights["mlp_norm.weight"], config), angle, config, "branch")
        h = gelu(h @ weights["mlp.up.weight"].T) @ weights["mlp.down.weight"].T
        x = x + rotate_by_theta(h, angle, config, "branch output")
    return x, angle


def in_frame_positions(block: Block, grid: list[tuple[int, int]], prefix: int) -> list[tuple[int, int]]:
    """(row, column) of a block's tokens; those of a prefix are all in the corner."""
    return [(0, 0)] * prefix if block[0] == "prefix" else grid


def key_frame(key: Block, query: Block, window: Window | None) -> int:
    """The frame position that a key block has for a query block."""
    if key[0] == "prefix":
        return query[1]  # always in the frame of the query
    if window is None or query[0] == "prefix" or key[1] >= window[1]:
        return key[1]
    first = first_in_window(query, window)
    return key[1] if first <= window[1] else first - window[1] + key[1]  # sinks come right before the window


def first_in_window(query: Block, window: Window) -> int:
    """The first frame of a window that ends with a clean frame itself, or with the one before a noisy frame."""
    stream, frame = query
    return frame - window[0] + (stream == "clean")


def attention(
    weights: Parameters,
    config: GPDiTConfig,
    h: Tensor,
    sizes: list[int],
    query_positions: list[Position],
    key_frames: list[tuple[int, ...]],
    key_positions: dict[tuple[int, ...], list[Position]],
    mask: Tensor,
) -> Tensor:
    """Masked softmax attention, head after head, and query block after query block: (tokens, D) -> (tokens, D)."""
    width, head_width = config.width, config.width // config.heads
    key_weight, value_weight = weights["key_value.weight"][:width], weights["key_value.weight"][width:]
    heads = []
    for head in range(config.heads):
        channels = slice(head * head_width, (head + 1) * head_width)
        query = rms_norm(h @ weights["query.weight"][channels].T, weights["query_norm.weight"], config)
        key = rms_norm(h @ key_weight[channels].T, weights["key_norm.weight"], config)
        value = h @ value_weight[channels].T
        query = rotate_by_positions(query, query_positions, config)
        keys = {frames: rotate_by_positions(key, table, config) for frames, table in key_positions.items()}
        rows = []
        for block, frames, visible in zip(query.split(sizes), key_frames, mask.split(sizes), strict=True):
            scores = block @ keys[frames].T / math.sqrt(head_width)
            scores = scores.masked_fill(~visible, -math.inf)
            exponentials = (scores - scores.amax(dim=1, keepdim=True)).exp()
            rows.append(exponentials / exponentials.sum(dim=1, keepdim=True) @ value)
        heads.append(torch.cat(rows))
    return torch.cat(heads, dim=1) @ weights["attention_output.weight"].T


def attends(variant: str, query: Block, key: Block, window: Window | None = None) -> bool:
    """The rule of GPDiT, figure 3, with a prefix that noisy frames attend to, and a window."""
    (stream, i), (key_stream, j) = query, key
    if query == key:
        return True
    if key_stream == "prefix":
        return stream == "noisy"
    if key_stream == "noisy" or stream == "prefix" or j >= i:
        return False
    if window is not None and window[1] <= j < first_in_window(query, window):
        return False
    return stream == "noisy" or variant == "of2"


def dense_mask(blocks: Sequence[Block], variant: str, sizes: Sequence[int], window: Window | None = None) -> Tensor:
    """(tokens of all blocks, tokens of all blocks), True where the row attends to the column."""
    rows = []
    for query, size in zip(blocks, sizes, strict=True):
        visible = [
            attends(variant, query, key, window) for key, count in zip(blocks, sizes, strict=True) for _ in range(count)
        ]
        rows += [torch.tensor(visible)] * size
    return torch.stack(rows)


def rotate_pairs(x: Tensor, angles: Sequence[Tensor]) -> Tensor:
    """Rotate channel pair (k, k + width / 2) of (tokens, width) counter-clockwise by `angles[k]` (tokens,)."""
    half = x.shape[1] // 2
    first, second = [], []
    for k, angle in enumerate(angles):
        cos, sin = angle.cos(), angle.sin()
        first.append(cos * x[:, k] - sin * x[:, k + half])
        second.append(sin * x[:, k] + cos * x[:, k + half])
    return torch.stack(first + second, dim=1)


def rotate_by_positions(x: Tensor, positions: list[Position], config: GPDiTConfig) -> Tensor:
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
    return rotate_pairs(x, angles)


def rotate_by_theta(x: Tensor, angle: Tensor, config: GPDiTConfig, where: str) -> Tensor:
    """R(theta) times each channel pair (GPDiT, 4.2) if the site is `where`; R(theta)^-1 at branch outputs."""
    sites = {"branch": ("branch", "branch_inverse"), "branch output": ("branch_inverse",)}
    if config.time_site not in sites.get(where, (where,)):
        return x
    sign = 1 if where == "branch output" else -1
    return rotate_pairs(x, [sign * angle] * (x.shape[1] // 2))


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


def to_image(tokens: Tensor, config: GPDiTConfig, height: int, width: int) -> Tensor:
    """(N, C * patch * patch) -> (C, H, W)."""
    p = config.patch_size
    squares = iter(tokens.view(len(tokens), config.latent_channels, p, p))
    rows = [torch.cat([next(squares) for _ in range(width // p)], dim=2) for _ in range(height // p)]
    return torch.cat(rows, dim=1)
