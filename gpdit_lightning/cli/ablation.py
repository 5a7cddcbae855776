"""The arms of an ablation: their recipes, costs and runs, and the record of them in the folder of the ablation."""

import json
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jsonargparse import Namespace

from gpdit_lightning.checkpoints.files import last_checkpoint, open_checkpoint
from gpdit_lightning.checkpoints.reading import find_weights, sha256_of_weights
from gpdit_lightning.cli.estimated_recipe import estimated_recipe
from gpdit_lightning.cli.messages import names_unknown_option
from gpdit_lightning.cli.parsing import option_names
from gpdit_lightning.cli.plan_trial import warnings_only
from gpdit_lightning.cli.recipe_cli import build_recipe, parse_recipe
from gpdit_lightning.cli.recipe_files import read_yaml, with_bases
from gpdit_lightning.cli.trainer_settings import check_steps
from gpdit_lightning.data.datamodule import LatentDataModule
from gpdit_lightning.data.selection import load_manifest, no_source_error, select_from_recipe
from gpdit_lightning.errors import InputError
from gpdit_lightning.estimation.budget import RunCosts
from gpdit_lightning.estimation.requirements import RunSettings
from gpdit_lightning.files import atomic_write
from gpdit_lightning.imports import import_path
from gpdit_lightning.options.ablate import AblateOptions
from gpdit_lightning.options.shared import RecipeOptions
from gpdit_lightning.regular_files import read_bounded
from gpdit_lightning.schema import (
    CONTENT_HASH,
    COUNT,
    MAX_JSON_BYTES,
    OBJECT,
    TEXT,
    check,
    check_content_hash,
    content_hash,
    differences,
    parse_json,
)
from gpdit_lightning.training.callbacks.ablation import AblationRecord, StepSeconds, record_in

RECORD, LOCK = "ablation.json", "lock"
WEIGHTS = "initial_weights"  # key of the record; those of earlier versions lack it
SCHEMA = {"base": OBJECT, "budget": TEXT, "validations": COUNT, "data": OBJECT, "arms": OBJECT}
# Options that the budget, the seeds and the folder determine.
DETERMINED = ("base", "runs", "run_dir", "seed_everything", "data.seed", "trainer.max_steps", "validate_every_steps")
FOLDERS = ("base", "config", "runs", "run_dir")  # options of which no result depends
TRIAL_STEPS, WARM_UP = 22, 2


@dataclass(frozen=True)
class Arm:
    """An arm of an ablation.

    Attributes:
        name: its name.
        overrides: as given.
        settings: the parsed recipe; None if it was refused.
        run: what its costs depend on; None if the recipe was refused.
        costs: its costs within the budget; None if the recipe was refused.
        failure: why the recipe was refused; empty if it was not.
    """

    name: str
    overrides: Mapping[str, Any]
    settings: Namespace | None = None
    run: RunSettings | None = None
    costs: RunCosts | None = None
    failure: str = ""

    @property
    def words(self) -> list[str]:
        """The overrides as words of a command line."""
        return override_words(self.overrides)


