"""Features of videos in the layout that Video-ChatGPT trains on, as files and a data set (GPDiT, section A.2).

Video-ChatGPT (Maaz et al., `scripts/save_spatio_temporal_clip_features.py`) keeps one array for each video: temporal
tokens, each the mean over the places of a frame, with zeros for the frames that a short video lacks; behind them
spatial tokens, each the mean over the frames at a place. Its own, of CLIP, are float16 (100 + 256, 1024), pickled as
VIDEO_ID.pkl. Here a folder holds

    features.json    a `FeatureRecord`: which model made them, and how
    NAME.npy         for each video float16 (temporal tokens + N, D); or NAME.pkl, which Video-ChatGPT reads unchanged
"""

import dataclasses
import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from gpdit_lightning.errors import InputError
from gpdit_lightning.files import written_whole
from gpdit_lightning.media.video import natural_sort_key

RECORD = "features.json"
ENDINGS = {"npy": ".npy", "pickle": ".pkl"}  # by format


def spatio_temporal(features: Tensor, temporal_tokens: int = 0) -> Tensor:
    """Means over the places of each frame and, behind them, over the frames at each place.

    Args:
        features: (..., F, N, D).
        temporal_tokens: zeros follow the F means over places up to so many tokens; 0: none do.

    Returns:
        float32 (..., temporal tokens + N, D).

    Raises:
        InputError: more frames than temporal tokens.
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
    """What all features of a folder share, as `features.json` says it."""

    format: str
    """npy or pickle."""
    layer: int
    """After which block of the model they were taken, 1-based."""
    width: int
    """D."""
    temporal_tokens: int
    """Means over places, with the zeros behind them."""
    spatial_tokens: int
    """N, the means over frames."""
    frames: int
    """Pixel frames of the clip that the model saw of each video."""
    stride: int
    """Frames of the video from one of the clip to the next; 0: spread evenly over the whole video."""
    size: str
    """HEIGHTxWIDTH in pixels."""
    precision: str
    """Of products: 32 or bf16."""
    codec: str
    """Name and fingerprint of the codec."""
    weights: str
    """Averaged (ema) or last trained (raw) weights."""
    step: int
    """Optimizer steps that they were trained for."""
    fingerprint: str
    """16 hexadecimal digits that change with the weights of the layers that were run."""
    architecture: dict[str, Any]
    """`GPDiTConfig.architecture()` of these layers."""

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The record of a folder.

        Raises:
            InputError: it is missing, or not what it ought to be.
        """
        path = Path(folder) / RECORD
        again = "write the features again, or copy all of their folder"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path} does not exist: {again}.") from None
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} is no readable JSON ({error}): {again}.") from None
        kinds = {field.name: dict if field.name == "architecture" else field.type for field in dataclasses.fields(cls)}
        if not isinstance(content, dict) or {name: type(value) for name, value in content.items()} != kinds:
            raise InputError(f"{path} does not hold the fields of a record of features: {again}.")
        if content["format"] not in ENDINGS:
            raise InputError(f"{path} has format {content['format']!r}, not {' or '.join(ENDINGS)}: {again}.")
        return cls(**content)

    def save(self, folder: str | Path) -> None:
        """Write `features.json`."""
        with written_whole(Path(folder) / RECORD) as path:
            path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def check(self, expected: Mapping[str, Any], folder: str | Path) -> None:
        """Raise `InputError`, naming the first field that differs, unless it says what is expected of it."""
        known = asdict(self)
        for name, value in expected.items():
            if name not in known:
                raise InputError(f"A record of features has no field {name!r}: it has {', '.join(known)}.")
            if known[name] != value:
                raise InputError(
                    f"{Path(folder) / RECORD} says {name} {known[name]!r} where {value!r} is asked for: those are "
                    "other features, so take another folder."
                )

    @property
    def shape(self) -> tuple[int, int]:
        """(temporal tokens + N, D) of each file."""
        return self.temporal_tokens + self.spatial_tokens, self.width

    def path_of(self, folder: str | Path, name: str) -> Path:
        """The file of a video; a name may lead into folders, as `jump/v_1`."""
        return Path(folder) / f"{name}{ENDINGS[self.format]}"


