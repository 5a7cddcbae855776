"""Features of videos in the layout of Video-ChatGPT, as files and as a data set (GPDiT, section A.2).

Video-ChatGPT (Maaz et al., `scripts/save_spatio_temporal_clip_features.py`) stores one array per video: temporal
tokens, which are means over the positions of a frame, padded with zeros for short videos; then spatial tokens, which
are means over the frames at a position. Its CLIP features are float16 (100 + 256, 1024), pickled as VIDEO_ID.pkl. In
this library, a folder contains

    features.json    a `FeatureRecord`: the model and the settings of the features
    features.sha256  the sha256 of each file of features, in lines as of `sha256sum`; the last line of a name is valid
    features.sources the identity of the video of each file, in similar lines
    NAME.npy         float16 (temporal tokens + N, D), one per video; or NAME.pkl, which Video-ChatGPT reads

Shapes: F latent frames, N tokens per frame, D hidden width.
"""

import hashlib
import io
import logging
import math
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.json_records import load_record, record_to_json
from gpdit_lightning.files import atomic_write, write_once
from gpdit_lightning.media.video import natural_sort_key
from gpdit_lightning.regular_files import BoundedReader, open_regular, read_bounded, sha256_of
from gpdit_lightning.retries import transient_error
from gpdit_lightning.specs import CodecSpec
from gpdit_lightning.tensor_files import npy_layout

RECORD, CHECKSUMS, SOURCES = "features.json", "features.sha256", "features.sources"
MAX_CHECKSUM_BYTES = 2**30  # of some millions of files
SUFFIXES = {"npy": ".npy", "pickle": ".pkl"}  # by format
REMEDY = "write the features again, or copy the whole folder"

log = logging.getLogger(__name__)


def spatio_temporal(features: Tensor, temporal_tokens: int = 0) -> Tensor:
    """Return means over the positions of each frame, followed by means over the frames at each position.

    Args:
        features: (..., F, N, D).
        temporal_tokens: number of temporal tokens after padding with zeros; 0: no padding.

    Returns:
        float32 (..., temporal tokens + N, D).

    Raises:
        InputError: there are more frames than temporal tokens.
    """
    frames = features.shape[-3]
    missing = (temporal_tokens or frames) - frames
    if missing < 0:
        raise InputError(
            f"{temporal_tokens} temporal tokens are too few for {frames} latent frames: give at least {frames}, or 0."
        )
    features = features.float()
    temporal = functional.pad(features.mean(dim=-2), (0, 0, 0, missing))
    return torch.cat((temporal, features.mean(dim=-3)), dim=-2)


@dataclass(frozen=True)
class FeatureRecord:
    """Properties that all features of a folder share; the content of `features.json`."""

    format: Literal["npy", "pickle"]
    layer: int
    """Number of the block after which the features are taken, from 1."""
    width: int
    """D."""
    temporal_tokens: int
    """Number of temporal tokens, including padding."""
    spatial_tokens: int
    """Number of spatial tokens, N."""
    frames: int
    """Pixel frames of the clip of each video."""
    stride: int
    """Video frames from one frame of the clip to the next; 0: spaced evenly over the whole video."""
    size: str
    """HEIGHTxWIDTH in pixels."""
    precision: str
    """Precision of matrix products: 32 or bf16."""
    codec: CodecSpec
    weights: str
    """EMA weights (ema) or last trained weights (raw)."""
    step: int
    """Optimizer steps of the training."""
    fingerprint: str
    """Hash of the weights of the layers that were run, 16 hexadecimal digits."""
    architecture: dict[str, Any]
    """`GPDiTConfig.architecture()` of these layers."""
    fps: float | None = None
    """Frames per second to which videos were resampled before the stride; None if they were not."""

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Load the record of a folder.

        Raises:
            InputError: the file is missing, damaged, or contains no such record.
        """
        return load_record(cls, Path(folder) / RECORD, REMEDY)

    def save(self, folder: str | Path) -> None:
        """Write `features.json`, unless another process has written it meanwhile."""
        write_once(Path(folder) / RECORD, record_to_json(self))

    def check(self, expected: Mapping[str, Any], folder: str | Path, label: Callable[[str], str] = str) -> None:
        """Compare the record with expected values of some of its fields.

        Args:
            expected: values by the names of the fields.
            folder: of the record, for messages.
            label: returns the name of a field in messages.

        Raises:
            InputError: a field has another value, or does not exist.
        """
        fields, path = asdict(self), Path(folder) / RECORD
        for name, value in expected.items():
            if name not in fields:
                raise InputError(f"{RECORD} has no field {name!r}: give one of {', '.join(fields)}.")
            if isinstance(value, CodecSpec):
                self.codec.check_same(value, str(path), "the expected features", "use another folder")
            elif fields[name] != value:
                raise InputError(
                    f"{path} has {label(name)} {fields[name]!r}, but {value!r} is expected: use another folder."
                )

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the features of a video: (temporal tokens + N, D)."""
        return self.temporal_tokens + self.spatial_tokens, self.width

    def path_of(self, folder: str | Path, name: str) -> Path:
        """Return the file of a video, whose name may contain folders, such as `jump/v_1`."""
        return Path(folder) / f"{name}{SUFFIXES[self.format]}"


