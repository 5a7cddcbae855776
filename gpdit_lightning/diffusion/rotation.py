"""Noising as a rotation of (x0, eps) by an angle theta in [0, pi/2] (GPDiT, section 4.2).

All angles are radians and have the leading dimensions of the latents: theta (B, F) belongs to latents (B, F, C, H, W),
theta (B,) to a single frame (B, C, H, W).
"""

import math
from typing import NamedTuple

from torch import Tensor

from gpdit_lightning.devices import check_device


class NoisySample(NamedTuple):
    """The input of the network and its training target.

    Attributes:
        noisy: cos(theta) x0 + sin(theta) eps.
        velocity: -sin(theta) x0 + cos(theta) eps, the orthogonal companion: the training target.
        theta: the angles.
    """

    noisy: Tensor
    velocity: Tensor
    theta: Tensor


def rotate_to(x0: Tensor, eps: Tensor, theta: Tensor) -> NoisySample:
    """Rotate clean latents towards noise: the forward process R(theta) (x0, eps) of GPDiT, section 4.2.

    Raises:
        InputError: noise or angles are on another device than the latents.
    """
    check_device(x0.device, "x0", eps=eps, theta=theta)
    per_frame = theta.reshape(theta.shape + (1,) * (x0.ndim - theta.ndim))
    cos, sin = per_frame.cos().to(x0.dtype), per_frame.sin().to(x0.dtype)
    return NoisySample(cos * x0 + sin * eps, cos * eps - sin * x0, theta)


def rotate_back(noisy: Tensor, velocity: Tensor, angle: float) -> Tensor:
    """Rotate noisy latents by `angle` towards clean data.

    This is a step of DDIM. With the angle theta of the latents it returns the implied x0, the first row of R(theta)^-1.

    Raises:
        InputError: the velocity is on another device than the latents.
    """
    check_device(noisy.device, "noisy", velocity=velocity)
    return math.cos(angle) * noisy - math.sin(angle) * velocity
