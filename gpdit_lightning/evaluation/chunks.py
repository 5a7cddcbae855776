"""Evaluation of one chunk of videos: ground truth, continuations, features and distances (GPDiT, section 5.2).

A chunk is a fixed set of videos, independent of the number of processes, and its results are written to one file
(`chunk_files.py`). Hence a process may stop at any time, and the scores do not depend on the number of processes.

Shapes: B videos, T pixel frames of a clip, T' generated frames, n features, k classes.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gpdit_lightning.codecs import Codec
from gpdit_lightning.errors import InputError, TransientError
from gpdit_lightning.evaluation.metrics import psnr, ssim
from gpdit_lightning.evaluation.networks import ImageNetwork, VideoNetwork
from gpdit_lightning.evaluation.self_checks import BLUR_LEVELS, NOISE_LEVELS, add_noise, gaussian_blur
from gpdit_lightning.evaluation.videos import Selection, read_clip
from gpdit_lightning.generation import ClipInputs, GenerationConfig, continue_video
from gpdit_lightning.media.images import Size, adm_resize_and_crop, read_image, resize_and_crop
from gpdit_lightning.model import GPDiT
from gpdit_lightning.options.prepare import ImageScaling
from gpdit_lightning.path_kinds import Medium

log = logging.getLogger(__name__)

# Names of the variants of a video in the files of chunks.
GROUND_TRUTH, CODEC, REPEATED = "truth", "codec", "repeated"
NOISE = tuple(f"noise {level:g}" for level in NOISE_LEVELS)
BLUR = tuple(f"blur {level:g}" for level in BLUR_LEVELS)

MAX_RECONSTRUCTED = 50_000  # of the real videos or images, which are also encoded and decoded


def seed_variant(seed: int) -> str:
    """Return the name of the continuation that is generated from a seed."""
    return f"seed {seed}"


@dataclass(frozen=True)
class EvaluationSettings:
    """How every video is read, continued and measured.

    Attributes:
        context_frames, generated_frames: numbers of pixel frames.
        stride: video frames from one frame of the clip to the next.
        size: (height, width) in pixels.
        seeds: of the noise; every video is continued once per seed.
        generation: how continuations are generated.
        fvd_includes_context: whether the video network's input includes the context frames, which are the same in
            ground truth and continuation.
        self_check_videos: number of videos, from the first of the selection, whose ground truth is also distorted.
        fps: frames per second to which videos are resampled, as for :func:`videos.read_clip`.
        medium: of the real data; a clip of images is one frame.
        image_scaling: how images are scaled before the centre crop.
    """

    context_frames: int
    generated_frames: int
    stride: int
    size: Size
    seeds: tuple[int, ...]
    generation: GenerationConfig
    fvd_includes_context: bool = True
    self_check_videos: int = 0
    fps: float | None = None
    medium: Medium = "video"
    image_scaling: ImageScaling = "bicubic"

    @property
    def frames(self) -> int:
        """Number of pixel frames of a clip."""
        return self.context_frames + self.generated_frames

    def read_clip(self, path: Path) -> Tensor:
        """Return an image, or the clip at the beginning of a video, uint8 (T, 3, H, W).

        Raises as :func:`media.images.read_image` and :func:`videos.read_clip`.
        """
        if self.medium == "image":
            scale = adm_resize_and_crop if self.image_scaling == "adm" else resize_and_crop
            return scale(read_image(path), self.size)
        return read_clip(path, self.frames, self.stride, self.size, fps=self.fps)


class MetricNetworks(NamedTuple):
    """The networks that scores are computed with; without a network its scores are left out."""

    video: VideoNetwork | None
    image: ImageNetwork | None


class Chunk(NamedTuple):
    """Videos that are evaluated as one batch.

    Attributes:
        start: index of the first video in the selection.
        names, paths: of the videos, as in the selection.
        classes: class number of each video, on which its continuation is conditioned; None without labels.
    """

    start: int
    names: tuple[str, ...]
    paths: tuple[Path, ...]
    classes: tuple[int, ...] | None = None


def split_into_chunks(selection: Selection, size: int, classes: tuple[int, ...] | None = None) -> list[Chunk]:
    """Divide a selection into chunks of `size` videos; the last one may be smaller.

    Args:
        selection: all videos.
        size: videos of a chunk.
        classes: class number of each video of the selection, or None.
    """
    return [
        Chunk(
            start,
            selection.names[start : start + size],
            selection.paths[start : start + size],
            None if classes is None else classes[start : start + size],
        )
        for start in range(0, len(selection.names), size)
    ]


def evaluate_chunk(
    chunk: Chunk,
    settings: EvaluationSettings,
    model: GPDiT,
    codec: Codec,
    networks: MetricNetworks,
    on_variant: Callable[[str, Sequence[str], Tensor], None] = lambda variant, names, videos: None,
) -> tuple[list[str], dict[str, Tensor]]:
    """Compute the results of a chunk, from which the scores follow.

    Args:
        chunk: the videos.
        settings: of the evaluation.
        model: in evaluation mode.
        codec: of the model.
        networks: of the scores.
        on_variant: called with the name of each variant, the names of its videos, and the videos, uint8
            (B, T, 3, H, W).

    Returns:
        The names of the videos that could be read, and the results of :func:`measure` by "VARIANT/QUANTITY".

    Raises:
        InputError: a file no longer exists; also as :func:`continue_video` and the networks.
    """
    clips = read_clips(chunk, settings)
    results = measure_real(chunk.start, clips, settings, codec, networks, on_variant)
    if clips:
        ground_truth = torch.stack(list(clips.values()))
        context = ground_truth[:, : settings.context_frames]
        for seed, inputs in continuation_inputs(chunk, list(clips), settings).items():
            frames, variant = settings.generated_frames, seed_variant(seed)
            videos = continue_video(model, codec, context, frames, settings.generation, inputs).pixels
            on_variant(variant, list(clips), videos)
            results |= by_variant(variant, measure(videos, ground_truth, settings, networks))
    return list(clips), results


def measure_real(
    start: int,
    clips: Mapping[str, Tensor],
    settings: EvaluationSettings,
    codec: Codec,
    networks: MetricNetworks,
    on_variant: Callable[[str, Sequence[str], Tensor], None] = lambda variant, names, videos: None,
) -> dict[str, Tensor]:
    """Compute the results of real clips and of the variants of :func:`real_variants`.

    Args:
        start: index of the first clip in the selection.
        clips: by their names, each uint8 (T, 3, H, W).
        settings, codec, networks, on_variant: as for :func:`evaluate_chunk`.

    Returns:
        The results of :func:`measure` by "VARIANT/QUANTITY".
    """
    names, results = list(clips), dict[str, Tensor]()
    if names:
        ground_truth = torch.stack(list(clips.values()))
        for variant, videos in real_variants(start, names, ground_truth, settings, codec):
            on_variant(variant, names[: len(videos)], videos)
            results |= by_variant(variant, measure(videos, ground_truth[: len(videos)], settings, networks))
    return results


def by_variant(variant: str, quantities: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return quantities by their keys in the files of chunks, "VARIANT/QUANTITY"."""
    return {f"{variant}/{quantity}": values for quantity, values in quantities.items()}


