"""The GPU check: it runs, reports wrong operators and failed measurements, and survives the end of its processes."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import attention, fitting, float8, generation, steps, waits
from benchmarks.gpu_check.cases import Case, NotRunError, Part, Row, Setup, measured
from benchmarks.gpu_check.isolation import is_of_device, run_part
from gpdit_lightning import InputError
from gpdit_lightning.estimation.flops import PassShape, training_flops
from gpdit_lightning.model import GPDiTConfig
from gpdit_lightning.model.attention import Sliced, backends, plan_attention

CPU = torch.device("cpu")
SHAPE = attention.Shape("tiny", 2, 64, 2, 3, 6)
ONE_FIT = ["attention", "generation", "offload", "waits"]


def run_smoke_test(out: Path, parts: list[str]) -> dict[str, Any]:
    """Run the command on the CPU; return the report."""
    assert command.main(["--smoke_test", "--out", str(out), "--parts", *parts]) == 0
    report: dict[str, Any] = json.loads(out.read_text())
    assert report["smoke_test"] is report["passed"] is True
    assert [name for name in command.PARTS if name in report] == parts
    assert all(row["passed"] and not row["failure"] for name in parts for row in report[name])
    return report


def test_the_smoke_test_passes_and_writes_all_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "figures.json"
    report = run_smoke_test(out, ONE_FIT)
    printed = capsys.readouterr().out
    assert "Smoke test at a tiny size" in printed
    assert "No measurement failed." in printed
    assert "FAILED" not in printed
    assert report["torch"] == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{40}( with changes)?|unknown", report["commit"])

    rows = [row for row in report["attention"] if not row["skipped"]]
    cases = {(row["backend"], row["variant"], row["dtype"]) for row in rows}
    assert cases == {("sdpa", v, d) for v in ("of2", "of") for d in ("float32", "bfloat16")}
    assert all(0 < row["forward_error"] < row["tolerance"] for row in rows)
    assert all(0 < row["backward_error"] < row["tolerance"] for row in rows)
    assert all("aten::" in row["kernel"] and row["forward_ms"] > 0 for row in rows if row["dtype"] == "bfloat16")
    skipped = {row["backend"] for row in report["attention"] if row["skipped"]}
    assert skipped == {*backends.BUILT_IN} - {"sdpa"}

    (row,) = report["generation"]
    assert row["frames_per_second"] == pytest.approx(4 / row["latent_ms"] * 1000)
    (row,) = report["offload"]
    assert row["strategy"] == "zero2_offload"
    assert len(row["losses"]) == 2
    assert row["peak_to_predicted"] == pytest.approx(row["peak_gib"] / row["predicted_gib"])
    assert row["predicted_host_gib"] > 0
    assert [row["waits_per_step"] for row in report["waits"]] == [0]

    tables = out.with_suffix(".md").read_text()
    assert all(f"## {command.PARTS[name].title}\n" in tables for name in ONE_FIT)
    assert "| not run: xformers has no kernels for cpu |" in tables
    assert {line.count("|") for line in tables.splitlines() if line.startswith("| sdpa ")} == {15}
    assert "finished at step 2" in out.with_suffix(".log").read_text()


@pytest.mark.slow
def test_the_smoke_test_of_the_parts_that_train_more_often(tmp_path: Path) -> None:
    report = run_smoke_test(tmp_path / "figures.json", ["steps", "float8"])
    (row,) = report["steps"]
    assert row["tokens_per_second"] == pytest.approx(5 * 12 * 6 / row["milliseconds"] * 1000)
    flops = sum(training_flops(tiny_h(), PassShape(5, 5, 12, 4, 6)).values())
    assert row["teraflops_per_second"] == pytest.approx(flops / row["milliseconds"] * 1000 / 1e12)
    assert row["mfu"] is None
    (row,) = report["float8"]
    assert row["largest_difference"] == 0  # bf16 twice


def tiny_h() -> GPDiTConfig:
    """Return the backbone of smoke tests."""
    return GPDiTConfig.preset("B", layers=2, width=32, mlp_width=32, heads=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    assert command.main(["--out", str(out)]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "needs a CUDA GPU" in captured.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clips", "0"], "--clips is 0"),
        (["--minutes", "nan"], "--minutes is nan"),
        (["--smoke_test", "--out", "."], "--out is ., a folder"),
        (["--out", "figures.md"], "--out is figures.md"),
    ],
)
def test_invalid_options_are_an_error(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert command.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {message}")


def test_the_full_check_has_the_shapes_of_the_recipes() -> None:
    setup = Setup(Path("latents"))
    found = {(s.size, s.heads, s.head_width, s.clips, s.frames, s.tokens) for s in attention.shapes(setup)}
    assert found == {
        (size, heads, width, clips, frames, 240)
        for size, heads, width in (("H", 22, 128), ("B", 12, 64))
        for clips, frames in ((8, 5), (5, 12))
    }
    assert fitting.latent_shape(smoke_test=False) == (12, 16, 192 // 8, 320 // 8)
    assert [case.labels["model"] for case in steps.cases(setup)] == ["H", "H", "B", "B"] * 2
    assert [case.labels["steps"] for case in generation.cases(setup)] == [25, 8, 25, 8]
    assert sum(part.share for part in command.PARTS.values()) == 60 * command.MINUTES
    for share, frames, of_recipe, gpus in ((fitting.STAGE2, 5, 64, 8), (fitting.STAGE3, 12, 160, 32)):
        videos = yaml.safe_load((Path("recipes") / f"{share.recipe}.yaml").read_text())["data"]["videos"]
        assert (share.clips * gpus, share.frames) == (videos["batch_size"], videos["frames"]) == (of_recipe, frames)


# --- attention


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
        (without_last_key, False, "an error exceeds the tolerance"),
        (without_value_gradient, True, "an error exceeds the tolerance"),
        (returning_nan, None, "ArithmeticError: the backend returned values that are not finite"),
        (unavailable, None, "NotImplementedError: No operator found"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_operator_fails(
    monkeypatch: pytest.MonkeyPatch, operator: Any, forward_ok: bool | None, failure: str, dtype: torch.dtype
) -> None:
    monkeypatch.setitem(attention.BACKENDS, "wrong", Sliced(operator))
    row, _ = measured(Case({}, lambda: attention.compare("wrong", "of2", dtype, SHAPE, CPU, timed=False)))
    assert row["failure"] == failure
    if forward_ok is not None:
        assert (row["forward_error"] <= row["tolerance"]) == forward_ok
        assert row["backward_error"] > row["tolerance"]


def test_the_reference_distinguishes_the_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library with one mask differs from the reference with the other one, in the clean stream."""
    assert attention.attention_errors("sdpa", "of2", torch.float32, SHAPE, CPU)[0] < 1e-5
    monkeypatch.setattr(attention, "plan_attention", lambda _, *rest, **more: plan_attention("of", *rest, **more))
    assert attention.attention_errors("sdpa", "of2", torch.float32, SHAPE, CPU)[0] > 0.1


