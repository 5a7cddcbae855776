"""The observed attention is the mask that the papers state, token by token."""

from typing import Any

import pytest
import torch

from gpdit_lightning import GPDiTConfig, InputError
from gpdit_lightning.model.attention_pattern import attention_patterns
from tests.model.block_oracle import Token, attends, tokens_of

ROWS, COLUMNS = 2, 4


def mask(config: GPDiTConfig, frames: int, context: int) -> tuple[list[Token], torch.Tensor]:
    """The tokens of a pass, by stream and block, and the mask of a clip of which `context` frames have no noise."""
    clean, noisy = (tokens_of(config, stream, frames, ROWS, COLUMNS) for stream in ("clean", "noisy"))
    last = max(token.block for token in clean)
    used = [token for token in clean if token.block < last] + [token for token in noisy if token.frame >= context]
    tokens = sorted(used, key=lambda token: (token.stream, token.block, token.place))
    return tokens, torch.tensor([[attends(config, query, key) for key in tokens] for query in tokens])


@pytest.mark.parametrize(
    ("fields", "frames", "context"),
    [
        ({}, 4, 0),
        ({"attention": "of", "size": "acdit-b", "time_conditioning": "adaln", "classes": 5}, 4, 2),
        ({"block_shape": (2, 0, 0), "first_block_frames": 1}, 5, 0),
        ({"block_shape": (1, 1, 2)}, 2, 1),
        ({"block_shape": (0, 0, 0)}, 3, 0),
        ({"block_shape": (0, 0, 0), "first_block_frames": 2}, 5, 2),
        ({"block_shape": (2, 0, 0), "first_block_frames": 3, "causal_in_block": True}, 7, 3),
    ],
    ids=str,
)
def test_the_attention_is_that_of_the_papers(fields: dict[str, Any], frames: int, context: int) -> None:
    config = GPDiTConfig(**fields)
    tokens, expected = mask(config, frames, context)
    (pattern,) = attention_patterns(config, frames, range(context, frames), ROWS, COLUMNS).values()
    assert torch.equal(pattern.attends, expected)
    assert sum(pattern.clean) == sum(token.stream == "clean" for token in tokens)
    assert sum(pattern.noisy) == sum(token.stream == "noisy" for token in tokens)


def test_factorized_attention_has_two_patterns() -> None:
    config = GPDiTConfig(block_shape=(2, 0, 0), first_block_frames=1, causal_in_block=True, factorized=True)
    tokens, whole = mask(config, 5, 1)
    same_frame = torch.tensor([[(a.stream, a.frame) == (b.stream, b.frame) for b in tokens] for a in tokens])
    same_place = torch.tensor([[a.place[1:] == b.place[1:] for b in tokens] for a in tokens])
    patterns = attention_patterns(config, 5, range(1, 5), ROWS, COLUMNS)
    assert torch.equal(patterns["within frames"].attends, same_frame)
    assert torch.equal(patterns["along time"].attends, whole & same_place)


def test_parts_of_blocks_are_refused() -> None:
    with pytest.raises(InputError, match="only a part of a block"):
        attention_patterns(GPDiTConfig(block_shape=(2, 0, 0)), 3, range(3), ROWS, COLUMNS)
