"""A chunk of videos: its truth, what the model makes of it, and what the networks see in both (GPDiT, section 5.2).

Chunks are of fixed videos, whatever the number of processes, and all that scores are made of is written to one file for
each. So a process may end anywhere, and any number of them come to the same scores.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gpdit_lightning.codecs import Codec
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.metrics import psnr, ssim
from gpdit_lightning.evaluation.networks import ImageNetwork, VideoNetwork
from gpdit_lightning.evaluation.self_checks import BLUR_LEVELS, NOISE_LEVELS, add_noise, gaussian_blur
from gpdit_lightning.evaluation.videos import Selection, read_clip
from gpdit_lightning.files import written_whole
from gpdit_lightning.generation import ClipInputs, GenerationConfig, continue_video
from gpdit_lightning.media.images import Size
from gpdit_lightning.model import GPDiT

log = logging.getLogger(__name__)

GROUND_TRUTH, CODEC, REPEATED = "truth", "codec", "repeated"


def seed_variant(seed: int) -> str:
    """What the videos of a seed are called among the variants."""
    return f"seed {seed}"


NOISE = tuple(f"noise {level:g}" for level in NOISE_LEVELS)
BLUR = tuple(f"blur {level:g}" for level in BLUR_LEVELS)


@dataclass(frozen=True)
class EvaluationSettings:
    """What is done to every video.

    Attributes:
        context_frames, generated_frames: in pixel frames.
        stride: of the clip in its video.
        size: (height, width) in pixels.
        seeds: the continuations of every video.
        generation: how they come about.
        video_of_all: the video network sees the context too, the same in truth and result.
        self_check_videos: the first so many are distorted as well.
    """

    context_frames: int
    generated_frames: int
    stride: int
    size: Size
    seeds: tuple[int, ...]
    generation: GenerationConfig
    video_of_all: bool = True
    self_check_videos: int = 0

    @property
    def frames(self) -> int:
        """Of a clip."""
        return self.context_frames + self.generated_frames

    def clip(self, path: Path) -> Tensor:
        """The truth: the beginning of a video, uint8 (T, 3, H, W); raises as `read_clip`."""
        return read_clip(path, self.frames, self.stride, self.size)


class MetricNetworks(NamedTuple):
    """What sees the videos; None for scores that are not asked for."""

    video: VideoNetwork | None
    image: ImageNetwork | None


class Chunk(NamedTuple):
    """Videos that are evaluated side by side.

    Attributes:
        start: number of the first in the selection.
        names, paths: of the selection.
    """

    start: int
    names: tuple[str, ...]
    paths: tuple[Path, ...]


def split_into_chunks(selection: Selection, size: int) -> list[Chunk]:
    """The selection in chunks of `size` videos, the last one of what is left."""
    return [
        Chunk(start, selection.names[start : start + size], selection.paths[start : start + size])
        for start in range(0, len(selection.names), size)
    ]


def evaluate_chunk(
    chunk: Chunk,
    task: EvaluationSettings,
    model: GPDiT,
    codec: Codec,
    networks: MetricNetworks,
    keep: Callable[[str, Sequence[str], Tensor], None] = lambda subject, names, videos: None,
) -> tuple[list[str], dict[str, Tensor]]:
    """All that scores are made of.

    Args:
        chunk: whose videos.
        task: what is done to them.
        model: in evaluation mode.
        codec: the model's.
        networks: that look.
        keep: is shown every subject's name, the names of its videos and these, uint8 (B, T, 3, H, W).

    Returns:
        The names of the videos that could be read, and, by "SUBJECT/WHAT", what was found in
        them: see :func:`compute_measurements`.

    Raises:
        InputError: a video is not there any more, or as :func:`continue_video` and the networks.
    """
    read: dict[str, Tensor] = {}
    for name, path in zip(chunk.names, chunk.paths, strict=True):
        try:
            read[name] = task.clip(path)
        except InputError as error:
            # Where a header promised more than there is, the video is lost, and the report says so; a folder that went
            # away must not lose all that is left.
            if not path.is_file():
                raise
            log.warning("left out: %s", error)
    names, found = list(read), {}
    if names:
        truth = torch.stack(list(read.values()))
        for subject, videos in video_variants(chunk.start, names, truth, task, model, codec):
            keep(subject, names, videos)
            for what, values in compute_measurements(videos, truth[: len(videos)], task, networks).items():
                found[f"{subject}/{what}"] = values
    return names, found


def video_variants(
    start: int, names: Sequence[str], truth: Tensor, task: EvaluationSettings, model: GPDiT, codec: Codec
) -> Iterator[tuple[str, Tensor]]:
    """The truth, what bounds a model from above and below, its continuations, and the distorted truth."""
    context = truth[:, : task.context_frames]
    yield GROUND_TRUTH, truth
    # The codec wants 1 + 4k frames: fill up with the last one, and drop what came of it.
    surplus = -(truth.shape[1] - 1) % codec.temporal_factor
    padded = torch.cat((truth, truth[:, -1:].expand(-1, surplus, -1, -1, -1)), dim=1)
    decoded = codec.decode(codec.encode(padded)).cpu()
    yield CODEC, torch.cat((context, decoded[:, task.context_frames : truth.shape[1]]), dim=1)
    yield REPEATED, torch.cat((context, context[:, -1:].expand(-1, task.generated_frames, -1, -1, -1)), dim=1)
    for seed in task.seeds:
        seeds = [noise_seed(name, seed) for name in names]
        yield (
            seed_variant(seed),
            continue_video(model, codec, context, task.generated_frames, task.generation, ClipInputs(seeds)).pixels,
        )
    checked = truth[: max(0, task.self_check_videos - start)]
    if len(checked):
        seeds = [noise_seed(name, 0) for name in names[: len(checked)]]
        for subject, deviation in zip(NOISE, NOISE_LEVELS, strict=True):
            yield subject, add_noise(checked, deviation, seeds)
        for subject, sigma in zip(BLUR, BLUR_LEVELS, strict=True):
            yield subject, gaussian_blur(checked, sigma)


def noise_seed(name: str, seed: int) -> int:
    """The noise of a video depends on its name and the seed alone."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4])


