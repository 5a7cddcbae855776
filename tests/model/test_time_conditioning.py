"""The time rotation against explicit numbers: trained weights depend on its sign."""

import pytest
import torch

from gpdit_lightning.model.config import TimeSite
from gpdit_lightning.model.time_conditioning import TimeRotation

THETA = torch.tensor([0.0, 0.8], dtype=torch.float64).asin()  # a clean token, and one with cos = 0.6 and sin = 0.8
X = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2, dtype=torch.float64)  # the pairs (1, 3) and (2, 4)
ROTATED = [[1.0, 2.0, 3.0, 4.0], [3.0, 4.4, 1.0, 0.8]]  # 0.6 * 1 + 0.8 * 3, ..., -0.8 * 1 + 0.6 * 3, ...
ROTATED_BACK = [[1.0, 2.0, 3.0, 4.0], [-1.8, -2.0, 2.6, 4.0]]


@pytest.mark.parametrize(
    ("site", "rotating", "rotating_back"),
    [
        ("branch", {"at_branch_input"}, set()),
        ("branch_inverse", {"at_branch_input"}, {"at_branch_output"}),
        ("input", {"at_input"}, set()),
        ("residual", {"at_block"}, set()),
        ("none", set(), set()),
    ],
)
def test_each_site_multiplies_channel_pairs_by_r_of_theta(
    site: TimeSite, rotating: set[str], rotating_back: set[str]
) -> None:
    """R(theta) = [[cos, sin], [-sin, cos]], as printed in GPDiT, section 4.2."""
    rotation = TimeRotation(THETA, site)
    for method in ("at_input", "at_block", "at_branch_input", "at_branch_output"):
        expected = ROTATED if method in rotating else ROTATED_BACK if method in rotating_back else X.tolist()
        result = getattr(rotation, method)(X)
        torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64))
        torch.testing.assert_close(getattr(rotation, method)(X[1:]), result[1:])  # the tail: the last block


def test_exchanging_the_channels_of_each_pair_reverses_the_rotation() -> None:
    """So the paper's R(theta)^-1 gives the same family of functions: weights absorb the exchange."""
    exchanged = X.roll(2, dims=1)
    forwards, backwards = (TimeRotation(sign * THETA, "branch") for sign in (1, -1))
    torch.testing.assert_close(forwards.at_branch_input(exchanged).roll(2, dims=1), backwards.at_branch_input(X))
