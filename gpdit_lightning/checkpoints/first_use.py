"""The first use of a model that its card and `export` show: a command, and a call of the pipeline."""

import json
import shlex
from dataclasses import dataclass

from gpdit_lightning.checkpoints.facts import TrainingFacts
from gpdit_lightning.model.config import GPDiTConfig
from gpdit_lightning.model.layout import BlockLayout

FRAMES = 16  # pixel frames of a video that a model can generate at any length
SAMPLES = 8  # of a class
# The task on the hub of a model trained on a source; the first one in the data counts.
TASKS = {"videos": "video-to-video", "sequences": "image-to-image", "images": "unconditional-image-generation"}
# ACDiT's sampler and guidance over the label (its section 5.1).
ACDIT_SAMPLER: dict[str, float | str] = {"sampler": "dpm2m", "steps": 25}
ACDIT_GUIDANCE = {"image": 1.5, "video": 2.5}


@dataclass(frozen=True)
class FirstUse:
    """A first use of a model.

    Attributes:
        purpose: what it does, after "to".
        verb: the command.
        options: of the command, without --checkpoint, --codec and --out.
        out: name of the output.
        arguments: of the call of a pipeline; empty for a few-shot model, which has no such call.
    """

    purpose: str
    verb: str
    options: str
    out: str
    arguments: str = ""

    def command(self, model: str, codec: str | None = None) -> str:
        """Return the command line for the path of a model, with the import path of its codec if that is custom."""
        codec_option = f" --codec {codec}" if codec else ""
        program = f"python -m gpdit_lightning {self.verb} --checkpoint {shlex.quote(model)}{codec_option}"
        return f"{program} {self.options} --out {self.out}"


def source_of_training(facts: TrainingFacts) -> str | None:
    """Return the first source of `TASKS` on which a model was trained; None if its data are not recorded."""
    trained_on = {name.split(".")[1] for name in facts.data if name.endswith(".manifests")}
    return next((source for source in TASKS if source in trained_on), None)


def makes_images(facts: TrainingFacts) -> bool:
    """Return whether the clips of the training were single latent frames."""
    return facts.geometry is not None and facts.geometry.frames == 1


def first_use(config: GPDiTConfig, facts: TrainingFacts) -> FirstUse | None:
    """Return the first use of a model; None if codec, geometry or schedule are not recorded.

    A few-shot model transforms an image. A model of videos continues one, by as many frames as it can generate. A model
    without context, or of images, generates from noise alone: samples of a class if it has classes.

    Args:
        config: the architecture.
        facts: the record of the training.
    """
    if not (facts.codec and facts.geometry and facts.schedule):
        return None
    if source_of_training(facts) == "sequences":
        options = "--examples PAIRS --source IMAGE.png"
        return FirstUse("transform an image as example pairs show", "transform", options, "out.png")
    if makes_images(facts):
        return _of_class(config, facts) or FirstUse("generate an image", "sample", "--frames 1", "out.png", "frames=1")
    frames = _generated_frames(config, facts)
    if config.takes_context:
        options = f"--context VIDEO.mp4 --frames {frames}"
        return FirstUse("continue a video", "sample", options, "out.mp4", f'"VIDEO.mp4", frames={frames}')
    video = FirstUse("generate a video", "sample", f"--frames {frames}", "out.mp4", f"frames={frames}")
    return _of_class(config, facts) or video


def _of_class(config: GPDiTConfig, facts: TrainingFacts) -> FirstUse | None:
    """Return how to generate samples of a class, with ACDiT's sampler if the model is one; None without classes."""
    if not facts.classes:
        return None
    name, settings = facts.classes[0], dict[str, float | str]()
    if config.time_conditioning == "adaln" and config.target == "epsilon":
        settings |= ACDIT_SAMPLER
    if facts.data.get("data.label_dropout"):
        settings["label_guidance"] = ACDIT_GUIDANCE["image" if makes_images(facts) else "video"]
    arguments = [f"label={json.dumps(name, ensure_ascii=False)}", f"count={SAMPLES}"]
    arguments += [f"{option}={json.dumps(value)}" for option, value in settings.items()]
    options = [
        f"--label {shlex.quote(name)} --count {SAMPLES}",
        *(f"--{name} {value}" for name, value in settings.items()),
    ]
    return FirstUse("generate samples of a class", "sample", " ".join(options), "samples", ", ".join(arguments))


def _generated_frames(config: GPDiTConfig, facts: TrainingFacts) -> int:
    """Return the number of pixel frames to generate after the default context of a model, or without any.

    A model with blocks of frames generates any number. One whose blocks are parts of frames, or all frames of a clip,
    generates those of a training clip after the context.
    """
    assert facts.codec is not None
    assert facts.geometry is not None
    if config.block_frames[1] and config.whole_frames:
        return FRAMES
    height, width = (side // facts.codec.spatial_factor for side in facts.geometry.sizes[0])
    context = BlockLayout.of(config, height, width).context_length(facts.geometry.frames - 1)
    in_training = facts.codec.pixel_frames(facts.geometry.frames)
    return in_training - (facts.codec.pixel_frames(context) if context else 0)
