"""An image task shown by examples: the model does to a picture what was done to others (GPDiT, section 5.4)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gpdit_lightning.codecs import Codec
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation.rollout import DEFAULT, GenerationConfig, rollout
from gpdit_lightning.model import GPDiT


def transform(
    model: GPDiT,
    codec: Codec,
    examples: Sequence[tuple[Tensor, Tensor]],
    sources: Tensor,
    config: GenerationConfig = DEFAULT,
    *,
    seeds: int | Sequence[int] = 0,
) -> Tensor:
    """Generate the target of each source as the frame after source, target, source, target, ..., source.

    Every picture is encoded and decoded alone (T = 1), as in the sequences of few-shot training.

    Args:
        model: in evaluation mode, trained on such sequences.
        codec: whose latents the model was trained on.
        examples: (source, target) pairs of uint8 (3, H, W), the same ones before every source; the paper takes two.
        sources: uint8 (B, 3, H, W); all pictures on any device.
        config: as for :func:`rollout`, with the schedule that the model was trained by; with a window, a picture sees
            the latest frames only.
        seeds: of the noise, one for each source; a number is that of all, so that sources may be batched in any way.

    Returns:
        uint8 (B, 3, H, W), on the CPU.

    Raises:
        InputError: no sources, examples of another size or not in pairs, or as `Codec.encode` and :func:`rollout`.
    """
    if sources.ndim != 4 or len(sources) == 0:
        raise InputError(f"the sources have shape {tuple(sources.shape)}: give pictures (B, 3, H, W), at least one.")
    if any(len(pair) != 2 for pair in examples):
        raise InputError("an example has not two pictures: give pairs of a source and its target.")
    shown = [picture for pair in examples for picture in pair]
    for picture in shown:
        if picture.shape != sources.shape[1:]:
            raise InputError(
                f"an example has shape {tuple(picture.shape)} and a source {tuple(sources.shape[1:])}: scale and crop "
                "all pictures to one size."
            )
    device = next(model.parameters()).device
    pictures = torch.stack([picture.to(codec.device) for picture in (*shown, *sources)])
    raw = codec.encode(pictures[:, None])[:, 0].to(device)
    before, asked = codec.whitened(raw).split((len(shown), len(sources)))
    context = torch.cat((before.expand(len(sources), *before.shape), asked[:, None]), dim=1)
    seeds = seeds if isinstance(seeds, Sequence) else [seeds] * len(sources)
    (latent,) = rollout(model, context, 1, config, seeds=seeds)
    return codec.decode(codec.unwhitened(latent)[:, None])[:, 0].cpu()
