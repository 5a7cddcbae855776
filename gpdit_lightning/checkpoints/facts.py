"""The record of the training of some weights, with one schema for checkpoints and exported folders."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, Self

from gpdit_lightning.diffusion import NoiseSchedule
from gpdit_lightning.errors import InputError
from gpdit_lightning.schema import COUNT, NUMBER, NUMBER_OR_NULL, OBJECT, TEXT, TEXT_OR_NULL, check, one_of
from gpdit_lightning.specs import ClipGeometry, CodecSpec

# Fields of `data` and `run` that are used; a checkpoint may record others, and lack any.
USED_FIELDS: dict[str, dict[str, Any]] = {
    "data": dict.fromkeys(("data.context_dropout", "data.context_noise", "data.label_dropout"), NUMBER)
    | {"data.videos.frames_without_loss": COUNT},
    "run": {"samples": OBJECT, "optimizer": OBJECT},
}
SAMPLE_COUNTS = {"train": COUNT, "validation": COUNT}
WeightsKind = Literal["ema", "raw"]

EXPORT_AGAIN = "export the model again"
MAX_VALUES = 2**20  # of the facts in a file


@dataclass(frozen=True)
class Origin:
    """The initial weights of a stage, as recorded in every checkpoint of the stage."""

    path: str
    """Their path in the recipe."""
    step: int
    """Optimizer steps that they were trained for."""
    sha256: str | None = None
    """Hash of the checkpoint or exported folder, which identifies them; None if it is not recorded."""

    SCHEMA: ClassVar[dict[str, Any]] = {"path": TEXT, "step": COUNT}

    @classmethod
    def from_dict(cls, content: Any, file: str, cure: str) -> Self:
        """Parse and validate the record in a file, from its field `origin`; otherwise as `CodecSpec.from_dict`."""
        check(content, cls.SCHEMA, "origin", file, cure)
        sha256 = check(content.get("sha256"), TEXT_OR_NULL, "origin.sha256", file, cure)
        return cls(content["path"], content["step"], sha256)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class ValidationLoss:
    """The last validation of a run before a checkpoint."""

    step: int
    """Optimizer steps trained."""
    quarters: dict[str, tuple[float | None, ...]]
    """For each source the mean loss in each quarter of the noise levels, [0, 1/4) to [3/4, 1]; None for a
    quarter without frames."""

    SCHEMA: ClassVar[dict[str, Any]] = {"step": COUNT, "quarters": OBJECT}

    @classmethod
    def from_dict(cls, content: Any, file: str, cure: str) -> Self:
        """Parse and validate the record in a file, from its field `validation`; otherwise as `CodecSpec.from_dict`."""
        check(content, cls.SCHEMA, "validation", file, cure)
        for source, losses in content["quarters"].items():
            name = f"validation.quarters.{source}"
            if len(check(losses, [NUMBER_OR_NULL], name, file, cure)) != 4:
                raise InputError(f"{file} has {len(losses)} numbers in {name}, one is needed for each quarter: {cure}.")
        return cls(content["step"], {source: tuple(losses) for source, losses in content["quarters"].items()})

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return {"step": self.step, "quarters": {source: list(losses) for source, losses in self.quarters.items()}}


@dataclass(frozen=True)
class TrainingScores:
    """The last scores of held-out clips that a run computed before a checkpoint."""

    step: int
    """Optimizer steps trained."""
    source: str
    """Source of the clips in the data."""
    clips: int
    """Number of clips."""
    context_frames: int
    """Pixel frames of context of each clip."""
    generated_frames: int
    """Pixel frames after the context."""
    sampler: str
    sampler_steps: int
    """Sampler steps per latent frame."""
    networks: dict[str, str]
    """Name of the network of each score that has one, by the key of the score."""
    values: dict[str, float]
    """Scores by their keys in `names.SCORE_NAMES`, each also with `_repeated` for the last context frame, repeated."""

    SCHEMA: ClassVar[dict[str, Any]] = {
        "step": COUNT,
        "source": TEXT,
        "clips": COUNT,
        "context_frames": COUNT,
        "generated_frames": COUNT,
        "sampler": TEXT,
        "sampler_steps": COUNT,
        "networks": OBJECT,
        "values": OBJECT,
    }

    @classmethod
    def from_dict(cls, content: Any, file: str, cure: str) -> Self:
        """Parse and validate the record in a file, from its field `scores`; otherwise as `CodecSpec.from_dict`."""
        check(content, cls.SCHEMA, "scores", file, cure)
        for name, schema in (("networks", TEXT), ("values", NUMBER)):
            for key, value in content[name].items():
                check(value, schema, f"scores.{name}.{key}", file, cure)
        return cls(**{name: content[name] for name in cls.SCHEMA})


@dataclass(frozen=True)
class TrainingFacts:
    """The record of the training of some weights; None, or empty, for each fact that is not recorded.

    A checkpoint records all of them, except the origin if training started from random weights.
    """

    weights: WeightsKind | None = None
    """Which weights of the checkpoint these are: averaged (`ema`) or last trained (`raw`)."""
    step: int | None = None
    """Optimizer steps trained."""
    stage: str | None = None
    """Name of the class of the training stage."""
    origin: Origin | None = None
    """The initial weights of the stage."""
    schedule: NoiseSchedule | None = None
    codec: CodecSpec | None = None
    """Codec of the training latents."""
    geometry: ClipGeometry | None = None
    """Stride, frame sizes and length of the training clips."""
    classes: tuple[str, ...] = ()
    """Names of the classes, in the order of the numbers that `GPDiT.forward` takes as conditions."""
    data: dict[str, Any] = field(default_factory=dict)
    """The settings that the order of the training data depends on."""
    validation: ValidationLoss | None = None
    scores: TrainingScores | None = None
    run: dict[str, Any] = field(default_factory=dict)
    """Settings and circumstances that generation does not depend on, for the model card: `optimizer`, `precision`,
    `hardware`, and the number of `samples` of each source and split."""
    lightning_version: str | None = None

    SCHEMA: ClassVar[dict[str, Any]] = {
        "weights": one_of("ema", "raw"),
        "step": COUNT,
        "stage": TEXT,
        "origin": Origin.SCHEMA,
        "schedule": {"name": TEXT, "shift": NUMBER},
        "codec": CodecSpec.SCHEMA,
        "geometry": ClipGeometry.SCHEMA,
        "classes": [TEXT],
        "data": OBJECT,
        "validation": ValidationLoss.SCHEMA,
        "scores": TrainingScores.SCHEMA,
        "run": OBJECT,
        "lightning_version": TEXT,
    }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], file: str) -> Self:
        """Parse and validate the facts in a file; other fields are ignored.

        Args:
            content: content of the file.
            file: path of the file, for messages.

        Raises:
            InputError: a field is of the wrong type, or the facts have more than `MAX_VALUES` values.
        """
        _check_size({name: content[name] for name in cls.SCHEMA if name in content}, file)
        facts = {
            name: check(content[name], cls.SCHEMA[name], name, file, EXPORT_AGAIN)
            for name in cls.SCHEMA
            if name in content
        }
        for group, fields in USED_FIELDS.items():
            given = facts.get(group, {})
            check(given, {name: fields[name] for name in fields if name in given}, group, file, EXPORT_AGAIN)
        for source, counts in facts.get("run", {}).get("samples", {}).items():
            check(counts, SAMPLE_COUNTS, f"run.samples.{source}", file, EXPORT_AGAIN)
        if "origin" in facts:
            facts["origin"] = Origin.from_dict(facts["origin"], file, EXPORT_AGAIN)
        if "schedule" in facts:
            try:
                facts["schedule"] = NoiseSchedule(**facts["schedule"])
            except (InputError, TypeError) as error:
                raise InputError(f"{file}: {error}") from None
        if "codec" in facts:
            facts["codec"] = CodecSpec.from_dict(facts["codec"], file, EXPORT_AGAIN)
        if "geometry" in facts:
            facts["geometry"] = ClipGeometry.from_dict(facts["geometry"], file, EXPORT_AGAIN)
        if "validation" in facts:
            facts["validation"] = ValidationLoss.from_dict(facts["validation"], file, EXPORT_AGAIN)
        if "scores" in facts:
            facts["scores"] = TrainingScores.from_dict(facts["scores"], file, EXPORT_AGAIN)
        return cls(**facts | {"classes": tuple(facts.get("classes", ()))})

    def to_dict(self) -> dict[str, Any]:
        """Return the facts that are recorded, as JSON values."""
        facts = {name: getattr(self, name) for name in self.SCHEMA} | {
            "origin": self.origin and self.origin.to_dict(),
            "schedule": self.schedule and asdict(self.schedule),
            "codec": self.codec and self.codec.to_dict(),
            "geometry": self.geometry and self.geometry.to_dict(),
            "validation": self.validation and self.validation.to_dict(),
            "scores": self.scores and asdict(self.scores),
            "classes": list(self.classes),
        }
        return {name: value for name, value in facts.items() if value not in (None, [], {})}


def _check_size(facts: Any, file: str) -> None:
    """Raise `InputError` if facts have too many values, which a small checkpoint can have by references."""
    stack, count = [facts], 0
    while stack:
        value = stack.pop()
        if isinstance(value, Mapping | list | tuple):
            count += len(value)
            stack += value.values() if isinstance(value, Mapping) else value
        if count > MAX_VALUES:
            raise InputError(
                f"{file} has more than {MAX_VALUES:,} values as the record of its training: {EXPORT_AGAIN}."
            )
