"""Rotary positions over (frame, row, column)."""

import torch
from torch import Tensor

from gpdit_lightning.model.layout import BlockLayout
from gpdit_lightning.model.positions import Rope, axis_angles, rope_base, shift_frames
from gpdit_lightning.model.time_conditioning import rotate_pairs
from tests.model.toys import assert_near, toy_config


def test_rope_base() -> None:
    """100 ceil(8 L / (100 pi)): steps at L = 39.27, 78.54, ..."""
    for length, base in ((1, 100), (32, 100), (39, 100), (40, 200), (78, 200), (300, 800)):
        assert rope_base(length) == base


def test_axis_angles() -> None:
    angles = axis_angles(40, 6, range(2, 5))
    expected = [[m, m * 200 ** (-1 / 3), m * 200 ** (-2 / 3)] for m in (2, 3, 4)]
    assert_near(angles, torch.tensor(expected, dtype=torch.float64), 1e-14)


def rope(first_frame: int, frames: int = 3, rows: int = 2, columns: int = 3) -> Rope:
    config, blocks = toy_config(), range(first_frame, first_frame + frames)
    layout = BlockLayout.of(config, rows * config.patch_size, columns * config.patch_size)
    return Rope(config, layout, blocks, first_frame + frames, torch.device("cpu"), torch.float64)


def scores(table: Rope, query: Tensor, key: Tensor) -> Tensor:
    return torch.einsum("bmhk,bnhk->bhmn", table(query, query.dtype), table(key, key.dtype))


def test_rope_is_relative() -> None:
    query, key = (torch.randn(2, 18, 2, 20, dtype=torch.float64) for _ in range(2))
    for offset in (1, 7, 100):
        assert_near(scores(rope(offset), query, key), scores(rope(0), query, key), 1e-12)
    plain = torch.einsum("bmhk,bnhk->bhmn", query, key)
    assert (scores(rope(0), query, key) - plain).abs().max() > 0.1  # positions do matter


def test_rope_depends_on_each_axis() -> None:
    """With equal tokens everywhere, the score changes with the distance along every axis."""
    x = torch.randn(20, dtype=torch.float64).expand(1, 18, 2, 20)
    table = scores(rope(0), x, x)[0, 0].view(3, 2, 3, 3, 2, 3)
    at_origin = table[0, 0, 0]
    for one_step in (at_origin[1, 0, 0], at_origin[0, 1, 0], at_origin[0, 0, 1]):
        assert (one_step - at_origin[0, 0, 0]).abs() > 1e-3
    assert_near(table[1, 1, 1, 1, 1, 2], at_origin[0, 0, 1], 1e-12)


def test_rope_tables_continue_each_other() -> None:
    """A cached rollout starts its table where the frames before end; a shorter stream uses the start of a table."""
    x = torch.randn(1, 18, 2, 20, dtype=torch.float64)
    whole = rope(0)(x, x.dtype)
    assert torch.equal(rope(1, frames=2)(x[:, 6:], x.dtype), whole[:, 6:])
    assert torch.equal(rope(0)(x[:, :6], x.dtype), whole[:, :6])


def test_rotate_pairs_rotates_counter_clockwise() -> None:
    x = torch.tensor([1.0, 2.0, 0.0, 0.0])  # the pairs (1, 0) and (2, 0)
    quarter = torch.tensor([0.0]), torch.tensor([1.0])
    assert torch.equal(rotate_pairs(x, *quarter), torch.tensor([0.0, 0.0, 1.0, 2.0]))
    assert rotate_pairs(x.bfloat16(), *quarter).dtype == torch.bfloat16


def test_shifted_keys_are_those_of_later_frames() -> None:
    x = torch.randn(1, 18, 2, 20, dtype=torch.float64)
    assert_near(shift_frames(toy_config(), rope(0)(x, x.dtype), 5), rope(5)(x, x.dtype), 1e-12)


def test_angles_are_computed_on_the_cpu_whatever_the_default_device_is() -> None:
    """MPS has no float64. A table on the meta device, taken for another default device, could not be copied from it."""
    expected = rope(0)
    with torch.device("meta"):
        table = rope(0)
        shift_frames(toy_config(), torch.zeros(1, 20, device="cpu"), 5)
    assert torch.equal(table.cos, expected.cos)
    assert torch.equal(table.sin, expected.sin)
