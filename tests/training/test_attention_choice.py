"""The attention backend of a run: timed, recorded, and the same on all ranks and after a restart."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpdit_lightning import GPDiTConfig, InputError
from gpdit_lightning.data.batches import LatentBatch
from gpdit_lightning.data.datamodule import LatentDataModule, SourceConfig
from gpdit_lightning.estimation.flops import PassShape
from gpdit_lightning.model.attention import backends
from gpdit_lightning.model.attention.trial import Measurement
from gpdit_lightning.stages import GPDiTStage
from gpdit_lightning.stages import base as stage_base
from gpdit_lightning.training import attention_choice
from gpdit_lightning.training.attention_choice import choose_backend, first_shapes, recorded_or_fastest
from tests.model.attention.emulated import emulated_operators
from tests.model.toys import toy_config

CPU, GIB = torch.device("cpu"), 2**30
SHAPES = {PassShape(2, 1, 3, 4, 6): 3, PassShape(4, 0, 1, 4, 6): 1}
CONFIG = toy_config(layers=3)
MEASURED = {
    "xformers": Measurement(4.0, GIB, "FlashAttention 2, xformers_flash::flash_fwd"),
    "xformers_block_diagonal": Measurement(2.0, 5 * GIB, "FlashAttention 2, xformers_flash::flash_fwd"),
    "sdpa": Measurement(8.0, GIB, "FlashAttention 2, aten::_flash_attention_forward"),
    "sdpa_fa3": Measurement(reason="the package flash_attn_interface of FA3 is not installed"),
    "sdpa_fa4": Measurement(reason="the package flash_attn of FA4 is not installed"),
    "flex_attention": Measurement(6.0, 2 * GIB, "FlexAttention"),
}


@pytest.fixture(autouse=True)
def _emulated() -> Iterator[None]:
    with emulated_operators():
        yield


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """The lines that were logged about backends."""
    with caplog.at_level(logging.INFO, logger=backends.log.name):
        yield lambda: list(dict.fromkeys(r.getMessage() for r in caplog.records if r.name == backends.log.name))


def choose(record: Path, memory_gib: float, config: GPDiTConfig = CONFIG) -> str:
    return recorded_or_fastest(record, config, SHAPES, CPU, torch.float32, int(memory_gib * GIB))


def given_measurements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let `MEASURED` be measured; return a list of the backends that are."""
    asked = []

    def measure(backend: Any, plans: Any, *_: Any) -> Measurement:
        name = next(name for name, known in backends.BACKENDS.items() if known is backend)
        asked.append(name)
        return MEASURED[name]

    monkeypatch.setattr(attention_choice, "measure", measure)
    return asked


def test_real_measurements_on_a_cpu(tmp_path: Path, lines: Callable[[], list[str]]) -> None:
    """One line names the kernel and the times; the file has all results."""
    record = tmp_path / "attention.json"
    chosen = choose(record, 1000)
    content = json.loads(record.read_text())
    assert content["backend"] == chosen
    assert list(content["measured"]) == list(backends.BUILT_IN)
    times = {name: each["milliseconds"] for name, each in content["measured"].items() if not each["reason"]}
    assert set(times) == {"xformers", "xformers_block_diagonal", "sdpa", "flex_attention"}
    assert chosen == min(times, key=lambda name: times[name])
    (line,) = lines()
    assert line.startswith(f"attention backend: {chosen} (the fastest at the shapes of this run; ")
    assert all(f"{name} {milliseconds / 4:.2f} ms" in line for name, milliseconds in times.items())
    assert "not used: sdpa_fa3: FA3 has no kernels for cpu; sdpa_fa4: " in line


@pytest.mark.parametrize(
    ("memory_gib", "checkpointing", "chosen"),
    [
        (1000, False, "xformers_block_diagonal"),  # 4 GiB more in each of 3 layers
        (100, False, "xformers"),
        (100, True, "xformers_block_diagonal"),  # in one layer at a time
    ],
)
def test_the_fastest_that_leaves_memory_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    lines: Callable[[], list[str]],
    memory_gib: float,
    checkpointing: bool,
    chosen: str,
) -> None:
    asked = given_measurements(monkeypatch)
    config = CONFIG.replaced(activation_checkpointing=checkpointing)
    assert choose(tmp_path / "attention.json", memory_gib, config) == chosen
    assert asked == list(backends.BUILT_IN)
    assert asked[0] == "xformers"
    (line,) = lines()
    assert "FlashAttention 2, xformers_flash::flash_fwd; " in line
    assert "sdpa_fa3: the package flash_attn_interface of FA3 is not installed" in line
    assert ("it saves 4096 MiB more per layer than the others" in line) == (chosen == "xformers")


