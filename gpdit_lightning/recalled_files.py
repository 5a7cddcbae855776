"""Files of results that can be computed again: written with a checksum, and left out if they are damaged."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from gpdit_lightning.errors import InputError, TransientError
from gpdit_lightning.regular_files import check_regular
from gpdit_lightning.tensor_files import safetensors_header

log = logging.getLogger(__name__)

T = TypeVar("T")
CHECKSUM = "sha256"  # key of the metadata


def save_with_checksum(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], place: Path | None = None
) -> None:
    """Write a safetensors file with a checksum of its tensors and its metadata, for :func:`read_with_checksum`.

    Args:
        path: the file, which may be a temporary one.
        tensors, metadata: its content.
        place: the file's final path, of one of several similar files in a folder: the checksum then covers its name and
            that of its folder, so that copies with another name are found.
    """
    save_file(dict(tensors), path, {**metadata, CHECKSUM: _content_sha256(tensors, metadata, place)})


def read_with_checksum(
    path: Path, keys: Sequence[str], cure: str, optional: bool = False, has_place: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file of :func:`save_with_checksum` into host memory, and compare its content with its checksum.

    Args:
        path: the file.
        keys: of its metadata.
        cure: what the user should do about a damaged file, for messages.
        optional: whether the checksum may be missing, as in a file of an earlier version.
        has_place: whether it was written with a `place`, which has to be `path`.

    Returns:
        the tensors by name, and the metadata.

    Raises:
        InputError: as :func:`safetensors_header`; or the metadata have other keys, or the checksum differs.
        TransientError: it could not be read for a reason other than its content.
    """
    stored, metadata = safetensors_header(path, cure)
    checksum = metadata.pop(CHECKSUM, None)
    if metadata.keys() != set(keys) or (checksum is None and not optional):
        wanted = ", ".join([*keys, *([] if optional else [CHECKSUM])])
        raise InputError(f"{path} is damaged, or of another version (its metadata are not {wanted}): {cure}.")
    tensors = {name: tensor.read() for name, tensor in stored.items()}
    if checksum is not None and checksum != _content_sha256(tensors, metadata, path if has_place else None):
        kind = "damaged, or of another place" if has_place else "damaged"
        raise InputError(f"{path} is {kind} (its content is not that of its checksum): {cure}.")
    return tensors, metadata


def recalled(path: Path, read: Callable[[Path], T]) -> T | None:
    """Return what `read` returns of a file that can be computed again; None if it is missing, or damaged (a warning).

    Raises:
        InputError: it is not a regular file.
        TransientError: it could not be read for a reason other than its content.
    """
    try:
        check_regular(path)
        return read(path)
    except FileNotFoundError:
        return None
    except TransientError:
        raise
    except InputError as error:
        if not path.is_file():
            raise
        log.warning("%s", error)
        return None


def _content_sha256(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], place: Path | None) -> str:
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    if place is not None:
        digest.update(json.dumps(place.absolute().parts[-2:]).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
