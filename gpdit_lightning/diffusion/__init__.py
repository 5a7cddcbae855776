"""The objective and its inverse: rotation, noise levels, loss, sampler. Needs torch alone."""

from gpdit_lightning.diffusion.loss import QuartileLoss, VelocityLoss, velocity_loss
from gpdit_lightning.diffusion.noise_levels import NoiseSchedule
from gpdit_lightning.diffusion.rotation import NoisySample, noise_from, rotate_back, rotate_to, x0_from
from gpdit_lightning.diffusion.sampler import RotationSampler

__all__ = [
    "NoiseSchedule",
    "NoisySample",
    "QuartileLoss",
    "RotationSampler",
    "VelocityLoss",
    "noise_from",
    "rotate_back",
    "rotate_to",
    "velocity_loss",
    "x0_from",
]
