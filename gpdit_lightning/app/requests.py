"""Requests of the page: their settings, and the check of each value."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gpdit_lightning.app.jobs import VideoRequest
from gpdit_lightning.diffusion.samplers import BUILT_IN
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation.contexts import VideoContext
from gpdit_lightning.generation.pipeline import GPDiTPipeline
from gpdit_lightning.options.app import MAX_GUIDANCE, MAX_STEPS, MIN_SECONDS, AppOptions
from gpdit_lightning.options.sample import GenerationOptions
from gpdit_lightning.options.shared import MAX_SEED

INITIAL_SECONDS = 2.0


class Number(NamedTuple):
    """A setting that is a number from `least` to `most`."""

    default: float
    least: float
    most: float
    whole: bool = False

    def parse(self, name: str, value: Any) -> float:
        """Return a value of JSON, or the default for None."""
        if value is None:
            return self.default
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not self.least <= value <= self.most or (self.whole and value != int(value)):
            number = f"{'whole ' * self.whole}number from {self.least:g} to {self.most:g}"
            raise InputError(f"{name} is {value!r}: give a {number}.")
        return int(value) if self.whole else float(value)


class Choice(NamedTuple):
    """A setting that is one of some texts."""

    default: str | None
    choices: tuple[str, ...]

    def parse(self, name: str, value: Any) -> str | None:
        """Return a value of JSON, or the default for None."""
        if value is None:
            return self.default
        if value not in self.choices:
            given = f"{name} is {value!r}, which this model does not have"
            cure = f"give one of {', '.join(self.choices)}" if self.choices else "leave it out"
            raise InputError(f"{given}: {cure}.")
        return str(value)


def settings_of(
    options: AppOptions, labels: Sequence[str] = (), sizes: Sequence[tuple[int, int]] = ()
) -> dict[str, Number | Choice]:
    """Return the settings of a video by their names, in the order of the documentation.

    Args:
        options: give limits and defaults.
        labels: the labels of the model.
        sizes: its sizes, (height, width).
    """
    samplers = dict.fromkeys((*BUILT_IN, options.sampler))  # a custom one of the command line is offered too
    return {
        "seconds": Number(min(INITIAL_SECONDS, options.max_seconds), MIN_SECONDS, options.max_seconds),
        "sampler": Choice(options.sampler, tuple(samplers)),
        "steps": Number(options.steps, 1, MAX_STEPS, whole=True),
        "guidance": Number(options.guidance, 0, MAX_GUIDANCE),
        "label": Choice(None, tuple(labels)),
        "label_guidance": Number(options.label_guidance, 0, MAX_GUIDANCE),
        "seed": Number(0, 0, MAX_SEED, whole=True),
        "size": Choice(None, tuple(f"{height}x{width}" for height, width in sizes)),
    }


def describe_model(pipeline: GPDiTPipeline, options: AppOptions, name: str) -> dict[str, Any]:
    """Return what the page shows about the model and its settings, as JSON values.

    Args:
        pipeline: the model.
        options: give the initial settings and the limits.
        name: the name of the model.
    """
    settings = settings_of(options, pipeline.labels, pipeline.sizes)
    choices = {key: list(setting.choices) for key, setting in settings.items() if isinstance(setting, Choice)}
    numbers = {key: setting for key, setting in settings.items() if isinstance(setting, Number)}
    return {
        "name": name,
        "step": pipeline.trained.step,
        "device": pipeline.device.type,
        "sizes": choices["size"],
        "frame_rate": pipeline.frame_rate,
        "labels": choices["label"],
        "samplers": choices["sampler"],
        "initial": {"sampler": options.sampler, **{key: number.default for key, number in numbers.items()}},
        "limits": {
            "upload": options.max_upload,
            "upload_seconds": options.max_upload_seconds,
            **{key: number.most for key, number in numbers.items()},
        },
    }


def parse_request(
    content: Any, pipeline: GPDiTPipeline, options: AppOptions, contexts: Mapping[str, VideoContext]
) -> VideoRequest:
    """Parse and check the settings of a video. Missing ones and null have the defaults, also all of them: `{}`.

    Args:
        content: JSON of the user: the settings of `settings_of`, and `context`, the id of an upload, without which the
            video begins with noise.
        pipeline: the model.
        options: give the limits and the defaults.
        contexts: the uploads by their ids.

    Raises:
        InputError: a setting is unknown, has an invalid value, or has no effect beside the others.
    """
    if not isinstance(content, dict):
        raise InputError("the settings are not a JSON object: send one.")
    settings = settings_of(options, pipeline.labels, pipeline.sizes)
    known = ("context", *settings)
    if unknown := [name for name in content if name not in known]:
        raise InputError(f"there is no setting {unknown[0]!r}: give some of {', '.join(known)}.")
    context_id = content.get("context")
    if context_id is not None and not (isinstance(context_id, str) and context_id in contexts):
        raise InputError("the uploaded file is no longer kept: choose it again.")
    values: dict[str, Any] = {name: setting.parse(name, content.get(name)) for name, setting in settings.items()}
    if values["label"] is None:
        if content.get("label_guidance") is not None:
            raise InputError("label_guidance is given without a label: give one, or leave label_guidance out.")
        values["label_guidance"] = 1.0
    if context_id is not None and values["size"] is not None:
        raise InputError("size is given with a context, which determines it: leave size out.")
    seconds = values.pop("seconds")
    return VideoRequest(
        context=None if context_id is None else contexts[context_id],
        seconds=seconds,
        options=GenerationOptions(guidance_levels=options.guidance_levels, **values),
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
