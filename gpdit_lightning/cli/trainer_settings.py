"""The settings of Lightning's trainer in a recipe: which of them are options, and their conversion for the trainer."""

import argparse
import inspect
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import (
    Callback,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy, StrategyRegistry

from gpdit_lightning.cli.recipe_parser import RecipeParser
from gpdit_lightning.cli.value_checks import (
    check_arguments,
    check_folder,
    check_limits,
    check_options,
    check_values,
)
from gpdit_lightning.devices import has_bf16, missing_gpu
from gpdit_lightning.errors import InputError
from gpdit_lightning.imports import did_you_mean, import_object, is_import_path, resolve
from gpdit_lightning.names import check_local, counted, number_in
from gpdit_lightning.options.shared import MAX_SEED, RecipeOptions
from gpdit_lightning.training.loggers import RunFolderTensorBoard, place_in_run_folder
from gpdit_lightning.training.strategies import ZERO_NAMES, register_strategies

log = logging.getLogger(__name__)

# Defaults that differ from Lightning's.
DEFAULTS: dict[str, Any] = {
    "max_steps": 1000,
    "log_every_n_steps": 50,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,  # its FLOPs do not include this model's attention
}

# Options that must be paths on this machine; `latents` and the manifests may be addresses.
LOCAL_PATHS = ("runs", "run_dir", "data.cache.directory", "model.init_args.initial_weights", "preview.codec_source")

# Settings that a run fixes, since other values would contradict the batch plan or the run folder: value and advice.
FIXED: dict[str, tuple[Any, str]] = {
    "check_val_every_n_epoch": (None, "set validate_every_steps, in optimizer steps"),  # an epoch is the whole run
    "enable_checkpointing": (True, "set checkpoint.every_steps"),
    "use_distributed_sampler": (False, "leave it out, since the batch plan divides each batch among the ranks"),
}
# Settings that a recipe cannot set, and advice.
REPLACED: dict[str, str] = {name: instead for name, (_, instead) in FIXED.items()} | {
    "accumulate_grad_batches": "set micro_batches of data.images, data.videos or data.sequences",
    "barebones": "leave it out",
    "default_root_dir": "set run_dir",
    "fast_dev_run": "set trainer.max_steps, and a run_dir for the trial",
    "limit_predict_batches": "leave it out, since no verb predicts",
    "enable_autolog_hparams": "leave it out, since config.yaml records the settings",
    "limit_train_batches": "set trainer.max_steps, since a step has all batches of its plan",
    "max_epochs": "set trainer.max_steps",
    "min_epochs": "set trainer.max_steps",
    "model_registry": "leave it out; to publish a model use the verb export",
    "overfit_batches": "build on the recipe gpdit:debug/overfit_one_clip",
    "reload_dataloaders_every_n_epochs": "leave it out, since an epoch is the whole run",
    "sync_batchnorm": "leave it out, since the model has no batch normalization",
    "val_check_interval": "set validate_every_steps, in optimizer steps",
}
BATCH_LIMITS = ("limit_val_batches", "limit_test_batches")  # settings
MAX_STEPS = 2**40  # the number of their micro-batches fits into 64 bits
# Values of REPLACED settings in the config.yaml of earlier runs; the other settings have Lightning's defaults there.
EARLIER_DEFAULTS = {"check_val_every_n_epoch": None, "use_distributed_sampler": False}
LIGHTNING_DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(Trainer).parameters.items()}

# Help texts that replace those of Lightning.
HELP = {
    "seed_everything": "Seed of the global random number generators, for the initial weights; true for a random one.",
    "model": "Class of the stage, such as MixedStage, or its import path; --model.init_args.NAME gives its arguments.",
    "trainer.accelerator": "Accelerator: auto, cpu, gpu, mps, or another accelerator of Lightning.",
    "trainer.strategy": "Strategy: auto (DDP if there are several devices), ddp, zero2, zero3, zero2_offload, "
    "zero3_offload, fsdp2, or another strategy of Lightning.",
    "trainer.devices": "Number of devices per node; auto for all; or a list of device numbers.",
    "trainer.num_nodes": "Number of nodes.",
    "trainer.precision": "Precision of training; bf16-mixed and 16-mixed keep float32 weights. By default 32-true.",
    "trainer.logger": "A logger, or a list of loggers. By default TensorBoard in the run folder; false: none. A logger "
    "writes to the run folder unless its save_dir is given.",
    "trainer.callbacks": "Callbacks that run after those of the library, in this order.",
    "trainer.max_steps": "Optimizer steps of the run.",
    "trainer.min_steps": "Minimum number of optimizer steps before a callback may stop the run.",
    "trainer.max_time": "Stop after this time, as DD:HH:MM:SS; the same command resumes.",
    "trainer.limit_val_batches": "Number (1: one) or fraction (1.0: all) of the validation batches to use; by default "
    "all.",
    "trainer.limit_test_batches": "The same for `test`.",
    "trainer.num_sanity_val_steps": "Validation batches before training, as a test; -1 for all.",
    "trainer.log_every_n_steps": "Optimizer steps between logged values.",
    "trainer.enable_progress_bar": "Show the progress; by default true.",
    "trainer.enable_model_summary": "Print the layers and parameters of the model.",
    "trainer.gradient_clip_val": "Maximum gradient norm, or value; by default gradients are not clipped.",
    "trainer.gradient_clip_algorithm": "Clip by norm or by value; by default norm.",
    "trainer.deterministic": "Use deterministic algorithms of PyTorch; warn: where they exist. By default false.",
    "trainer.benchmark": "Let cuDNN select the fastest algorithms by timing; by default false.",
    "trainer.inference_mode": "Use torch.inference_mode, instead of torch.no_grad, in validation.",
    "trainer.profiler": "Profiler: simple, advanced, pytorch, or another profiler of Lightning; by default none.",
    "trainer.detect_anomaly": "Find the operation that produces a NaN in the backward pass; slow.",
    "trainer.plugins": "Plugins of Lightning.",
}


