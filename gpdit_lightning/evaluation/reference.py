"""Statistics of real images or videos, with which samples from noise alone are compared.

They are computed once and stored in a file, `reference.safetensors`, for further evaluations; or read from an .npz file
in the layout of ADM (Dhariwal and Nichol, 2021).
"""

import json
import math
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.json_records import record_from_json
from gpdit_lightning.evaluation.metrics import Moments, moments_problem
from gpdit_lightning.evaluation.network_files import NetworkRecord
from gpdit_lightning.evaluation.report import other_setting
from gpdit_lightning.evaluation.self_checks import SelfChecks
from gpdit_lightning.files import atomic_write
from gpdit_lightning.media.images import Size
from gpdit_lightning.path_kinds import Medium
from gpdit_lightning.recalled_files import read_with_checksum, save_with_checksum
from gpdit_lightning.regular_files import BoundedReader
from gpdit_lightning.retries import transient_error
from gpdit_lightning.schema import OBJECT, SIZE, check, parse_json
from gpdit_lightning.tensor_files import check_finite, npy_layout, safetensors_header

FILE = "reference.safetensors"
RECORD = "gpdit_reference"  # key of the record in the metadata of the file
ARCHIVE_ERRORS = (zipfile.BadZipFile, zlib.error)
MAX_PACKING = 1032  # of the method deflate
MAX_MANIFOLD = 10_000
"""Number of real samples for precision and recall, the first ones, as in ADM's reference batch for ImageNet."""
REMEDY = "give the reference.safetensors of an evaluation by this version, or an .npz of ADM"


@dataclass(frozen=True)
class ReferenceRecord:
    """What the statistics were computed from."""

    data: str
    """Name of the data set."""
    choice: str
    """How the real images or videos were selected, and clips from the videos."""
    names_sha256: str
    """sha256 of their names, in their order."""
    items: int
    """Number of real images or videos."""
    medium: Medium
    frames: int
    """Pixel frames of each; 1 for images."""
    size: Size
    """(height, width) in pixels."""
    stride: int
    fps: float | None
    resize: str
    """How frames were brought to that size."""
    networks: dict[str, NetworkRecord]
    """By role: video, image, classifier."""
    labels: dict[str, int] = field(default_factory=dict)
    """Number of real images or videos of each label; empty if labels are unknown."""
    codec_sha256: str | None = None
    """Fingerprint of the codec of the scores "the truth through the codec"."""
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    """Scores of real data against real data, by the names of references in reports."""
    self_checks: dict[str, SelfChecks] = field(default_factory=dict)
    """By the key of the distance in `names.SCORE_NAMES`."""


@dataclass(frozen=True)
class Reference:
    """Statistics of real images or videos.

    Attributes:
        record: what they were computed from.
        moments: mean and covariance of features, by quantity: `image` of single frames, `video` of clips.
        manifold: features (N, n) of at most `MAX_MANIFOLD` samples for precision and recall, by quantity.
    """

    record: ReferenceRecord
    moments: Mapping[str, Moments]
    manifold: Mapping[str, Tensor]

    def save(self, path: Path) -> None:
        """Write the file, atomically."""
        tensors = {f"manifold.{quantity}": features for quantity, features in self.manifold.items()}
        for quantity, moments in self.moments.items():
            tensors |= {f"mean.{quantity}": moments.mean, f"covariance.{quantity}": moments.covariance}
        samples = {quantity: moments.samples for quantity, moments in self.moments.items()}
        metadata = {RECORD: json.dumps(asdict(self.record)), "samples": json.dumps(samples)}
        with atomic_write(path) as temporary:
            on_cpu = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
            save_with_checksum(temporary, on_cpu, metadata)

    @classmethod
    def load(cls, path: Path) -> "Reference":
        """Read a file that :meth:`save` wrote.

        Raises:
            InputError: the file is missing, damaged, or another one.
        """
        if RECORD not in safetensors_header(path, REMEDY)[1]:
            raise InputError(f"{path} contains no statistics of real images or videos: {REMEDY}.")
        tensors, metadata = read_with_checksum(path, (RECORD, "samples"), REMEDY, optional=True)
        record = record_from_json(ReferenceRecord, metadata[RECORD], str(path), REMEDY)
        check_finite(tensors, str(path), REMEDY)
        counts = check(parse_json(metadata["samples"].encode(), str(path), REMEDY), OBJECT, "", str(path), REMEDY)
        moments = {}
        for quantity, samples in counts.items():
            check(samples, SIZE, f"samples.{quantity}", str(path), REMEDY)
            mean, covariance = (tensors.get(f"{name}.{quantity}") for name in ("mean", "covariance"))
            if mean is None or covariance is None:
                raise InputError(f"{path} has no mean (d,) and covariance (d, d) of {quantity}: {REMEDY}.")
            if problem := moments_problem(mean.double(), covariance.double()):
                raise InputError(f"{path} has {problem}, of {quantity}: {REMEDY}.")
            moments[quantity] = Moments(mean, covariance, samples)
        manifold = {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith("manifold.")}
        return cls(record, moments, manifold)


