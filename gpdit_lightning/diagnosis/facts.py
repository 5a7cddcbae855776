"""The settings of a run on which its curves depend, read from the recipe in its run folder."""

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.source import KINDS
from gpdit_lightning.errors import InputError
from gpdit_lightning.hashes import remembered_sha256
from gpdit_lightning.model import GPDiTConfig
from gpdit_lightning.schema import COUNT, LIST, NUMBER_OR_NULL, OBJECT, TEXT, Constraint, check

# The source of stages that have one only.
SOURCE_OF_STAGE = {"ImageWarmupStage": "images", "LongVideoStage": "videos", "FewShotStage": "sequences"}

STAGE, SIZE, LOSS, DATA, TRAINING = "stage", "size", "loss", "data", "training"
VALIDATION, PREVIEW, SCORES = "validation", "preview", "scores"
# Fields of the backbone, by the group of their facts; the others do not change curves.
BACKBONE = {
    SIZE: ("layers", "width", "mlp_width", "heads", "patch_size"),
    LOSS: ("target", "block_shape", "first_block_frames", "causal_in_block", "latent_channels"),
    TRAINING: ("factorized", "attention", "time_conditioning", "time_site", "classes"),
}
SOURCE = {LOSS: ("frames", "least_frames", "loss_frames", "frames_without_loss"), TRAINING: ("batch_size", "tokens")}
OF_DATA = ("context_dropout", "noise_levels", "noise_draws", "context_noise")
OF_OPTIMIZER = ("algorithm", "learning_rate", "decay", "warmup_steps", "weight_decay")
ERROR_RATIO = "sample/rollout_error_ratio"  # of previews
# Curves that have settings of their own, with the group of these; not every run has them.
OWN_SETTINGS = {"loss/val": VALIDATION, ERROR_RATIO: PREVIEW, "scores_vs_decoded/fvd": SCORES}
# The section of the recipe and its fields, by group. The loss of few batches depends on the clips and angles in them.
OF_GROUP = {
    VALIDATION: ("data", ("validation_batches",)),
    PREVIEW: ("preview", ("clips", "context_frames", "sampler", "sampler_steps")),
    SCORES: ("scores", ("clips", "context_frames", "sampler", "sampler_steps")),
}

Facts = dict[str, dict[str, Any]]

STEPS = Constraint("-1 or a non-negative integer below 2^63", lambda value: value == -1 or COUNT.accepts(value))
COUNT_OR_NULL = Constraint(f"{COUNT.description} or null", lambda value: value is None or COUNT.accepts(value))
# The settings with which the comparison computes, in the form of `schema.py`.
SCHEMA = {
    STAGE: {"class_path": TEXT, "sources": LIST},
    SIZE: OBJECT,
    LOSS: {"backbone.target": TEXT},
    DATA: OBJECT,
    TRAINING: {
        "trainer.max_steps": STEPS,
        "trainer.gradient_clip_val": NUMBER_OR_NULL,
        "optimizer.warmup_steps": COUNT_OR_NULL,
        "initial_weights": TEXT,
    },
    **dict.fromkeys(OWN_SETTINGS.values(), OBJECT),
}


