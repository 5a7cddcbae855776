import math

import pytest
import torch

from gpdit_lightning.errors import InputError
from gpdit_lightning.training.optimizer import OptimizerConfig, build_optimizer, learning_rate_factor


def factors(config: OptimizerConfig, steps: range, max_steps: int = 100) -> list[float]:
    return [learning_rate_factor(step, config, max_steps) for step in steps]


def test_constant_without_warmup_is_the_peak_throughout() -> None:
    assert factors(OptimizerConfig(), range(0, 1000, 50), max_steps=-1) == [1.0] * 20


def test_the_warmup_rises_linearly_and_ends_at_the_peak() -> None:
    config = OptimizerConfig(warmup_steps=4)
    assert factors(config, range(6)) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_falls_along_half_a_wave_after_the_warmup() -> None:
    config = OptimizerConfig(warmup_steps=20, decay="cosine")
    assert factors(config, range(20)) == [(step + 1) / 20 for step in range(20)]
    expected = [0.5 * (1 + math.cos(math.pi * (step - 20) / 80)) for step in range(20, 101)]
    assert factors(config, range(20, 101)) == pytest.approx(expected)
    assert learning_rate_factor(20, config, 100) == 1
    assert learning_rate_factor(60, config, 100) == pytest.approx(0.5)
    assert learning_rate_factor(100, config, 100) == 0
    assert learning_rate_factor(150, config, 100) == 0


def test_a_warmup_longer_than_the_run_is_only_a_warmup() -> None:
    config = OptimizerConfig(warmup_steps=200, decay="cosine")
    assert factors(config, range(100)) == [(step + 1) / 200 for step in range(100)]


def test_the_schedule_drives_the_optimiser() -> None:
    parameter = torch.nn.Parameter(torch.zeros(()))
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=2, decay="cosine")
    optimizer, schedule = build_optimizer([parameter], config, max_steps=6)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.1 * factor for factor in factors(config, range(6), max_steps=6)])


def test_without_weight_decay_it_is_adam() -> None:
    config = OptimizerConfig(learning_rate=0.01, betas=(0.8, 0.95), eps=1e-6)
    ours, adams = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    optimizer, _ = build_optimizer([ours], config, max_steps=-1)
    adam = torch.optim.Adam([adams], lr=0.01, betas=(0.8, 0.95), eps=1e-6)
    for step in range(5):
        for parameter, stepper in ((ours, optimizer), (adams, adam)):
            parameter.grad = torch.tensor([0.3, -1.0]) * (step + 1)
            stepper.step()
    assert torch.equal(ours, adams)


def test_weight_decay_is_decoupled() -> None:
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer, _ = build_optimizer([parameter], OptimizerConfig(learning_rate=0.1, weight_decay=0.5), max_steps=-1)
    parameter.grad = torch.zeros(1)
    optimizer.step()
    assert parameter.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5))


@pytest.mark.parametrize("rate", [0.0, -1e-4, math.nan])
def test_a_learning_rate_that_is_not_positive_is_refused(rate: float) -> None:
    with pytest.raises(InputError, match=r"optimizer\.learning_rate is .*must be positive"):
        OptimizerConfig(learning_rate=rate)


def test_a_negative_warmup_is_refused() -> None:
    with pytest.raises(InputError, match=r"optimizer\.warmup_steps is -1"):
        OptimizerConfig(warmup_steps=-1)


@pytest.mark.parametrize("max_steps", [-1, 0])
def test_a_cosine_without_an_end_is_refused(max_steps: int) -> None:
    with pytest.raises(InputError, match=r"set trainer\.max_steps"):
        build_optimizer([torch.nn.Parameter(torch.zeros(1))], OptimizerConfig(decay="cosine"), max_steps)