def manifold_of(parts: Iterable[Tensor]) -> Tensor:
    """Return the first `MAX_MANIFOLD` rows of features that are given in parts (rows, n)."""
    rows: list[Tensor] = []
    for part in parts:
        rows.append(part)
        if sum(map(len, rows)) >= MAX_MANIFOLD:
            break
    return torch.cat(rows)[:MAX_MANIFOLD].float()


@dataclass(frozen=True)
class AdmFile:
    """Content of an .npz file in the layout of ADM's reference batches.

    Attributes:
        path: of the file.
        images: uint8 (N, H, W, 3), `arr_0`; None if there are none.
        moments: of the features of Inception, `mu` and `sigma`, often those of a whole data set while the images are
            a part of it; None if there are none.
    """

    path: Path
    images: np.ndarray | None
    moments: Moments | None

    @classmethod
    def load(cls, path: Path) -> "AdmFile":
        """Read a file; pickled arrays are refused.

        Raises:
            InputError: the file is missing or damaged, or contains neither images nor moments.
        """
        try:
            with BoundedReader(path, REMEDY) as file, zipfile.ZipFile(file) as archive:
                images, mu, sigma = (_array(archive, f"{name}.npy") for name in ("arr_0", "mu", "sigma"))
        except InputError:
            raise
        except (OSError, ValueError, EOFError, RuntimeError, NotImplementedError, *ARCHIVE_ERRORS) as error:
            raise transient_error(error, path) or InputError(f"{path} cannot be read ({error}): {REMEDY}.") from None
        if images is not None and (
            images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not images.size
        ):
            found = f"{images.dtype} {images.shape}"
            raise InputError(f"{path} has arr_0 of {found}, not images uint8 (N, H, W, 3): {REMEDY}.")
        if mu is None or sigma is None:
            if images is None:
                raise InputError(f"{path} has neither arr_0 nor mu and sigma: {REMEDY}.")
            return cls(path, images, None)
        for name, array in (("mu", mu), ("sigma", sigma)):
            if array.dtype.kind != "f":
                raise InputError(f"{path} has {name} of {array.dtype}, not floating-point numbers: {REMEDY}.")
        mean, covariance = torch.from_numpy(np.float64(mu)), torch.from_numpy(np.float64(sigma))
        if problem := moments_problem(mean, covariance):
            raise InputError(f"{path} has {problem}: {REMEDY}.")
        return cls(path, images, Moments(mean, covariance))

    def clip(self, number: int) -> Tensor:
        """Return an image as a clip, uint8 (1, 3, H, W)."""
        assert self.images is not None
        return torch.from_numpy(self.images[number]).permute(2, 0, 1)[None].contiguous()


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray | None:
    """Return an array of an .npz file; None if there is none. A member unpacks to at most `MAX_PACKING` times its size.

    Raises:
        ValueError: it is no array, an array of objects, or its shape differs from its bytes.
    """
    if name not in archive.namelist():
        return None
    info = archive.getinfo(name)
    with archive.open(info) as member:
        shape, dtype, offset = npy_layout(member)
        if dtype.hasobject:
            raise ValueError(f"{name} is an array of Python objects")
        if info.file_size != offset + math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} has {info.file_size} bytes, which differs from {dtype} of shape {shape}")
        if info.file_size > MAX_PACKING * (info.compress_size + 1):
            raise ValueError(f"{name} states {info.file_size} bytes in {info.compress_size} packed ones")
    with archive.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def check_reference(
    path: Path, record: ReferenceRecord, expected: Mapping[str, Any], networks: Mapping[str, NetworkRecord]
) -> None:
    """Check that statistics are those of the clips and networks of an evaluation.

    Args:
        path: of the file, for messages.
        record: what the statistics were computed from.
        expected: fields of the record that must be equal.
        networks: of the evaluation, by their roles.

    Raises:
        InputError: a field or a network differs.
    """
    for name, wanted in expected.items():
        if getattr(record, name) != wanted:
            raise InputError(
                f"{path} has statistics with another {other_setting([(name, getattr(record, name), wanted)])} than "
                "this evaluation: change that, or give the real data instead."
            )
    for role in networks.keys() - {"classifier"}:  # real data are compared by features alone
        if record.networks.get(role) != networks[role]:
            found, given = (
                f"{network.name} ({network.sha256})" if network else "none"
                for network in (record.networks.get(role), networks[role])
            )
            raise InputError(
                f"{path} was computed with the {role} network {found}, but this evaluation has {given}: give that "
                "network, or the real data instead."
            )
