"""The private names of Lightning and DeepSpeed in gpdit_lightning/training/internals.py, and their behaviour.

A failure here after an upgrade names what a release has removed or changed. Values under ZeRO are compared with those
of one process in strategies/test_sharding.py.
"""

import importlib
import importlib.util
import inspect
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch import strategies
from lightning.pytorch.loggers import TensorBoardLogger

import gpdit_lightning
from gpdit_lightning.training import internals
from gpdit_lightning.training.internals import event_writer
from gpdit_lightning.training.optimizer import OptimizerConfig
from gpdit_lightning.training.run_folder import close_event_files
from gpdit_lightning.training.strategies.fsdp import FSDP2
from gpdit_lightning.training.strategies.zero import ZeRO

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

# (function of internals.py, module of DeepSpeed, class or "", private names that the function uses)
STAGE_2, STAGE_3 = "deepspeed.runtime.zero.stage_1_and_2", "deepspeed.runtime.zero.stage3"
DEEPSPEED_NAMES = [
    ("prepare_deepspeed", "deepspeed.utils.groups", "", ["_release_process_group_references"]),
    ("prepare_deepspeed", "deepspeed.comm.torch", "", ["build_shm_op"]),
    (
        "zero2_locations",
        STAGE_2,
        "DeepSpeedZeroOptimizer",
        ["self.bit16_groups", "self.single_partition_of_fp32_groups"],
    ),
    ("zero2_locations", "deepspeed.utils.mixed_precision_linkage", "", ["_hp_mapping"]),
    (
        "zero3_locations",
        STAGE_3,
        "DeepSpeedZeroOptimizer_Stage3",
        ["self.grad_position", "get_param_id", "self.fp32_partitioned_groups_flat"],
    ),
    ("zero2_gradient_norm", STAGE_2, "DeepSpeedZeroOptimizer", ["def scaled_global_norm", "self.scaled_global_norm()"]),
    ("zero3_gradient_norm", "deepspeed.runtime.utils", "", ["def combine_grad_norm_groups"]),
    ("zero3_gradient_norm", STAGE_3, "DeepSpeedZeroOptimizer_Stage3", ["def _get_norm_groups", "_get_norm_groups()"]),
    ("refresh_zero2_weights", STAGE_2, "DeepSpeedZeroOptimizer", ["def update_lp_params"]),
    (
        "refresh_zero3_weights",
        STAGE_3,
        "DeepSpeedZeroOptimizer_Stage3",
        ["def _partition_all_parameters", "def _reassign_or_swap_out_partitioned_parameters"],
    ),
    ("release_zero3_modules", "deepspeed.runtime.zero.parameter_offload", "", ["FWD_MODULE_STACK = "]),
]


@needs_deepspeed
@pytest.mark.parametrize(("function", "module", "class_name", "names"), DEEPSPEED_NAMES)
def test_deepspeed_has_the_private_names(function: str, module: str, class_name: str, names: list[str]) -> None:
    """In its source: most of them are attributes that exist only in a run on several ranks."""
    code: Any = importlib.import_module(module)
    source = inspect.getsource(getattr(code, class_name) if class_name else code)
    missing = [name for name in names if name not in source]
    assert not missing, f"internals.{function} uses {missing}, which {module} {class_name} no longer has"


@needs_deepspeed
def test_deepspeed_has_cached_methods_to_clear() -> None:
    assert internals.cached_zero3_methods()


@pytest.mark.parametrize(("class_name", "method"), internals.OVERRIDDEN_METHODS)
def test_lightning_has_the_methods_that_a_strategy_overrides(class_name: str, method: str) -> None:
    theirs, ours = getattr(getattr(strategies, class_name), method, None), getattr(ZeRO, method)
    assert theirs is not None, f"{class_name}.{method} is gone"
    assert list(inspect.signature(theirs).parameters) == list(inspect.signature(ours).parameters)


def test_private_names_of_the_trainer_are_used_in_internals_only() -> None:
    package = Path(gpdit_lightning.__file__).parent
    private = re.compile(r"\b(?:trainer|strategy|launcher|loop|engine|zero_optimizer|pl_module)\._[a-z]\w*")
    uses = {
        f"{path.relative_to(package)}: {use}"
        for path in package.rglob("*.py")
        if path.name != "internals.py"
        for use in private.findall(path.read_text(encoding="utf-8"))
    }
    assert not uses


