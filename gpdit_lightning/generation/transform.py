"""In-context image tasks: the model transforms an image as example pairs show (GPDiT, section 5.4)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gpdit_lightning.codecs import Codec
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation.config import DEFAULT_CONFIG, ClipInputs, GenerationConfig
from gpdit_lightning.generation.rollout import check_finite, rollout
from gpdit_lightning.model import GPDiT


def transform(
    model: GPDiT,
    codec: Codec,
    examples: Sequence[tuple[Tensor, Tensor]],
    sources: Tensor,
    config: GenerationConfig = DEFAULT_CONFIG,
    *,
    seeds: int | Sequence[int] = 0,
) -> Tensor:
    """Generate the target of each source as the frame that follows the example pairs and the source.

    Every image is encoded and decoded as a video of one frame, as in few-shot training.

    Args:
        model: in evaluation mode, trained on such sequences.
        codec: the codec whose latents the model was trained on.
        examples: (source, target) pairs of uint8 (3, H, W), the same for all sources (GPDiT: two).
        sources: uint8 (B, 3, H, W) on any device.
        config: as for :func:`rollout`, with the noise schedule of training.
        seeds: seed of the noise of each source. A number is the seed of all sources, so that results are independent of
            batch composition.

    Returns:
        uint8 (B, 3, H, W), on the CPU.

    Raises:
        InputError: no sources, examples of another size or not in pairs, a model that cannot generate one image, or as
            `Codec.encode` and :func:`rollout`.
    """
    if sources.ndim != 4 or len(sources) == 0:
        raise InputError(f"the sources have shape {tuple(sources.shape)}: give images (B, 3, H, W), at least one.")
    if any(len(pair) != 2 for pair in examples):
        raise InputError("an example is not a pair: give a source and its target.")
    given = 2 * len(examples) + 1
    layout = model.layout(*(side // codec.spatial_factor for side in sources.shape[2:]))
    if layout.context_length(given) != given or len(layout.group_after(given, given + 1)) > 1:
        raise InputError(
            f"the model cannot generate one image after {given} others, since its blocks have more frames "
            "(block_shape and first_block_frames): use a model with blocks of one frame."
        )
    example_images = [image for pair in examples for image in pair]
    for image in example_images:
        if image.shape != sources.shape[1:]:
            raise InputError(
                f"an example has shape {tuple(image.shape)} and a source {tuple(sources.shape[1:])}: scale and crop "
                "all images to one size."
            )
    images = torch.stack([image.to(codec.device) for image in (*example_images, *sources)])
    latents = codec.whitened(codec.encode(images[:, None])[:, 0].to(model.device))
    example_latents, source_latents = latents.split((len(example_images), len(sources)))
    context = torch.cat((example_latents.expand(len(sources), *example_latents.shape), source_latents[:, None]), dim=1)
    seed_per_source = seeds if isinstance(seeds, Sequence) else [seeds] * len(sources)
    (target,) = rollout(model, context, 1, config, ClipInputs(seeds=seed_per_source))
    targets = codec.decode(codec.unwhitened(target)[:, None])[:, 0].cpu()
    check_finite(target, config.sampler)
    return targets
