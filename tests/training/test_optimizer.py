import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from gpdit_lightning.errors import InputError
from gpdit_lightning.training.callbacks.stopping import shut_down_process_group
from gpdit_lightning.training.optimizer import (
    OptimizerConfig,
    apply_config,
    build_optimizer,
    learning_rate_factor,
    reduce_ddp_gradients_in_bf16,
    reduction_dtype,
)


def factors(config: OptimizerConfig, steps: range, max_steps: int = 100) -> list[float]:
    return [learning_rate_factor(step, config, max_steps) for step in steps]


def test_constant_without_warmup_is_the_peak() -> None:
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


def test_wsd_is_constant_after_the_warmup_and_falls_linearly_at_the_end() -> None:
    config = OptimizerConfig(warmup_steps=20, decay="wsd", decay_steps=10)
    assert factors(config, range(20)) == [(step + 1) / 20 for step in range(20)]
    assert factors(config, range(20, 91)) == [1.0] * 71
    assert factors(config, range(90, 101)) == pytest.approx([1 - left / 10 for left in range(11)])
    assert learning_rate_factor(100, config, 100) == learning_rate_factor(150, config, 100) == 0


def test_halvings_are_the_exponential_decay_of_acdits_code() -> None:
    """Over the last 15 % of the steps the factor is 0.5 ** (6 r) after the fraction r of the decay."""
    config = OptimizerConfig(decay="wsd", decay_steps=150, halvings=6)
    assert factors(config, range(851), max_steps=1000) == [1.0] * 851
    expected = [0.5 ** (6 * (step - 850) / 150) for step in range(850, 1001)]
    assert factors(config, range(850, 1001), max_steps=1000) == pytest.approx(expected, rel=1e-12)
    assert factors(config, range(850, 1001, 25), max_steps=1000) == pytest.approx([0.5**n for n in range(7)])


def test_wsd_may_have_no_stable_part() -> None:
    config = OptimizerConfig(warmup_steps=40, decay="wsd", decay_steps=60)
    build_optimizer([torch.nn.Parameter(torch.zeros(1))], config, max_steps=100)
    assert factors(config, range(38, 43)) == pytest.approx([39 / 40, 1, 1, 59 / 60, 58 / 60])


@pytest.mark.parametrize("decay", ["cosine", "wsd"])
def test_a_decay_ends_at_the_final_fraction(decay: Literal["cosine", "wsd"]) -> None:
    bare, floored = (
        OptimizerConfig(warmup_steps=5, decay=decay, decay_steps=30, final_learning_rate_fraction=floor)
        for floor in (0.0, 0.1)
    )
    assert factors(floored, range(5)) == factors(bare, range(5))
    expected = [0.1 + 0.9 * factor for factor in factors(bare, range(5, 101))]
    assert factors(floored, range(5, 101)) == pytest.approx(expected)
    assert learning_rate_factor(100, floored, 100) == 0.1


@pytest.mark.parametrize("interrupted", [1, 3, 5, 7])
def test_a_resumed_schedule_continues_its_decay(interrupted: int) -> None:
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=2, decay="wsd", decay_steps=4)

    def steps(number: int, saved: tuple[Any, Any] | None = None) -> tuple[list[float], tuple[Any, Any]]:
        optimizer, schedule = build_optimizer([torch.nn.Parameter(torch.zeros(()))], config, max_steps=8)
        if saved is not None:
            optimizer.load_state_dict(saved[0])
            schedule.load_state_dict(saved[1])
        rates = []
        for _ in range(number):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return rates, (optimizer.state_dict(), schedule.state_dict())

    uninterrupted, _ = steps(8)
    before, saved = steps(interrupted)
    after, _ = steps(8 - interrupted, saved)
    assert before + after == uninterrupted
    assert uninterrupted == pytest.approx([0.05, 0.1, 0.1, 0.1, 0.1, 0.075, 0.05, 0.025])


def test_a_longer_wsd_run_has_the_same_stable_part() -> None:
    config = OptimizerConfig(decay="wsd", decay_steps=10)
    assert factors(config, range(90), max_steps=100) == factors(config, range(90), max_steps=1000)


def test_a_warmup_longer_than_the_run_is_only_a_warmup() -> None:
    config = OptimizerConfig(warmup_steps=200, decay="cosine")
    assert factors(config, range(100)) == [(step + 1) / 200 for step in range(100)]


def test_the_schedule_sets_the_learning_rate_of_the_optimizer() -> None:
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


MUON = OptimizerConfig(learning_rate=0.1, betas=(0.9, 0.99), eps=1e-6, warmup_steps=3, algorithm="muon")


def muon_parameters() -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    return torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(4))


