"""What a checkpoint or an exported folder records of the training of its weights, in one schema for both."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, Self

from gpdit_lightning.diffusion import NoiseSchedule
from gpdit_lightning.errors import InputError
from gpdit_lightning.schema import COUNT, NUMBER, OBJECT, TEXT, check, one_of
from gpdit_lightning.specs import ClipGeometry, CodecSpec

WeightsKind = Literal["ema", "raw"]

EXPORT_AGAIN = "export the model again"


@dataclass(frozen=True)
class Origin:
    """The weights that a stage started from; every checkpoint of the stage records it."""

    path: str
    """As the recipe named it."""
    step: int
    """Optimizer steps that they were trained for."""
    sha256: str
    """Identifies them: of the checkpoint or the exported folder."""


@dataclass(frozen=True)
class TrainingFacts:
    """What is known of the training of some weights; None, or empty, where it is not known.

    A checkpoint knows everything but, where training began at random, the origin.
    """

    weights: WeightsKind | None = None
    """Which of the checkpoint's weights these are: averaged (`ema`) or last trained (`raw`)."""
    step: int | None = None
    """Optimizer steps trained."""
    stage: str | None = None
    """The class of the stage that trained them."""
    origin: dict[str, Any] | None = None
    """`path`, `step` and `sha256` of the weights that the stage began with."""
    schedule: NoiseSchedule | None = None
    codec: CodecSpec | None = None
    """Of the latents that they were trained on."""
    geometry: ClipGeometry | None = None
    """Of the training clips."""
    classes: tuple[str, ...] = ()
    """The names of the classes, by the numbers that `GPDiT.forward` takes as conditions."""
    data: dict[str, Any] = field(default_factory=dict)
    """What the order of the training data depends on."""
    lightning_version: str | None = None

    SCHEMA: ClassVar[dict[str, Any]] = {
        "weights": one_of("ema", "raw"),
        "step": COUNT,
        "stage": TEXT,
        "origin": {"path": TEXT, "step": COUNT},
        "schedule": {"name": TEXT, "shift": NUMBER},
        "codec": CodecSpec.SCHEMA,
        "geometry": ClipGeometry.SCHEMA,
        "classes": [TEXT],
        "data": OBJECT,
        "lightning_version": TEXT,
    }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], file: str) -> Self:
        """The facts that a file records; it may hold other fields too.

        Args:
            content: of the file.
            file: its path, for messages.

        Raises:
            InputError: a field is of the wrong kind.
        """
        facts = {
            name: check(content[name], cls.SCHEMA[name], name, file, EXPORT_AGAIN)
            for name in cls.SCHEMA
            if name in content
        }
        if "schedule" in facts:
            try:
                facts["schedule"] = NoiseSchedule(**facts["schedule"])
            except (InputError, TypeError) as error:
                raise InputError(f"{file}: {error}") from None
        if "codec" in facts:
            facts["codec"] = CodecSpec.from_dict(facts["codec"], file, EXPORT_AGAIN)
        if "geometry" in facts:
            facts["geometry"] = ClipGeometry.from_dict(facts["geometry"], file, EXPORT_AGAIN)
        return cls(**facts | {"classes": tuple(facts.get("classes", ()))})

    def to_dict(self) -> dict[str, Any]:
        """What is known, as JSON values."""
        facts = {name: getattr(self, name) for name in self.SCHEMA} | {
            "schedule": self.schedule and asdict(self.schedule),
            "codec": self.codec and self.codec.to_dict(),
            "geometry": self.geometry and self.geometry.to_dict(),
            "classes": list(self.classes),
        }
        return {name: value for name, value in facts.items() if value not in (None, [], {})}