class FeatureDigests:
    """One hash for each file of features in a folder; a line is appended for each file that is written.

    Args:
        folder: with features.
        record: name of the file with the hashes: `CHECKSUMS` has the sha256 of the features, `SOURCES` the
            :func:`hashes.content_identity` of their video.

    Attributes:
        are_recorded: whether the folder has such a file; those of version 0.1.0 have none.

    Raises:
        InputError: the file is not a regular file, or too large.
        OSError: it cannot be read.
    """

    def __init__(self, folder: Path, record: str = CHECKSUMS) -> None:
        self.folder, self.path = folder, folder / record
        self._known = dict[bytes, bytes]()
        self.are_recorded = self.path.exists()
        for line in read_bounded(self.path, MAX_CHECKSUM_BYTES).split(b"\n") if self.are_recorded else ():
            digest, _, name = line.removeprefix(b"\\").partition(b"  ")
            self._known[name] = digest

    def get(self, path: Path) -> str | None:
        """Return the recorded hash of a file in the folder; None if there is none."""
        digest = self._known.get(self._name(path))
        return None if digest is None else digest.decode(errors="replace")

    def add(self, values: Mapping[Path, str]) -> None:
        """Record the hashes of files in the folder, after they were written, by one write.

        A file without a hash in a folder with hashes is damaged, as one that a killed process has not recorded.

        Raises:
            OSError: the folder is not writable.
        """
        lines = b""
        for path, value in values.items():
            name, digest = self._name(path), value.encode()
            self._known[name] = digest
            lines += (b"\\" if b"\\" in name else b"") + digest + b"  " + name + b"\n"
        with open_regular(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT) as file:
            # A process that was killed may have left a line without its end.
            torn = file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
            file.write((b"\n" if torn else b"") + lines)

    def _name(self, path: Path) -> bytes:
        """Return the name of a file within the folder, escaped as by `sha256sum`."""
        name = os.fsencode(path.relative_to(self.folder).as_posix())
        for character, escaped in ((b"\\", b"\\\\"), (b"\n", b"\\n"), (b"\r", b"\\r")):
            name = name.replace(character, escaped)
        return name


class PortablePickler(pickle.Pickler):
    """Pickler of arrays for every version of numpy.

    By default numpy 2 refers to `numpy._core`, which numpy 1.24, used by Video-ChatGPT, does not have.
    """

    def reducer_override(self, value: Any) -> Any:
        """Represent an array by the arguments of `numpy.ndarray`."""
        if isinstance(value, np.ndarray):
            return np.ndarray, (value.shape, value.dtype.str, bytearray(value.tobytes()))
        return NotImplemented


def write_features(path: Path, features: Tensor, record: FeatureRecord) -> None:
    """Write the features of a video as float16, atomically.

    Args:
        path: from `record.path_of`.
        features: (temporal tokens + N, D).
        record: of the folder.

    Raises:
        InputError: the features have another shape, or exceed the range of float16.
    """
    values = features.detach().to("cpu", torch.float16).numpy()
    if values.shape != record.shape:
        raise InputError(
            f"the features for {path} have shape {values.shape}, but {RECORD} states {record.shape}: correct one."
        )
    if not np.isfinite(values).all():
        raise InputError(f"the features for {path} exceed the range of float16: use another layer.")
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        if record.format == "pickle":
            PortablePickler(file).dump(values)
        else:
            np.save(file, values, allow_pickle=False)


