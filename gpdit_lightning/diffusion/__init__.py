"""Diffusion: noising as a rotation, noise levels, the loss, samplers, guidance. Needs only torch."""

from gpdit_lightning.diffusion.guidance import Guidance
from gpdit_lightning.diffusion.loss import DenoisingLoss, QuartileLoss, denoising_loss
from gpdit_lightning.diffusion.noise_levels import NoiseSchedule
from gpdit_lightning.diffusion.rotation import (
    NoisySample,
    Target,
    check_target,
    rotate_back,
    rotate_to,
    training_target,
    velocity_of,
)
from gpdit_lightning.diffusion.samplers import (
    SAMPLERS,
    AdamsSampler,
    DPMSolver2M,
    FreshNoise,
    RotationSampler,
    Sampler,
    StochasticSampler,
    TangentSampler,
    Velocity,
    make_sampler,
    register_sampler,
)

__all__ = [
    "SAMPLERS",
    "AdamsSampler",
    "DPMSolver2M",
    "DenoisingLoss",
    "FreshNoise",
    "Guidance",
    "NoiseSchedule",
    "NoisySample",
    "QuartileLoss",
    "RotationSampler",
    "Sampler",
    "StochasticSampler",
    "TangentSampler",
    "Target",
    "Velocity",
    "check_target",
    "denoising_loss",
    "make_sampler",
    "register_sampler",
    "rotate_back",
    "rotate_to",
    "training_target",
    "velocity_of",
]
