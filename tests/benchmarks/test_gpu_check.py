"""The GPU check: it runs, and reports wrong operators and failed steps."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_check
from gpdit_lightning.model.attention import Sliced, backends, plan_attention

IGNORE_DTYPE_WARNING = pytest.mark.filterwarnings("ignore:Mismatch dtype")


@IGNORE_DTYPE_WARNING
def test_the_smoke_test_passes_and_writes_all_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "figures.json"
    assert gpu_check.main(["--smoke_test", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Smoke test at a tiny size" in printed
    assert "All checks passed." in printed
    assert "FAILED" not in printed

    report = json.loads(out.read_text())
    assert report["smoke_test"] is report["passed"] is True
    assert report["torch"] == torch.__version__
    cases = {(row["variant"], row["dtype"], row["head_width"]) for row in report["attention"]}
    assert cases == {(v, d, w) for v in ("of2", "of") for d in ("float32", "bfloat16") for w in (64, 128)}
    assert all(0 < row["forward_error"] < row["tolerance"] for row in report["attention"])
    assert all(0 < row["backward_error"] < row["tolerance"] for row in report["attention"])
    assert [row["activation_checkpointing"] for row in report["steps"]] == [False, True]
    for row in report["steps"]:
        assert row["tokens_per_second"] == pytest.approx(2 * 3 * 6 / row["milliseconds"] * 1000)
        assert row["mfu"] is row["peak_gib"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    assert gpu_check.main(["--out", str(out)]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "needs a CUDA GPU" in captured.err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--clips", "0"], "--clips is 0"), (["--smoke_test", "--out", "."], "--out is ., a folder")],
)
def test_invalid_options_are_an_error(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert gpu_check.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {message}")


def without_last_key(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute a wrong forward pass: no token attends to the last key."""
    return backends.sdpa(query, key[:, :-1], value[:, :-1])


def without_value_gradient(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute a correct forward pass with a wrong backward pass."""
    return backends.sdpa(query, key, value.detach() + 0 * value)


def returning_nan(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return backends.sdpa(query, key, value) * torch.nan


def unavailable(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    raise NotImplementedError("No operator found\nwith many reasons")


@pytest.mark.parametrize(
    ("operator", "forward_ok", "failure"),
    [
        (without_last_key, False, ""),
        (without_value_gradient, True, ""),
        (returning_nan, None, "ArithmeticError: the backend returned values that are not finite"),
        (unavailable, None, "NotImplementedError: No operator found"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_operator_fails(
    monkeypatch: pytest.MonkeyPatch, operator: Any, forward_ok: bool | None, failure: str, dtype: torch.dtype
) -> None:
    monkeypatch.setitem(gpu_check.BACKENDS, "wrong", Sliced(operator))
    result = gpu_check.check_attention("wrong", "of2", dtype, 64, gpu_check.smoke_test())
    assert not result.passed
    assert result.failure == failure
    if forward_ok is None:
        assert result.forward_error is result.backward_error is None
    else:
        assert result.forward_error is not None
        assert (result.forward_error <= result.tolerance) == forward_ok
        assert result.backward_error is not None
        assert result.backward_error > result.tolerance
    assert json.loads(json.dumps(gpu_check.with_verdict(result)))["verdict"].startswith("FAILED")


def test_the_reference_distinguishes_the_masks() -> None:
    """The library with one mask differs from the reference with the other one, in the clean stream."""
    check = gpu_check.smoke_test()

    assert gpu_check.attention_errors("sdpa", "of2", torch.float32, 64, check)[0] < 1e-5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_check, "plan_attention", lambda _, *rest, **more: plan_attention("of", *rest, **more))
        assert gpu_check.attention_errors("sdpa", "of2", torch.float32, 64, check)[0] > 0.1


def test_a_backend_that_cannot_be_used_is_no_failure() -> None:
    result = gpu_check.check_attention("xformers", "of2", torch.bfloat16, 64, gpu_check.smoke_test())
    assert result.passed
    assert gpu_check.with_verdict(result)["verdict"] == "not run: xformers has no kernels for cpu"


@IGNORE_DTYPE_WARNING
def test_a_failed_step_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    time_step = gpu_check.time_step

    def out_of_memory(config: Any, check: Any) -> Any:
        if config.activation_checkpointing:  # the second model
            raise torch.OutOfMemoryError("CUDA out of memory")
        return time_step(config, check)

    monkeypatch.setattr(gpu_check, "time_step", out_of_memory)
    out = tmp_path / "figures.json"
    assert gpu_check.main(["--smoke_test", "--out", str(out)]) == 1
    assert "FAILED out of memory: pass a smaller --clips" in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert report["passed"] is False
    assert [row["passed"] for row in report["steps"]] == [True, False]


def test_the_full_check_has_the_sizes_of_the_paper() -> None:
    check = gpu_check.full_check(clips=16)
    assert (check.frames, check.height * 8, check.width * 8) == (5, 192, 320)
    assert {(m.layers, m.width, m.activation_checkpointing) for m in check.models} == {
        (12, 768, False),
        (24, 2816, True),
    }
    assert check.backends == backends.BUILT_IN
    assert {m.head_width for m in check.models} == set(gpu_check.HEAD_WIDTHS)


@IGNORE_DTYPE_WARNING
def test_flops_per_second_follow_from_step_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A patched clock gives two steps of one second each."""
    ticks = iter(range(100))
    monkeypatch.setattr(gpu_check, "now", lambda _: float(next(ticks)))
    check = replace(gpu_check.smoke_test(), warmup=0, steps=2)
    config = check.models[0].replaced(latent_channels=4)
    result = gpu_check.time_step(config, check)
    flops = sum(gpu_check.training_flops(config, gpu_check.PassShape(2, 2, 3, 4, 6)).values())
    assert result.milliseconds == 1000
    assert result.teraflops_per_second == pytest.approx(flops / 1e12)
