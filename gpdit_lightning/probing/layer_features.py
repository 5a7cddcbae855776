"""Features of every layer of a model for linear probing (GPDiT, section 5.3).

Shapes: n videos, L layers (layer 0 is the patch embedding, so there are L + 1 features), D hidden width.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from gpdit_lightning.codecs import Codec
from gpdit_lightning.codecs.base import fingerprint_of
from gpdit_lightning.errors import InputError, TransientError
from gpdit_lightning.evaluation.videos import read_clip
from gpdit_lightning.files import atomic_write
from gpdit_lightning.hashes import content_identity
from gpdit_lightning.media.images import Size
from gpdit_lightning.model import GPDiT
from gpdit_lightning.progress import progress_bar
from gpdit_lightning.recalled_files import read_with_checksum, recalled, save_with_checksum
from gpdit_lightning.schema import COUNT, LIST, Constraint, check, parse_json
from gpdit_lightning.tensor_files import check_finite, is_finite

log = logging.getLogger(__name__)

COMPUTED_AGAIN = "it is computed again"
VIDEOS_PER_FILE = 64  # videos per file of the cache; a stopped run repeats at most one file

INDEX = Constraint(
    "indices of videos",
    lambda value: isinstance(value, list) and all(type(item) is int and 0 <= item < VIDEOS_PER_FILE for item in value),
)
NOTES = {"places": INDEX, "squeezed": COUNT, "faults": LIST}


class LayerFeatures(NamedTuple):
    """Features of every layer for the videos that could be read.

    Attributes:
        features: float32 (n, L + 1, D).
        paths: of the n videos, in the given order.
        num_resampled: number of videos that were too short for the stride and were sampled more densely.
    """

    features: NDArray[np.float32]
    paths: list[Path]
    num_resampled: int


def extract_layer_features(
    model: GPDiT,
    codec: Codec,
    videos: Sequence[Path],
    size: Size,
    *,
    frames: int = 13,
    stride: int = 3,
    batch_size: int = 8,
    workers: int = 2,
    cache: Path | None = None,
    progress: bool = False,
    fps: float | None = None,
) -> LayerFeatures:
    """Compute the features of every layer in one pass (GPDiT, section 5.3).

    Features are those of the clean stream only, at theta = 0, averaged over latent frames and tokens. A clip is the
    middle of its video; the frames are spaced evenly over the whole video if it is too short for the stride.

    Args:
        model: in evaluation mode.
        codec: of the model.
        videos: paths. A video that cannot be read is left out, and a warning names it.
        size: (height, width) in pixels, to which frames are scaled and cropped.
        frames: number of pixel frames of a clip, which the codec must accept.
        stride: video frames from one frame of a clip to the next.
        batch_size: clips per pass.
        workers: threads that read videos.
        cache: folder for the features, from which a stopped run resumes.
        progress: show a progress bar over videos.
        fps: frames per second to which videos are resampled; see :func:`gpdit_lightning.evaluation.videos.read_clip`.

    Raises:
        InputError: codec or model do not accept `frames` or `size`, no video can be read, or features are not finite.
    """
    codec.latent_frames(frames)
    codec.check_frame_size(*size)
    # The name of a file in the cache is a hash of everything that its content depends on.
    weights = fingerprint_of(model.state_dict()) if cache else None
    settings: list[Any] = [model.config.architecture(), weights, codec.fingerprint, frames, stride, size]
    settings += [] if fps is None else [fps]
    read = partial(_read, frames=frames, stride=stride, size=size, fps=fps)
    blocks: list[_FeatureBlock] = []
    with (
        ThreadPoolExecutor(workers) as readers,
        progress_bar(total=len(videos), desc="features", unit=" videos", disable=not progress) as bar,
    ):
        for start in range(0, len(videos), VIDEOS_PER_FILE):
            paths = videos[start : start + VIDEOS_PER_FILE]
            file = cache and cache / f"{_hash([settings, [_identity(path) for path in paths]])}.safetensors"
            known = _FeatureBlock.recall(file, (model.config.layers + 1, model.config.width)) if file else None
            if known:
                block = known
                bar.update(len(paths))
            else:
                block = _FeatureBlock.compute(model, codec, readers.map(read, paths), batch_size, bar)
                if not is_finite(block.features):
                    raise InputError(
                        "features are not finite, because of the weights of the model: use another checkpoint."
                    )
                if file:
                    block.save(file)
            for error in block.errors:
                log.warning("warning: left out: %s", error)
            blocks.append(block)
    readable = [
        videos[VIDEOS_PER_FILE * number + index] for number, block in enumerate(blocks) for index in block.indices
    ]
    if not readable:
        raise InputError(f"none of the {len(videos)} videos can be read: give others.")
    features = torch.cat([block.features for block in blocks]).numpy()
    return LayerFeatures(features, readable, sum(block.num_resampled for block in blocks))


class _Clip(NamedTuple):
    """A clip, uint8 (T, 3, H, W), or the reason why it could not be read."""

    pixels: Tensor | None
    is_resampled: bool = False
    error: str = ""


class _FeatureBlock(NamedTuple):
    """The results of at most `VIDEOS_PER_FILE` successive videos, stored as one file of the cache.

    Attributes:
        features: float32 (n, L + 1, D) of the n readable videos.
        indices: of the readable videos among the successive videos.
        num_resampled: as in `LayerFeatures`.
        errors: one message per unreadable video.
    """

    features: Tensor
    indices: list[int]
    num_resampled: int
    errors: list[str]

    @classmethod
    def compute(cls, model: GPDiT, codec: Codec, clips: Iterable[_Clip], batch_size: int, bar: "tqdm[_Clip]") -> Self:
        """Compute the results of clips."""
        features = [torch.empty(0, model.config.layers + 1, model.config.width)]
        indices, num_resampled, errors = [], 0, []
        numbered = enumerate(clips)
        while batch := list(islice(numbered, batch_size)):
            pixels = [clip.pixels for _, clip in batch if clip.pixels is not None]
            if pixels:
                features.append(_mean_features(model, codec, torch.stack(pixels)))
            indices += [index for index, clip in batch if clip.pixels is not None]
            num_resampled += sum(clip.is_resampled for _, clip in batch)
            errors += [clip.error for _, clip in batch if clip.error]
            bar.update(len(batch))
        return cls(torch.cat(features), indices, num_resampled, errors)

    @classmethod
    def recall(cls, path: Path, shape: tuple[int, int]) -> Self | None:
        """Read a file that :meth:`save` wrote, with features of a shape (L + 1, D) of each video.

        Returns:
            The results; None if there is no file, or, after a warning, if it is damaged.

        Raises:
            InputError: it is not a regular file.
            TransientError: it cannot be read for a reason other than its content.
        """
        return recalled(path, partial(cls._load, shape=shape))

    @classmethod
    def _load(cls, path: Path, shape: tuple[int, int]) -> Self:
        tensors, metadata = read_with_checksum(path, ("notes",), COMPUTED_AGAIN, has_place=True)
        notes = parse_json(metadata["notes"].encode(), str(path), COMPUTED_AGAIN)
        check(notes, NOTES, "", str(path), COMPUTED_AGAIN)
        if set(tensors) != {"features"} or tensors["features"].shape != (len(notes["places"]), *shape):
            raise InputError(f"{path} has no features of {len(notes['places'])} videos: {COMPUTED_AGAIN}.")
        check_finite(tensors, str(path), COMPUTED_AGAIN)
        return cls(tensors["features"], notes["places"], notes["squeezed"], notes["faults"])

    def save(self, path: Path) -> None:
        """Write the results, atomically."""
        metadata = {"places": self.indices, "squeezed": self.num_resampled, "faults": self.errors}
        with atomic_write(path) as temporary:
            notes = {"notes": json.dumps(metadata)}
            save_with_checksum(temporary, {"features": self.features}, notes, place=path)


def _read(path: Path, frames: int, stride: int, size: Size, fps: float | None) -> _Clip:
    for resample in (False, True):
        try:
            clip = read_clip(path, frames, stride, size, centred=True, resample_short=resample, fps=fps)
            return _Clip(clip, resample)
        except TransientError:
            raise
        except InputError as error:
            message = str(error)
    return _Clip(None, error=message)


@torch.no_grad()
def _mean_features(model: GPDiT, codec: Codec, pixels: Tensor) -> Tensor:
    """Return averaged features of clips, uint8 (B, T, 3, H, W), as float32 (B, L + 1, D) on the CPU."""
    clean = codec.whitened(codec.encode(pixels).to(model.device))
    layers = model.features(clean, range(model.config.layers + 1))
    return torch.stack([layers[layer].float().mean((1, 2)) for layer in sorted(layers)], dim=1).cpu()


def _identity(path: Path) -> tuple[str, str]:
    """Return the path of a file and a hash that changes with its content, which is empty if it cannot be read.

    Raises:
        TransientError: it could not be read for a reason other than its content.
    """
    try:
        return str(path.resolve()), content_identity(path)
    except TransientError:
        raise
    except InputError:  # `_read` gives the reason
        return str(path.resolve()), ""


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