def facts_of(recipe: Mapping[str, Any], tags: Collection[str], name: str) -> Facts:
    """Return the settings of a run that its curves depend on, as names and JSON values, in groups.

    The groups: `stage` and `loss` decide what the losses are means of, `data` describes the data, if they are found,
    `size` and `training` decide how fast the losses fall, and `validation`, `preview` and `scores` belong to loss/val,
    the error ratio of previews and FVD, if the run has them.

    Args:
        recipe: the content of `config.yaml` in the run folder.
        tags: of the run's curves, which name its sources where there are several.
        name: of the file, for the message.

    Raises:
        InputError: the recipe lacks a setting that every run has, or one has no possible value.
    """
    try:
        model, data = recipe["model"], recipe["data"]
        options = model["init_args"]
        backbone = GPDiTConfig(**options["backbone"])
        stage = str(model["class_path"]).rpartition(".")[2]
        manifests = manifests_of(data, recipe.get("data_dir") or [])
        sources = sources_of(data, stage, tags, manifests.values())
        facts: Facts = {STAGE: {"class_path": stage, "sources": sources}, SIZE: {}, LOSS: {}, DATA: {}, TRAINING: {}}
        for group, fields in BACKBONE.items():
            facts[group] |= {f"backbone.{field}": plain(getattr(backbone, field)) for field in fields}
        facts[LOSS] |= {f"schedule.{field}": value for field, value in options["schedule"].items()}
        for source in sources:
            for group, of_source in SOURCE.items():
                facts[group] |= {f"data.{source}.{field}": data[source].get(field) for field in of_source}
            facts[DATA] |= data_facts(source, manifests, data)
        facts[TRAINING] |= {f"data.{field}": data.get(field) for field in OF_DATA}
        facts[TRAINING] |= {f"optimizer.{field}": options["optimizer"].get(field) for field in OF_OPTIMIZER}
        facts[TRAINING] |= {
            "ema.decay": recipe["ema"]["decay"],
            **{f"trainer.{field}": recipe["trainer"].get(field) for field in ("max_steps", "gradient_clip_val")},
            "initial_weights": "of another run" if options.get("initial_weights") else "random",
        }
        facts |= {group: {} for group in OWN_SETTINGS.values()}
        for group in (group for tag, group in OWN_SETTINGS.items() if tag in tags):
            section, own = OF_GROUP[group]
            facts[group] = {f"{section}.{field}": recipe[section].get(field) for field in own}
        if facts[SCORES]:
            facts[SCORES]["scores.video_network"] = network_fact(recipe[SCORES]["video_network"])
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{name} is not the recipe of a run ({type(error).__name__}: {error}): give a run folder that `fit` has "
            "written."
        ) from None
    check(facts, SCHEMA, "", name, "correct it, or give another run")
    return facts


def plain(value: Any) -> Any:
    """Return a value as JSON has it: tuples as lists."""
    return list(value) if isinstance(value, tuple) else value


def network_fact(options: Mapping[str, Any]) -> str | None:
    """Return what identifies the network of FVD; None if its file is not found on this machine."""
    kind, path = options.get("kind") or "I3D", options.get("path")
    with suppress(InputError, OSError):
        return f"{kind} {remembered_sha256(Path(path))[:16]}" if path else str(kind)
    return None


def manifests_of(data: Mapping[str, Any], folders: str | list[str]) -> dict[str, Manifest]:
    """Return the manifests of the data that are found on this machine, by their paths in the recipe.

    Args:
        data: data settings of the recipe.
        folders: `data_dir` of the recipe.
    """
    paths = [folders] if isinstance(folders, str) else list(folders)
    paths += [path for source in KINDS for path in data[source]["manifests"] or []]
    found = {}
    for path in map(str, paths):
        if "://" not in path:  # on this machine
            with suppress(InputError, OSError):
                found[path] = Manifest.load(Path(path), check_files=False)
    return found


def sources_of(data: Mapping[str, Any], stage: str, tags: Collection[str], manifests: Iterable[Manifest]) -> list[str]:
    """Return the names of the sources that a run trains on.

    Several sources have a curve each. Otherwise it is the one that the recipe or the stage names, or the data have.
    """
    several = [name for name in KINDS if f"train/loss_{name}" in tags]
    kinds = {shard.kind for manifest in manifests for shard in manifest.shards}
    named = list(data.get("sources") or [])
    with_manifests = [name for name in KINDS if data[name]["manifests"]]
    of_stage = [SOURCE_OF_STAGE[stage]] if stage in SOURCE_OF_STAGE else []
    of_data = [name for name, kind in KINDS.items() if kind in kinds]
    return several or named or of_stage or with_manifests or of_data


def data_facts(source: str, manifests: Mapping[str, Manifest], data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what describes the data of a source: codec, whitening, stride, number of training samples.

    The values are None if the data are not found on this machine.
    """
    own = data[source]["manifests"]
    used = [manifest for path, manifest in manifests.items() if not own or path in map(str, own)]
    shards = [
        (manifest, shard) for manifest in used for shard in manifest.of_split("train") if shard.kind == KINDS[source]
    ]
    first = shards[0][0] if shards else None
    mean, std = (
        first and [round(float(value), 3) for value in values]
        for values in ((first.codec.mean, first.codec.std) if first else ((), ()))
    )
    return {
        f"data.{source}: codec": first and f"{first.codec.name} {first.codec.fingerprint}",
        f"data.{source}: means of the whitening": mean,
        f"data.{source}: standard deviations of the whitening": std,
        f"data.{source}: stride": first and first.preparation.get("stride"),
        f"data.{source}: latent sizes": first and sorted({"x".join(map(str, s.shape[1:])) for _, s in shards}),
        f"data.{source}: training samples": first and sum(shard.count for _, shard in shards),
    }