@dataclass(frozen=True)
class Ablation:
    """The arms of an ablation, and what they have in common.

    Attributes:
        options: the options of the command.
        words: the base recipe, as words of the command line of `fit`.
        base: the parsed base recipe.
        costs: of the base recipe, which determine the budget.
        assumed: names of the sources whose data are not prepared.
        arms: the arms.
    """

    options: AblateOptions
    words: list[str]
    base: Namespace
    costs: RunCosts
    assumed: frozenset[str]
    arms: list[Arm]

    @staticmethod
    def name_of_run(arm: Arm, seed: int) -> str:
        """Return the name of the run of an arm and a seed, which is its path in the folder of the ablation."""
        return f"{arm.name}/seed-{seed}"

    def run_dir(self, arm: Arm, seed: int) -> Path:
        """Return the run folder of an arm and a seed."""
        return self.options.out / self.name_of_run(arm, seed)

    def recipe(self, arm: Arm, seed: int) -> RecipeOptions:
        """Return the options of `fit` for an arm and a seed."""
        assert arm.costs is not None
        steps = arm.costs.steps
        record = {
            "class_path": import_path(AblationRecord),
            "init_args": {
                "data": {"class_path": import_path(LatentDataModule), "init_args": self._validation_data(arm)},
                "schedule": vars(self.base.model.init_args.schedule),
                "every_steps": max(1, round(steps / self.options.validations)),
                "run": self.name_of_run(arm, seed),
            },
        }
        settings = {
            "run_dir": self.run_dir(arm, seed),
            "seed_everything": seed,
            "data.seed": seed,
            "trainer.max_steps": steps,
            "validate_every_steps": 0,
        }
        words = [f"--{name}={value}" for name, value in settings.items()]
        words.append(f"--trainer.callbacks+={json.dumps(record)}")
        return RecipeOptions(config=(), overrides=[*self.words, *arm.words, *words])

    def _validation_data(self, arm: Arm) -> dict[str, Any]:
        """Return the arguments of the data that all arms are validated on: those of the base recipe.

        Only what the arm's backbone needs is that of the arm: whether batches have labels, and the blocks that clips
        are cut to. Neither changes noise and noise levels of clips that both cut to the same length.
        """
        assert arm.settings is not None
        own = {name: arm.settings.data[name] for name in ("labels", "block_frames")}
        return plain(self.base.data) | plain(Namespace(**own))

    def result(self, arm: Arm, seed: int) -> dict[str, Any] | None:
        """Return the record of a finished run, see :class:`AblationRecord`; None if it is not finished.

        Raises:
            InputError: the last checkpoint cannot be read, or is not of this run.
        """
        last = last_checkpoint(self.run_dir(arm, seed))
        if last is None or arm.costs is None:
            return None
        checkpoint = open_checkpoint(last)
        record = record_in(checkpoint.content, str(last), self.name_of_run(arm, seed))
        return record if checkpoint.step >= arm.costs.steps else None


def plain(settings: Namespace | None) -> dict[str, Any]:
    """Return settings as JSON values; none for those of a refused recipe."""
    return dict(json.loads(json.dumps(settings.as_dict(), default=str))) if settings is not None else {}


