"""The resolved recipe in the run folder, and what a resumed run changes in it."""

import logging
import re
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from gpdit_lightning.cli.bounded_yaml import load_yaml
from gpdit_lightning.cli.recipe_files import read_yaml
from gpdit_lightning.data.ranks import check_same_on_ranks
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import atomic_write
from gpdit_lightning.schema import differences, shown
from gpdit_lightning.training.loggers import log_recipe
from gpdit_lightning.training.run_folder import RECIPE

log = logging.getLogger(__name__)

MAX_CHANGES = 20  # settings in a message
OF_INITIAL_WEIGHTS = ("seed_everything", "model.init_args.initial_weights")  # have no effect after a checkpoint
SAME_FOLDER = ("run_dir", "runs")  # the same folder may have other names
# Settings in which ranks may differ: folders and files, whose content is compared, what does not change the result, and
# the seed of the initial weights, which each rank draws if it is true.
OF_EACH_NODE = re.compile(
    r"run_dir|runs|latents|data_dir|data\.\w+\.manifests|data\.(cache|workers)\b.*|"
    r"seed_everything|model\.init_args\.initial_weights|preview\.codec_source|scores\.(codec_source|\w+_network\.path)|"
    r"trainer\.(devices|logger|callbacks|profiler|default_root_dir|enable_progress_bar|enable_model_summary)\b.*"
)


class SaveRecipe(Callback):
    """Write the resolved recipe to the run folder and the loggers when training starts, with the number of parameters.

    All ranks must have the same settings, except for those of their nodes. Settings that differ from those of the run
    before it was resumed are logged; also if no step is left, when the recipe in the run folder stays as it is.

    Args:
        text: the YAML.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.is_started = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise `InputError` on all ranks if one of them has other settings, by which their weights would diverge."""
        if stage == "fit" and trainer.world_size > 1:
            settings = {name: repr(value) for name, value, _ in differences(load_yaml(self.text), {}, absent={})}
            check_same_on_ranks(
                trainer, {name: text for name, text in settings.items() if not OF_EACH_NODE.fullmatch(name)}
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and log; by now the run is restored and checked."""
        self.is_started = True
        if not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / RECIPE
        if trainer.global_step:
            log_changes(path, self.text, is_finished=False)
        with atomic_write(path) as temporary:
            temporary.write_text(self.text, encoding="utf-8")
        log_recipe(trainer.loggers, self.text, trainer.global_step)
        parameters = sum(parameter.numel() for parameter in pl_module.parameters())
        log.info("%s trains %s parameters", type(pl_module).__name__, f"{parameters:,}")
        if trainer.world_size > 1:
            log.info(
                "%d ranks train; rank 0 writes logs and previews, to %s",
                trainer.world_size,
                trainer.default_root_dir,
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log changed settings of a run without a step left, whose training does not start."""
        if trainer.is_global_zero and not self.is_started:
            log_changes(Path(trainer.default_root_dir) / RECIPE, self.text, is_finished=True)


def log_changes(path: Path, text: str, is_finished: bool) -> None:
    """Log the settings of a resumed run that differ from those in its folder, such as "data.seed is 1 (it was 0)".

    A setting that only one of them has, as those of other versions or classes, is left out.

    Args:
        path: the recipe in the run folder; nothing is logged if it is missing or cannot be read.
        text: the recipe of the resumed run.
        is_finished: whether no step is left.
    """
    try:
        before = read_yaml(path)
    except InputError:  # the run folder is a copy without it, or it was edited
        return
    absent: Any = object()
    changes = {
        name: f"{name} is {shown(now)} (it was {shown(then)})"
        for name, now, then in differences(load_yaml(text), before, absent=absent)
        if absent not in (now, then) and name not in SAME_FOLDER
    }
    unused = [changes.pop(name) for name in OF_INITIAL_WEIGHTS if name in changes]
    if unused:
        log.info("the weights are those of the checkpoint, so that these have no effect: %s", "; ".join(unused))
    texts = list(changes.values())
    if len(texts) > MAX_CHANGES:
        texts[MAX_CHANGES:] = [f"and {len(texts) - MAX_CHANGES} more"]
    if texts and is_finished:
        log.warning(
            "warning: changed settings have no effect, since no step is left (%s): "
            "raise trainer.max_steps to train on with them, or give another --run_dir",
            "; ".join(texts),
        )
    elif texts:
        log.info("the run resumes with changed settings: %s", "; ".join(texts))
