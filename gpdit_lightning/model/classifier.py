"""A classifier of clips: the clean stream of a GPDiT, the mean of its tokens, a norm and a linear layer."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gpdit_lightning.devices import check_device
from gpdit_lightning.errors import InputError
from gpdit_lightning.model.config import GPDiTConfig
from gpdit_lightning.model.gpdit import GPDiT
from gpdit_lightning.model.precision import product_dtype


def clean_stream_config(config: GPDiTConfig, layers: int = 0) -> GPDiTConfig:
    """Return the architecture of the first blocks of a GPDiT without what conditions noisy tokens only.

    The clean stream is the same function of its weights with adaLN and with rotation, since the angle of clean tokens
    is 0. Rotation has no parameters, so that none is without a gradient.

    Args:
        config: any architecture.
        layers: number of blocks; 0 for all.

    Raises:
        InputError: there are fewer blocks.
    """
    if not 0 <= layers <= config.layers:
        raise InputError(f"layer {layers} does not exist: give a number from 1 to {config.layers}, or 0 for the last.")
    unconditioned = {"classes": 0, "text_width": 0, "time_conditioning": "rotation", "target": "velocity"}
    return config.replaced(layers=layers or config.layers, **unconditioned)


class Classifier(GPDiT):
    """Class scores of clips from the clean stream, without noise and angles.

    In place of the output layer, which denoises, it has one of the classes, whose input is the norm of the mean over
    all tokens (the global pooling of MAE's fine-tuning). A token attends to the tokens that it sees as a clean block of
    `config`: with blocks of frames those of earlier frames, with squares those of earlier squares in raster order.

    Args:
        config: from :func:`clean_stream_config`.
        classes: number of classes.
    """

    def __init__(self, config: GPDiTConfig, classes: int) -> None:
        super().__init__(config)
        self.output = nn.Linear(config.width, classes)
        nn.init.trunc_normal_(self.output.weight, std=2e-5)  # as MAE's head
        nn.init.zeros_(self.output.bias)

    def load_clean_stream(self, weights: Mapping[str, Tensor]) -> None:
        """Load the patch embedding and the blocks from the state dict of a GPDiT of the architecture before."""
        names = [name for name in self.state_dict() if not name.startswith("output")]
        self.load_state_dict({name: weights[name] for name in names}, strict=False)

    def forward(self, clean: Tensor, branch_scales: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Return the scores (B, classes) in float32.

        Args:
            clean: (B, F, C, H, W) whitened latents.
            branch_scales: as in :meth:`features`, for all blocks.

        Raises:
            InputError: the shapes do not fit the architecture, or a tensor is on another device than the weights.
        """
        check_device(self.device, "the model", branch_scales=branch_scales)
        layer = self.config.layers
        tokens = self.features(clean, [layer], branch_scales=branch_scales)[layer]
        pooled = self.output_norm(tokens.mean(dim=(1, 2)))
        scores = self.output(pooled.to(product_dtype(self.output.weight)))
        return scores.to(torch.promote_types(scores.dtype, torch.float32))
