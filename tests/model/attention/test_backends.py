"""The choice of an attention backend, custom ones, and the xformers path with a reference in place of its operator."""

import importlib.util
import inspect
import logging
import math
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from gpdit_lightning import GPDiT, InputError
from gpdit_lightning.model.attention import backends, register_attention_backend, trial, xformers_backends
from gpdit_lightning.model.precision import product_dtype
from tests.model import oracle
from tests.model.attention.emulated import ReferenceOperator, emulated_operators, forget_choices
from tests.model.toys import assert_near, toy_batch, toy_config, toy_model

Call = tuple[tuple[int, ...], tuple[int, ...]]  # shapes of the query and of the keys


@pytest.fixture(autouse=True)
def _fresh_choice() -> Iterator[None]:
    """Choices are cached for the whole process."""
    forget_choices()
    yield
    forget_choices()


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> ReferenceOperator:
    """The reference as an installed xformers, which has no kernels for a CPU."""
    reference = ReferenceOperator()
    monkeypatch.setattr(xformers_backends, "load_xformers_operator", lambda: reference)
    pretend_installed(monkeypatch, installed=True)
    return reference


@pytest.fixture
def operator_on_cpu() -> Iterator[ReferenceOperator]:
    """The reference as xformers' kernel for the CPU, for which the real package has none."""
    with emulated_operators() as reference:
        yield reference


def pretend_installed(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        if name == "xformers":
            return real("math") if installed else None
        return real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def gradients(model: GPDiT, batch: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor | None]]:
    leaves = [x.detach().clone().requires_grad_() for x in batch]
    output = model(*leaves)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=output.dtype)
    grads = torch.autograd.grad((output * weights).sum(), [*leaves, *model.parameters()], allow_unused=True)
    return output.detach(), list(grads)


# Some clips have context; all have; images, whose context has no frames; none has.
CASES = pytest.mark.parametrize(("clips", "context_clips", "frames"), [(3, 1, 5), (2, 2, 2), (2, 2, 1), (2, 0, 2)])


@CASES
@pytest.mark.parametrize("variant", ["of2", "of"])
def test_equals_sdpa_and_the_oracle(
    operator_on_cpu: ReferenceOperator, variant: str, clips: int, context_clips: int, frames: int
) -> None:
    batch = toy_batch(clips, context_clips, frames)
    config = toy_config(attention=variant)
    model = toy_model(config.replaced(attention_backend="xformers"))
    output, grads = gradients(model, batch)
    assert operator_on_cpu.calls
    calls = len(operator_on_cpu.calls)
    expected, expected_grads = gradients(toy_model(config.replaced(attention_backend="sdpa")), batch)
    assert len(operator_on_cpu.calls) == calls  # the other model did not use it
    assert_near(output, expected, 1e-12, "output")
    for (name, _), grad, expected_grad in zip(
        [("noisy", 0), ("theta", 0), ("clean", 0), *model.named_parameters()], grads, expected_grads, strict=True
    ):
        assert_near(grad, expected_grad, 1e-11, f"gradient of {name}")
    assert_near(output, oracle.forward(model.state_dict(), config, *batch), what="oracle")


def expected_calls(variant: str, clips: int, context_clips: int, frames: int, layers: int, tokens: int) -> list[Call]:
    """What figure 3 of GPDiT allows: one unmasked call per query frame, and one for all that attend to themselves."""
    heads, head_width = 2, 20

    def call(batch: int, key_frames: int) -> Call:
        return (batch, tokens, heads, head_width), (batch, key_frames * tokens, heads, head_width)

    calls = []
    for layer in range(layers):
        if context_clips and frames > 1:
            if layer < layers - 1 and variant == "of":
                calls.append(call(context_clips * (frames - 1), 1))
            elif layer < layers - 1:
                calls += [call(context_clips, j + 1) for j in range(frames - 1)]
            calls += [call(context_clips, i + 1) for i in range(frames)]
            if clips > context_clips:
                calls.append(call((clips - context_clips) * frames, 1))
        else:
            calls.append(call(clips * frames, 1))
    return calls


@CASES
@pytest.mark.parametrize("variant", ["of2", "of"])
def test_calls(operator_on_cpu: ReferenceOperator, variant: str, clips: int, context_clips: int, frames: int) -> None:
    model = toy_model(attention=variant, attention_backend="xformers", layers=3)
    model(*toy_batch(clips, context_clips, frames))
    assert sorted(operator_on_cpu.calls) == sorted(
        expected_calls(variant, clips, context_clips, frames, layers=3, tokens=6)
    )


