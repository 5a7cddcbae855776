"""Linear probing (GPDiT, section 5.3): what a linear classifier reads out of each layer's frozen features.

Shapes: n videos, L layers and one more (0 is the patch embedding), D hidden width.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm import tqdm

from gpdit_lightning.codecs import Codec
from gpdit_lightning.codecs.base import fingerprint_of
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.videos import read_clip
from gpdit_lightning.files import written_whole
from gpdit_lightning.media.images import Size
from gpdit_lightning.model import GPDiT
from gpdit_lightning.probing.splits import LabelledVideo, check_splits

log = logging.getLogger(__name__)

# Ours, as the paper names none: the inverse strengths of the penalty among which cross-validation chooses.
C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 5
RESAMPLES = 10_000
CHUNK = 64  # videos whose features make one file: so many a killed run loses at most


class LayerFeatures(NamedTuple):
    """Features of videos.

    Attributes:
        features: float32 (n, L + 1, D).
        paths: of the n videos, in the order asked for; those that could not be read are missing.
        squeezed: how many were too short for the stride and were sampled more densely.
    """

    features: NDArray[np.float32]
    paths: list[Path]
    squeezed: int


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
) -> LayerFeatures:
    """Every layer's clean stream, averaged over latent frames and tokens, from one pass (GPDiT, section 5.3).

    A clip is the middle of its video; one that is too short for the stride is spread evenly over all of it. Nothing is
    rotated (theta = 0).

    Args:
        model: in evaluation mode.
        codec: whose latents it was trained on.
        videos: files. One that cannot be read is left out, and a warning names it.
        size: (height, width) in pixels, to which frames are scaled and cropped.
        frames: pixel frames of a clip, 1 + 4k.
        stride: between them.
        batch_size: clips that the model takes at once.
        workers: threads that read.
        cache: a folder where features stay, so that a killed run goes on and another split takes no second pass.
        progress: show a bar over videos.

    Raises:
        InputError: `frames` or `size` do not suit the codec or the model, or no video can be read.
    """
    codec.latent_frames(frames)
    codec.check_frame_size(*size)
    # The cache is asked for what it holds by all that decides it, so nothing stale is ever taken.
    weights = fingerprint_of(model.state_dict()) if cache else None
    settings = [model.config.architecture(), weights, codec.fingerprint, frames, stride, size]
    read = partial(_read, frames=frames, stride=stride, size=size)
    parts: list[_Part] = []
    with (
        ThreadPoolExecutor(workers) as readers,
        tqdm(total=len(videos), desc="features", unit=" videos", disable=not progress) as bar,
    ):
        for start in range(0, len(videos), CHUNK):
            chunk = videos[start : start + CHUNK]
            path = cache and cache / f"{_hash([settings, [_state(video) for video in chunk]])}.safetensors"
            if path and path.exists():
                part = _Part.load(path)
                bar.update(len(chunk))
            else:
                part = _Part.of(model, codec, readers.map(read, chunk), batch_size, bar)
                if path:
                    part.save(path)
            for fault in part.faults:
                log.warning("warning: left out: %s", fault)
            parts.append(part)
    paths = [videos[CHUNK * number + place] for number, part in enumerate(parts) for place in part.places]
    if not paths:
        raise InputError(f"None of the {len(videos)} videos can be read: give others.")
    return LayerFeatures(
        torch.cat([part.features for part in parts]).numpy(), paths, sum(part.squeezed for part in parts)
    )


class _Clip(NamedTuple):
    """What became of reading a video: pixels uint8 (T, 3, H, W), or why there are none."""

    pixels: Tensor | None
    squeezed: bool = False
    fault: str = ""


class _Part(NamedTuple):
    """Features of successive videos: (n, L + 1, D), the places of these n among those asked for, and the rest."""

    features: Tensor
    places: list[int]
    squeezed: int
    faults: list[str]

    @classmethod
    def of(cls, model: GPDiT, codec: Codec, clips: Iterable[_Clip], batch_size: int, bar: "tqdm[_Clip]") -> "_Part":
        rows = [torch.empty(0, model.config.layers + 1, model.config.width)]
        places, squeezed, faults = [], 0, []
        numbered = enumerate(clips)
        while batch := list(islice(numbered, batch_size)):
            pixels = [clip.pixels for _, clip in batch if clip.pixels is not None]
            if pixels:
                rows.append(_features(model, codec, torch.stack(pixels)))
            places += [place for place, clip in batch if clip.pixels is not None]
            squeezed += sum(clip.squeezed for _, clip in batch)
            faults += [clip.fault for _, clip in batch if clip.fault]
            bar.update(len(batch))
        return cls(torch.cat(rows), places, squeezed, faults)

    @classmethod
    def load(cls, path: Path) -> "_Part":
        with safe_open(path, "pt") as file:
            notes = json.loads(file.metadata()["notes"])
            return cls(file.get_tensor("features"), **notes)

    def save(self, path: Path) -> None:
        notes = {name: value for name, value in self._asdict().items() if name != "features"}
        with written_whole(path) as partial_file:
            partial_file.write_bytes(save({"features": self.features}, {"notes": json.dumps(notes)}))


def _read(path: Path, frames: int, stride: int, size: Size) -> _Clip:
    for squeezed in (False, True):
        try:
            return _Clip(read_clip(path, frames, stride, size, centred=True, resample_short=squeezed), squeezed)
        except InputError as error:
            fault = str(error)
    return _Clip(None, fault=fault)


@torch.no_grad()
def _features(model: GPDiT, codec: Codec, pixels: Tensor) -> Tensor:
    """LayerFeatures features of clips (B, T, 3, H, W): float32 (B, L + 1, D) on the CPU."""
    device = next(model.parameters()).device
    clean = codec.whitened(codec.encode(pixels).to(device))
    layers = model.features(clean, range(model.config.layers + 1))
    return torch.stack([layers[number].float().mean((1, 2)) for number in sorted(layers)], dim=1).cpu()


def _state(path: Path) -> tuple[str, int, int]:
    """By what a file is known again, if it is there."""
    if not path.exists():
        return str(path), 0, 0
    found = path.stat()
    return str(path.resolve()), found.st_size, found.st_mtime_ns


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


class Probe(NamedTuple):
    """What a trained classifier says of the test half.

    Attributes:
        predictions: a class for each video.
        C: inverse strength of the L2 penalty.
        validation: accuracy in cross-validation with it; None where C was given.
    """

    predictions: NDArray[np.str_]
    C: float
    validation: float | None


def fit_probe(
    train: NDArray[np.float32],
    labels: Sequence[str],
    groups: Sequence[str],
    test: NDArray[np.float32],
    regularisation: float | None = None,
) -> Probe:
    """Logistic regression on features that the training half's mean and deviation standardise.

    Labels of the test half are no argument, so nothing is chosen by them.

    Args:
        train: (n, D).
        labels, groups: of the n training videos.
        test: (m, D).
        regularisation: C, the inverse strength of the L2 penalty. None: the one of `C_GRID` with the highest accuracy
            in cross-validation over whole groups of the training half, standardised anew in each fold; the smaller of
            equals.

    Raises:
        InputError: a class with too few groups to choose C.
    """
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=regularisation or 1.0, max_iter=10_000))
    inputs = train.astype(np.float64)
    if regularisation is not None:
        return Probe(classifier.fit(inputs, labels).predict(test.astype(np.float64)), regularisation, None)
    counts = Counter(label for label, _ in set(zip(labels, groups, strict=True)))
    label, fewest = min(counts.items(), key=lambda item: item[1])
    if fewest < 2:
        raise InputError(
            f"Class {label!r} has one group of training videos, too few to choose the regularisation by "
            "cross-validation: give --regularisation a number."
        )
    search = GridSearchCV(
        classifier,
        {"logisticregression__C": C_GRID},
        scoring="accuracy",
        cv=StratifiedGroupKFold(min(FOLDS, fewest)),
    ).fit(inputs, labels, groups=groups)
    return Probe(
        search.predict(test.astype(np.float64)),
        search.best_params_["logisticregression__C"],
        float(search.best_score_),
    )


def confidence_interval(
    correct: Sequence[bool] | NDArray[np.bool_], groups: Sequence[str], seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of an accuracy by the bootstrap over groups: videos of one group err together.

    Args:
        correct: for each video.
        groups: for each video, of two or more.
        seed: of the resampling.

    Returns:
        the 2.5 % and 97.5 % quantiles of the accuracy over `RESAMPLES` draws of as many groups with replacement.
    """
    _, of_group = np.unique(groups, return_inverse=True)
    sizes = np.bincount(of_group)
    right = np.bincount(of_group, weights=correct)
    numbers = np.random.default_rng(seed)
    drawn = numbers.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=RESAMPLES)
    low, high = np.quantile(drawn @ right / (drawn @ sizes), [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class LayerScore:
    """The probe of one layer; 0 is the patch embedding."""

    layer: int
    accuracy: float
    """Top-1, of the test half."""
    interval: tuple[float, float]
    """95 %, over test groups."""
    C: float
    validation: float | None
    """Accuracy in cross-validation over training groups, where C was chosen by it."""


def probe_layers(
    pooled: LayerFeatures, videos: Sequence[LabelledVideo], regularisation: float | None = None, progress: bool = False
) -> list[LayerScore]:
    """Fit and test a probe on every layer.

    Args:
        pooled: features of the videos.
        videos: their classes and halves; those that `pooled` lacks are not used.
        regularisation: as for :func:`fit_probe`.
        progress: show a bar over layers.

    Raises:
        InputError: as :func:`fit_probe`, or the videos left are not enough (:func:`check_splits`).
    """
    places = {path: place for place, path in enumerate(pooled.paths)}
    videos = [video for video in videos if video.path in places]
    check_splits(videos)
    train, test = ([video for video in videos if video.split == split] for split in ("train", "test"))
    learned, asked = ([places[video.path] for video in half] for half in (train, test))
    labels, groups = [video.label for video in train], [video.group for video in train]
    truth, held_out = np.array([video.label for video in test]), [video.group for video in test]
    scores = []
    for layer in tqdm(range(pooled.features.shape[1]), desc="probes", unit=" layers", disable=not progress):
        features = pooled.features[:, layer]
        probe = fit_probe(features[learned], labels, groups, features[asked], regularisation)
        correct = probe.predictions == truth
        interval = confidence_interval(correct, held_out)
        scores.append(LayerScore(layer, float(correct.mean()), interval, probe.C, probe.validation))
    return scores