class TrainingParser(RecipeParser):
    """The parser of `fit`, `validate` and `test`."""

    def add_trainer_options(self) -> None:
        """Add the settings of Lightning's trainer that a recipe may use as options."""
        self.add_class_arguments(
            Trainer, "trainer", instantiate=False, fail_untyped=False, sub_configs=True, skip=set(REPLACED)
        )
        self.set_defaults({f"trainer.{name}": value for name, value in DEFAULTS.items()})
        for name, instead in REPLACED.items():  # parsed, so that `validate` can refuse them
            # With help=SUPPRESS jsonargparse would drop given values where it resolves interpolations.
            self.add_argument(f"--trainer.{name}", type=Any, default=argparse.SUPPRESS, help=f"Not used: {instead}.")
        for name in self.verb_options:  # parsed by cli/parsing.py; `validate` removes them
            self.add_argument(f"--{name}", type=Any, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        for action in self._actions:
            action.help = HELP.get(action.dest, action.help)
            if action.dest.removeprefix("trainer.") in BATCH_LIMITS:
                # Lightning's Union[int, float] may be the equal Union[float, int] of typing's cache, which would turn 1
                # (one batch) into 1.0 (all batches).
                vars(action)["_typehint"] = int | float | None

    def validate(self, cfg: Namespace, *arguments: Any, **options: Any) -> None:
        """Validate, refuse settings that a recipe cannot set, and set the folders of loggers."""
        for name in self.verb_options:
            cfg.pop(name, None)
        trainer = cfg.get("trainer")
        if isinstance(trainer, Namespace):  # the parser of a part of a recipe has none
            remove_replaced(trainer)
            for spec in logger_specs(trainer.get("logger")):
                if cfg.get("run_dir") is not None and spec.get("init_args") is not None:
                    kind, given = import_object(spec.class_path, "trainer.logger"), vars(spec.init_args)
                    spec.init_args.update(Namespace(**place_in_run_folder(kind, given, Path(cfg.run_dir))))
        super().validate(cfg, *arguments, **options)
        if "run_dir" not in cfg:  # the parser of a part of a recipe
            return
        check_values("", cfg)
        check_limits(cfg)
        check_options(cfg, self._actions)
        check_seed(cfg.get("seed_everything"))
        for name in ("runs", "run_dir", "latents", "data.cache.directory"):
            check_folder(name, cfg.get(name))
        for name in LOCAL_PATHS:
            if isinstance(path := cfg.get(name), str):
                check_local(name, path)
        model = cfg.get("model")
        if isinstance(model, Namespace) and isinstance(model.get("init_args"), Namespace):
            check_arguments("model.init_args", import_object(model.class_path, "model"), model.init_args)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise InputError instead of printing the usage; with advice if there is no recipe, or none with a stage."""
        if re.search(r"arguments are required: .*\bmodel\b", message):
            if not any(re.match(r"(--config|-c)\b", argument) for argument in self.args):
                raise RecipeOptions.no_recipe()
            raise InputError("the recipe names no stage: set `model` to one, such as MixedStage, or build on a recipe.")
        super().error(message, ex)


def remove_replaced(trainer: Namespace) -> None:
    """Remove the settings that a recipe cannot set.

    Raises:
        InputError: one has a value other than its default.
    """
    for name, instead in REPLACED.items():
        if name not in trainer:
            continue
        value = trainer.pop(name)
        default = LIGHTNING_DEFAULTS[name]
        if value not in (default, EARLIER_DEFAULTS.get(name, default)):
            raise InputError(f"trainer.{name} is {value}, which a recipe cannot set: {instead}.")


def logger_specs(setting: Any) -> Iterator[Namespace]:
    """Yield the specifications (`class_path`, `init_args`) of the loggers in `trainer.logger`."""
    for spec in setting if isinstance(setting, list) else [setting]:
        if isinstance(spec, Namespace) and "class_path" in spec:
            yield spec


def loggers_of(setting: Any, run_dir: Path) -> list[Logger]:
    """Return the loggers of a run.

    Args:
        setting: `trainer.logger` of the recipe: a logger, or several; false: none; None or true: TensorBoard in the
            run folder.
        run_dir: the run folder.
    """
    if setting is None or setting is True:
        return [RunFolderTensorBoard(run_dir)]
    if isinstance(setting, Logger):
        return [setting]
    return list(setting or [])


def callbacks_of(setting: Callback | Iterable[Callback] | None) -> list[Callback]:
    """Return the callbacks of a recipe in their order."""
    if setting is None:
        return []
    return [setting] if isinstance(setting, Callback) else list(setting)


def strategy_of(setting: Any) -> Any:
    """Return the strategy of a run, as Lightning's trainer takes it.

    Args:
        setting: `trainer.strategy` of the recipe: a strategy, a registered name, or the import path of a class that
            needs no arguments. Lightning's names for DeepSpeed select :class:`ZeRO`.

    Raises:
        InputError: a name or class that is not found, or a DeepSpeed strategy that :class:`ZeRO` does not replace.
    """
    if not isinstance(setting, str):
        return setting
    register_strategies()
    name = setting.lower()  # as Lightning does
    if name in ZERO_NAMES:
        return ZERO_NAMES[name]
    names = ["auto", *(name for name in StrategyRegistry.available_strategies() if not name.startswith("deepspeed"))]
    if name.startswith("deepspeed"):
        raise InputError(f"trainer.strategy is {setting}: use one of {', '.join(dict.fromkeys(ZERO_NAMES.values()))}.")
    if is_import_path(setting):
        return resolve(setting, {}, "trainer.strategy", Strategy)()
    if name not in names:
        cure = did_you_mean(name, names) or ": see fit --help, or give the import path of a Strategy subclass"
        raise InputError(f"trainer.strategy '{setting}' is not known{cure}.")
    return name


def check_precision(setting: Any, device: torch.device) -> None:
    """Raise `InputError` if a device or the optimizer does not support the precision of a recipe.

    Args:
        setting: `trainer.precision` of the recipe; None: 32-true.
        device: the device of the trainer. On a CPU Lightning replaces 16-mixed by bf16-mixed.
    """
    name = str(setting or "32-true")
    if name == "16-true":
        obstacle, cure = "in which the state of the optimizer underflows", "bf16-mixed or 32-true"
    elif name in ("16", "16-mixed") and device.type == "cpu":
        obstacle, cure = "which is not supported on a CPU", "bf16-mixed or 32-true"
    elif name.startswith("bf16") and not has_bf16(device):
        obstacle, cure = f"which the device {device} does not support", "16-mixed or 32-true"
    elif name in ("64", "64-true") and device.type == "mps":
        obstacle, cure = "which MPS does not support", "32-true"
    else:
        return
    raise InputError(f"trainer.precision is {name}, {obstacle}: use {cure}.")


def check_accelerator(accelerator: Any, devices: Any) -> None:
    """Check that this machine has the devices on which a recipe trains.

    Args:
        accelerator: `trainer.accelerator` of the recipe: a name, or an accelerator, which checks itself.
        devices: `trainer.devices`.

    Raises:
        InputError: the accelerator is unknown or not found, or has fewer devices.
    """
    if not isinstance(accelerator, str):
        return
    names = ["auto", "gpu", *sorted(AcceleratorRegistry.available_accelerators())]
    if accelerator not in names:
        advice = did_you_mean(accelerator, names) or f": give one of {', '.join(names)}"
        raise InputError(f"trainer.accelerator '{accelerator}' is not known{advice}.")
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    gpu = "mps" if has_mps else "cuda"  # in Lightning's order
    name = {"gpu": gpu, "auto": gpu if has_cuda or has_mps else "cpu"}.get(accelerator, accelerator)
    if missing := missing_gpu(name):
        raise InputError(
            f"trainer.accelerator is {accelerator}, but {missing}, or set trainer.accelerator to auto or cpu."
        )
    if not AcceleratorRegistry[name]["accelerator"].is_available():  # such as tpu
        raise InputError(f"trainer.accelerator is {name}, but Lightning finds no such device: give auto or cpu.")
    numbers = devices if isinstance(devices, list) else re.findall(r"\d+", str(devices)) if "," in str(devices) else []
    highest = max((int(number) + 1 for number in numbers), default=number_in(str(devices)) or 0)
    if name == "cpu" and numbers:
        raise InputError(
            f"trainer.devices is {devices}, which are numbers of GPUs, but training is on the CPU: give a number of "
            "processes."
        )
    if name == "cpu" and accelerator == "auto" and highest > 1:
        log.info("%s; so %d processes train on the CPU", missing_gpu(gpu), highest)
    if name == "cuda" and highest > (present := torch.cuda.device_count()):
        raise InputError(
            f"trainer.devices is {devices}, but torch finds {counted(present, 'GPU')}, numbered from 0: give auto for "
            "all of them, or check the environment variable CUDA_VISIBLE_DEVICES."
        )


def check_trainer(settings: Mapping[str, Any], max_ranks: int) -> None:
    """Check settings that Lightning accepts, or refuses only after it has launched the ranks.

    Args:
        settings: of the trainer.
        max_ranks: `data.max_ranks`.

    Raises:
        InputError: a setting cannot be used.
    """
    check_accelerator(settings["accelerator"], settings["devices"])
    for name in ("devices", "num_nodes"):
        value = settings[name]
        number = int(value) if isinstance(value, str) and re.fullmatch(r"[-+]?\d+", value) else value
        ranks = len(value) if isinstance(value, list) else number
        is_all = name == "devices" and ranks == -1
        if isinstance(ranks, int) and not (is_all or 1 <= ranks <= max_ranks):
            cure = f"give 1 to {max_ranks}, or raise data.max_ranks, which is {max_ranks} and sets the data order"
            raise InputError(f"trainer.{name} is {value}: {cure}.")
    time = settings["max_time"]
    is_unusable = isinstance(time, Mapping) and min(time.values(), default=-1) < 0
    if is_unusable or (isinstance(time, str) and not re.fullmatch(r"\d{1,6}(:\d{1,2}){3}", time)):
        raise InputError(f"trainer.max_time is {time!r}: give a time, as DD:HH:MM:SS.")
    clip = settings["gradient_clip_val"]
    if clip is not None and not clip >= 0:
        raise InputError(f"trainer.gradient_clip_val is {clip}: give a positive number, or null for no clipping.")
    for name, least in (("max_steps", 1), ("min_steps", 0), ("num_sanity_val_steps", -1)):
        check_steps(f"trainer.{name}", settings[name], least)
    for name in BATCH_LIMITS:
        limit = settings[name]
        if limit is not None and not (0 <= limit <= 1 or (limit > 1 and limit % 1 == 0)):
            cure = "give a number of batches (0, 1, 2, ...), or a fraction of them (from 0.0 to 1.0)"
            raise InputError(f"trainer.{name} is {limit}: {cure}.")


def check_steps(name: str, value: int | None, least: int = 1) -> None:
    """Raise `InputError` unless a setting is a number of steps from `least` to `MAX_STEPS`; None is accepted."""
    if value is not None and not least <= value <= MAX_STEPS:
        raise InputError(f"{name} is {value}: give a number from {least} to {MAX_STEPS:,}.")


def check_seed(seed: Any) -> None:
    """Raise `InputError` unless `seed_everything` is a seed of NumPy's global generator, or true or false."""
    if isinstance(seed, int) and not 0 <= seed <= MAX_SEED:
        raise InputError(f"seed_everything is {seed}: give a whole number from 0 to {MAX_SEED}.")


def check_repeated(from_recipe: Iterable[Callback], of_library: Iterable[Callback]) -> None:
    """Raise `InputError` if a callback of a recipe does, or contradicts, what the library does in every run.

    Args:
        from_recipe: the callbacks of the recipe.
        of_library: the callbacks of every run, which options configure.
    """
    of_library = list(of_library)
    for callback in from_recipe:
        name = type(callback).__name__
        if isinstance(callback, GradientAccumulationScheduler):
            raise InputError(
                f"trainer.callbacks has {name}, but each step has all batches of its plan: remove it, and "
                f"{REPLACED['accumulate_grad_batches']}."
            )
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise InputError(
                f"trainer.callbacks has {name}, but every run averages its weights, and validates and exports that "
                "average: remove the callback, and set ema.decay."
            )
        for present in of_library:
            if isinstance(callback, type(present)):
                raise InputError(
                    f"trainer.callbacks has {name}, but every run has the callback {type(present).__name__} already: "
                    "remove it there, and set the options of health, ema, preview, scores or checkpoint."
                )


def check_interval(name: str, value: int | None, least: int) -> None:
    """Raise `InputError` unless a setting is a number of optimizer steps, at least `least`."""
    if value is None or value < least:
        raise InputError(f"{name} is {value}: give a number of optimizer steps, at least {least}.")
