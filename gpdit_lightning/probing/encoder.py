"""GPDiT as the frozen vision encoder of another model (GPDiT, section A.2).

Shapes: B clips, F latent frames, C channels, h x w latent pixels, N tokens per frame, D hidden width.
"""

import logging
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from gpdit_lightning.checkpoints.hub import HubGPDiT
from gpdit_lightning.checkpoints.reading import TrainedModel
from gpdit_lightning.checkpoints.weights import Weights
from gpdit_lightning.codecs import Codec
from gpdit_lightning.data.source import whole_blocks
from gpdit_lightning.errors import InputError
from gpdit_lightning.model.layout import BlockLayout
from gpdit_lightning.probing.features import spatio_temporal

log = logging.getLogger(__name__)


def first_layers(backbone: HubGPDiT, layers: int) -> HubGPDiT:
    """Return a frozen model of the first blocks only, which shares its parameters with the given model.

    The other parameters are freed with the last reference to `backbone`. Label and text embeddings are left out, since
    clean frames are not conditioned on them.

    Args:
        backbone: any GPDiT.
        layers: number of blocks, at least 1.

    Raises:
        InputError: the backbone has fewer blocks, or `layers` is below 1.
    """
    num_layers = backbone.config.layers
    if not 1 <= layers <= num_layers:
        raise InputError(f"layer {layers} does not exist: give a number from 1 to {num_layers}.")
    unused = ("prefix.", "time_embedding.label.", *(f"blocks.{number}." for number in range(layers, num_layers)))
    tensors = {name: tensor for name, tensor in backbone.state_dict().items() if not name.startswith(unused)}
    config = backbone.config.replaced(layers=layers, classes=0, text_width=0)
    facts = replace(backbone.facts, classes=())
    return HubGPDiT.from_weights(Weights(tensors, config, facts)).requires_grad_(False)


def clip_frames(
    requested: int | None, trained: TrainedModel, codec: Codec, layout: BlockLayout, most: int | None = None
) -> int:
    """Return the number of pixel frames of the clips that a model encodes; warn if it is more than in training.

    Args:
        requested: the option --frames; None for the length of the longest training clips.
        trained: the model.
        codec: of the model.
        layout: the blocks of the model, of which clips consist.
        most: upper limit of the default, unless the first block of the model is longer.

    Raises:
        InputError: the codec cannot encode the requested number of frames, the model has no positions for them, or they
            are not whole blocks of the model.
    """
    longest, in_training = trained.backbone.config.rope_lengths[0], codec.pixel_frames(trained.geometry.frames)
    block_frames = trained.backbone.config.block_frames
    if requested is None:
        latents = codec.latent_frames(codec.encodable_frames(min(in_training, most or in_training)))
        return codec.pixel_frames(whole_blocks(latents, block_frames) or block_frames[0])
    latents = codec.latent_frames(requested, "--frames")
    if latents > longest:
        raise InputError(
            f"--frames is {requested}, but the model has positions for {codec.pixel_frames(longest)}: give fewer."
        )
    if whole_blocks(latents, block_frames) != latents:
        lengths = " or ".join(str(codec.pixel_frames(length)) for length in layout.contexts_near(latents))
        raise InputError(
            f"--frames is {requested}, and its {latents} latent frames are not whole blocks of the model: give "
            f"{lengths}."
        )
    if requested > in_training:
        log.warning("warning: --frames is %d, but training clips had at most %d", requested, in_training)
    return requested


@torch.no_grad()
def pooled_features(backbone: HubGPDiT, latents: Tensor, temporal_tokens: int = 0) -> Tensor:
    """Return pooled features of clips after the last block of a model: clean stream only, theta = 0, unnormalised.

    Args:
        backbone: from :func:`first_layers`.
        latents: whitened, (B, F, C, h, w).
        temporal_tokens: as for :func:`spatio_temporal`.

    Returns:
        float32 (B, temporal tokens + N, D).
    """
    layer = backbone.config.layers
    return spatio_temporal(backbone.features(latents, [layer])[layer], temporal_tokens)


class VideoEncoder(nn.Module):
    """The first blocks of a GPDiT, frozen, and a trainable linear projection to the width of another model.

    It replaces the CLIP encoder of Video-ChatGPT (GPDiT, section A.2: 18 layers of GPDiT-H). The backbone stays in
    evaluation mode without gradients. Only `encoder.projection` is trained, so only its state_dict has to be saved.

    Args:
        backbone: any GPDiT. Its parameters are shared, so do not train it further.
        layers: number of blocks.
        out_width: width of the projected tokens.
        temporal_tokens: as for :func:`spatio_temporal`; 100 in Video-ChatGPT.

    Raises:
        InputError: as :func:`first_layers`.
    """

    def __init__(self, backbone: HubGPDiT, layers: int, out_width: int, temporal_tokens: int = 0) -> None:
        super().__init__()
        self.backbone = first_layers(backbone, layers)
        self.projection = nn.Linear(
            self.backbone.config.width, out_width, device=self.backbone.patch_embedding.weight.device
        )
        self.temporal_tokens = temporal_tokens

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the projection; the backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, latents: Tensor) -> Tensor:
        """Map whitened latents (B, F, C, h, w) to projected features (B, temporal tokens + N, out_width).

        Raises:
            InputError: the backbone does not accept the shape, or there are more frames than temporal tokens.
        """
        pooled = pooled_features(self.backbone, latents, self.temporal_tokens)
        return self.projection(pooled.to(self.projection.weight.dtype))
