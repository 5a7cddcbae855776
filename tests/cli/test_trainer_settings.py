"""The settings of Lightning's trainer in recipes: which are refused, and how names become loggers and strategies.

Whole runs with loggers and callbacks of a recipe are in test_loggers.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from gpdit_lightning.cli.recipe_cli import parse_recipe, recipe_text
from gpdit_lightning.cli.trainer_settings import (
    DEFAULTS,
    EARLIER_DEFAULTS,
    FIXED,
    LIGHTNING_DEFAULTS,
    REPLACED,
    callbacks_of,
    check_interval,
    check_trainer,
    loggers_of,
    strategy_of,
)
from gpdit_lightning.errors import InputError

RECIPE = ["--config", "gpdit:stage2_mixed"]

OTHER_VALUES = {
    "accumulate_grad_batches": 2,
    "barebones": "true",
    "check_val_every_n_epoch": 2,
    "default_root_dir": "elsewhere",
    "enable_autolog_hparams": "false",
    "enable_checkpointing": "false",
    "fast_dev_run": "true",
    "limit_predict_batches": 2,
    "limit_train_batches": 2,
    "max_epochs": 3,
    "min_epochs": 3,
    "model_registry": "mine",
    "overfit_batches": 1,
    "reload_dataloaders_every_n_epochs": 1,
    "sync_batchnorm": "true",
    "val_check_interval": 10,
}


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_a_setting_that_a_run_fixes_is_refused_with_its_replacement(name: str) -> None:
    with pytest.raises(InputError, match=f"^trainer.{name} is .*, which a recipe cannot set: ") as caught:
        parse_recipe("fit", [*RECIPE, f"--trainer.{name}={OTHER_VALUES[name]}"])
    assert str(caught.value).endswith(f"{REPLACED[name]}.")


def test_defaults_of_fixed_settings_are_accepted_and_not_recorded(tmp_path: Path) -> None:
    """As in the config.yaml of runs before these settings were refused."""
    values = {name: LIGHTNING_DEFAULTS[name] for name in REPLACED} | EARLIER_DEFAULTS
    overlay = tmp_path / "overlay.yaml"
    as_yaml = {None: "null", True: "true", False: "false"}
    lines = [f"  {name}: {as_yaml.get(value, value)}" for name, value in values.items()]
    overlay.write_text("\n".join(["trainer:", *lines]))
    settings = parse_recipe("fit", [*RECIPE, f"--config={overlay}"])
    assert not set(REPLACED) & set(vars(settings.trainer))


def test_fixed_settings_are_settings_of_the_trainer() -> None:
    assert FIXED.keys() <= REPLACED.keys() <= LIGHTNING_DEFAULTS.keys()
    assert REPLACED.keys() == OTHER_VALUES.keys() | {"use_distributed_sampler"}  # of which both values are accepted
    Trainer(**{name: value for name, (value, _) in FIXED.items()}, accelerator="cpu", logger=False)


def test_loggers_of_a_recipe(tmp_path: Path) -> None:
    for default in (None, True):
        (logger,) = loggers_of(default, tmp_path)
        assert isinstance(logger, TensorBoardLogger)
        assert Path(logger.log_dir) == tmp_path
    first, second = CSVLogger(tmp_path), TensorBoardLogger(tmp_path)
    assert loggers_of(first, tmp_path) == [first]
    assert loggers_of([second, first], tmp_path) == [second, first]
    assert loggers_of(False, tmp_path) == loggers_of([], tmp_path) == []


def test_callbacks_of_a_recipe_keep_their_order() -> None:
    first, second = Timer(), Timer()
    assert callbacks_of(None) == []
    assert callbacks_of(first) == [first]
    assert callbacks_of([second, first]) == [second, first]


@pytest.mark.parametrize(
    ("setting", "strategy"),
    [("deepspeed", "zero2"), ("deepspeed_stage_3_offload", "zero3_offload"), ("ddp", "ddp"), ("fsdp2", "fsdp2")],
)
def test_names_of_lightnings_deepspeed_select_zero(setting: Any, strategy: str) -> None:
    assert strategy_of(setting) == strategy


def test_a_deepspeed_strategy_without_counterpart_is_refused() -> None:
    with pytest.raises(InputError, match=r"^trainer.strategy is deepspeed_stage_1: use one of zero2, "):
        strategy_of("deepspeed_stage_1")


@pytest.mark.parametrize(("value", "least"), [(None, 0), (-1, 0), (0, 1)])
def test_an_interval_is_a_number_of_steps(value: int | None, least: int) -> None:
    check_interval("name", least, least)
    with pytest.raises(InputError, match=f"^name is {value}: give a number of optimizer steps, at least {least}"):
        check_interval("name", value, least)


@pytest.mark.parametrize(
    ("name", "accepted", "refused", "cure"),
    [
        ("max_steps", [1], [-5, -1, 0, 2**41], "give a number from 1 to 1,099,511,627,776."),
        ("min_steps", [None, 0], [-1, 2**41], "give a number from 0 to 1,099,511,627,776."),
        ("limit_val_batches", [None, 0, 1, 0.5, 1.0, 7], [-5, -0.5, 1.5], "give a number of batches"),
        ("limit_test_batches", [None, 0, 1, 0.5, 1.0, 7], [-5, -0.5, 1.5], "give a number of batches"),
        ("devices", [-1, 4, "-1", "auto"], [-5, 0, 5, "5", []], "give 1 to 4"),
        ("num_nodes", [1, 4], [-1, 0, 5], "give 1 to 4"),
    ],
)
def test_the_range_that_a_refusal_states_is_what_is_accepted(
    name: str, accepted: list[Any], refused: list[Any], cure: str
) -> None:
    settings = LIGHTNING_DEFAULTS | DEFAULTS
    for value in accepted:
        check_trainer(settings | {name: value}, max_ranks=4)
    for value in refused:
        with pytest.raises(InputError) as caught:
            check_trainer(settings | {name: value}, max_ranks=4)
        assert str(caught.value).startswith(f"trainer.{name} is {value}: {cure}")


def test_one_batch_of_the_validation_is_not_all_batches() -> None:
    one, everything = (
        parse_recipe("fit", [*RECIPE, f"--trainer.limit_val_batches={text}"]).trainer.limit_val_batches
        for text in ("1", "1.0")
    )
    assert (type(one), type(everything)) == (int, float)


class OnDevice(Callback):
    """A callback with a default that YAML cannot contain."""

    def __init__(self, device: torch.device = torch.device("cpu"), steps: int = 3) -> None:  # noqa: B008
        self.device, self.steps = device, steps


@pytest.mark.parametrize(
    ("name", "arguments"), [(f"{__name__}.OnDevice", {"steps": 3}), ("Timer", {"duration": None, "verbose": True})]
)
def test_defaults_of_classes_that_yaml_cannot_contain_are_not_recorded(
    name: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    """Such as a device, and Lightning's Interval. The recorded recipe can be used."""
    text = recipe_text("fit", [*RECIPE, f"--trainer.callbacks=[{{class_path: {name}}}]"])
    assert yaml.safe_load(text)["trainer"]["callbacks"][0]["init_args"] == arguments
    (tmp_path / "config.yaml").write_text(text)
    assert recipe_text("fit", ["--config", str(tmp_path / "config.yaml")]) == text
