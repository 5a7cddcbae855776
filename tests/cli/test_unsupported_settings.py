"""Precisions and attention backends that a device does not support are refused when a verb starts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpdit_lightning.cli import main
from gpdit_lightning.cli.trainer_settings import check_accelerator, check_precision
from gpdit_lightning.devices import available_device
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation.settings import selected_precision
from gpdit_lightning.model.attention.backends import BACKENDS, register_attention_backend, sdpa
from tests.cli.test_resume import fit, recipe


@pytest.fixture
def without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU such as V100, on which torch emulates bf16."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)


@pytest.mark.parametrize(
    ("setting", "device", "message"),
    [
        ("16-mixed", "cpu", "16-mixed, which is not supported on a CPU: use bf16-mixed or 32-true"),
        (16, "cpu", "16, which is not supported on a CPU: use bf16-mixed or 32-true"),
        ("16-true", "cuda", "16-true, in which the state of the optimizer underflows: use bf16-mixed "),
        ("bf16-mixed", "cuda:1", "bf16-mixed, which the device cuda:1 does not support: use 16-mixed or 32-true"),
        ("64-true", "mps", "64-true, which MPS does not support: use 32-true"),
    ],
)
@pytest.mark.usefixtures("without_bf16")
def test_a_precision_that_the_device_does_not_support(setting: Any, device: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^trainer.precision is {message}"):
        check_precision(setting, torch.device(device))


@pytest.mark.usefixtures("without_bf16")
def test_precisions_that_are_supported() -> None:
    for setting, device in ((None, "cpu"), ("bf16-mixed", "cpu"), ("64-true", "cpu"), (16, "cuda"), ("32-true", "mps")):
        check_precision(setting, torch.device(device))


@pytest.mark.parametrize(
    ("is_built", "gpus", "accelerator", "devices", "message"),
    [
        (False, 0, "gpu", 1, "accelerator is gpu, but torch .* is built without CUDA: install .* or cpu"),
        (True, 0, "cuda", "auto", "accelerator is cuda, but torch .* finds no GPU: check the driver .* or cpu"),
        (True, 2, "mps", 1, "accelerator is mps, but torch .* finds no GPU of Apple: .* or cpu"),
        (True, 2, "tpu", 1, "accelerator is tpu, but Lightning finds no such device: .* or cpu"),
        (True, 2, "GPU", 1, r"accelerator 'GPU' is not known: give one of auto, gpu, cpu, "),
        (
            True,
            2,
            "auto",
            8,
            "devices is 8, but torch finds 2 GPUs, .*: give auto for all of them, or check ",
        ),
        (True, 2, "gpu", "0,2", "devices is 0,2, but torch finds 2 GPUs, numbered from 0: "),
        (True, 0, "auto", [1], r"devices is \[1\], which are numbers of GPUs, but training is on the CPU: give a "),
    ],
)
def test_devices_that_are_not_found_are_refused_with_the_reason(
    is_built: bool,
    gpus: int,
    accelerator: str,
    devices: Any,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    messages: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: is_built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(InputError, match=f"^trainer.{message}"):
        check_accelerator(accelerator, devices)
    for usable, number in (("cpu", 8), ("auto", gpus or 8), ("auto", "auto")):
        check_accelerator(usable, number)
    notes = [record.getMessage() for record in messages.records]
    assert [note.rpartition("; ")[2] for note in notes] == ([] if gpus else ["so 8 processes train on the CPU"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", "the device 'cuda' cannot be used, since torch .* is built without CUDA: install .*, or give auto "),
        ("cuda:1", "the device 'cuda:1' cannot be used, since torch .* is built without CUDA: "),
        ("mps", "the device 'mps' cannot be used, since torch .* finds no GPU of Apple: "),
        ("tpu", "torch has no device 'tpu': give auto, cpu or cuda"),
    ],
)
def test_a_device_of_a_verb_that_is_not_found_is_refused_with_the_reason(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=f"^{message}"):
        available_device(name)


@pytest.mark.parametrize(("native", "automatic"), [(True, "bf16"), (False, "32")])
def test_bf16_of_generation_needs_a_device_that_has_it(
    native: bool, automatic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    device = torch.device("cuda", 0)
    assert selected_precision("auto", device) == automatic
    assert selected_precision("32", device) == "32"
    if native:
        assert selected_precision("bf16", device) == "bf16"
    else:
        with pytest.raises(InputError, match="--precision is bf16, which the device cuda:0 does not support: use 32"):
            selected_precision("bf16", device)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--trainer.precision=16-mixed"], "trainer.precision is 16-mixed, which is not supported on a CPU"),
        (
            ["--model.init_args.backbone.attention_backend=xformers", "--trainer.precision=bf16-mixed"],
            "attention_backend is xformers, but xformers has no kernels for cpu: use auto or sdpa.",
        ),
        (
            ["--model.init_args.backbone.attention_backend=forward_only"],
            "attention_backend 'forward_only' returns a result without a gradient",
        ),
    ],
)
def test_fit_refuses_before_the_first_step(
    overrides: list[str], message: str, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("gpdit_lightning.stages.base.GPDiT", None)  # the model is not even built
    monkeypatch.setitem(BACKENDS, "forward_only", None)
    register_attention_backend("forward_only", forward_only)
    assert fit(tmp_path / "recipe.yaml", recipe(tiny_shards, tmp_path / "run"), *overrides) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_what_lightning_refuses_after_the_start_is_no_fault_of_the_library(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--trainer.limit_val_batches=0.01", "--validate_every_steps=1"]
    assert fit(tmp_path / "recipe.yaml", recipe(tiny_shards, tmp_path / "run"), *settings) == 2
    message = "error: the trainer cannot be used with these settings: You requested to check 0.01 of the `val_dataload"
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)


def forward_only(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention without a backward pass, as FlexAttention's on a CPU."""
    with torch.no_grad():
        return sdpa(query, key, value)


def test_a_forward_only_backend_serves_validation(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(BACKENDS, "forward_only", None)
    register_attention_backend("forward_only", forward_only)
    path = tmp_path / "recipe.yaml"
    assert fit(path, recipe(tiny_shards, tmp_path / "run"), "--trainer.max_steps=1") == 0
    backend = "--model.init_args.backbone.attention_backend"
    assert main(["validate", f"--config={path}", f"{backend}=forward_only"]) == 0
    assert main(["validate", f"--config={path}", f"{backend}=xformers"]) == 2
    assert "xformers has no kernels for cpu" in capsys.readouterr().err.splitlines()[-1]
