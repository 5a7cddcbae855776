"""The order of the data as a checkpoint records it: a run resumes only if the recipe gives the same order."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.source import KINDS
from gpdit_lightning.errors import InputError

# Settings that checkpoints of earlier versions do not record, with the only value that they could have.
EARLIER_SETTINGS = {"data.sampling": "joint"}
# Settings of sources that checkpoints do not record.
UNRECORDED_DEFAULTS = (("loss_frames", "all"), ("frames_without_loss", 0))


def changes_of_order(
    saved: Mapping[str, Any],
    order: Mapping[str, Any],
    saved_folders: Mapping[str, Sequence[str]],
    folders: Mapping[str, Sequence[str]],
) -> list[str]:
    """Return the differences of the settings of two orders, for a message.

    The settings of a source that only one of them uses count as one difference.

    Args:
        saved, order: settings of a checkpoint and of the recipe.
        saved_folders, folders: folders of the manifests of each, by their option.
    """
    before, now = ([name for name in KINDS if f"data.{name}.manifests" in settings] for settings in (saved, order))
    changes = [f"data.{name}, which the recipe does not use now" for name in before if name not in now]
    changes += [f"no data.{name}, which the recipe uses now" for name in now if name not in before]
    of_one = tuple(f"data.{name}." for name in {*before} ^ {*now})
    return changes + [
        f"{name} = {_value_text(name, saved, saved_folders)} and the recipe has {_value_text(name, order, folders)}"
        for name in sorted(order.keys() | saved.keys())
        if order.get(name) != saved.get(name) and not name.startswith(of_one)
    ]


def _value_text(name: str, settings: Mapping[str, Any], folders: Mapping[str, Sequence[str]]) -> str:
    """Return the value of a setting; manifests as their folders with the fingerprints."""
    if name not in folders or name not in settings:
        return str(settings.get(name, "none"))
    pairs = zip(folders[name], settings[name], strict=True)
    return ", ".join(f"{folder} (fingerprint {fingerprint})" for folder, fingerprint in pairs)


def check_order(
    state: Mapping[str, Any],
    order: Mapping[str, Any],
    folders: Mapping[str, Sequence[str]],
    manifests: Mapping[str, Sequence[Manifest]],
) -> None:
    """Check that a checkpoint was trained in the order of a recipe.

    Args:
        state: the state of the data in the checkpoint.
        order: settings of the recipe that determine the order, by their names.
        folders: folders of the manifests, by the option.
        manifests: the manifests, by the name of the source.

    Raises:
        InputError: the data, the mixture or the batches changed.
    """
    saved = EARLIER_SETTINGS | state["order"]
    # Checkpoints of earlier versions do not record folders.
    changes = changes_of_order(saved, order, state.get("folders", {}), folders)
    if changes:
        previous = "".join(
            f" (the manifest before the data were extended is {path})" for path in _previous_manifests(saved, manifests)
        )
        raise InputError(
            f"the checkpoint was trained with {'; with '.join(changes)}; so its data order cannot continue: "
            f"restore the old values{previous}, which are in config.yaml of the run folder, or start a new run "
            "folder (--run_dir NEW, for a chain --runs NEW), also from its weights "
            "(--model.init_args.initial_weights OLD_RUN_DIR)."
        )


def _previous_manifests(saved: Mapping[str, Any], manifests: Mapping[str, Sequence[Manifest]]) -> Iterator[Path]:
    """Yield the manifests of a checkpoint that preparation kept when the data were extended."""
    for name, found in manifests.items():
        for manifest, fingerprint in zip(found, saved.get(f"data.{name}.manifests", ()), strict=False):
            path = manifest.directory / f"manifest-{fingerprint}.json"
            if isinstance(path, Path) and path.exists():
                yield path