@torch.inference_mode()
def compute_measurements(
    videos: Tensor, truth: Tensor, task: EvaluationSettings, networks: MetricNetworks
) -> dict[str, Tensor]:
    """What the networks see in videos, and how far these are from the truth.

    Args:
        videos, truth: uint8 (B, T, 3, H, W).
        task: which frames are generated.
        networks: that look.

    Returns:
        `video` (B, n); of the T' generated frames alone `image` (B, T', n), `classes` (B, T', k), `psnr` and `ssim`
        (B,); float32, on the CPU, without what there is no network for.
    """
    generated, true = (clip[:, task.context_frames :] for clip in (videos, truth))
    found = {"psnr": psnr(generated, true), "ssim": ssim(generated, true)}
    if networks.video is not None:
        found["video"] = networks.video(videos if task.video_of_all else generated)
    if networks.image is not None:
        features, probabilities = networks.image.features_and_probabilities(generated.flatten(0, 1))
        found["image"] = features.unflatten(0, generated.shape[:2])
        if probabilities is not None:
            found["classes"] = probabilities.unflatten(0, generated.shape[:2])
    return {name: values.float().cpu().contiguous() for name, values in found.items()}


def write_chunk(path: Path, names: Sequence[str], found: dict[str, Tensor], made_by: Mapping[str, Any]) -> None:
    """Write what :func:`evaluate_chunk` found, and by which settings (JSON values), whole or not at all."""
    with written_whole(path) as temporary:
        save_file(found, temporary, metadata={"names": json.dumps(list(names)), "made_by": json.dumps(made_by)})


def differences(ours: Any, theirs: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """What differs between two JSON values: the name of each part, as "guidance.context", with both values."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for part in {**ours, **theirs}:
            yield from differences(ours.get(part), theirs.get(part), f"{name}.{part}" if name else part)
    elif ours != theirs:
        yield name, ours, theirs


class ChunkFiles:
    """What was found in all chunks, read one chunk at a time, in their order.

    Args:
        paths: of the files.
        made_by: the settings that all of them must be of.

    Attributes:
        names: of the videos that could be read.

    Raises:
        InputError: a file that cannot be read, or of other settings.
    """

    def __init__(self, paths: Sequence[Path], made_by: Mapping[str, Any]) -> None:
        self.paths = paths
        self.names: list[str] = []
        self.keys: set[str] = set()
        wanted = json.loads(json.dumps(made_by))
        for path in paths:
            try:
                with safe_open(path, "pt") as file:
                    names, there = (json.loads(file.metadata()[name]) for name in ("names", "made_by"))
                    self.keys |= set(file.keys())
            except (SafetensorError, KeyError, TypeError) as error:
                raise InputError(f"{path} is damaged ({error}): delete it and run the same command again.") from None
            self.names += names
            for name, ours, theirs in differences(wanted, there):
                raise InputError(
                    f"{path} is of an evaluation with another {name} ({theirs}, not {ours}): give another --out, or "
                    "remove that folder."
                )

    def values(self, subject: str, what: str, place: int | None = None, as_of: str | None = None) -> Iterator[Tensor]:
        """What was found in a subject, chunk by chunk; nothing where nothing was.

        Args:
            subject: such as "truth".
            what: such as "video".
            place: of all generated frames only this one.
            as_of: of all videos only those that this other subject was made of.
        """
        wanted, other = f"{subject}/{what}", f"{as_of or subject}/{what}"
        for path in self.paths:
            with safe_open(path, "pt") as file:
                if {wanted, other} <= set(file.keys()):
                    length, values = file.get_slice(other).get_shape()[0], file.get_slice(wanted)
                    yield values[:length] if place is None else values[:length, place]

    def has(self, subject: str, what: str) -> bool:
        """Whether anything was found."""
        return f"{subject}/{what}" in self.keys
