"""Requests of the page: their settings, and the check of each value."""

from collections.abc import Mapping
from typing import Any

from gpdit_lightning.app.jobs import VideoRequest
from gpdit_lightning.diffusion.samplers import BUILT_IN
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation.contexts import VideoContext
from gpdit_lightning.generation.pipeline import GPDiTPipeline
from gpdit_lightning.options.app import MAX_GUIDANCE, MAX_STEPS, MIN_SECONDS, AppOptions
from gpdit_lightning.options.sample import GenerationOptions

MAX_SEED = 2**32 - 1
INITIAL_SECONDS = 2.0


def describe_model(pipeline: GPDiTPipeline, options: AppOptions, name: str) -> dict[str, Any]:
    """Return what the page shows about the model and its settings, as JSON values.

    Args:
        pipeline: the model.
        options: give the initial settings and the limits.
        name: the name of the model.
    """
    samplers = dict.fromkeys((*BUILT_IN, options.sampler))  # a custom one of the command line is offered too
    return {
        "name": name,
        "step": pipeline.trained.step,
        "device": pipeline.device.type,
        "sizes": [f"{height}x{width}" for height, width in pipeline.sizes],
        "frame_rate": pipeline.frame_rate,
        "labels": list(pipeline.labels),
        "samplers": list(samplers),
        "initial": {
            "seconds": min(INITIAL_SECONDS, options.max_seconds),
            "sampler": options.sampler,
            "steps": options.steps,
            "guidance": options.guidance,
            "label_guidance": options.label_guidance,
        },
        "limits": {
            "seconds": options.max_seconds,
            "upload": options.max_upload,
            "upload_seconds": options.max_upload_seconds,
            "steps": MAX_STEPS,
            "guidance": MAX_GUIDANCE,
            "seed": MAX_SEED,
        },
    }


def parse_request(
    content: Any, pipeline: GPDiTPipeline, options: AppOptions, contexts: Mapping[str, VideoContext]
) -> VideoRequest:
    """Parse and check the settings of a video. Missing ones have the initial values of the page.

    Args:
        content: JSON of the user: `context` (the id of an upload; without it the video begins with noise), `seconds`,
            `sampler`, `steps`, `guidance`, `label`, `label_guidance`, `seed`, and `size` without a context.
        pipeline: the model.
        options: give the limits and the initial values.
        contexts: the uploads by their ids.

    Raises:
        InputError: a setting is unknown or has an invalid value.
    """
    if not isinstance(content, dict):
        raise InputError("the settings are not a JSON object: send one.")
    known = ("context", "seconds", "sampler", "steps", "guidance", "label", "label_guidance", "seed", "size")
    if unknown := [name for name in content if name not in known]:
        raise InputError(f"there is no setting {unknown[0]!r}: give some of {', '.join(known)}.")
    context_id = content.get("context")
    if context_id is not None and not (isinstance(context_id, str) and context_id in contexts):
        raise InputError("the uploaded file is no longer kept: choose it again.")
    label = _choice(content, "label", None, pipeline.labels)
    label_guidance = float(_number(content, "label_guidance", options.label_guidance, 0, MAX_GUIDANCE))
    sizes = [f"{height}x{width}" for height, width in pipeline.sizes]
    return VideoRequest(
        context=None if context_id is None else contexts[context_id],
        seconds=float(_number(content, "seconds", INITIAL_SECONDS, MIN_SECONDS, options.max_seconds)),
        options=GenerationOptions(
            sampler=_choice(content, "sampler", options.sampler, (*BUILT_IN, options.sampler)) or options.sampler,
            steps=int(_number(content, "steps", options.steps, 1, MAX_STEPS, whole=True)),
            guidance=float(_number(content, "guidance", options.guidance, 0, MAX_GUIDANCE)),
            guidance_levels=options.guidance_levels,
            label=label,
            label_guidance=1.0 if label is None else label_guidance,
            seed=int(_number(content, "seed", 0, 0, MAX_SEED, whole=True)),
            size=_choice(content, "size", None, sizes) if context_id is None else None,
        ),
    )


def parse_start(text: str) -> float | None:
    """Return the time in seconds at which the given frames of an upload begin; None for an empty text.

    Raises:
        InputError: the text is not a number; its range depends on the file.
    """
    try:
        return float(text) if text else None
    except ValueError:
        raise InputError(f"start is {text[:20]!r}: give a time in seconds.") from None


def _number(
    content: Mapping[str, Any], name: str, default: float, least: float, most: float, *, whole: bool = False
) -> float:
    """Return a number between two limits; the default may be outside them."""
    value = content.get(name)
    if value is None:
        return default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= most or (whole and value != int(value)):
        raise InputError(f"{name} is {value!r}: give a {'whole ' * whole}number from {least:g} to {most:g}.")
    return value


def _choice(content: Mapping[str, Any], name: str, default: str | None, choices: Any) -> str | None:
    """Return one of some texts."""
    value = content.get(name)
    if value is None:
        return default
    if value not in choices:
        given = f"{name} is {value!r}, which this model does not have"
        raise InputError(f"{given}: give one of {', '.join(choices)}." if choices else f"{given}: leave it out.")
    return str(value)
