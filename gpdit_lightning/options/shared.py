"""Options that several verbs share."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from inspect import formatannotation
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from gpdit_lightning.errors import InputError
from gpdit_lightning.names import as_text, check_local
from gpdit_lightning.schema import shown

Precision = Literal["auto", "32", "bf16"]


MAX_SEED = 2**32 - 1  # of NumPy's global generator
MAX_COUNT = 2**20  # of results of one command, and of frames of a video: each takes memory or time
MAX_WORKERS = 1024


def check_at_least(options: Any, **limits: int) -> None:
    """Raise an InputError that names the option if a value is below its limit; None is accepted."""
    for name, limit in limits.items():
        value = getattr(options, name)
        if value is not None and value < limit:
            raise InputError(f"--{name} is {value}: give at least {limit}.")


def check_at_most(options: Any, **limits: int) -> None:
    """Raise an InputError that names the option if a value is above its limit; None is accepted."""
    for name, limit in limits.items():
        value = getattr(options, name)
        if value is not None and value > limit:
            raise InputError(f"--{name} is {value}: give at most {limit}.")


def check_between(options: Any, **ranges: tuple[float, float]) -> None:
    """Raise an InputError that names the option if a value is outside its range; None is accepted."""
    for name, (least, most) in ranges.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise InputError(f"--{name} is {value}: give a number from {least:g} to {most:g}.")


def check_has_effect(options: Any, condition: str, *names: str) -> None:
    """Raise an InputError if one of some options has a value other than its default.

    Args:
        options: the record.
        condition: under which the options have no effect, such as `without --context`.
        names: the options.
    """
    defaults = {field.name: field.default for field in fields(options)}
    for name in names:
        if getattr(options, name) != defaults[name]:
            raise InputError(f"--{name} has no effect {condition}: change that, or leave --{name} out.")


def check_is_utf8(options: Any, name: str, cure: str) -> None:
    """Raise an InputError if the value of an option, or one of its items, has bytes that are not UTF-8."""
    value = getattr(options, name)
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, str | Path) and str(item) != as_text(str(item)):
            raise InputError(f"--{name} is {item}, which is not UTF-8: {cure}.")


def names_of(*records: type[Any]) -> tuple[str, ...]:
    """Return the names of all options of some records."""
    return tuple(field.name for record in records for field in fields(record))


def _argument(value: Any) -> str:
    """Return a value as it is written on a command line: text as it is, all else as JSON."""
    return str(value) if isinstance(value, str | Path) else json.dumps(value, default=str)


def _is_required(record: Any, name: str) -> bool:
    """Return whether an option has no default; `config` may be empty where other options give the whole recipe."""
    return name != "config" and any(field.name == name and field.default is MISSING for field in fields(record))


def _accepts(hint: Any, value: Any) -> bool:
    """Return whether a value is of a type: number, truth value, text, path, named choice, sequence, mapping, record.

    NumPy's numbers are numbers, and truth values are none. A path may be a text, and a text in a sequence a path; one
    of either may stand for a sequence. What a mapping contains is not checked.
    """
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_accepts(part, value) for part in members)
    if origin is Literal:
        return any(type(value) is type(name) and value == name for name in members)
    if origin is Sequence:
        (item,) = members
        if isinstance(value, str | Path):
            return item in (str, Path)
        is_sequence = isinstance(value, Sequence) and not isinstance(value, bytes)
        return is_sequence and all(_accepts(str | Path if item is str else item, v) for v in value)
    if origin is tuple:
        is_sequence = isinstance(value, list | tuple) and len(value) == len(members)
        return is_sequence and all(map(_accepts, members, value))
    if hint is Path:
        return isinstance(value, str | Path)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return hint is Any or isinstance(value, origin or hint)


class OptionRecord:
    """Base of the records of options; converts strings to paths, and single paths and strings to tuples of one.

    A command line is parsed by the types of the fields, and a record that Python code makes is checked for them. Texts
    are taken for paths, which must not be addresses, except those of `NO_PATHS`.
    """

    NO_PATHS: ClassVar[Collection[str]] = ("data_dir", "overrides", "label", "source_pattern", "group_pattern")

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name in names_of(type(self)):
            hint, value = hints[name], getattr(self, name)
            types = (hint, *get_args(hint))
            items = value if isinstance(value, list | tuple) else [value]
            for item in items:
                if isinstance(item, str | Path) and name not in self.NO_PATHS:
                    check_local(f"--{name}", item)
            if not _accepts(hint, value):
                raise InputError(f"--{name} is {shown(value)}; it must be of type {formatannotation(hint)}.")
            if any(item == "" for item in items):
                raise InputError(f"--{name} is empty: give a value, or leave the option out.")
            if isinstance(value, list | tuple) and not value and _is_required(self, name):
                raise InputError(f"--{name} is an empty list: give at least one value.")
            takes_paths = Sequence[Path] in types
            if isinstance(value, str | Path) and (takes_paths or Sequence[str] in types):
                self._set(name, (Path(value) if takes_paths else value,))
            elif isinstance(value, str) and Path in types:
                self._set(name, Path(value))
            elif isinstance(value, Sequence) and takes_paths:
                self._set(name, tuple(map(Path, value)))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the records are frozen


@dataclass(frozen=True, kw_only=True)
class WeightsOptions(OptionRecord):
    """Model."""

    weights: Literal["ema", "raw"] = "ema"
    """Averaged (ema) or last trained (raw) weights."""


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(WeightsOptions):
    """Model."""

    checkpoint: str
    """A checkpoint, a run folder (for its last checkpoint), an exported folder, or its name on the hub (user/model)."""


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(OptionRecord):
    """Computation."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ...; auto is this process's GPU if there is one."""


