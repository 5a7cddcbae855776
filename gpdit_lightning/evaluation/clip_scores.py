"""Scores of continuations of clips that are in memory, for scores during training.

Shapes: N clips, B of them in one batch, T pixel frames, T' of them generated, n features.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpdit_lightning.evaluation.chunks import MetricNetworks
from gpdit_lightning.evaluation.metrics import frechet_distance_of_features, mean_squared_error, psnr, ssim

Quantities = dict[str, Tensor]
"""Per clip: features `video` (B, n) of the whole clip and `image` (B, T', n) of the generated frames; and against the
ground truth `psnr`, `ssim` and `error` (B,). All are float32 on the CPU."""


class ClipReference(NamedTuple):
    """Quantities of clips, with which those of continuations are compared.

    Attributes:
        truth: features of the ground truth.
        repeated: quantities of the last context frame, repeated; empty without a context.
    """

    truth: Quantities
    repeated: Quantities


def measure_features(videos: Tensor, context: int, networks: MetricNetworks) -> Quantities:
    """Return the features of clips.

    Args:
        videos: uint8 (B, T, 3, H, W), on any device.
        context: number of pixel frames of context.
        networks: of the scores; without a network its features are left out.
    """
    features = {}
    if networks.video is not None:
        features["video"] = networks.video(videos).cpu()
    if networks.image is not None:
        generated = videos[:, context:]
        features["image"] = networks.image(generated.flatten(0, 1)).unflatten(0, generated.shape[:2]).cpu()
    return features


def measure_continuations(videos: Tensor, ground_truth: Tensor, context: int, networks: MetricNetworks) -> Quantities:
    """Return the features of clips and, if there is a context, their errors against the ground truth.

    Args:
        videos, ground_truth: uint8 (B, T, 3, H, W), on any device.
        context, networks: as for :func:`measure_features`.
    """
    features = measure_features(videos, context, networks)
    if context == 0:  # clips from noise alone do not correspond to real ones
        return features
    generated, real = videos[:, context:], ground_truth[:, context:]
    errors = {
        "psnr": psnr(generated, real),
        "ssim": ssim(generated, real),
        "error": mean_squared_error(generated, real),
    }
    return features | {name: values.cpu() for name, values in errors.items()}


def measure_reference(ground_truth: Tensor, context: int, networks: MetricNetworks) -> ClipReference:
    """Return the quantities of the ground truth, and of repeating the last context frame.

    Args:
        ground_truth: uint8 (B, T, 3, H, W), on any device.
        context, networks: as for :func:`measure_features`.
    """
    truth = measure_features(ground_truth, context, networks)
    if context == 0:
        return ClipReference(truth, {})
    last = ground_truth[:, context - 1 : context].expand(-1, ground_truth.shape[1] - context, -1, -1, -1)
    repeated = torch.cat((ground_truth[:, :context], last), dim=1)
    return ClipReference(truth, measure_continuations(repeated, ground_truth, context, networks))


def concatenate(parts: Sequence[Quantities]) -> Quantities:
    """Concatenate the quantities of successive clips, of which there is at least one."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def compute_clip_scores(generated: Quantities, reference: ClipReference) -> dict[str, float]:
    """Return the scores of N clips.

    Args:
        generated: quantities of the continuations.
        reference: of the same clips.

    Returns:
        `fvd`, `fid` (the mean over the positions of the generated frames), `psnr` and `ssim`, each also with
        `_repeated` for the last context frame, repeated; and `rollout_error_ratio`, the mean squared error relative to
        that of repeating, unless the true frames are all equal. Those without quantities are left out.

    Raises:
        InputError: a feature is not finite.
    """
    scores = {}
    for suffix, quantities in (("", generated), ("_repeated", reference.repeated)):
        if "video" in quantities:
            scores[f"fvd{suffix}"] = frechet_distance_of_features(reference.truth["video"], quantities["video"])
        if "image" in quantities:
            positions = zip(reference.truth["image"].unbind(1), quantities["image"].unbind(1), strict=True)
            distances = [frechet_distance_of_features(*features) for features in positions]
            scores[f"fid{suffix}"] = sum(distances) / len(distances)
        for name in ("psnr", "ssim"):
            if name in quantities:
                scores[f"{name}{suffix}"] = quantities[name].double().mean().item()
    if "error" in generated:
        error, of_repeating = (part["error"].double().mean().item() for part in (generated, reference.repeated))
        scores |= {"rollout_error_ratio": error / of_repeating} if of_repeating > 0 else {}
    return scores
