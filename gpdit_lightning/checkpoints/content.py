"""The content of a training checkpoint: its files, read without unpickling objects and without mapping them to memory.

Only tensors and plain values are unpickled. `torch.load` returns the tensors without their data (`map_location="meta"`)
and with their places in the file, from which they are read when they are needed, so that a few facts of a checkpoint
cost no memory. Tensors that were saved without data are in parts (parts.py).
"""

import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from gpdit_lightning.checkpoints.marks import AVERAGE, TRAINING, step_of
from gpdit_lightning.checkpoints.parts import places, read_parts
from gpdit_lightning.errors import InputError
from gpdit_lightning.regular_files import Identity, identity_of, open_regular
from gpdit_lightning.retries import retried, transient_error
from gpdit_lightning.schema import COUNT, LIST, OBJECT, TEXT, check, shown
from gpdit_lightning.tensor_files import (
    SlicedTensor,
    StoredTensor,
    TensorOnDisk,
    check_finite,
    row_major_strides,
    safetensors_header,
    size_text,
)

CURE = "use another checkpoint of the run"
MAX_PICKLE_BYTES = 2**28  # of the part of a checkpoint that has no tensors
REQUIRED = ("state_dict", "gpdit", "LatentDataModule")
# What Lightning and the stage restore, besides the weights.
RESUMABLE = {
    "loops": {"fit_loop": OBJECT},
    "callbacks": OBJECT,
    "lr_schedulers": LIST,
    "LatentDataModule": {"order": OBJECT},
}
# The bulk of a checkpoint, whose tensors may be left in the file.
STATE = ("state_dict", "optimizer_states")


@retried
def read_content(folder: Path, lazily: bool = False) -> dict[str, Any]:
    """Read a checkpoint; objects other than tensors and plain values are refused.

    Args:
        folder: folder of the checkpoint.
        lazily: whether weights, average and optimizer state are `TensorOnDisk` instead of tensors in host memory.

    Raises:
        InputError: a file is missing, truncated, of another type or of another step, or weights are not finite.
        TransientError: three attempts to read a file failed for a reason other than its content.
    """
    path = folder / TRAINING
    content = _unpickle(path)
    if isinstance(content, dict):
        _find_slices(content, folder)
    _refuse_without_data(content, path)
    if not isinstance(content, dict) or not all(isinstance(content.get(name), dict) for name in REQUIRED):
        raise InputError(f"{path} is not a checkpoint of gpdit_lightning: give one that `fit` wrote.")
    check(content, {"global_step": COUNT, "gpdit": {"stage": TEXT}}, "", str(folder), CURE)
    step = step_of(folder)
    if step is not None and content["global_step"] != step:
        raise InputError(f"{path} is of step {content['global_step']}, not of step {step}: {CURE}.")
    if not all(isinstance(name, str) for name in content["state_dict"]):
        raise InputError(f"{folder} has weights without names: {CURE}.")
    average = _average_of(folder, content)
    for name, value in content.items():
        if name not in STATE or not lazily:
            content[name] = _read_tensors(value)
    if average is not None:
        content["ema"]["weights"] = average if lazily else _read_tensors(average)
    if not lazily:
        _check_all_finite(content, folder)
    return content


def read_resumable(folder: Path, lazily: bool = False) -> dict[str, Any]:
    """Read a checkpoint from which a run resumes; arguments and errors as of `read_content`.

    Raises:
        InputError: also if the checkpoint lacks a state that a run restores.
    """
    content = read_content(folder, lazily)
    return cast("dict[str, Any]", check(content, RESUMABLE, "", str(folder), CURE))


def _find_slices(content: dict[str, Any], folder: Path) -> None:
    """Replace the tensors without data in the content of a checkpoint by those of its parts.

    Raises:
        InputError: parts are missing or damaged, or do not have each element of a tensor once.
    """
    slices = read_parts(folder, CURE)
    for place in places(content):
        tensor = place.value
        if not isinstance(tensor, Tensor):
            continue
        shape = tuple(tensor.shape)
        stored = SlicedTensor(tensor.dtype, shape, tuple(slices.pop(place.name, ())))
        if tensor.stride() != row_major_strides(shape) or (reason := stored.gap()):
            reason = reason if tensor.stride() == row_major_strides(shape) else f"it has the strides {tensor.stride()}"
            raise InputError(f"{folder} lacks a part of {shown(place.name)} ({reason}): {CURE}.")
        place.container[place.key] = stored
    if slices:
        raise InputError(f"{folder} has parts of {shown(next(iter(slices)))}, which {TRAINING} lacks: {CURE}.")


