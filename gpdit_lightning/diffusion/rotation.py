"""Noising as a rotation of (x0, eps) by an angle theta in [0, pi/2] (GPDiT, section 4.2).

All angles are radians and have the leading dimensions of the latents: theta (B, F) belongs to latents (B, F, C, H, W),
theta (B,) to a single frame (B, C, H, W); or they have all dimensions, and broadcast.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gpdit_lightning.devices import check_device
from gpdit_lightning.diffusion.noise_levels import NoiseSchedule
from gpdit_lightning.errors import InputError

Target = Literal["velocity", "epsilon"]
"""What a network predicts: the companion of the noisy latents (GPDiT, section 4.2), or the noise (DDPM, ACDiT)."""


class NoisySample(NamedTuple):
    """The input of the network and its training target.

    Attributes:
        noisy: cos(theta) x0 + sin(theta) eps.
        velocity: -sin(theta) x0 + cos(theta) eps, the orthogonal companion: the training target, unless this is eps.
        theta: the angles.
    """

    noisy: Tensor
    velocity: Tensor
    theta: Tensor


def rotate_to(x0: Tensor, eps: Tensor, theta: Tensor) -> NoisySample:
    """Rotate clean latents towards noise: the forward process R(theta) (x0, eps) of GPDiT, section 4.2.

    Raises:
        InputError: noise or angles are on another device than the latents, or the noise has another shape.
    """
    check_device(x0.device, "x0", eps=eps, theta=theta)
    if eps.shape != x0.shape:  # broadcast, several latents would get the same noise
        raise InputError(f"eps has shape {tuple(eps.shape)}; it must be that of x0, {tuple(x0.shape)}.")
    angles = _broadcastable(theta, x0)
    cos, sin = angles.cos().to(x0.dtype), angles.sin().to(x0.dtype)
    return NoisySample(cos * x0 + sin * eps, cos * eps - sin * x0, theta)


def check_target(target: Target, schedule: NoiseSchedule) -> None:
    """Raise `InputError` if the velocity cannot be computed from the target at the strongest noise of a schedule."""
    if target == "epsilon" and schedule.name == "cosine":
        raise InputError(
            "the target is epsilon, from which x0 cannot be computed at the pure noise of the cosine schedule: set "
            "the schedule to linear (model.init_args.schedule.name), or backbone.target to velocity."
        )


def training_target(sample: NoisySample, eps: Tensor, target: Target) -> Tensor:
    """Return what the network is trained to predict for latents with the noise `eps`."""
    return sample.velocity if target == "velocity" else eps


def velocity_of(prediction: Tensor, noisy: Tensor, theta: Tensor, target: Target) -> Tensor:
    """Return the velocity that a prediction of `target` implies: with epsilon, (eps - sin(theta) noisy) / cos(theta).

    Near pure noise the quotient amplifies errors of epsilon, as in every sampler of DDPM: with the linear schedule
    cos(theta) is at least 0.0064. It is computed in float32 or better.

    Args:
        prediction: the output of the network.
        noisy: its input, of the same shape.
        theta: the angles, less than pi/2 if the target is epsilon.
        target: what the network predicts.
    """
    if target == "velocity":
        return prediction
    precise = torch.promote_types(noisy.dtype, torch.float32)
    theta = _broadcastable(theta.to(precise), noisy)
    return ((prediction.to(precise) - theta.sin() * noisy.to(precise)) / theta.cos()).to(prediction.dtype)


def _broadcastable(theta: Tensor, latents: Tensor) -> Tensor:
    return theta.reshape(theta.shape + (1,) * (latents.ndim - theta.ndim))


def rotate_back(noisy: Tensor, velocity: Tensor, angle: float) -> Tensor:
    """Rotate noisy latents by `angle` towards clean data.

    This is a step of DDIM. With the angle theta of the latents it returns the implied x0, the first row of R(theta)^-1.

    Raises:
        InputError: the velocity is on another device than the latents.
    """
    check_device(noisy.device, "noisy", velocity=velocity)
    return math.cos(angle) * noisy - math.sin(angle) * velocity