class PortablePickler(pickle.Pickler):
    """Pickles arrays so that every numpy reads them.

    By themselves those of numpy 2 name `numpy._core`, which the numpy 1.24 that Video-ChatGPT asks for does not have.
    """

    def reducer_override(self, value: Any) -> Any:
        """An array as what `numpy.ndarray` is called with."""
        if isinstance(value, np.ndarray):
            return np.ndarray, (value.shape, value.dtype.str, bytearray(value.tobytes()))
        return NotImplemented


def write_features(path: Path, features: Tensor, record: FeatureRecord) -> None:
    """Write a video's features as float16, whole or not at all.

    Args:
        path: as `record.path_of` gives it.
        features: (temporal tokens + N, D).
        record: of their folder.

    Raises:
        InputError: another shape, or values that float16 cannot hold.
    """
    values = features.detach().to("cpu", torch.float16).numpy()
    if values.shape != record.shape:
        raise InputError(f"The features for {path} are {values.shape} where {RECORD} says {record.shape}: mend one.")
    if not np.isfinite(values).all():
        raise InputError(f"The features for {path} are beyond what float16 holds: take another layer.")
    with written_whole(path) as partial, partial.open("wb") as file:
        if record.format == "pickle":
            PortablePickler(file).dump(values)
        else:
            np.save(file, values, allow_pickle=False)


def read_features(path: Path, shape: tuple[int, int]) -> Tensor:
    """A file's features, float16 (temporal tokens + N, D); nothing is unpickled.

    Args:
        path: of a `.npy` file.
        shape: that it must have, as `FeatureRecord.shape`.

    Raises:
        InputError: missing, damaged, or of another shape or type.
    """
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: write the features of its video, or leave it out.") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} is no whole .npy file ({error}): remove it and write it again.") from None
    if not isinstance(values, np.ndarray) or (values.shape, values.dtype) != (shape, np.float16):
        found = f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else "several arrays"
        raise InputError(f"{path} holds {found} where float16 {shape} belongs: remove it and write it again.")
    return torch.from_numpy(np.array(values))


class VideoFeatures(Dataset[Tensor]):
    """The features in a folder that `python -m gpdit_lightning features` wrote.

    `features["v_1"]`, by the name of a video without its ending, or `features[0]` in the order of `names`: float16
    (temporal tokens + N, D).

    Args:
        folder: with its `features.json`.
        expected: what its record must say, such as `layer=18` or `fingerprint="0123456789abcdef"`.

    Attributes:
        record: what all of them share.
        names: of the videos, in natural order.

    Raises:
        InputError: no such folder, features of another model, pickled ones, or none.
    """

    def __init__(self, folder: str | Path, **expected: Any) -> None:
        self.folder = Path(folder)
        self.record = FeatureRecord.load(folder)
        self.record.check(expected, folder)
        if self.record.format != "npy":
            raise InputError(
                f"{folder} holds pickled features, which are not opened here: write them with --format npy."
            )
        files = sorted(self.folder.rglob("*.npy"), key=lambda path: (path.parent, natural_sort_key(path)))
        self.names = [path.relative_to(folder).as_posix().removesuffix(".npy") for path in files]
        if not files:
            raise InputError(f"{folder} holds no features yet: run `python -m gpdit_lightning features` again.")

    def __len__(self) -> int:
        """How many videos there are."""
        return len(self.names)

    def __getitem__(self, video: int | str) -> Tensor:
        """The features of a video by its number or name; `InputError` where they are not to be had."""
        name = self.names[video] if isinstance(video, int) else video
        return read_features(self.record.path_of(self.folder, name), self.record.shape)