def _refuse_without_data(content: Any, path: Path) -> None:
    """Raise `InputError` if a tensor without data is left in the content of a file."""

    def refuse(tensor: Tensor) -> None:
        raise InputError(f"{path} lacks the data of a tensor of shape {tuple(tensor.shape)}: {CURE}.")

    _replace(content, Tensor, refuse)


def _average_of(folder: Path, content: dict[str, Any]) -> dict[str, TensorOnDisk] | None:
    """Return the averaged weights of a checkpoint, which its content has no more; None if it has no average."""
    if "ema" not in content:
        return None
    check(content, {"ema": {"updates": COUNT}}, "", str(folder), CURE)
    if "weights" in content["ema"]:  # of a checkpoint in parts
        check(content, {"ema": {"weights": OBJECT}}, "", str(folder), CURE)
        average: dict[str, Any] = content["ema"].pop("weights")
    else:
        average = dict(safetensors_header(folder / AVERAGE, CURE)[0])
    trained = _number_of_trained(content)
    if trained not in (None, len(average)):
        raise InputError(f"{folder} has an average of {len(average)} weights, but {trained} were trained: {CURE}.")
    weights = content["state_dict"]
    for name, tensor in average.items():
        latest, shape = weights.get(name), getattr(tensor, "shape", None)
        is_average = isinstance(tensor, TensorOnDisk) and tensor.dtype.is_floating_point
        if not is_average or not isinstance(latest, TensorOnDisk) or latest.shape != shape:
            raise InputError(
                f"{folder} has {name} of shape {shape} in the average, which {TRAINING} does not have: {CURE}."
            )
    return average


def _number_of_trained(content: dict[str, Any]) -> int | None:
    """Return the number of parameters in the optimizer state; None if there is no such state."""
    try:
        return sum(len(group["params"]) for group in content["optimizer_states"][0]["param_groups"])
    except (KeyError, IndexError, TypeError):
        return None


def check_shapes(saved: Mapping[str, Any], ours: Mapping[str, Tensor]) -> None:
    """Raise `InputError`, with the first name that differs, unless weights of a checkpoint have the model's shapes."""
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in saved.items()}
    for name in (*ours, *saved):
        expected = tuple(ours[name].shape) if name in ours else "nothing"
        if shapes.get(name, "nothing") != expected or not hasattr(saved[name], "shape"):
            raise InputError(
                f"the checkpoint has shape {shapes.get(name, 'nothing')} as {name}, but the model has {expected}: "
                f"{CURE}."
            )


def _check_all_finite(content: dict[str, Any], folder: Path) -> None:
    """Raise `InputError` if weights, average or optimizer state have numbers that are not finite."""
    cure = f"{CURE} (remove {folder.name}, and the same command resumes from the one before)"
    check_finite(content["state_dict"], str(folder / TRAINING), cure)
    if "ema" in content:
        check_finite(content["ema"]["weights"], str(folder / AVERAGE), cure)
    states = content.get("optimizer_states")
    for optimizer in states if isinstance(states, list) else ():
        moments = optimizer.get("state") if isinstance(optimizer, dict) else None
        for number, values in moments.items() if isinstance(moments, dict) else ():
            if isinstance(values, dict):
                named = {f"the optimizer state {name} of parameter {number}": value for name, value in values.items()}
                check_finite(named, str(folder / TRAINING), cure)


def _unpickle(path: Path) -> Any:
    """Return the content of a file of `torch.save`, with a `StoredTensor` for each tensor that has data."""
    try:
        identity, records = _records(path)
        content = torch.load(path, map_location="meta", weights_only=True)
        return _replace(content, Tensor, lambda tensor: _stored(tensor, path, identity, records))
    except InputError:
        raise
    except (EOFError, OSError, zipfile.BadZipFile) as error:
        damaged = InputError(f"{path} is not a complete checkpoint ({_reason(error)}): {CURE}.")
        raise transient_error(error, f"{path} ({size_text(path)})") or damaged from None
    except Exception as error:  # a damaged pickle may raise anything
        known = transient_error(error, f"{path} ({size_text(path)})")
        raise known or InputError(f"{path} cannot be read as a checkpoint ({_reason(error)}): {CURE}.") from None


