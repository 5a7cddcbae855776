"""Trials of attention backends on random inputs: agreement with SDPA, the kernel that runs, time and memory."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gpdit_lightning.model.attention.base import AttentionBackend, PlannedAttention, Sliced
from gpdit_lightning.model.attention.gather import KV, QKV
from gpdit_lightning.model.attention.kernels import kernels_of
from gpdit_lightning.model.attention.plan import AttentionPlan, BlockSizes, plan_attention
from gpdit_lightning.model.attention.sdpa import sdpa

REFERENCE = Sliced(sdpa)
SMALL_PLAN = plan_attention("of2", BlockSizes.of_frames(3, 8), clips=2, rows=3)
"""The plan of small trials: three frames of 8 tokens; two clips with context and one without."""


class Inputs(NamedTuple):
    """Random inputs of a layer, and random gradients of its outputs."""

    context: KV | None
    parts: list[QKV]
    gradients: list[Tensor]

    @classmethod
    def random(
        cls, plan: AttentionPlan, heads: int, head_width: int, device: torch.device, dtype: torch.dtype, gradient: bool
    ) -> "Inputs":
        """Return inputs for a plan; with `gradient`, they require gradients."""
        generator = torch.Generator(device).manual_seed(0)

        def tensors(rows: int, *tokens: int) -> list[Tensor]:
            shapes = [(rows, count, heads, head_width) for count in tokens]
            return [torch.randn(s, generator=generator, device=device, dtype=dtype) for s in shapes]

        context = KV(*tensors(plan.clips, *[plan.context_tokens] * 2)) if plan.clips else None
        lengths = [(sum(rows.query_lengths), sum(rows.key_lengths)) for rows in plan.parts]
        parts = [QKV(*tensors(rows.rows, m, n, n)) for rows, (m, n) in zip(plan.parts, lengths, strict=True)]
        gradients = [tensors(rows.rows, m)[0] for rows, (m, _) in zip(plan.parts, lengths, strict=True)]
        inputs = cls(context, parts, gradients)
        for tensor in inputs.leaves:
            tensor.requires_grad_(gradient)
        return inputs

    @property
    def leaves(self) -> list[Tensor]:
        """Return all queries, keys and values."""
        return [*(self.context or ()), *(tensor for part in self.parts for tensor in part)]

    def backward(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the gradients of all queries, keys and values."""
        return torch.autograd.grad(outputs, self.leaves, self.gradients, materialize_grads=True, allow_unused=True)


class BackendError(Exception):
    """A backend failed a trial, with the reason in one clause."""


def check_backend(backend: AttentionBackend, plan: AttentionPlan, inputs: Inputs, gradient: bool) -> None:
    """Compare a backend with SDPA.

    Args:
        backend: the backend.
        plan: the plan.
        inputs: inputs for it.
        gradient: also compare the gradients.

    Raises:
        BackendError: an output has another shape, dtype or device, has no gradient, or differs.
        Exception: the backend may raise anything.
    """
    device = inputs.leaves[0].device
    expected, actual = (
        PlannedAttention.of(each, plan, device)(inputs.context, inputs.parts) for each in (REFERENCE, backend)
    )
    for out, right in zip(actual, expected, strict=True):
        for what in ("shape", "dtype", "device"):
            if getattr(out, what) != getattr(right, what):
                raise BackendError(f"its output has {what} {getattr(out, what)}, not {getattr(right, what)}")
        if gradient and not out.requires_grad:
            raise BackendError("its output has no gradient")
    pairs: dict[str, tuple[Sequence[Tensor], Sequence[Tensor]]] = {"output": (actual, expected)}
    if gradient:
        pairs["gradient"] = (inputs.backward(actual), inputs.backward(expected))
    for what, (of_backend, of_sdpa) in pairs.items():
        errors = [
            (actual - right).float().norm() / right.float().norm().clamp(min=1e-6)
            for actual, right in zip(of_backend, of_sdpa, strict=True)
        ]
        largest = torch.stack(errors).nan_to_num(torch.inf).max().item()
        if not math.isfinite(largest):
            raise BackendError(f"its {what} is not finite")
        if largest > tolerance(inputs.leaves[0].dtype):
            raise BackendError(f"its {what} differs from SDPA's by {largest:.1%}")


def tolerance(dtype: torch.dtype) -> float:
    """Return the largest relative error (Frobenius norm) that a trial allows; that of float32 allows TF32."""
    return 5e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-2