@needs_deepspeed
@pytest.mark.parametrize(
    ("config", "reduction", "data_type"),
    [({"bf16": {}}, "float32", "fp32"), ({"bf16": {}}, "bf16", "bf16"), ({}, "bf16", "bf16"), ({}, "float32", None)],
)
def test_deepspeed_adds_up_gradients_in_the_precision_of_the_option(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], reduction: Any, data_type: str | None
) -> None:
    monkeypatch.setattr(strategies.DeepSpeedStrategy, "_format_config", lambda self: self.config.update(config))
    strategy, module = ZeRO(), LightningModule()
    module.optimizer_config = OptimizerConfig(gradient_reduction=reduction)
    strategy._lightning_module = module
    strategy._format_config()
    assert strategy.config.get("communication_data_type") == data_type
    assert ("data_types" in strategy.config) == ("bf16" in config)


def test_lightnings_broadcast_of_a_signal_exists() -> None:
    """`disable_signal_handlers` replaces it; tests/device/on_sim/training.py counts the waits."""
    loop = importlib.import_module("lightning.pytorch.loops.training_epoch_loop")._TrainingEpochLoop
    assert "self._broadcast_sigterm_tensor()" in inspect.getsource(loop.advance)


class Decisions(Callback):
    """Records the decisions of Lightning's loop, as internals.py reads them, and what follows."""

    def __init__(self) -> None:
        self.trainers: list[Any] = []
        self.last_micro_batch: list[bool] = []
        self.validation_expected: list[int] = []  # micro-batches
        self.validated: list[int] = []
        self.batch = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        internals.disable_signal_handlers(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trainers.append(internals.attached_trainer(pl_module))
        self.handler = signal.getsignal(signal.SIGTERM)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        self.last_micro_batch.append(internals.is_last_micro_batch(trainer))

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.batch += 1
        if internals.validation_follows(trainer):
            self.validation_expected.append(self.batch)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated.append(self.batch)


class Scalar(LightningModule):
    """One weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.weight * batch.sum()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """A trainer on the CPU without Lightning's default callbacks."""

    def build(**options: Any) -> Trainer:
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
        return Trainer(accelerator="cpu", default_root_dir=tmp_path, enable_model_summary=False, **quiet, **options)

    return build


def test_the_decisions_of_the_training_loop(trainer: Callable[..., Trainer]) -> None:
    assert internals.attached_trainer(Scalar()) is None
    decisions, loader = Decisions(), torch.utils.data.DataLoader(torch.ones(12))
    before = signal.getsignal(signal.SIGTERM)
    training = trainer(
        devices=1,
        max_steps=6,
        accumulate_grad_batches=2,
        val_check_interval=4,
        num_sanity_val_steps=0,
        callbacks=[decisions],
    )
    training.fit(Scalar(), loader, loader)
    assert decisions.trainers == [training]
    assert decisions.handler == before  # Lightning's would be one of its own
    assert decisions.last_micro_batch == [False, True] * 6
    assert decisions.validation_expected == decisions.validated == [4, 8, 12]


def test_the_processes_that_lightning_launches(trainer: Callable[..., Trainer]) -> None:
    assert internals.launched_processes(trainer(devices=1).strategy) is None
    strategy = trainer(devices=2, strategy="ddp").strategy
    assert internals.launched_processes(strategy) == []
    assert "self.procs.append" in inspect.getsource(type(strategy.launcher))


def test_the_data_parallel_size_is_read_after_it_is_set() -> None:
    strategy = FSDP2()
    internals.set_data_parallel_size(strategy, 3)
    source = inspect.getsource(strategies.ModelParallelStrategy.setup_environment)
    assert vars(strategy)["_data_parallel_size"] == 3
    assert "_setup_device_mesh(\n            self._data_parallel_size" in source


def test_the_writer_of_event_files_is_opened_at_its_first_use_and_not_to_be_closed(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path / "run")
    close_event_files([logger])
    assert event_writer(logger) is None
    assert not (tmp_path / "run").exists()
    assert logger.experiment is event_writer(logger)
    close_event_files([logger])
