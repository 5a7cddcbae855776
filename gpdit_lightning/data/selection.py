"""The sources of data that a run uses: those that its stage trains on and for which there are samples."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gpdit_lightning.data.manifest import FILE_NAME, Manifest, MissingManifestError
from gpdit_lightning.data.source import KINDS, SourceConfig
from gpdit_lightning.errors import InputError

PREPARE_VIDEOS_OR_IMAGES = {"videos": "--videos MY_VIDEOS", "images": "--images MY_IMAGES"}
PREPARE_PAIRS = "prepare-pairs --task grayscale --sources MY_IMAGES --out latents/pairs"


@dataclass(frozen=True)
class Selection:
    """The sources of a run.

    Attributes:
        configs: the sources in use by name, each with the manifests that contain its samples.
        left_out: by name of another source on which the stage trains, why it is not used.
    """

    configs: dict[str, SourceConfig]
    left_out: dict[str, str]


def select_sources(
    configs: Mapping[str, SourceConfig], data_dir: Sequence[str] = (), allowed: Sequence[str] = ()
) -> Selection:
    """Select the sources of a run.

    A source is used if the stage trains on it, if it has a batch size, and if it has data: `manifests`, or else folders
    of `data_dir` with training samples of its kind.

    Args:
        configs: the sources of the recipe by name.
        data_dir: folders of prepared data that may contain samples of any kind, or their manifest.json.
        allowed: names of the sources that the stage trains on; empty: any.

    Raises:
        InputError: a folder of `data_dir` has no manifest or a broken one.
    """
    kinds = {path: kinds_of(load_manifest(path, "data_dir", allowed or KINDS, check_files=False)) for path in data_dir}
    used, left_out = dict[str, SourceConfig](), dict[str, str]()
    for name in (name for name in KINDS if name in (allowed or KINDS)):
        config = configs[name]
        manifests = config.manifests or [path for path in data_dir if KINDS[name] in kinds[path]]
        if not manifests:
            left_out[name] = f"{and_list(data_dir)} has no {name} for training" if data_dir else "it has no manifests"
        elif not max(config.batch_size, config.tokens):
            left_out[name] = f"data.{name}.batch_size is 0"
        else:
            used[name] = replace(config, manifests=list(manifests))
    return Selection(used, left_out)


def sources_of_run(chosen: Sequence[str], of_stage: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the sources that a run may use; empty: any.

    Args:
        chosen: `data.sources` of the recipe; empty: those of the stage.
        of_stage: the sources on which the stage trains; empty: any.

    Raises:
        InputError: the stage does not train on a chosen source.
    """
    for name in chosen:
        if name not in (of_stage or KINDS):
            raise InputError(
                f"data.sources has {name}, but the stage trains on {and_list(of_stage or list(KINDS))}: leave it out."
            )
    return tuple(chosen) or tuple(of_stage)


def kinds_of(manifest: Manifest) -> set[str]:
    """Return the kinds of the training samples of a manifest."""
    return {shard.kind for shard in manifest.of_split("train")}


def no_source_error(selection: Selection, data_dir: Sequence[str]) -> InputError:
    """Return the error for a selection without a source, with the command that prepares data for it."""
    with_data = [f"data.{name}" for name, reason in selection.left_out.items() if reason.startswith("data.")]
    cure = f"give {and_list(with_data, 'or')} a batch_size (or tokens) above 0"
    cure = cure if with_data else how_to_prepare(selection.left_out)
    reasons = "; ".join(f"data.{name} is not used, since {reason}" for name, reason in selection.left_out.items())
    return InputError(f"no source of data is in use ({reasons}): {cure}.")


def load_manifest(path: str, option: str, sources: Iterable[str], check_files: bool = True) -> Manifest:
    """Load a manifest that an option names.

    Args:
        path: the folder or the manifest.
        option: the name of the option.
        sources: the sources that need it, for the command that prepares data.
        check_files: as for `Manifest.load`.

    Raises:
        InputError: it does not exist or cannot be used.
    """
    try:
        return Manifest.load(path, check_files)
    except MissingManifestError:
        inside = [str(found.parent) for found in sorted(Path(path).glob(f"*/{FILE_NAME}"))] if "://" not in path else []
        cure = f"give --data_dir {' '.join(inside)}" if inside else how_to_prepare(sources)
        raise InputError(f"{option} is {path}, which has no {FILE_NAME}: {cure}.") from None


def how_to_prepare(sources: Iterable[str]) -> str:
    """Return the command that prepares data for any of the sources, and the option that uses the result."""
    inputs = [option for name, option in PREPARE_VIDEOS_OR_IMAGES.items() if name in sources]
    words = f"prepare {' '.join(inputs)} --out latents/mine" if inputs else PREPARE_PAIRS
    return f"make some with `python -m gpdit_lightning {words}`, then give --data_dir {words.split()[-1]}"


def and_list(words: Sequence[str], last: str = "and") -> str:
    """Return words as text: "a, b and c"."""
    return f" {last} ".join([*([", ".join(words[:-1])] if words[:-1] else []), *words[-1:]])