def read_clips(chunk: Chunk, settings: EvaluationSettings) -> dict[str, Tensor]:
    """Return the clips of a chunk by the names of their videos, each uint8 (T, 3, H, W).

    A video that is damaged, or shorter than its header states, is left out with a warning; the report names it.

    Raises:
        InputError: a file no longer exists, for example because its file system was unmounted.
        TransientError: a file cannot be read for a reason other than its content.
    """
    clips: dict[str, Tensor] = {}
    for name, path in zip(chunk.names, chunk.paths, strict=True):
        try:
            clips[name] = settings.read_clip(path)
        except TransientError:
            raise
        except InputError as error:
            if not path.is_file():
                raise
            log.warning("left out: %s", error)
    return clips


def continuation_inputs(chunk: Chunk, names: Sequence[str], settings: EvaluationSettings) -> dict[int, ClipInputs]:
    """Return the seeds of the noise and the classes of some videos of a chunk, by seed of the evaluation."""
    condition = None
    if chunk.classes is not None:
        class_of = dict(zip(chunk.names, chunk.classes, strict=True))
        condition = torch.tensor([class_of[name] for name in names])
    return {seed: ClipInputs([noise_seed(name, seed) for name in names], condition) for seed in settings.seeds}


def real_variants(
    start: int, names: Sequence[str], ground_truth: Tensor, settings: EvaluationSettings, codec: Codec
) -> Iterator[tuple[str, Tensor]]:
    """Yield the ground truth, two references, and the distorted ground truth.

    Without context there is no last context frame, so one reference is left out.

    Args:
        start: index of the first video in the selection.
        names: of the videos.
        ground_truth: uint8 (B, T, 3, H, W).
        settings, codec: as for :func:`evaluate_chunk`.

    Yields:
        the name of a variant, and uint8 (B, T, 3, H, W). Distorted variants may have fewer videos.
    """
    context = ground_truth[:, : settings.context_frames]
    yield GROUND_TRUTH, ground_truth
    if start < MAX_RECONSTRUCTED:
        reconstruction = reconstruct(codec, ground_truth)
        yield CODEC, torch.cat((context, reconstruction[:, settings.context_frames :]), dim=1)
    if settings.context_frames:
        yield REPEATED, torch.cat((context, context[:, -1:].expand(-1, settings.generated_frames, -1, -1, -1)), dim=1)
    to_distort = ground_truth[: max(0, settings.self_check_videos - start)]
    if len(to_distort):
        seeds = [noise_seed(name, 0) for name in names[: len(to_distort)]]
        for variant, level in zip(NOISE, NOISE_LEVELS, strict=True):
            yield variant, add_noise(to_distort, level, seeds)
        for variant, sigma in zip(BLUR, BLUR_LEVELS, strict=True):
            yield variant, gaussian_blur(to_distort, sigma)