def test_a_resumed_run_computes_by_the_same_backend(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lines: Callable[[], list[str]]
) -> None:
    """Without new measurements, unless the backend cannot be used any more."""
    record = tmp_path / "attention.json"
    record.write_text(json.dumps({"backend": "flex_attention", "kernel": "FlexAttention"}))
    asked = given_measurements(monkeypatch)
    assert choose(record, 1000) == "flex_attention"
    assert not asked
    assert lines() == ["attention backend: flex_attention (as before in this run; FlexAttention)"]
    monkeypatch.setattr(attention_choice, "built_in_failure", lambda *_, **__: "it is gone")
    assert choose(record, 100) == "xformers"
    assert asked
    assert lines()[-1].endswith("; flex_attention, as before in this run, cannot be used: it is gone)")
    assert json.loads(record.read_text())["backend"] == "xformers"


@pytest.mark.parametrize("content", ['{"backend": "os.system", "kernel": ""}', '{"kernel": ""}', "[]", "{"])
def test_a_record_chooses_among_the_built_in_backends_only(tmp_path: Path, content: str) -> None:
    record = tmp_path / "attention.json"
    record.write_text(content)
    with pytest.raises(InputError, match=r"attention\.json .*: delete the file to time the backends again"):
        choose(record, 1000)


def trainer_of(folder: Path, device: str, first: bool) -> Any:
    """A trainer on a device; broadcast returns the choice of rank 0."""
    strategy = SimpleNamespace(root_device=torch.device(device), broadcast=lambda choice: choice or "sdpa_fa3")
    return SimpleNamespace(strategy=strategy, is_global_zero=first, default_root_dir=str(folder), world_size=2)


def test_ranks_take_the_choice_of_the_first(tmp_path: Path) -> None:
    """Another rank measures nothing; a fixed backend and a CPU need no choice."""
    facts: Any = (None, CONFIG, torch.float32, False)
    assert choose_backend(trainer_of(tmp_path, "cuda", first=False), *facts) == "sdpa_fa3"
    assert choose_backend(trainer_of(tmp_path, "cpu", first=True), *facts) == "auto"
    fixed = (None, CONFIG.replaced(attention_backend="xformers"), torch.float32, False)
    assert choose_backend(trainer_of(tmp_path, "cuda", first=True), *fixed) == "xformers"
    assert not list(tmp_path.iterdir())


def test_a_run_computes_by_its_choice(
    fit: Callable[..., Any],
    tiny_shards: Path,
    tiny_config: GPDiTConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The shapes are those of the batches, and the backbone has the chosen backend."""
    data = LatentDataModule(videos=SourceConfig([str(tiny_shards)], batch_size=4), noise_draws=2, context_dropout=0.5)
    asked = []

    def choice(trainer: Any, data: Any, config: GPDiTConfig, dtype: torch.dtype, clean_stream_only: bool) -> str:
        asked.append(first_shapes(data, config, 1, clean_stream_only))
        return "xformers_block_diagonal"

    monkeypatch.setattr(stage_base, "choose_backend", choice)
    batches, predict = [], GPDiTStage.predict

    def recorded(self: GPDiTStage, batch: LatentBatch) -> Any:
        batches.append(batch)
        return predict(self, batch)

    monkeypatch.setattr(GPDiTStage, "predict", recorded)
    trainer = fit(GPDiTStage(tiny_config), data, tmp_path, max_steps=3)
    assert trainer.lightning_module.backbone.config.attention_backend == "xformers_block_diagonal"
    assert batches
    for batch in batches:
        clips, frames, _, height, width = batch.latents.shape
        assert asked[0][PassShape(clips, batch.context, frames, height, width, batch.draws, batch.frames)]
