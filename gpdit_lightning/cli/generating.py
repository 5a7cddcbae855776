"""What the verbs that use a trained model share: how their options become models, codecs and settings."""

from typing import Any, Literal

import torch

from gpdit_lightning.checkpoints.reading import TrainedModel
from gpdit_lightning.codecs import Codec, load_codec_from_spec
from gpdit_lightning.diffusion import Guidance, make_sampler
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation import GenerationConfig
from gpdit_lightning.media.images import Size, parse_size
from gpdit_lightning.options.shared import LoadingOptions, PrecisionOptions, SamplerOptions

PRECISIONS = {"32": None, "bf16": torch.bfloat16}


def load_codec_of(trained: TrainedModel, options: LoadingOptions) -> Codec:
    """The codec of a model, on its device.

    Raises:
        InputError: the codec's weights are not available.
    """
    device = next(trained.backbone.parameters()).device
    owner = str(trained.path)
    return load_codec_from_spec(trained.codec, device, options.codec_source, owner=owner, codec=options.codec)


def generation_config(
    options: SamplerOptions, trained: TrainedModel, label_guidance: float = 1.0, **rest: Any
) -> GenerationConfig:
    """How to generate.

    Args:
        options: the sampler, guidance over the context, and precision.
        trained: the model.
        label_guidance: guidance scale over the label.
        rest: further fields of the result.
    """
    return GenerationConfig(
        sampler=make_sampler(options.sampler, options.steps, trained.schedule),
        guidance=Guidance(options.guidance, label_guidance, *options.guidance_levels),
        autocast_dtype=PRECISIONS[selected_precision(options, trained)],
        **rest,
    )


def selected_precision(options: PrecisionOptions, trained: TrainedModel) -> Literal["32", "bf16"]:
    """The precision of matrix products: `auto` is bf16 for a model on CUDA, else 32."""
    if options.precision == "auto":
        return "bf16" if next(trained.backbone.parameters()).is_cuda else "32"
    return options.precision


def trained_sizes(size: str | None, trained: TrainedModel) -> tuple[Size, ...]:
    """The sizes of the training clips in pixels, or the requested one of them.

    Raises:
        InputError: the model was not trained on the requested size.
    """
    sizes = trained.geometry.sizes
    if size is None:
        return sizes
    wanted = parse_size(size)
    if wanted not in sizes:
        known = ", ".join(f"{height}x{width}" for height, width in sizes)
        raise InputError(f"--size is {size}, but the checkpoint was trained on {known}: choose one of these.")
    return (wanted,)


def trained_size(size: str | None, trained: TrainedModel, checkpoint: str) -> Size:
    """The one size in pixels at which the model sees all videos.

    Raises:
        InputError: the model was not trained on the requested size, or on several and none is requested.
    """
    sizes = trained_sizes(size, trained)
    if len(sizes) > 1:
        known = ", ".join(f"{height}x{width}" for height, width in sizes)
        raise InputError(f"{checkpoint} was trained on {known}: choose one of them by --size.")
    return sizes[0]