def override_words(overrides: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return overrides as words of a command line; nested mappings become dotted names, except those of a class."""
    words = []
    for name, value in overrides.items():
        if isinstance(value, Mapping) and value and "class_path" not in value:
            words += override_words(value, f"{prefix}{name}.")
        else:
            words.append(f"--{prefix}{name}={value if isinstance(value, str) else json.dumps(value)}")
    return words


def base_words(options: AblateOptions) -> list[str]:
    """Return the base recipe as words of the command line of `fit`: files with options of `ablate` without these."""
    of_verb, words = set(option_names(AblateOptions)), list[str]()
    for word in with_bases([f"--config={path}" for path in options.config]):
        content = read_yaml(Path(word.partition("=")[2]))
        if of_verb & content.keys():
            words += override_words({name: content[name] for name in content.keys() - of_verb - {"base"}})
        else:
            words.append(word)
    return [*words, *options.overrides]


def read_ablation(options: AblateOptions) -> Ablation:
    """Parse the base recipe and the arms, and compute the steps of each arm within the budget.

    With the budget `time`, they are preliminary: those with as many FLOPs.

    Raises:
        InputError: the base recipe cannot be used, or an arm has an unknown option, one that is not its to set, or the
            settings of another arm.
    """
    words = base_words(options)
    base = parse_recipe("ablate", words)
    steps = base.trainer.max_steps
    check_steps("trainer.max_steps of the base recipe", steps)
    estimated = estimated_recipe(base)
    costs = RunCosts.of_steps(estimated.run, steps)
    arms = list[Arm]()
    for name, overrides in options.arms.items():
        arm = read_arm(name, overrides, words, base)
        for other in arms:
            if arm.words == other.words or (arm.settings and plain(arm.settings) == plain(other.settings)):
                raise InputError(
                    f"the arms {other.name!r} and {name!r} have the same settings: change one, or leave it out."
                )
        if arm.run is not None:
            by_steps = options.budget == "steps"
            of_arm = RunCosts.of_steps(arm.run, steps) if by_steps else RunCosts.within_flops(arm.run, costs.flops)
            arm = replace(arm, costs=of_arm)
        arms.append(arm)
    return Ablation(options, words, base, costs, estimated.assumed, arms)


def read_arm(name: str, overrides: Mapping[str, Any], words: Sequence[str], base: Namespace) -> Arm:
    """Parse the recipe of an arm; one that is refused has a `failure`.

    Raises:
        InputError: an option is unknown, or not the arm's to set.
    """
    arm = Arm(name, overrides)
    for word in arm.words:
        option = word.partition("=")[0].removeprefix("--")
        if option in DETERMINED:
            raise InputError(
                f"the arm {name!r} sets {option}, which the seeds, the budget and --out determine: leave it out."
            )
    try:
        settings = parse_recipe("ablate", [*words, *arm.words]) if arm.words else base
        return replace(arm, settings=settings, run=estimated_recipe(settings).run)
    except InputError as error:
        if names_unknown_option(str(error)):
            raise InputError(f"the arm {name!r} cannot be used: {error}") from None
        return replace(arm, failure=str(error))


def record_ablation(ablation: Ablation, writes: bool = True) -> Ablation:
    """Compare an ablation with the record in its folder, and write the record, unless this is not the first rank.

    Returns:
        the ablation with the steps of the record or, for the budget `time` and arms that are not in it, of a trial.

    Raises:
        InputError: the folder has another ablation, one from other initial weights, or an arm of the same name with
            other overrides.
    """
    options, path = ablation.options, ablation.options.out / RECORD
    settings = {
        "base": {name: value for name, value in plain(ablation.base).items() if name not in FOLDERS},
        "budget": options.budget,
        "validations": options.validations,
        "data": data_of(ablation.base),
    }
    saved: dict[str, Any] = read_record(path) if path.exists() else {"arms": {}}
    settings[WEIGHTS] = saved.get(WEIGHTS, {}) | initial_weights_of(ablation)
    if not path.exists() and options.out.exists() and {file.name for file in options.out.iterdir()} - {LOCK}:
        raise InputError(f"{options.out} has files, but no {RECORD} of an ablation: give another --out.")
    if path.exists() and (changed := difference({name: saved[name] for name in settings if name in saved}, settings)):
        raise InputError(
            f"{options.out} has an ablation with another {changed}: give another --out, or the settings in {path}."
        )
    arms: dict[str, Any] = saved["arms"]
    for arm in ablation.arms:
        if arm.name in arms and arms[arm.name]["overrides"] != arm.overrides:
            raise InputError(
                f"the arm {arm.name!r} in {options.out} has the overrides {json.dumps(arms[arm.name]['overrides'])}: "
                "give the new ones another name."
            )
    steps = {name: arm["steps"] for name, arm in arms.items()}
    if options.budget == "time":
        steps = measured_steps(ablation) | steps
    found = [replace(arm, costs=with_steps(arm, steps)) for arm in ablation.arms]
    arms |= {arm.name: {"overrides": arm.overrides, "steps": arm.costs.steps} for arm in found if arm.costs is not None}
    if writes:
        options.out.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            content = json.loads(json.dumps(settings | {"arms": arms}))
            text = json.dumps(content | {CONTENT_HASH: content_hash(content)}, indent=1)
            temporary.write_text(text, encoding="utf-8")
    return replace(ablation, arms=found)


def initial_weights_of(ablation: Ablation) -> dict[str, str]:
    """Return the sha256 of all initial weights by path, except for those that cannot be read, which the runs report."""
    hashes = {}
    for settings in (ablation.base, *(arm.settings for arm in ablation.arms if arm.settings is not None)):
        path = settings.model.init_args.get("initial_weights")
        if path and path not in hashes:
            with suppress(InputError, OSError):
                hashes[path] = sha256_of_weights(find_weights(path))
    return hashes


def with_steps(arm: Arm, steps: Mapping[str, int]) -> RunCosts | None:
    """Return the costs of an arm with the number of steps in a table, if it has an entry."""
    if arm.costs is None:
        return None
    return replace(arm.costs, steps=steps.get(arm.name, arm.costs.steps))


def difference(saved: Any, current: Any) -> str:
    """Return the name of the first value that differs between two nested records; empty if none does.

    Values that the saved one does not have are options of a later version of the library, and do not count.
    """
    later = object()
    different = (entry for entry in differences(saved, current, absent=later) if entry[1] is not later)
    name, before, now = next(different, ("", None, None))
    section, _, inner = name.partition(".")
    if section in ("data", WEIGHTS):  # fingerprints of folders and files
        return f"content of {inner}"
    now = None if now is later else now
    return name and f"{inner or f'--{name}'} ({json.dumps(before)} instead of {json.dumps(now)})"


def data_of(settings: Namespace) -> dict[str, list[str]]:
    """Return the fingerprints of the data of a recipe, by option.

    Raises:
        InputError: there are none, a manifest cannot be used, or nothing is held out.
    """
    selection = select_from_recipe(settings.data)
    if not selection.configs:
        raise no_source_error(selection)
    manifests = {
        (option := f"data.{name}.manifests"): [
            load_manifest(path, option, selection.configs) for path in source.manifests
        ]
        for name, source in selection.configs.items()
    }
    if settings.data.validation_batches == 0:
        raise InputError("data.validation_batches is 0: an ablation compares validation losses, so give a number.")
    if not any(manifest.of_split("validation") for found in manifests.values() for manifest in found):
        raise InputError("no samples of the data are held out, on which arms are compared (see `prepare --help`).")
    return {option: [manifest.fingerprint()[:16] for manifest in found] for option, found in manifests.items()}


def read_record(path: Path) -> dict[str, Any]:
    """Return the record of an ablation.

    Raises:
        InputError: it cannot be read, or is no such record.
    """
    cure = "restore it, or give another --out"
    content = parse_json(read_bounded(path, MAX_JSON_BYTES), str(path), cure)
    check(content, SCHEMA, "", str(path), cure)
    check_content_hash(content, str(path), cure)
    content.pop(CONTENT_HASH, None)
    check(content.get(WEIGHTS, {}), OBJECT, WEIGHTS, str(path), cure)
    for name, arm in content["arms"].items():
        check(arm, {"overrides": OBJECT, "steps": COUNT}, f"arms.{name}", str(path), cure)
    return dict(content)


def measured_steps(ablation: Ablation) -> dict[str, int]:
    """Return the steps of each arm that take as long as those of the base recipe, by a trial of each."""
    recorded = ablation.options.out / RECORD
    known = read_record(recorded)["arms"] if recorded.exists() else {}
    missing = [arm for arm in ablation.arms if arm.costs is not None and arm.name not in known]
    if not missing:
        return {}
    seconds = ablation.costs.steps * measured_step_seconds(ablation.words)
    steps = {}
    for arm in missing:
        print(f"trial of {arm.name}: {TRIAL_STEPS} steps", flush=True)
        with suppress(InputError):  # raised again, and reported, by its runs
            of_step = measured_step_seconds([*ablation.words, *arm.words])
            steps[arm.name] = max(1, round(seconds / of_step))
    return steps


def measured_step_seconds(words: Sequence[str]) -> float:
    """Return the median seconds of an optimizer step of a recipe, by a short training of which nothing is kept.

    Raises:
        InputError: the recipe cannot be trained, or trains in several processes.
    """
    timer = StepSeconds()
    with TemporaryDirectory() as folder, warnings_only():
        settings = {
            "run_dir": folder,
            "trainer.max_steps": TRIAL_STEPS,
            "trainer.logger": "false",
            "trainer.enable_progress_bar": "false",
            "trainer.enable_model_summary": "false",
            "validate_every_steps": 0,
            "preview.every_steps": 0,
            "scores.every_steps": 0,
            "checkpoint.keep_every_steps": 0,
        }
        cli = build_recipe("fit", [*words, *(f"--{name}={value}" for name, value in settings.items())])
        if cli.trainer.world_size > 1:
            raise InputError("the budget time is for training in one process: give --budget steps or flops.")
        cli.trainer.callbacks.append(timer)  # type: ignore[attr-defined]
        cli.trainer.fit(cli.model, cli.datamodule, weights_only=True)
    return statistics.median(timer.seconds[WARM_UP:])
