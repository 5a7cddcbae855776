"""An `AutoencoderKL` of diffusers with small random weights and the factors of Stable Diffusion's."""

from typing import Any

import pytest
import torch

LEVELS = 4


def small_autoencoder(**config: Any) -> Any:
    """Return one with 0.37M parameters, whose posterior has standard deviations of about 1."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    levels = config.pop("levels", LEVELS)
    return diffusers.AutoencoderKL(
        block_out_channels=(32,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **config,
    ).eval()
