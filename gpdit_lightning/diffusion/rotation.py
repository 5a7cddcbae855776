"""Noising as a rotation of (x0, eps) by an angle theta in [0, pi/2] (GPDiT, section 4.2).

All angles are radians and have the leading dimensions of the latents: theta (B, F) belongs to latents (B, F, C, H, W),
theta (B,) to a single frame (B, C, H, W).
"""

from typing import NamedTuple

from torch import Tensor


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


def _cos_sin(theta: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    theta = theta.reshape(theta.shape + (1,) * (like.ndim - theta.ndim))
    return theta.cos().to(like.dtype), theta.sin().to(like.dtype)


def rotate_to(x0: Tensor, eps: Tensor, theta: Tensor) -> NoisySample:
    """Rotate clean latents towards noise: the forward process R(theta) (x0, eps) of GPDiT, section 4.2."""
    cos, sin = _cos_sin(theta, x0)
    return NoisySample(cos * x0 + sin * eps, cos * eps - sin * x0, theta)


def x0_from(noisy: Tensor, velocity: Tensor, theta: Tensor) -> Tensor:
    """Return the clean latents that a velocity implies: the first row of R(theta)^-1."""
    cos, sin = _cos_sin(theta, noisy)
    return cos * noisy - sin * velocity


def noise_from(noisy: Tensor, velocity: Tensor, theta: Tensor) -> Tensor:
    """Return the noise that a velocity implies: the second row of R(theta)^-1."""
    cos, sin = _cos_sin(theta, noisy)
    return sin * noisy + cos * velocity