def is_complete(path: Path, record: FeatureRecord, checksums: FeatureDigests) -> bool:
    """Return whether the features of a video are written; a warning names a file that is damaged.

    In a folder without checksums, header and size are compared; of pickled features, the least size is known.

    Args:
        path: from `record.path_of`.
        record: of the folder.
        checksums: of the folder.

    Raises:
        InputError: it is not a regular file.
        OSError: it cannot be read.
    """
    values = 2 * math.prod(record.shape)  # bytes of float16
    try:
        with BoundedReader(path, "remove it") as file:
            if record.format == "pickle":
                complete = file.size > values
            else:
                shape, dtype, offset = npy_layout(file)
                complete = (shape, dtype, file.size) == (record.shape, np.float16, offset + values)
    except FileNotFoundError:
        return False
    except InputError:
        raise
    except (ValueError, EOFError):
        complete = False
    if complete and checksums.are_recorded:
        complete = checksums.get(path) == sha256_of(path)
    if not complete:
        log.warning("%s is damaged: it is written again", path)
    return complete


def read_features(path: Path, shape: tuple[int, int], checksums: FeatureDigests | None = None) -> Tensor:
    """Read the features of a video, float16 (temporal tokens + N, D); nothing is unpickled.

    Args:
        path: a `.npy` file.
        shape: expected shape, `FeatureRecord.shape`.
        checksums: of the folder, with which the file is compared if it has any.

    Raises:
        InputError: the file is missing or damaged, or has another shape or type.
    """
    try:
        with BoundedReader(path) as file:
            found = npy_layout(file)[:2]
            if found != (shape, np.float16):
                raise InputError(
                    f"{path} contains {found[1]} {found[0]}, but float16 {shape} is expected: remove it and write it "
                    "again."
                )
            file.seek(0)
            content = file.read()
        if checksums and checksums.are_recorded and checksums.get(path) != hashlib.sha256(content).hexdigest():
            raise InputError(f"{path} is not the file whose sha256 {CHECKSUMS} has: remove it and write it again.")
        return torch.from_numpy(np.lib.format.read_array(io.BytesIO(content), allow_pickle=False))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: write the features of its video, or leave it out.") from None
    except InputError:
        raise
    except (OSError, ValueError, EOFError) as error:
        damaged = InputError(f"{path} is not a complete .npy file ({error}): remove it and write it again.")
        raise transient_error(error, path) or damaged from None


class VideoFeatures(Dataset[Tensor]):
    """Data set of the features in a folder that `python -m gpdit_lightning features` wrote.

    An item is float16 (temporal tokens + N, D). Its key is the name of a video without suffix, `features["v_1"]`, or an
    index into `names`, `features[0]`.

    Args:
        folder: contains `features.json`.
        expected: values that fields of the record must have, such as `layer=18` or `fingerprint="0123456789abcdef"`.

    Attributes:
        record: properties that all features share.
        names: of the videos, in natural order.

    Raises:
        InputError: the folder does not exist or contains no features, the features are pickled, or the record differs
            from `expected`.
    """

    def __init__(self, folder: str | Path, **expected: Any) -> None:
        self.folder = Path(folder)
        self.record = FeatureRecord.load(folder)
        self._checksums = FeatureDigests(self.folder)
        self.record.check(expected, folder)
        if self.record.format != "npy":
            raise InputError(
                f"{folder} contains pickled features, which VideoFeatures does not read: write them with --format npy."
            )
        files = sorted(self.folder.rglob("*.npy"), key=lambda path: (path.parent, natural_sort_key(path)))
        self.names = [path.relative_to(folder).as_posix().removesuffix(".npy") for path in files]
        if not files:
            raise InputError(f"{folder} contains no features yet: run `python -m gpdit_lightning features` again.")

    def __len__(self) -> int:
        """Number of videos."""
        return len(self.names)

    def __getitem__(self, video: int | str) -> Tensor:
        """Return the features of a video by index or name; raises as :func:`read_features`."""
        name = self.names[video] if isinstance(video, int) else video
        return read_features(self.record.path_of(self.folder, name), self.record.shape, self._checksums)