@dataclass(frozen=True, kw_only=True)
class LoadingOptions(WeightsOptions, DeviceOptions):
    """Model."""

    codec_source: str | None = None
    """Folder, file or hub name of the codec's weights, if they were moved since the data were prepared."""
    codec: str | None = None
    """Import path of a custom codec's class. It must be given although a checkpoint records it, so that no file decides
    which code is imported."""


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions(OptionRecord):
    """Computation."""

    precision: Precision = "auto"
    """Precision of matrix products; auto is bf16 on GPUs of CUDA that have it, else 32."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(CheckpointOptions, LoadingOptions, PrecisionOptions):
    """Model."""


@dataclass(frozen=True, kw_only=True)
class SamplerOptions(OptionRecord):
    """Generation."""

    sampler: str = "rotation"
    """Sampler: rotation, tangent, adams, dpm2m, stochastic, or the import path of a class (see docs/generation.md)."""
    steps: int = 25
    """Sampler steps per latent frame."""
    guidance: float = 1.0
    """Guidance scale over the context (GPDiT: 1.2 for H, 2.0 for B); 1 is no guidance."""
    guidance_levels: tuple[float, float] = (0.0, 1.0)
    """Range of noise levels at which guidance is applied; 1 is pure noise, 0 a clean frame."""


@dataclass(frozen=True, kw_only=True)
class LabelGuidanceOptions(OptionRecord):
    """Generation."""

    label_guidance: float = 1.0
    """Guidance scale over the label; 1 is no guidance."""


@dataclass(frozen=True, kw_only=True)
class ContextNoiseOptions(OptionRecord):
    """Generation."""

    context_noise: float = 0.0
    """Angle in radians by which a generated frame is rotated towards noise before later frames attend to it, against
    drift in long videos; at most the data.context_noise of training. The video itself stays clean."""


@dataclass(frozen=True, kw_only=True)
class BatchedSamplerOptions(SamplerOptions):
    """Generation."""

    seed: int = 0
    """Seed of the noise; results are independent of batch composition."""
    batch_size: int = 8
    """Number of results that are generated at the same time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, seed=0, batch_size=1, steps=1)


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(OptionRecord):
    """Recipe."""

    EXAMPLE: ClassVar[str] = "gpdit:stage2_mixed"

    config: Sequence[str]
    """A recipe, then overlays; later ones override."""
    overrides: Mapping[str, Any] | Sequence[str] = ()
    """Options that override the recipe: {"trainer.max_steps": 10}, or words of a command line."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.overrides, Mapping):
            self._set("overrides", tuple(f"--{name}={_argument(value)}" for name, value in self.overrides.items()))
        if not self.config and not self.overrides:
            raise self.no_recipe()

    @classmethod
    def no_recipe(cls) -> InputError:
        """Return the error for a missing recipe."""
        return InputError(
            f"no recipe is given: give one, such as --config {cls.EXAMPLE} (`python -m gpdit_lightning recipes` lists "
            "all)."
        )

    @property
    def fit_arguments(self) -> list[str]:
        """The recipe as command-line arguments of `fit`."""
        return [*(f"--config={path}" for path in self.config), *self.overrides]


@dataclass(frozen=True, kw_only=True)
class SizeOptions(OptionRecord):
    """Videos."""

    size: str | None = None
    """HEIGHTxWIDTH in pixels, one of the sizes of training; by default the one that is closest in aspect to most of the
    videos."""


@dataclass(frozen=True, kw_only=True)
class VideoOptions(SizeOptions):
    """Videos."""

    videos: Sequence[str]
    """Videos, folders that are searched for videos recursively, and .txt lists with one path per line."""
