"""A slow, obviously correct backbone in float64 for any blocks and time conditioning, token by token.

Written from the papers (GPDiT, 4.1 and 4.2; ACDiT, 4; DiT, 3.2; arXiv:2505.19122) and from the names in a state dict;
it shares no code with the library. A token is described by its stream, block and place, and the mask is built from
these for each pair of tokens. Both streams are computed whole, with nothing skipped.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gpdit_lightning import GPDiTConfig
from tests.model.oracle import (
    Parameters,
    gelu,
    patches,
    prefix_tokens,
    rms_norm,
    rotate_by_positions,
    rotate_by_theta,
    to_image,
)


@dataclass(frozen=True)
class Token:
    stream: str  # prefix, clean or noisy
    block: tuple[int, int, int] = (0, 0, 0)  # (frames, rows, columns) of blocks before it
    frame: int = 0
    row: int = 0
    column: int = 0

    @property
    def place(self) -> tuple[int, int, int]:
        return self.frame, self.row, self.column


def tokens_of(config: GPDiTConfig, stream: str, frames: int, rows: int, columns: int) -> list[Token]:
    """The tokens of a clip by frame, row and column."""
    of_block, block_rows, block_columns = config.block_shape
    first = config.first_block_frames or of_block or frames
    tokens = []
    for frame in range(frames):
        in_time = 0 if frame < first else 1 + ((frame - first) // of_block if of_block else 0)
        for row in range(rows):
            for column in range(columns):
                block = in_time, row // (block_rows or rows), column // (block_columns or columns)
                tokens.append(Token(stream, block, frame, row, column))
    return tokens


def blocks_of(config: GPDiTConfig, frames: int, rows: int, columns: int) -> list[tuple[int, int, int]]:
    """The blocks of a clip in order."""
    return sorted({token.block for token in tokens_of(config, "noisy", frames, rows, columns)})


def attends(config: GPDiTConfig, query: Token, key: Token) -> bool:
    """Whether a token attends to another one."""
    if query.stream == "prefix" or key.stream == "prefix":
        return key.stream == "prefix" and query.stream in ("prefix", "noisy")
    if query.stream == key.stream and query.block == key.block:
        return not config.causal_in_block or key.frame <= query.frame
    return key.stream == "clean" and key.block < query.block and (query.stream == "noisy" or config.attention == "of2")


def forward(
    parameters: Parameters,
    config: GPDiTConfig,
    noisy: Tensor,
    theta: Tensor,
    clean: Tensor | None = None,
    draws: int = 1,
    condition: Tensor | None = None,
    clean_theta: Tensor | None = None,
) -> Tensor:
    """What `GPDiT.forward` should return: noisy (B, F, C, H, W), theta (B, S), clean (B', F, C, H, W) or None.

    The angles (B', S) of the clean blocks are 0 if `clean_theta` is None.
    """
    frames, _, height, width = noisy.shape[1:]
    rows, columns = height // config.patch_size, width // config.patch_size
    order = blocks_of(config, frames, rows, columns)
    outputs = []
    for clip in range(len(noisy)):
        latents, tokens = list(noisy[clip]), tokens_of(config, "noisy", frames, rows, columns)
        if clean is not None and clip < draws * len(clean):
            latents = list(clean[clip % len(clean)]) + latents
            tokens = tokens_of(config, "clean", frames, rows, columns) + tokens
        label = None if condition is None else condition[clip]
        x = torch.cat([patches(frame, config) for frame in latents])
        x = x @ parameters["patch_embedding.weight"].T + parameters["patch_embedding.bias"]
        if config.has_prefix:
            prefix = prefix_tokens(parameters, config, label)
            x, tokens = torch.cat((prefix, x)), [Token("prefix")] * len(prefix) + tokens
        of_noisy, of_clean = dict(zip(order, theta[clip], strict=True)), dict.fromkeys(order, theta.new_zeros(()))
        if clean_theta is not None and len(latents) > frames:
            of_clean = dict(zip(order, clean_theta[clip % len(clean_theta)], strict=True))
        angles = [of_noisy[token.block] if token.stream == "noisy" else of_clean[token.block] for token in tokens]
        time = Time(parameters, config, tokens, angles, label)
        if config.time_conditioning == "rotation":
            x = rotate_by_theta(x, time.angle, config, "input")
        if config.time_conditioning == "embedding":
            x = torch.where(time.noisy[:, None], x + time.embedding, x)
        x = transformer(parameters, config, x, tokens, time)
        x = time.at_input(rms_norm(x, parameters["output_norm.weight"], config), "output_modulation", 0)
        x = x @ parameters["output.weight"].T + parameters["output.bias"]
        of_frames = x[-frames * rows * columns :].chunk(frames)
        outputs.append(torch.stack([to_image(of_frame, config, height, width) for of_frame in of_frames]))
    return torch.stack(outputs)


class Time:
    """The time conditioning of the tokens of a clip."""

    def __init__(
        self,
        parameters: Parameters,
        config: GPDiTConfig,
        tokens: list[Token],
        thetas: list[Tensor],
        label: Tensor | None,
    ) -> None:
        self.parameters, self.config = parameters, config
        self.noisy = torch.tensor([token.stream == "noisy" for token in tokens])
        of_prefix = torch.tensor([token.stream == "prefix" for token in tokens])
        self.angle = torch.where(of_prefix, 0.0, torch.stack(thetas))
        if config.time_conditioning != "rotation":
            by_block = {token.block: theta for token, theta in zip(tokens, thetas, strict=True)}
            embeddings = {block: embedding(parameters, config, theta, label) for block, theta in by_block.items()}
            self.embedding = torch.stack([embeddings[token.block] for token in tokens])

    def modulation(self, name: str, branch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Shift (or angles of channel pairs), scale and gate of a branch; no gate for the output layer."""
        silu = self.embedding / (1 + (-self.embedding).exp())
        values = silu @ self.parameters[f"{name}.weight"].T + self.parameters[f"{name}.bias"]
        width = self.config.width
        shift = width if self.config.time_conditioning == "adaln" else width // 2
        of_branch = values[:, branch * (shift + 2 * width) :]
        return of_branch[:, :shift], of_branch[:, shift : shift + width], of_branch[:, shift + width :][:, :width]

    def at_input(self, x: Tensor, name: str, branch: int) -> Tensor:
        """DiT: x (1 + scale) + shift, or rotated, for noisy tokens alone; or the rotation by theta."""
        if self.config.time_conditioning == "rotation":
            return rotate_by_theta(x, self.angle, self.config, "branch")
        if self.config.time_conditioning == "embedding":
            return x
        shift, scale, _ = self.modulation(name, branch)
        scaled = x * (1 + scale)
        if self.config.time_conditioning == "adaln":
            return torch.where(self.noisy[:, None], scaled + shift, x)
        pairs = torch.complex(*scaled.chunk(2, dim=1)) * torch.polar(torch.ones_like(shift), shift)
        return torch.where(self.noisy[:, None], torch.cat((pairs.real, pairs.imag), dim=1), x)

    def at_output(self, x: Tensor, name: str, branch: int) -> Tensor:
        """DiT: gate x, for noisy tokens alone; or the inverse rotation."""
        if self.config.time_conditioning == "rotation":
            return rotate_by_theta(x, self.angle, self.config, "branch output")
        if self.config.time_conditioning == "embedding":
            return x
        return torch.where(self.noisy[:, None], x * self.modulation(name, branch)[2], x)


def embedding(parameters: Parameters, config: GPDiTConfig, theta: Tensor, label: Tensor | None) -> Tensor:
    """DiT's embedding of the step, with theta on a scale of 1000 for pi/2, plus that of the label: (D,)."""
    step = theta * 2000 / math.pi
    angles = [step * 10_000 ** (-k / 128) for k in range(128)]
    x = torch.stack([angle.cos() for angle in angles] + [angle.sin() for angle in angles])
    x = parameters["time_embedding.hidden.weight"] @ x + parameters["time_embedding.hidden.bias"]
    x = x / (1 + (-x).exp())
    x = parameters["time_embedding.output.weight"] @ x + parameters["time_embedding.output.bias"]
    if config.classes:
        number = config.classes if label is None or label < 0 else int(label)
        x = x + parameters["time_embedding.label.weight"][number]
    return x


def transformer(parameters: Parameters, config: GPDiTConfig, x: Tensor, tokens: list[Token], time: Time) -> Tensor:
    """The residual stream (tokens, D) after all blocks of the transformer."""
    allowed = [[attends(config, query, key) for key in tokens] for query in tokens]
    mask = torch.tensor(allowed)
    same_frame = torch.tensor([[(q.stream, q.frame) == (k.stream, k.frame) for k in tokens] for q in tokens])
    same_place = torch.tensor([[(q.row, q.column) == (k.row, k.column) for k in tokens] for q in tokens])
    branches = 3 if config.factorized else 2
    for layer in range(config.layers):
        weights = {name.removeprefix(f"blocks.{layer}."): value for name, value in parameters.items()}
        time.parameters = weights
        x = rotate_by_theta(x, time.angle, config, "residual") if config.time_conditioning == "rotation" else x
        if config.factorized:
            spatial = {name.removeprefix("spatial."): value for name, value in weights.items()}
            h = time.at_input(rms_norm(x, spatial["attention_norm.weight"], config), "modulation", 0)
            x = x + time.at_output(attention(spatial, config, h, tokens, same_frame), "modulation", 0)
        h = time.at_input(rms_norm(x, weights["attention_norm.weight"], config), "modulation", branches - 2)
        h = attention(weights, config, h, tokens, mask & same_place if config.factorized else mask)
        x = x + time.at_output(h, "modulation", branches - 2)
        h = time.at_input(rms_norm(x, weights["mlp_norm.weight"], config), "modulation", branches - 1)
        h = gelu(h @ weights["mlp.up.weight"].T) @ weights["mlp.down.weight"].T
        x = x + time.at_output(h, "modulation", branches - 1)
    time.parameters = parameters
    return x


def attention(weights: Parameters, config: GPDiTConfig, h: Tensor, tokens: list[Token], mask: Tensor) -> Tensor:
    """Masked softmax attention: (tokens, D) -> (tokens, D)."""
    width, head_width = config.width, config.width // config.heads
    key_weight, value_weight = weights["key_value.weight"][:width], weights["key_value.weight"][width:]
    first_place = {block: min(t.place for t in tokens if t.block == block) for block in {t.block for t in tokens}}
    heads = []
    for head in range(config.heads):
        channels = slice(head * head_width, (head + 1) * head_width)
        query = rms_norm(h @ weights["query.weight"][channels].T, weights["query_norm.weight"], config)
        key = rms_norm(h @ key_weight[channels].T, weights["key_norm.weight"], config)
        value = h @ value_weight[channels].T
        query = rotate_by_positions(query, [token.place for token in tokens], config)
        rows = [torch.empty(0)] * len(tokens)
        for block, place in first_place.items():
            # To the tokens of a block, those of the prefix are in the place of the block's first token.
            keys = rotate_by_positions(key, [place if t.stream == "prefix" else t.place for t in tokens], config)
            for number, token in enumerate(tokens):
                if token.block == block:
                    scores = (keys @ query[number] / math.sqrt(head_width)).masked_fill(~mask[number], -math.inf)
                    rows[number] = scores.softmax(dim=0) @ value
        heads.append(torch.stack(rows))
    return torch.cat(heads, dim=1) @ weights["attention_output.weight"].T
