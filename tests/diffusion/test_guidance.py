import math

import pytest
import torch

from gpdit_lightning.diffusion import Guidance, NoiseSchedule
from gpdit_lightning.errors import InputError


def test_one_condition_is_guided_as_ho_and_salimans_do() -> None:
    conditional, unconditional = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = unconditional + 2.5 * (conditional - unconditional)
    torch.testing.assert_close(Guidance(context=2.5).combine(conditional, None, unconditional), expected)
    torch.testing.assert_close(Guidance(label=2.5).combine(conditional, unconditional, None), expected)


def test_two_conditions_add_up() -> None:
    both, without_label, without_context = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    guided = Guidance(context=1.5, label=3.0).combine(both, without_label, without_context)
    torch.testing.assert_close(guided, both + 2.0 * (both - without_label) + 0.5 * (both - without_context))


def test_without_other_velocities_the_velocity_is_unchanged() -> None:
    assert torch.equal(Guidance(context=9.0, label=9.0).combine(torch.ones(2), None, None), torch.ones(2))


@pytest.mark.parametrize("schedule", [NoiseSchedule(), NoiseSchedule(shift=3.0)])
def test_levels_are_those_of_the_schedule(schedule: NoiseSchedule) -> None:
    guidance = Guidance(least_level=0.25, most_level=0.5)
    assert not guidance.at_all_levels
    for t, applies in ((0.2, False), (0.25, True), (0.4, True), (0.5, True), (0.55, False)):
        theta = schedule.theta(torch.tensor([t], dtype=torch.float32)).item()
        assert guidance.applies_at(theta, schedule) == applies, t


def test_all_levels_by_default() -> None:
    guidance = Guidance()
    assert guidance.at_all_levels
    assert all(guidance.applies_at(theta, NoiseSchedule()) for theta in (0.0, 1.0, math.pi / 2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context": math.nan}, "guidance scale of the context is nan"),
        ({"label": math.inf}, "guidance scale of the label is inf"),
        ({"context": 1e30}, "guidance scale of the context is 1e\\+30"),
        ({"least_level": 0.6, "most_level": 0.5}, "from 0.6 to 0.5 is not a range"),
        ({"most_level": 1.1}, "from 0.0 to 1.1 is not a range"),
        ({"least_level": -0.1}, "from -0.1 to 1.0 is not a range"),
    ],
)
def test_invalid_scales_and_levels_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Guidance(**fields)