def failure(
    backend: AttentionBackend, device_type: str, dtype: torch.dtype, head_width: int, gradient: bool
) -> str | None:
    """Return the reason why a backend cannot be used, found by a small trial if need be; None if it can."""
    reason = backend.obstacle(device_type, dtype, gradient)
    if reason is not None or device_type == "meta":  # where nothing is computed
        return reason
    with torch.inference_mode(False), torch.set_grad_enabled(gradient):
        try:
            inputs = Inputs.random(SMALL_PLAN, 2, head_width, torch.device(device_type), dtype, gradient)
            check_backend(backend, SMALL_PLAN, inputs, gradient)
        except Exception as error:  # a build for another torch or GPU may raise anything
            return f"a trial failed ({first_line(error)})"
    return None


def first_line(error: Exception) -> str:
    """Return type and first line of an error, or the reason of a `BackendError`."""
    line = str(error).strip().partition("\n")[0]
    return line if isinstance(error, BackendError) else f"{type(error).__name__}: {line}".removesuffix(": ")


def kernel_of(backend: AttentionBackend, plan: AttentionPlan, inputs: Inputs) -> str:
    """Return the kernel that computes a plan."""
    if backend.kernel is not None:
        return backend.kernel
    planned = PlannedAttention.of(backend, plan, inputs.leaves[0].device)
    return kernels_of(lambda: planned(inputs.context, inputs.parts))


def small_trial_kernel(
    backend: AttentionBackend, device_type: str, dtype: torch.dtype, head_width: int, gradient: bool
) -> str:
    """Return the kernel that computes the plan of small trials."""
    with torch.inference_mode(False), torch.set_grad_enabled(gradient):
        inputs = Inputs.random(SMALL_PLAN, 2, head_width, torch.device(device_type), dtype, gradient)
        return kernel_of(backend, SMALL_PLAN, inputs)


@dataclass(frozen=True)
class Measurement:
    """The trial of a backend at the shapes of a run.

    Attributes:
        milliseconds: time of the forward and backward passes of all plans, each as often as in a step; None: it failed.
        saved_bytes: the most bytes that autograd saves for the backward pass of a plan, without the inputs.
        kernel: the kernel that ran.
        reason: why the backend cannot be used; empty if it can.
    """

    milliseconds: float | None = None
    saved_bytes: int = 0
    kernel: str = ""
    reason: str = ""


def measure(
    backend: AttentionBackend,
    plans: Mapping[AttentionPlan, float],
    heads: int,
    head_width: int,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int = 3,
) -> Measurement:
    """Compare a backend with SDPA and time it, forward and backward; an error is a result.

    Args:
        backend: the backend.
        plans: how often each plan is computed in a step.
        heads, head_width: the shape of queries, keys and values.
        device, dtype: device and precision.
        repeats: number of timed runs of each plan, after one that is not timed.
    """
    reason = backend.obstacle(device.type, dtype, gradient=True)
    if reason is not None:
        return Measurement(reason=reason)
    milliseconds, saved, kernel = 0.0, 0, ""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        try:
            for plan, count in plans.items():
                inputs = Inputs.random(plan, heads, head_width, device, dtype, gradient=True)
                check_backend(backend, plan, inputs, gradient=True)
                kernel = kernel or kernel_of(backend, plan, inputs)
                planned = PlannedAttention.of(backend, plan, device)
                saved = max(saved, saved_bytes(partial(planned, inputs.context, inputs.parts), inputs.leaves))
                milliseconds += count * statistics.median(_milliseconds(planned, inputs) for _ in range(repeats))
        except Exception as error:  # a build for another torch or GPU may raise anything
            return Measurement(reason=first_line(error))
    return Measurement(milliseconds, saved, kernel)


def _milliseconds(planned: PlannedAttention, inputs: Inputs) -> float:
    """Return the time of a forward and a backward pass."""
    started = _now(inputs)
    inputs.backward(planned(inputs.context, inputs.parts))
    return 1000 * (_now(inputs) - started)


def _now(inputs: Inputs) -> float:
    """Return the time in seconds, after the device has finished all queued work."""
    device = inputs.leaves[0].device
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
    return time.perf_counter()


def saved_bytes(run: Callable[[], object], held: Iterable[Tensor]) -> int:
    """Return the bytes that autograd saves for the backward pass of a function.

    Args:
        run: the function; what it returns keeps the graph alive until the bytes are counted, so that no address is
            counted twice.
        held: tensors that are not counted, such as inputs and weights.
    """
    addresses = {tensor.untyped_storage().data_ptr() for tensor in held}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output of the operation that saves it would keep its graph, and itself, for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(count for address, count in saved.items() if address not in addresses)
