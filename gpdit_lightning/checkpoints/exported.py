"""Exported models on disk: reading and writing of their folders.

An exported folder contains `model.safetensors`, `config.json` and the model card, `README.md`; and `codec.safetensors`
if the weights of the codec are a single file of the run, such as a linear codec that was fitted on its videos; and the
sample images of the card, `sample.png` and `sample.gif`, if there are any. Other files are never read, and none of
these can contain code. `SHA256SUMS` has the hashes of the files that are read, as `sha256sum --check` takes them; each
machine verifies them once (hashes.py). Folders of earlier versions have none. `config.json` is plain JSON:

    format, library_version, dtype   format of the folder, version of its writer, data type of the weights
    checksums                        "SHA256SUMS"; missing if an earlier version wrote the folder without that file
    config                           architecture: `GPDiTConfig.to_dict()`
    weights, step, stage, ...        the recorded fields of `TrainingFacts`
"""

import json
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from gpdit_lightning.checkpoints.card import CardDetails, is_unedited, model_card
from gpdit_lightning.checkpoints.facts import EXPORT_AGAIN
from gpdit_lightning.checkpoints.weights import Weights
from gpdit_lightning.errors import InputError, TransientError
from gpdit_lightning.files import atomic_write
from gpdit_lightning.hashes import remembered_sha256
from gpdit_lightning.model.config import GPDiTConfig
from gpdit_lightning.path_kinds import EXPORTED_CONFIG, EXPORTED_WEIGHTS
from gpdit_lightning.regular_files import read_bounded
from gpdit_lightning.retries import retried, transient_error
from gpdit_lightning.schema import parse_json, shown
from gpdit_lightning.tensor_files import safetensors_header
from gpdit_lightning.version import __version__

CONFIG, WEIGHTS, CARD = EXPORTED_CONFIG, EXPORTED_WEIGHTS, "README.md"
CODEC = "codec.safetensors"
STRIP, ANIMATION = IMAGES = "sample.png", "sample.gif"
CHECKSUMS = "SHA256SUMS"
FORMAT = "gpdit_lightning-model-1"
CURE = f"{EXPORT_AGAIN}, or copy or download all of its folder"
MAX_CONFIG_BYTES = 2**24
MAX_CHECKSUM_BYTES = 2**16

log = logging.getLogger(__name__)


def is_exported(path: Path) -> bool:
    """Return whether a path is an exported folder, possibly incomplete."""
    return (path / CONFIG).exists() or (path / WEIGHTS).exists()


@retried
def read_exported(folder: Path) -> Weights:
    """Open the weights in an exported folder, whose files are verified; the tensors are read when they are used.

    Raises:
        InputError: a file is missing, truncated, of another type, or not the one that was exported.
        TransientError: three attempts to read a file failed for a reason other than its content.
    """
    path, config_path = folder / WEIGHTS, folder / CONFIG
    if not config_path.exists():
        raise InputError(f"{config_path} does not exist: {CURE}.")
    text = _read(config_path, MAX_CONFIG_BYTES)
    content = parse_json(text, str(config_path), CURE)
    file_format = content.get("format") if isinstance(content, dict) else None
    if file_format != FORMAT:
        raise InputError(f"{config_path} has format {shown(file_format)} and this version reads {FORMAT!r}: {CURE}.")
    if not path.exists():
        raise InputError(f"{path} does not exist, and weights in other files are not opened: {CURE}.")
    tensors, _ = safetensors_header(path, CURE)
    weights = Weights.checked(tensors, content.get("config"), content, str(config_path))
    if content.get("checksums") and not (folder / CHECKSUMS).exists():
        raise InputError(f"{folder / CHECKSUMS} does not exist, so the files cannot be verified: {CURE}.")
    verify_checksums(folder)
    if _read(config_path, MAX_CONFIG_BYTES) != text:  # the hash may be that of a file which has replaced it since
        raise TransientError(f"{config_path} changed while it was read: {CURE}.")
    return replace(weights, owner=str(path), folder=folder)


