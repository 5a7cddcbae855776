"""The simulated device itself; run by tests/device/test_on_sim.py."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.device.simulated import recording

x, cpu = torch.arange(6.0).to("sim"), torch.arange(6.0)
indices = torch.tensor([0, 2])


@pytest.mark.parametrize(
    "operation",
    [
        lambda: x + cpu,
        lambda: x == cpu,
        lambda: x.view(2, 3) @ cpu.view(3, 2),
        lambda: torch.cat((x, cpu)),
        lambda: torch.stack((x[0], torch.tensor(1.0))),
        lambda: torch.where(x > 1, x, cpu),
        lambda: F.embedding(indices, x.view(3, 2)),
        lambda: x.index_select(0, indices),
        lambda: cpu[indices.to("sim")],
        lambda: x.clone().index_add_(0, indices, x[:2]),
        lambda: F.scaled_dot_product_attention(x.view(1, 1, 2, 3), x.view(1, 1, 2, 3), cpu.view(1, 1, 2, 3)),
        lambda: torch._foreach_lerp_([x.clone()], [cpu], 0.5),
        lambda: nn.Linear(6, 2)(x),
        lambda: torch.randn(3, device="sim", generator=torch.Generator()),
        lambda: x.clone().normal_(generator=torch.Generator()),
        lambda: x.numpy(),
    ],
)
def test_tensors_of_both_devices_fail(operation: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, TypeError), match=r"sim|cpu"):
        operation()


@pytest.mark.parametrize(
    ("operation", "waits"),
    [
        (lambda: x[0].item(), {"read": 1}),
        (lambda: bool(x[0]), {"read": 1}),
        (lambda: float(x[0]) + int(x[1]), {"read": 2}),
        (lambda: f"{x[0]:.2f}", {"read": 1}),
        (lambda: torch.equal(x, x), {"read": 1}),
        (lambda: torch.allclose(x, x), {"read": 1}),
        (lambda: x.tolist(), {"tolist": 1}),
        (lambda: repr(x), {"print": 1}),
        (lambda: x.cpu(), {"copy to the CPU": 1}),
        (lambda: cpu.clone().copy_(x), {"copy to the CPU": 1}),
        (lambda: cpu.to("sim"), {"copy to the device": 1}),
        (lambda: torch.tensor([1.0], device="sim"), {"copy to the device": 1}),
        (lambda: x.new_tensor([1.0]), {"copy to the device": 1}),
        (lambda: x[[0, 2]], {"copy to the device": 1}),
        (lambda: x[indices], {"index on the CPU": 1}),
        (lambda: x[x > 1], {"mask as index": 1}),
        (lambda: x.clone().masked_fill_(x > 1, 0.0), {}),
        (lambda: x.masked_select(x > 1), {"masked_select": 1}),
        (lambda: x.nonzero(), {"nonzero": 1}),
        (lambda: x.unique(), {"_unique2": 1}),
        (lambda: x.repeat_interleave(2), {}),
        (lambda: x + torch.tensor(1.0), {}),
        (lambda: torch.full((3,), 2.0, device="sim") + torch.arange(3, device="sim"), {}),
        (lambda: [part + 1 for part in x.split(2)] + list(x.unbind()), {}),
        (lambda: cpu.to("sim", non_blocking=True), {}),
    ],
)
def test_waits_are_counted(operation: Callable[[], object], waits: dict[str, int]) -> None:
    with recording() as record:
        operation()
    assert {cause.split(" at ")[0].split(",")[0]: count for cause, count in record.waits.items()} == waits
    assert all(cause.rpartition(":")[0].endswith("on_sim/tool.py") for cause in record.waits)


def test_random_numbers_and_asynchronous_copies_are_recorded() -> None:
    with recording() as record:
        torch.randn(3, device="sim")
        cpu.to("sim", non_blocking=True)
    assert sum(record.random.values()) == sum(record.copies.values()) == 1
    assert not record.waits


@pytest.mark.parametrize("inference", [False, True])
def test_values_and_gradients_are_those_of_the_cpu(inference: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.GELU())

    def output(device: str) -> Tensor:
        layer.to(device).zero_grad()
        values = cpu.to(device).view(2, 3)
        with torch.inference_mode(inference):
            result = layer(values.expand(2, 2, 3)[0] * 2)
            result[:, 1:].mul_(0.5)
        if inference:
            return result
        result.square().sum().backward()
        return next(layer.parameters()).grad

    torch.testing.assert_close(output("sim").cpu(), output("cpu"))


def test_the_precision_of_a_module_changes() -> None:
    layer = nn.Linear(6, 2).to("sim").to(torch.float64)
    assert layer(x.double()).dtype == layer.weight.dtype == layer.weight.inner.dtype == torch.float64


def test_autocast_has_the_precision_that_is_requested() -> None:
    layer = nn.Linear(6, 2).to("sim")
    with torch.autocast("sim", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert (x + 1).dtype == torch.float32
    assert layer(x).dtype == torch.float32
