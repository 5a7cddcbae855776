"""Arguments of a call of the pipeline from Python, as options of `sample`."""

import math
from collections.abc import Sequence
from typing import Any, TypedDict

from gpdit_lightning.errors import InputError
from gpdit_lightning.options.sample import GenerationOptions


class GenerationArguments(TypedDict, total=False):
    """The arguments of a call: the options of `sample`, by the same names (`gpdit_lightning.options.sample`).

    `seed` may also be a list with a seed for each context, and `size` a pair of height and width.
    """

    frames: int | None
    samples: int
    count: int | None
    seed: int | Sequence[int]
    batch_size: int
    sampler: str
    steps: int
    guidance: float
    guidance_levels: tuple[float, float]
    label: str | int | Sequence[str | int] | None
    label_guidance: float
    window: int | None
    sinks: int
    context_noise: float
    cache: bool
    context_frames: int | None
    start: float | None
    fps: float | None
    stride: int | None
    size: str | Sequence[int] | None


def options_of_call(
    arguments: GenerationArguments, seconds: float | None
) -> tuple[GenerationOptions, Sequence[int] | None]:
    """Return the options of a call, and the seed of each context if `seed` is a list.

    Args:
        arguments: the arguments by name.
        seconds: duration to generate instead of `frames`; only checked.

    Raises:
        InputError: an argument is unknown or has a value that cannot be used.
    """
    known = GenerationArguments.__annotations__
    if unknown := [name for name in arguments if name not in known]:
        raise InputError(f"a pipeline has no option {unknown[0]!r}: give some of {', '.join(known)}.")
    if seconds is not None and "frames" in arguments:
        raise InputError(f"both frames and seconds are given ({arguments['frames']} and {seconds}): give one.")
    if seconds is not None and not 0 < seconds < math.inf:
        raise InputError(f"seconds is {seconds}: give a duration above 0.")
    options: dict[str, Any] = dict(arguments)
    seeds = None
    if isinstance(arguments.get("seed"), Sequence):
        seeds = options.pop("seed")
        options |= {"seed": min(seeds)} if seeds else {}  # the least one is checked with the options
    label = arguments.get("label")
    if label is not None:
        labels = [label] if isinstance(label, str) or not isinstance(label, Sequence) else label
        options["label"] = tuple(map(str, labels))
    size = arguments.get("size")
    if isinstance(size, Sequence) and not isinstance(size, str):
        options["size"] = "x".join(map(str, size))
    return GenerationOptions(**options), seeds
