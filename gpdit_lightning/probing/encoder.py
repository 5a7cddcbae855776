"""A GPDiT as the frozen vision encoder of another model (GPDiT, section A.2).

Shapes: B clips, F latent frames, C channels, h x w latent pixels, N tokens per frame, D hidden width.
"""

from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from gpdit_lightning.checkpoints.hub import HubGPDiT
from gpdit_lightning.checkpoints.weights import Weights
from gpdit_lightning.errors import InputError
from gpdit_lightning.probing.features import spatio_temporal


def first_layers(backbone: HubGPDiT, layers: int) -> HubGPDiT:
    """A frozen model of the first blocks only, whose parameters are the given model's own tensors, not copies.

    The rest is freed as soon as nobody else holds `backbone`. Labels and texts are left out: clean frames see none.

    Args:
        backbone: any GPDiT.
        layers: how many blocks, from 1.

    Raises:
        InputError: more than there are, or none.
    """
    most = backbone.config.layers
    if not 1 <= layers <= most:
        raise InputError(f"layer {layers} does not exist: choose from 1 to {most}.")
    unused = ("prefix.", *(f"blocks.{number}." for number in range(layers, most)))
    tensors = {name: tensor for name, tensor in backbone.state_dict().items() if not name.startswith(unused)}
    config = backbone.config.replaced(layers=layers, classes=0, text_width=0)
    facts = replace(backbone.facts, classes=())
    return HubGPDiT.from_weights(Weights(tensors, config, facts)).requires_grad_(False)


@torch.no_grad()
def pooled_features(backbone: HubGPDiT, latents: Tensor, temporal_tokens: int = 0) -> Tensor:
    """The features of clips behind a model's last block: clean stream only, theta = 0, unnormalised, pooled.

    Args:
        backbone: as :func:`first_layers` makes it.
        latents: (B, F, C, h, w) whitened.
        temporal_tokens: as for :func:`spatio_temporal`.

    Returns:
        float32 (B, temporal tokens + N, D).
    """
    layer = backbone.config.layers
    return spatio_temporal(backbone.features(latents, [layer])[layer], temporal_tokens)


class VideoEncoder(nn.Module):
    """The first blocks of a GPDiT, frozen, and a linear layer onto the width of another model, which is trained.

    As Video-ChatGPT has it for CLIP (GPDiT, section A.2: 18 layers of GPDiT-H). The backbone stays in evaluation mode
    and gets no gradients. What training changes is `encoder.projection.state_dict()`, which is all that needs saving.

    Args:
        backbone: whose blocks are run. Its tensors are shared, so train it no further.
        layers: how many of them.
        out_width: of the tokens that come out.
        temporal_tokens: as for :func:`spatio_temporal`; Video-ChatGPT has 100.

    Raises:
        InputError: layers that do not exist.
    """

    def __init__(self, backbone: HubGPDiT, layers: int, out_width: int, temporal_tokens: int = 0) -> None:
        super().__init__()
        self.backbone = first_layers(backbone, layers)
        self.projection = nn.Linear(
            self.backbone.config.width, out_width, device=self.backbone.patch_embedding.weight.device
        )
        self.temporal_tokens = temporal_tokens

    def train(self, mode: bool = True) -> Self:
        """As of any module, but the backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, latents: Tensor) -> Tensor:
        """Whitened latents (B, F, C, h, w) to (B, temporal tokens + N, out_width).

        Raises:
            InputError: latents that do not fit the backbone, or more frames than temporal tokens.
        """
        pooled = pooled_features(self.backbone, latents, self.temporal_tokens)
        return self.projection(pooled.to(self.projection.weight.dtype))