def verify_checksums(folder: Path) -> None:
    """Compare the files of an exported folder with the hashes that were written with them, if there are any.

    Raises:
        InputError: a file is missing, additional, or not the one that was exported; or the hashes cannot be parsed.
        TransientError: a file could not be read for a reason other than its content.
    """
    sums = folder / CHECKSUMS
    if not sums.exists():
        log.info("%s has no %s, since an earlier version wrote it, so its files cannot be verified.", folder, CHECKSUMS)
        return
    text = _read(sums, MAX_CHECKSUM_BYTES).decode("utf-8", errors="replace")
    lines = [re.fullmatch(r"([0-9a-f]{64}) [ *]([^/\x00]+)", line) for line in text.splitlines()]
    expected = {line[2]: line[1] for line in lines if line is not None}
    if len(expected) != len(lines) or not expected.keys() >= {CONFIG, WEIGHTS}:
        raise InputError(f"{sums} does not have one hash for each of {CONFIG} and {WEIGHTS}: {CURE}.")
    for name in (CONFIG, WEIGHTS, CODEC):
        if name not in expected:
            if (folder / name).exists():
                raise InputError(f"{folder / name} is none of the files that {sums} lists: remove it, or {CURE}.")
            continue
        if not (folder / name).exists():
            raise InputError(f"{folder / name} does not exist: {CURE}.")
        try:
            actual = remembered_sha256(folder / name)
        except OSError as error:
            unreadable = InputError(f"{folder / name} cannot be read ({error.strerror}): {CURE}.")
            raise transient_error(error, folder / name) or unreadable from None
        if actual != expected[name]:
            raise InputError(f"{folder / name} is not the file that was exported (its sha256 is {actual}): {CURE}.")


def write_checksums(folder: Path) -> None:
    """Write the hashes of the files in an exported folder that are read."""
    names = [name for name in (CONFIG, WEIGHTS, CODEC) if (folder / name).is_file()]
    with atomic_write(folder / CHECKSUMS) as path:
        path.write_text("".join(f"{remembered_sha256(folder / name)}  {name}\n" for name in names), encoding="utf-8")


def _read(path: Path, most: int) -> bytes:
    try:
        return read_bounded(path, most)
    except OSError as error:
        unreadable = InputError(f"{path} cannot be read ({error.strerror}): {CURE}.")
        raise transient_error(error, path) or unreadable from None


def write_exported(folder: Path, weights: Weights, details: CardDetails | None = None) -> None:
    """Write the files of an exported folder, each atomically, and their hashes last; a card that was edited is kept.

    Args:
        folder: the folder.
        weights: the weights with the record of their training.
        details: sample images, which are in the folder, and scores for the card.

    Raises:
        InputError: the weights cannot be written, usually because the disk is full.
    """
    tensors = weights.read_all()
    with atomic_write(folder / CONFIG) as path:
        path.write_text(config_json(weights), encoding="utf-8")
    with atomic_write(folder / WEIGHTS) as path:
        try:
            # `contiguous` copies only the few tensors that are not contiguous already.
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        except SafetensorError as error:
            raise InputError(f"{folder / WEIGHTS} cannot be written ({error}): free some disk space.") from None
        shutil.copymode(folder / CONFIG, path)  # safetensors makes it readable by its owner only
    if not has_edited_card(folder):
        parameters = sum(tensor.numel() for tensor in tensors.values())
        with atomic_write(folder / CARD) as path:
            card = model_card(weights.config, weights.facts, parameters, _dtype(weights), details)
            path.write_text(card, encoding="utf-8")
    write_checksums(folder)


def has_edited_card(folder: Path) -> bool:
    """Return whether a folder contains a card that was edited, or written by an earlier version or another program."""
    card = folder / CARD
    return card.exists() and not is_unedited(read_bounded(card).decode(errors="replace"))


def contains(folder: Path, weights: Weights) -> bool:
    """Return whether an exported folder contains exactly these weights with the same record of their training."""
    saved = read_exported(folder)
    return (saved.config, saved.facts) == (weights.config, weights.facts) and all(
        stored.dtype == weights.tensors[name].dtype and torch.equal(saved.read(name), weights.read(name).cpu())
        for name, stored in saved.tensors.items()
    )


def copy_companions(source: Path, folder: Path, *, card: bool) -> None:
    """Copy the weights of the codec from one exported folder to another.

    Args:
        source: an exported folder.
        folder: the other one.
        card: whether to copy the card with its images too, unless the other folder has an edited one.
    """
    names = [CODEC, *(IMAGES if card else ()), *([CARD] if card and not has_edited_card(folder) else [])]
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    write_checksums(folder)


def config_json(weights: Weights) -> str:
    """Return the text of `config.json`, without settings of execution such as `compile`."""
    config = GPDiTConfig.preset(weights.config.size, **weights.config.architecture())
    head = {
        "format": FORMAT,
        "library_version": __version__,
        "checksums": CHECKSUMS,
        "dtype": _dtype(weights),
        "config": config.to_dict(),
    }
    return json.dumps(head | weights.facts.to_dict(), indent=2) + "\n"


def _dtype(weights: Weights) -> str:
    return str(next(iter(weights.tensors.values())).dtype).removeprefix("torch.")