def test_noisy_copies_share_keys_and_values_of_their_clip(operator_on_cpu: ReferenceOperator) -> None:
    """Two copies of one clip of two frames, and a clip without context."""
    model = toy_model(attention_backend="xformers", layers=1)
    noisy, theta, clean = toy_batch(3, 1, frames=2)
    model(noisy, theta, clean, draws=2)
    alone, first, second = [((2, 6, 2, 20), (2, key_frames * 6, 2, 20)) for key_frames in (1, 1, 2)]
    assert sorted(operator_on_cpu.calls) == sorted([alone, first, second])


def test_cached_generation_uses_the_operator(operator_on_cpu: ReferenceOperator) -> None:
    model = toy_model(attention_backend="xformers")
    noisy, theta, clean = toy_batch(frames=3)
    with torch.no_grad():
        expected = model(noisy, theta, clean)
        cache = model.new_cache(2, 3, 4, 6)
        model.extend(cache, clean[:, :2])
        operator_on_cpu.calls.clear()
        assert_near(model.denoise(noisy[:, 2], theta[:, 2], cache), expected[:, 2])
    assert operator_on_cpu.calls == [((2, 6, 2, 20), (2, 18, 2, 20))] * 2


@pytest.mark.parametrize(("variant", "cache_in_autocast"), [("of2", False), ("of", True)])
def test_the_operator_gets_one_precision(
    operator_on_cpu: ReferenceOperator, variant: str, cache_in_autocast: bool
) -> None:
    model = toy_model(attention=variant, attention_backend="xformers").float()
    noisy, theta, clean = (x.float() for x in toy_batch(3, 2, frames=3))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cache_in_autocast):
        cache = model.new_cache(2, 3, 4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(noisy, theta, clean)
        model.extend(cache, clean[:, :1])
        model.extend(cache, clean[:, 1:2])
        assert model.denoise(noisy[:2, 2], theta[:2, 2], cache).isfinite().all()


def test_the_real_operator_has_the_signature_of_the_reference() -> None:
    """Names, order and defaults of the parameters that we rely on."""
    if importlib.util.find_spec("xformers") is None:
        pytest.skip("xformers is not installed")
    parameters = inspect.signature(xformers_backends.load_xformers_operator()).parameters
    ours = inspect.signature(ReferenceOperator.__call__).parameters
    for name, parameter in list(ours.items())[1:]:
        assert parameters[name].default == parameter.default, name
        assert parameters[name].kind == parameter.kind, name
    assert list(parameters)[:6] == list(ours)[1:7]
    extra = [p for name, p in parameters.items() if name not in ours]
    assert all(p.default is not inspect.Parameter.empty for p in extra)


def choice(
    caplog: pytest.LogCaptureFixture, requested: str, device_type: str = "cuda", dtype: torch.dtype = torch.bfloat16
) -> tuple[Any, str]:
    """The operator chosen, twice, and the one line logged about it."""
    with caplog.at_level(logging.INFO, logger=backends.log.name):
        operator = backends.select_backend(requested, device_type, dtype)
        assert backends.select_backend(requested, device_type, dtype) is operator
    (line,) = caplog.messages
    return operator, line


def on_cpu_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the trial for a CUDA device run without one."""
    real = trial.Inputs.random

    def random(plan: Any, heads: int, head_width: int, device: Any, *rest: Any) -> trial.Inputs:
        return real(plan, heads, head_width, torch.device("cpu"), *rest)

    monkeypatch.setattr(trial.Inputs, "random", random)


def fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(*_: Any, **__: Any) -> Tensor:
        raise error

    monkeypatch.setattr(xformers_backends, "load_xformers_operator", lambda: broken)
    pretend_installed(monkeypatch, installed=True)
    on_cpu_instead(monkeypatch)


@pytest.mark.parametrize("requested", ["sdpa", "xformers"])
def test_a_requested_backend(
    caplog: pytest.LogCaptureFixture, operator_on_cpu: ReferenceOperator, requested: str
) -> None:
    chosen, line = choice(caplog, requested, "cpu", torch.float32)
    assert chosen is backends.BACKENDS[requested]
    assert line == f"attention backend: {requested} (requested)"


def test_auto_selects_xformers_on_cuda(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, operator: ReferenceOperator
) -> None:
    on_cpu_instead(monkeypatch)
    chosen, line = choice(caplog, "auto")
    assert chosen is backends.BACKENDS["xformers"]
    assert line.startswith("attention backend: xformers (")
    assert operator.calls  # it was tried first


def test_the_trial_has_the_precision_and_the_head_width_of_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under autocast the residual stream is float32, and what attention gets is not."""
    requests = []

    def record(requested: str, device_type: str, dtype: torch.dtype, head_width: int) -> Any:
        requests.append((dtype, head_width))
        return backends.BACKENDS["sdpa"]

    monkeypatch.setattr("gpdit_lightning.model.streams.select_backend", record)
    model, batch = toy_model().float(), [part.float() for part in toy_batch()]
    model(*batch)
    with torch.autocast("cpu", torch.bfloat16):
        model(*batch)
    model.bfloat16()(*batch)
    width = model.config.head_width
    assert requests == [(torch.float32, width), (torch.bfloat16, width), (torch.bfloat16, width)]
    assert product_dtype(torch.empty(1, device="meta")) == torch.float32


@pytest.mark.parametrize(
    ("device_type", "dtype", "reason"),
    [
        ("cpu", torch.float32, "xformers has no kernels for cpu"),
        ("meta", torch.bfloat16, "xformers has no kernels for meta"),
        ("cuda", torch.float64, "xformers has no float64 kernels"),
    ],
)
def test_auto_selects_sdpa_if_xformers_cannot_be_used(
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    operator: ReferenceOperator,
    device_type: str,
    dtype: torch.dtype,
    reason: str,
) -> None:
    on_cpu_instead(monkeypatch)
    chosen, line = choice(caplog, "auto", device_type, dtype)
    assert chosen is backends.BACKENDS["sdpa"]
    assert line.startswith(f"attention backend: sdpa ({reason}")
    assert ("flash_attention" in line) == (device_type == "cuda")  # the kernel
    assert not operator.calls


def test_auto_without_xformers(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, installed=False)
    on_cpu_instead(monkeypatch)
    chosen, line = choice(caplog, "auto")
    assert chosen is backends.BACKENDS["sdpa"]
    assert line.startswith("attention backend: sdpa (xformers is not installed; ")


def test_auto_after_a_failed_trial(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, NotImplementedError("No operator found\nand many lines more"))
    chosen, line = choice(caplog, "auto")
    assert chosen is backends.BACKENDS["sdpa"]
    assert line.startswith("attention backend: sdpa (a trial failed (NotImplementedError: No operator found); ")


def test_auto_after_a_trial_that_failed_without_a_message(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, AssertionError())
    chosen, line = choice(caplog, "auto")
    assert chosen is backends.BACKENDS["sdpa"]
    assert "AssertionError" in line


def test_xformers_requested_but_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, installed=False)
    with pytest.raises(
        InputError, match="attention_backend is xformers, but xformers is not installed: use auto or sdpa"
    ):
        backends.select_backend("xformers", "cuda", torch.bfloat16)