# --- processes


def unavailable_case() -> Row:
    raise NotRunError("a package is not installed")


def out_of_memory() -> Row:
    try:
        raise torch.OutOfMemoryError("CUDA out of memory")
    except RuntimeError as error:
        raise InputError("the memory does not suffice.") from error


def crash() -> Row:
    print("a kernel has failed", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)  # a process without memory ends so
    return {}


def hang() -> Row:
    if os.fork() == 0:  # such as a worker, which must end too
        time.sleep(60)
    time.sleep(60)
    return {}


def test_each_case_survives_the_failures_of_the_others(tmp_path: Path) -> None:
    """Errors of the device and crashes end a process, the time limit ends the part; all other cases are measured."""
    work: dict[str, Callable[[], Row]] = {
        "good": lambda: {"process": os.getpid()},
        "wrong": lambda: {"process": os.getpid(), "failure": "the result is wrong"},
        "error": lambda: {"figure": 1 // 0},
        "unavailable": unavailable_case,
        "after errors": lambda: {"process": os.getpid()},
        "memory": out_of_memory,
        "after memory": lambda: {"process": os.getpid()},
        "crash": crash,
        "after crash": lambda: {"process": os.getpid()},
        "hang": hang,
        "late": lambda: {},
    }
    part = Part("part", "", 1, {}, lambda _: [Case({"name": name}, function) for name, function in work.items()])
    rows: dict[str, Row] = {}
    began = time.monotonic()
    run_part(part, Setup(tmp_path), 4.0, tmp_path / "log", lambda row: rows.update({row["name"]: row}))
    assert time.monotonic() - began < 30
    assert list(rows) == list(work)
    assert {name: row["failure"] for name, row in rows.items() if row["failure"]} == {
        "wrong": "the result is wrong",
        "error": "ZeroDivisionError: integer division or modulo by zero",
        "memory": "InputError: the memory does not suffice.",
        "crash": "its process ended by SIGKILL: a kernel has failed",
    }
    assert {name: row["skipped"] for name, row in rows.items() if row["skipped"]} == {
        "unavailable": "a package is not installed",
        "hang": "not finished within the 4 s of this part",
        "late": "no time left of the 4 s of this part",
    }
    processes = [row["process"] for row in rows.values() if "process" in row]
    assert processes[0] == processes[1] == processes[2]
    assert len(set(processes)) == 3
    assert "ZeroDivisionError" in (tmp_path / "log").read_text()
    assert not is_of_device(ZeroDivisionError())


def test_failures_end_the_command_with_status_1_and_unused_time_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    limits: list[float] = []

    def run_nothing(part: Part, setup: Setup, seconds: float, log: Path, add: Callable[[Row], None]) -> None:
        limits.append(seconds)
        add({"model": "B", "failure": "it | broke" if part.name == "waits" else "", "skipped": ""})

    monkeypatch.setattr(command, "run_part", run_nothing)
    out = tmp_path / "figures.json"
    arguments = ["--smoke_test", "--out", str(out), "--minutes", "1", "--parts", "waits", "float8", "steps"]
    assert command.main(arguments) == 1
    assert "1 measurements failed" in capsys.readouterr().out
    assert "| FAILED: it \\| broke |" in out.with_suffix(".md").read_text()
    report = json.loads(out.read_text())
    assert report["passed"] is False
    assert [report[name][0]["passed"] for name in ("steps", "float8", "waits")] == [True, True, False]
    used = limits[2] - limits[0]  # the last part has all that is left
    assert limits == pytest.approx([60 * 200 / 260, 60 * 40 / 60, 60], abs=5)
    assert used > 0


# --- training


def test_the_losses_of_float8_are_compared_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: Any, settings: dict[str, str]) -> Row:
        in_float8 = settings["model__init_args__backbone__float8"] == "true"
        losses, milliseconds = ([1.0, 0.44, 0.2], 50.0) if in_float8 else ([1.0, 0.4, 0.2], 100.0)
        return {"losses": losses, "milliseconds": milliseconds, "peak_gib": 1.0}

    monkeypatch.setattr(float8, "train", train)
    monkeypatch.setattr(float8, "check_float8", lambda *_, **__: None)
    row = float8.measure_float8(Setup(Path("latents")), "H")
    assert row["largest_difference"] == pytest.approx(0.1)
    assert row["speedup"] == 2
    assert not row["failure"]
    assert "failure" in fitting.check_losses({"losses": [1.0, float("nan")]})


def test_float8_is_not_run_without_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA A100")
    setup = Setup(Path("latents"))
    row, _ = measured(Case({}, lambda: float8.measure_float8(setup, "H")))
    assert "NVIDIA A100 has compute capability 8.0" in row["skipped"]


def test_calls_are_counted_within_the_measured_steps() -> None:
    matrix = torch.ones(2, 2)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        matrix.mm(matrix)
        with record_function(waits.MEASURED):
            matrix.mm(matrix)
            matrix.mm(matrix)
            matrix.sum().item()
        matrix.sum().item()
    calls = waits.calls_within(profiled.events(), waits.MEASURED, ["aten::mm", "aten::item", "aten::add"])
    assert calls == {"aten::mm": 2, "aten::item": 1}
