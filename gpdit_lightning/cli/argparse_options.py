"""What the verbs that generate share: options, and what becomes of them."""

import argparse
from collections.abc import Callable
from typing import Any

import torch

from gpdit_lightning.checkpoints.reading import TrainedModel, load_trained_model
from gpdit_lightning.codecs import Codec, load_codec_from_spec
from gpdit_lightning.devices import available_device
from gpdit_lightning.diffusion import SAMPLERS, Guidance, make_sampler
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation import GenerationConfig
from gpdit_lightning.media.images import Size, parse_size

PRECISIONS = {"32": None, "bf16": torch.bfloat16}


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults; where there is none, the text says what that means."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parser_of(verb: str, description: str) -> argparse.ArgumentParser:
    """A parser that asks for the checkpoint to generate with."""
    options = argparse.ArgumentParser(
        prog=f"python -m gpdit_lightning {verb}", description=description, formatter_class=Help
    )
    options.add_argument("--checkpoint", required=True, help="a checkpoint, a run folder or an exported folder")
    return options


def add_generation(add: Callable[..., Any]) -> None:
    """Add the options of how to generate, by the `add_argument` of a group."""
    add("--seed", type=int, default=0, help="of the noise, the same for every context and whatever the batch")
    add("--batch_size", type=int, default=8, help="results generated side by side")
    add("--sampler", default="rotation", choices=list(SAMPLERS), help="from noise to a frame; see docs/generation.md")
    add("--steps", type=int, default=25, help="sampler steps for each latent frame")
    add("--guidance", type=float, default=1.0, help="scale over the context; the paper takes 1.2 for H, 2.0 for B")
    add(
        "--guidance_levels",
        type=float,
        nargs=2,
        default=[0.0, 1.0],
        metavar=("FROM", "TO"),
        help="noise levels that are guided: 1 is pure noise, 0 a clean frame",
    )
    add_precision(add)
    add_opening(add)


def add_precision(add: Callable[..., Any]) -> None:
    """Add the precision of products."""
    add("--precision", default="auto", choices=["auto", *PRECISIONS], help="of products; auto is bf16 on CUDA, else 32")


def add_opening(add: Callable[..., Any]) -> None:
    """Add the options of :func:`opened`."""
    add("--weights", default="ema", choices=["ema", "raw"], help="averaged or last trained weights")
    add("--codec_source", help="where the codec's weights are now, if they moved since preparation")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def opened(options: argparse.Namespace) -> tuple[TrainedModel, Codec]:
    """The model and its codec on the device.

    Raises:
        InputError: one of the three is not to be had.
    """
    device = available_device(options.device)
    trained = load_trained_model(options.checkpoint, device, options.weights)
    return trained, load_codec_from_spec(trained.codec, device, options.codec_source, where=str(options.checkpoint))


def config_of(options: Any, trained: TrainedModel, label_guidance: float = 1.0, **rest: Any) -> GenerationConfig:
    """How to generate, as options of the names of :func:`add_generation` say; `rest` are further fields."""
    precision = options.precision
    if precision == "auto":
        precision = "bf16" if next(trained.backbone.parameters()).is_cuda else "32"
    return GenerationConfig(
        sampler=make_sampler(options.sampler, options.steps, trained.schedule),
        guidance=Guidance(options.guidance, label_guidance, *options.guidance_levels),
        autocast_dtype=PRECISIONS[precision],
        **rest,
    )


def trained_sizes(size: str | None, trained: TrainedModel) -> tuple[Size, ...]:
    """The sizes of the training clips, or the one of them that is asked for.

    Raises:
        InputError: one that was not trained on.
    """
    sizes = trained.geometry.sizes
    if size is None:
        return sizes
    wanted = parse_size(size)
    if wanted not in sizes:
        known = ", ".join(f"{height}x{width}" for height, width in sizes)
        raise InputError(f"--size is {size}, but the checkpoint was trained on {known}: give one of these.")
    return (wanted,)