@pytest.mark.parametrize(
    ("device_type", "dtype", "reason"),
    [
        ("cpu", torch.float32, "no kernels for cpu"),
        ("mps", torch.bfloat16, "no kernels for mps"),
        ("cuda", torch.float64, "no float64 kernels"),
    ],
)
def test_xformers_requested_where_it_cannot_be_used(
    operator: ReferenceOperator, device_type: str, dtype: torch.dtype, reason: str
) -> None:
    with pytest.raises(
        InputError, match=f"^attention_backend is xformers, but xformers has {reason}: use auto or sdpa"
    ):
        backends.select_backend("xformers", device_type, dtype)


def test_a_model_that_requests_xformers_on_a_cpu_is_refused(operator: ReferenceOperator) -> None:
    with pytest.raises(InputError, match="xformers has no kernels for cpu"):
        toy_model(attention_backend="xformers")(*toy_batch())
    assert not operator.calls


CUSTOM_CALLS = []


def custom_operator(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A custom operator."""
    CUSTOM_CALLS.append(query.shape)
    return ReferenceOperator()(query, key, value)


def test_a_custom_operator_by_its_import_path_and_by_a_registered_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "BACKENDS", dict(backends.BACKENDS))
    module = ModuleType("custom_operators")
    module.custom_operator = custom_operator  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    register_attention_backend("mine", custom_operator)
    expected = toy_model()(*toy_batch())
    for name in ("mine", "custom_operators.custom_operator"):
        CUSTOM_CALLS.clear()
        model = toy_model(attention_backend=name)
        assert_near(model(*toy_batch()), expected)
        assert CUSTOM_CALLS
        assert model.config.to_dict()["attention_backend"] == name  # what the user wrote
        forget_choices()
        caplog.clear()
        backend, line = choice(caplog, name, "cpu", torch.float32)
        assert backend.operator is custom_operator
        assert line == f"attention backend: {name} (requested)"
    with pytest.raises(InputError, match="attention backend 'sdpa' is built in"):
        register_attention_backend("sdpa", custom_operator)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "SDPA",
            "attention_backend 'SDPA' is not known.*: choose one of auto, xformers, .*, flex_attention, or give",
        ),
        ("", "attention_backend '' is not known"),
        ("no_such_package.operator", "attention_backend 'no_such_package.operator' cannot be imported"),
        ("math.pi", "attention_backend 'math.pi' is of type float; it must be callable"),
    ],
)
def test_unknown_names_are_refused_when_the_model_is_built(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        toy_model(attention_backend=name)


FAULTY_OPERATORS: dict[str, tuple[Any, str]] = {
    "none": (lambda query, key, value: None, r"returns NoneType for queries of torch.float32 \(3, 8, 2, 16\) on cpu"),
    "swapped_result": (lambda *qkv: backends.sdpa(*qkv).transpose(1, 2), r"returns torch.float32 \(3, 2, 8, 16\)"),
    "of_torch": (
        torch.nn.functional.scaled_dot_product_attention,
        r"failed \(RuntimeError: .* give a function of query",
    ),
    "identity": (lambda query, key, value: query, "result that differs from SDPA's by"),
    "double": (lambda *qkv: backends.sdpa(*qkv).double(), "returns torch.float64"),
    "two_arguments": (lambda query, key: query, r"failed \(TypeError: .*takes 2 positional"),
    "without_scale": (lambda query, key, value: backends.sdpa(4 * query, key, value), "result that differs"),
    "not_finite": (lambda *qkv: backends.sdpa(*qkv) / 0, "result that is not finite"),
    "detached": (lambda *qkv: backends.sdpa(*qkv).detach(), "returns a result without a gradient"),
    "detached_key": (lambda q, k, v: backends.sdpa(q, k.detach(), v), "gradient that differs from SDPA's by 100.0%"),
}


@pytest.mark.parametrize("name", FAULTY_OPERATORS)
def test_faults_of_a_custom_operator_are_found_by_a_trial_call(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    operator, message = FAULTY_OPERATORS[name]
    monkeypatch.setattr(backends, "BACKENDS", dict(backends.BACKENDS))
    register_attention_backend(name, operator)
    with pytest.raises(InputError, match=rf"^attention_backend '{name}' .*{message}"):
        backends.select_backend(name, "cpu", torch.float32, 16)
    if name.startswith("detached"):
        with torch.no_grad():
            assert backends.select_backend(name, "cpu", torch.float32, 16).operator is operator


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_correct_operator_passes_the_trial_call(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(backends, "BACKENDS", dict(backends.BACKENDS))
    register_attention_backend("correct", ReferenceOperator())
    for head_width in (8, 128):
        backends.select_backend("correct", "cpu", dtype, head_width)
    backends.select_backend("correct", "meta", dtype)


def test_a_class_is_no_operator() -> None:
    with pytest.raises(InputError, match=r"attention_backend 'torch.nn.Linear' is a class: give a function of query"):
        toy_model(attention_backend="torch.nn.Linear")


def test_sdpa_is_plain_attention() -> None:
    """Layout (B, M, H, K) in and out, scale 1 / sqrt(K), more keys than queries."""
    query, key, value = (torch.randn(2, count, 3, 8, dtype=torch.float64) for count in (5, 7, 7))
    out = backends.sdpa(query, key, value)
    assert out.shape == query.shape
    for head in range(3):
        weights = (query[:, :, head] @ key[:, :, head].mT / math.sqrt(8)).softmax(-1)
        assert_near(out[:, :, head], weights @ value[:, :, head], 1e-12)