def take_steps(parameters: Sequence[torch.nn.Parameter], optimizers: Sequence[Any], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()


def test_muon_updates_the_matrices_and_adamw_all_else() -> None:
    matrix, vector = muon_parameters()
    optimizer, schedule = build_optimizer([vector, matrix], MUON, max_steps=-1, matrices=[matrix])
    rates = []
    for step in range(4):
        rates.append([group["lr"] for group in optimizer.param_groups])
        take_steps((matrix, vector), (optimizer, schedule), range(step, step + 1))
    assert torch.tensor(rates).allclose(torch.tensor([0.1 / 3, 0.2 / 3, 0.1, 0.1])[:, None].expand(-1, 2))

    expected = muon_parameters()
    muon = torch.optim.Muon(expected[:1], 0.1, momentum=0.9, eps=1e-6, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(expected[1:], 0.1, betas=(0.9, 0.99), eps=1e-6, weight_decay=0)
    schedules = [LambdaLR(o, lambda step: min(1, (step + 1) / 3)) for o in (muon, adamw)]
    take_steps(expected, (muon, adamw, *schedules), range(4))
    assert torch.equal(matrix, expected[0])
    assert torch.equal(vector, expected[1])


def test_muon_resumes() -> None:
    """Bit-equal, with the settings of the recipe."""
    runs = []
    for interrupted in (False, True):
        matrix, vector = muon_parameters()
        optimizer, schedule = build_optimizer([matrix, vector], MUON, max_steps=-1, matrices=[matrix])
        take_steps((matrix, vector), (optimizer, schedule), range(2))
        if interrupted:
            saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
            optimizer, schedule = build_optimizer([matrix, vector], MUON, max_steps=-1, matrices=[matrix])
            optimizer.load_state_dict(saved[0])
            schedule.load_state_dict(saved[1])
            apply_config(MUON, optimizer, schedule)
        take_steps((matrix, vector), (optimizer, schedule), range(2, 5))
        runs.append((matrix, vector))
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("rate", [0.0, -1e-4, math.nan])
def test_a_learning_rate_that_is_not_positive_is_refused(rate: float) -> None:
    with pytest.raises(InputError, match=r"optimizer\.learning_rate is .*must be positive"):
        OptimizerConfig(learning_rate=rate)


def test_a_negative_warmup_is_refused() -> None:
    with pytest.raises(InputError, match=r"optimizer\.warmup_steps is -1"):
        OptimizerConfig(warmup_steps=-1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": (1.0, 0.9)}, r"optimizer\.betas is \[1\.0, 0\.9\]; both must lie in \[0, 1\)"),
        ({"betas": (0.9, -0.1)}, r"optimizer\.betas is"),
        ({"eps": 0.0}, r"optimizer\.eps is 0\.0; it must be positive"),
        ({"weight_decay": -0.1}, r"optimizer\.weight_decay is -0\.1; it must not be negative"),
        ({"weight_decay": math.nan}, r"optimizer\.weight_decay is nan"),
        ({"decay": "wsd"}, r"optimizer\.decay is wsd but decay_steps is 0"),
        ({"halvings": 6}, r"optimizer\.halvings is 6, .* but decay is constant and final_learning_rate_fraction is 0"),
        ({"decay": "wsd", "decay_steps": 5, "halvings": -1}, r"optimizer\.halvings is -1; it must be 0 or more"),
        ({"final_learning_rate_fraction": 1.1}, r"optimizer\.final_learning_rate_fraction is 1\.1"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OptimizerConfig(**settings)


@pytest.mark.parametrize("max_steps", [-1, 0])
@pytest.mark.parametrize("decay", ["cosine", "wsd"])
def test_a_decay_without_an_end_is_refused(decay: Literal["cosine", "wsd"], max_steps: int) -> None:
    with pytest.raises(InputError, match=rf"decay is {decay} but the run has no end: set trainer\.max_steps"):
        build_optimizer([torch.nn.Parameter(torch.zeros(1))], OptimizerConfig(decay=decay, decay_steps=10), max_steps)


def test_wsd_longer_than_the_run_is_refused() -> None:
    config = OptimizerConfig(warmup_steps=41, decay="wsd", decay_steps=60)
    with pytest.raises(InputError, match=r"warmup_steps = 41 and decay_steps = 60 do not fit into .*max_steps = 100"):
        build_optimizer([torch.nn.Parameter(torch.zeros(1))], config, max_steps=100)


class OnCuda(torch.nn.Parameter):
    """A parameter that is said to be on CUDA; torch has a fused AdamW for the CPU too."""

    is_cuda = True  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("kind", "scales_gradients", "fused"), [(OnCuda, False, True), (OnCuda, True, None), (nn.Parameter, False, None)]
)
def test_adamw_is_fused_on_cuda(kind: Any, scales_gradients: bool, fused: bool | None) -> None:
    """The fused update is the same; Lightning's gradient scaler does not clip gradients for it."""
    ours, other = kind(torch.linspace(1, 2, 5)), nn.Parameter(torch.linspace(1, 2, 5))
    updated = []
    for parameter in (ours, other):
        config = OptimizerConfig(learning_rate=0.1, weight_decay=0.1)
        optimizer, _ = build_optimizer([parameter], config, max_steps=-1, scales_gradients=scales_gradients)
        for step in range(3):
            parameter.grad = torch.linspace(-1, 1, 5) * (step + 1)
            optimizer.step()
        updated.append((parameter.detach().as_subclass(torch.Tensor), optimizer.param_groups[0]["fused"]))
    assert [group for _, group in updated] == [fused, None]
    torch.testing.assert_close(updated[0][0], updated[1][0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_ddp_adds_up_gradients_in_the_precision_of_the_option(precision: Any, tmp_path: Any) -> None:
    """A gradient with more digits than bf16 has is rounded to it, or not."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module = nn.Linear(1, 1, bias=False)
        module.optimizer_config = OptimizerConfig(gradient_reduction=precision)
        model = DistributedDataParallel(module)
        if reduction_dtype(module) == torch.bfloat16:
            reduce_ddp_gradients_in_bf16(model)
            reduce_ddp_gradients_in_bf16(module)  # not wrapped: nothing is done
        value = torch.full((1, 1), 1.2345678)
        model(value).sum().backward()
        assert module.weight.grad is not None
        expected = value.bfloat16().float() if precision == "bf16" else value
        assert torch.equal(module.weight.grad, expected)
    finally:
        shut_down_process_group()
    with pytest.raises(InputError, match="gradient_reduction is fp8: choose one of float32, bf16"):
        OptimizerConfig(gradient_reduction="fp8")  # type: ignore[arg-type]