def reconstruct(codec: Codec, videos: Tensor) -> Tensor:
    """Encode and decode uint8 (B, T, 3, H, W). T is arbitrary: the last frame is repeated to a length of the codec."""
    frames = videos.shape[1]
    missing = -(frames - 1) % codec.temporal_factor
    padded = torch.cat((videos, videos[:, -1:].expand(-1, missing, -1, -1, -1)), dim=1)
    return codec.decode(codec.encode(padded))[:, :frames].cpu()


def noise_seed(name: str, seed: int) -> int:
    """Return the seed of a video's noise, which depends only on the video's name and the given seed."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4])


@torch.inference_mode()
def measure(
    videos: Tensor, ground_truth: Tensor, settings: EvaluationSettings, networks: MetricNetworks
) -> dict[str, Tensor]:
    """Compute features, class probabilities and pixel distances of videos.

    Args:
        videos, ground_truth: uint8 (B, T, 3, H, W).
        settings: give the number of context frames.
        networks: of the scores.

    Returns:
        `video` (B, n), features of clips; and of the generated frames only: `image` (B, T', n), features; `classes`
        (B, T', k), probabilities; `psnr` and `ssim` (B,), if there is a context, since videos from noise alone do not
        correspond to real ones. All are float32 on the CPU. Keys without a network are missing.
    """
    generated, reference = (clips[:, settings.context_frames :] for clips in (videos, ground_truth))
    results: dict[str, Tensor] = {}
    # The networks first: on a GPU they compute while the CPU compares pixels.
    if networks.video is not None:
        results["video"] = networks.video(videos if settings.fvd_includes_context else generated)
    if networks.image is not None:
        features, probabilities = networks.image.features_and_probabilities(generated.flatten(0, 1))
        results["image"] = features.unflatten(0, generated.shape[:2])
        if probabilities is not None:
            results["classes"] = probabilities.unflatten(0, generated.shape[:2])
    if settings.context_frames:
        results |= {"psnr": psnr(generated, reference), "ssim": ssim(generated, reference)}
    return {name: values.float().cpu().contiguous() for name, values in results.items()}