def _reason(error: Exception) -> str:
    """Return the reason of an error in a few words.

    The advice of torch to load files without a restriction to plain values is left out: it would run their code.
    """
    if isinstance(error, pickle.UnpicklingError):
        named = re.search(r"GLOBAL (\S+)", str(error))
        return f"it contains objects other than tensors and plain values{f', such as {named[1]}' if named else ''}"
    text = next(iter(str(error).splitlines()), "")
    return "it is damaged" if not text or "weights_only" in text else text


def _records(path: Path) -> tuple[Identity, dict[int, int]]:
    """Check the archive of a checkpoint; return its identity, and the sizes of its records by their offsets.

    Raises:
        EOFError: the file is truncated, or of another type.
        InputError: a record is compressed, or the part without tensors is too large.
        OSError: the file cannot be read.
    """
    records = {}
    with open_regular(path) as file:
        identity = identity_of(os.fstat(file.fileno()))
        file.read(1)  # an error of the disk is raised here, which is_zipfile would ignore
        if not zipfile.is_zipfile(file):
            raise EOFError("truncated, or of another type")
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                    raise InputError(f"{path} has compressed parts, which torch does not write: {CURE}.")
                if "/data/" not in record.filename and record.file_size > MAX_PICKLE_BYTES:
                    raise InputError(
                        f"{path} has {record.file_size} bytes besides its tensors, more than {MAX_PICKLE_BYTES}: "
                        f"{CURE}."
                    )
                # A local header has 30 bytes, of which the last four are the lengths of the name and of the rest.
                file.seek(record.header_offset + 26)
                lengths = file.read(4)
                name, rest = lengths[:2], lengths[2:]
                start = record.header_offset + 30 + int.from_bytes(name, "little") + int.from_bytes(rest, "little")
                records[start] = record.file_size
    return identity, records


def _stored(tensor: Tensor, path: Path, identity: Identity, records: dict[int, int]) -> StoredTensor | Tensor:
    """Return the place of a tensor in the file, or the tensor itself if it was saved without data.

    Raises:
        InputError: it is not the place of a record of its size, or the tensor has elements beyond it.
    """
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise InputError(f"{path} has a tensor that is sparse or quantized: {CURE}.")
    storage = tensor.untyped_storage()
    offset, size = getattr(storage, "_checkpoint_offset", None), storage.nbytes()
    if offset is None:
        return tensor
    if size > 0 and records.get(offset) != size:
        raise InputError(f"{path} lacks {size} bytes of a tensor of shape {tuple(tensor.shape)}: {CURE}.")
    shape, first = tuple(tensor.shape), int(tensor.storage_offset())
    stored = StoredTensor(path, identity, offset, size, tensor.dtype, shape, tensor.stride(), first)
    stored.check_bounds()
    return stored


def _read_tensors(value: Any) -> Any:
    """Replace every `TensorOnDisk` in nested containers by a tensor in host memory."""
    return _replace(value, TensorOnDisk, lambda tensor: tensor.read())


def _replace(value: Any, kind: type, replace: Callable[[Any], Any]) -> Any:
    """Replace values of a type in nested dicts and lists, which are changed, and in tuples, which are made anew.

    A container that is in several places is visited once, since references could make a small file enormous.
    """
    visited: dict[int, Any] = {}

    def replaced(inner: Any) -> Any:
        if isinstance(inner, kind):
            return replace(inner)
        if isinstance(inner, tuple) and id(inner) not in visited:
            visited[id(inner)] = inner, tuple(map(replaced, inner))  # with the tuple, so that its id stays in use
        elif isinstance(inner, dict | list) and id(inner) not in visited:
            visited[id(inner)] = inner, inner
            stack.append(inner)
        return visited[id(inner)][1] if id(inner) in visited else inner

    stack: list[Any] = []
    result = replaced(value)
    while stack:
        container = stack.pop()
        for key, inner in list(container.items() if isinstance(container, dict) else enumerate(container)):
            container[key] = replaced(inner)
    return result
