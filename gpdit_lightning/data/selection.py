"""The sources of data that a run uses: those that its stage trains on and for which there are samples."""

import logging
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpdit_lightning.data.manifest import FILE_NAME, Manifest, MissingManifestError
from gpdit_lightning.data.source import KINDS, SourceConfig
from gpdit_lightning.errors import InputError
from gpdit_lightning.path_kinds import reason_and_cure

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """The sources of a run.

    Attributes:
        configs: the sources in use by name, each with the manifests that contain its samples.
        left_out: by name of another source on which the stage trains, why it is not used.
        data_dir: the manifests of `data_dir`.
    """

    configs: dict[str, SourceConfig]
    left_out: dict[str, str]
    data_dir: tuple[Manifest, ...] = ()

    @property
    def cure(self) -> str:
        """How to obtain data for the sources that are left out."""
        without_batch = [f"data.{name}" for name, reason in self.left_out.items() if reason.startswith("data.")]
        if without_batch:
            return f"give {and_list(without_batch, 'or')} a batch_size (or tokens) above 0"
        return how_to_prepare(self.left_out, self.data_dir)


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
        InputError: an option of a source is invalid, or a folder of `data_dir` has no manifest or a broken one.
    """
    shared = load_data_dir(data_dir, allowed or KINDS, check_files=False)
    used, left_out = dict[str, SourceConfig](), dict[str, str]()
    for name, config in configs.items():
        config.check(name)
    for name in (name for name in KINDS if name in (allowed or KINDS)):
        config = configs[name]
        manifests = config.manifests or [path for path, one in shared.items() if KINDS[name] in kinds_of(one)]
        if not manifests:
            missing = f"there are no {name} for training in {and_list(data_dir)}"
            left_out[name] = missing if data_dir else "it has no manifests"
        elif not max(config.batch_size, config.tokens):
            left_out[name] = f"data.{name}.batch_size is 0"
        else:
            used[name] = replace(config, manifests=list(manifests))
    return Selection(used, left_out, tuple(shared.values()))


def select_from_recipe(data: Any) -> Selection:
    """Select the sources of a run from the `data` of a parsed recipe; errors as in :func:`select_sources`."""
    configs = {name: SourceConfig(**vars(getattr(data, name))) for name in KINDS}
    return select_sources(configs, data.data_dir, sources_of_run(data.sources, data.stage_sources))


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


def no_source_error(selection: Selection) -> InputError:
    """Return the error for a selection without a source, with its cure."""
    reasons = "; ".join(f"data.{name} is not used, since {reason}" for name, reason in selection.left_out.items())
    return InputError(f"no source of data is in use ({reasons}): {selection.cure}.")


def load_manifest(path: str, option: str, sources: Collection[str], check_files: bool = True) -> Manifest:
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
        reason = reason_and_cure(Path(path), "data", how_to_prepare(sources))
        raise InputError(f"{option} is {path}, which has no {FILE_NAME}, {reason}.") from None


def load_data_dir(paths: Sequence[str], sources: Collection[str], check_files: bool = True) -> dict[str, Manifest]:
    """Load the manifests of `data_dir` by their paths.

    Data that several paths lead to, in any spelling or as copies, are loaded by the first path only, which is logged.

    Args:
        paths: the folders, or their manifests.
        sources: as for :func:`load_manifest`.
        check_files: as for `Manifest.load`.

    Raises:
        InputError: a manifest does not exist or cannot be used.
    """
    loaded, first_paths = dict[str, Manifest](), dict[str, str]()
    for path in paths:
        manifest = load_manifest(path, "data_dir", sources, check_files)
        first = first_paths.setdefault(manifest.fingerprint(), path)
        if first in loaded:
            log.info("data_dir gives the same data as %s and as %s: they are used once.", first, path)
        else:
            loaded[path] = manifest
    return loaded


def log_repeated(option: str, manifests: Sequence[Manifest]) -> None:
    """Log a line for data that the manifests of a source give several times, since their samples then have more weight.

    Args:
        option: the name of the option that lists the manifests.
        manifests: the manifests in the order of the option.
    """
    paths = defaultdict[str, list[str]](list)
    for manifest in manifests:
        paths[manifest.fingerprint()].append(str(manifest.directory))
    for same in paths.values():
        if len(same) > 1:
            log.info(
                "%s gives the same data %d times (%s): each of their samples is used %d times in an epoch; give them "
                "once unless they are to have this weight.",
                option,
                len(same),
                and_list(list(dict.fromkeys(same))),
                len(same),
            )


def how_to_prepare(sources: Collection[str], present: Sequence[Manifest] = ()) -> str:
    """Return the command that prepares data for any of the sources, and the option that uses the result.

    Args:
        sources: names of the sources.
        present: manifests that the new data should match in codec and size, and that are used with them.
    """
    codec = [f"--codec {manifest.codec.name}" for manifest in present[:1]]
    size = next((size_in_pixels(manifest) for manifest in present), None)
    if "videos" in sources or "images" in sources:
        kinds = [kind for kind in ("video", "image") if f"{kind}s" in sources]
        out, words = f"latents/{f'{kinds[0]}s' if present else 'mine'}", ["prepare"]
        for kind in kinds:
            words += [f"--{kind}s MY_{kind.upper()}S", *([f"--{kind}_sizes {size}"] if size else [])]
    else:
        out, words = "latents/pairs", ["prepare-pairs --task grayscale --sources MY_IMAGES"]
        words += [f"--size {size}"] if size else []
    command = " ".join(["python -m gpdit_lightning", *words, *codec, f"--out {out}"])
    folders = " ".join([*(str(manifest.directory) for manifest in present), out])
    return f"make some with `{command}`, then give --data_dir {folders}"


def size_in_pixels(manifest: Manifest) -> str:
    """Return the size of the frames in the first shard of a manifest as HEIGHTxWIDTH."""
    _, _, height, width = manifest.shards[0].shape
    return f"{height * manifest.codec.spatial_factor}x{width * manifest.codec.spatial_factor}"


def and_list(words: Sequence[str], last: str = "and") -> str:
    """Return words as text: "a, b and c"."""
    return f" {last} ".join([*([", ".join(words[:-1])] if words[:-1] else []), *words[-1:]])
