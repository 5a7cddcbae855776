"""The model card (README.md) of an exported model: its use, sample images, scores, and the record of its training.

The card contains no local paths, since exported folders are published; `config.json` keeps them.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from gpdit_lightning.checkpoints.facts import TrainingFacts, TrainingScores, ValidationLoss
from gpdit_lightning.model.config import GPDiTConfig
from gpdit_lightning.names import SCORE_NAMES, is_hub_name
from gpdit_lightning.specs import CodecSpec

NAME = "GPDiT"
TAGS = ["video-generation", "video-prediction", "diffusion", "autoregressive", "gpdit"]

INTRODUCTION = """# GPDiT

A generative pre-trained autoregressive diffusion transformer ([GPDiT](https://arxiv.org/abs/2505.07344)): it generates
the latents of {medium} {unit} by {unit}, each {unit} denoised given the clean {unit}s before it."""

IN_PYTHON = """In Python, with this folder or its name on the hub as `MODEL`:

```python
from gpdit_lightning import GPDiTPipeline

pipeline = GPDiTPipeline.from_pretrained("MODEL"{codec})
pipeline({arguments}, seed=0).save("{out}")
```"""

NETWORK_IN_PYTHON = """The network alone:

```python
from gpdit_lightning import GPDiT

model = GPDiT.from_pretrained("MODEL")  # this folder, or its name on the hub
```"""

ON_COMMAND_LINE = """On the command line:

```bash
python -m gpdit_lightning sample --checkpoint MODEL{codec} {options} --out {out}
```"""

TRANSFORM = """On the command line, with this folder or its name on the hub as `MODEL`:

```bash
python -m gpdit_lightning transform --checkpoint MODEL --examples PAIRS --source IMAGE.png --out out.png
```"""

LICENSE = """## License

No license is stated, since the rights to the training data are not recorded. Before publishing these weights, add a
`license:` to the head of this file."""

SIGNATURE = "<!-- Written by gpdit_lightning; sha256 of the text above: "
MAX_LISTED_CLASSES = 10

WEIGHTS_KINDS = {"ema": "averaged (EMA)", "raw": "last trained"}
# The task on the hub of a model trained on a source; the first one in the data counts.
TASKS = {"videos": "video-to-video", "sequences": "image-to-image", "images": "unconditional-image-generation"}


@dataclass(frozen=True)
class CardScore:
    """A score of an evaluation, or one that was computed during the training.

    Attributes:
        metric: key of the metric in `SCORE_NAMES`.
        value: the mean over seeds.
        text: the mean with its deviation or a comparison.
        data: name of the data set.
        protocol: what was generated from what.
    """

    metric: str
    value: float
    text: str
    data: str
    protocol: str


@dataclass(frozen=True)
class GenerationExample:
    """A first use of a model.

    Attributes:
        purpose: what it does, after "to".
        arguments: of the call of a pipeline.
        options: of `sample`, without --checkpoint, --codec and --out.
        out: name of the output.
    """

    purpose: str
    arguments: str
    options: str
    out: str


@dataclass(frozen=True)
class CardDetails:
    """What a card shows besides the record in the weights.

    Attributes:
        images: file name in the folder -> caption.
        scores: scores of an evaluation.
    """

    images: Mapping[str, str] = field(default_factory=dict)
    scores: Sequence[CardScore] = ()


def model_card(
    config: GPDiTConfig, facts: TrainingFacts, parameters: int, dtype: str, details: CardDetails | None = None
) -> str:
    """Return the card in Markdown, with the YAML head that the hub reads.

    Args:
        config: the architecture.
        facts: the record of the training.
        parameters: number of parameters.
        dtype: data type in which they are stored.
        details: sample images and scores.
    """
    details = details or CardDetails()
    task = task_of(facts)
    unit = "frame" if config.block_shape == (1, 0, 0) else "block"
    medium = "an image" if unit == "block" and _makes_images(facts) else "a video"
    introduction = INTRODUCTION.format(medium=medium, unit=unit)
    sections = [f"---\n{_head(task, facts, details)}\n---", introduction, _summary(facts, parameters, dtype)]
    sections += [f"![{caption}]({name})\n\n*{caption}*" for name, caption in details.images.items()]
    sections += ["## Use", *_use(task, facts, config.takes_context)]
    if metrics := _metrics(facts, details):
        sections += ["## Metrics", *metrics]
    if facts.classes:
        sections += ["## Classes", _classes(facts.classes)]
    if training := _training(facts):
        sections += ["## Training", _table("", training)]
    if facts.data:
        text = "The data and their order. Manifests are identified by the first 16 digits of their fingerprints."
        settings = {name: value for name, value in facts.data.items() if name != "data.labels"}  # listed above
        sections += [text, _table("setting", _as_code(settings))]
    sections += ["## Architecture", _table("field", _as_code({"size": config.size, **config.architecture()}))]
    if facts.codec:
        text = "Latents of this codec, whitened by its constants: `(latents - mean) / std` in each channel."
        sections += ["## Latents", text, _table("codec", _as_code(_codec(facts.codec)))]
    text = "\n\n".join([*sections, LICENSE]) + "\n\n"
    return text + _signature(text)


def is_unedited(card: str) -> bool:
    """Return whether a card is as `model_card` returned it; cards of earlier versions count as edited."""
    text, _, _ = card.rpartition(SIGNATURE)
    return card == text + _signature(text)


def _signature(text: str) -> str:
    """Return the last line of a card, an HTML comment with a hash of the text above, by which edits are detected."""
    return f"{SIGNATURE}{sha256(text.encode()).hexdigest()[:16]} -->\n"


def task_of(facts: TrainingFacts) -> str | None:
    """Return the task of a model on the hub, by the data that it was trained on; None if they are not recorded."""
    trained_on = {name.split(".")[1] for name in facts.data if name.endswith(".manifests")}
    return next((task for source, task in TASKS.items() if source in trained_on), None)


def _head(task: str | None, facts: TrainingFacts, details: CardDetails) -> str:
    """Return the YAML head, with metrics in the form of a model index."""
    results = [
        EvalResult(
            task_type=task or "video-to-video",
            dataset_type=f"held-out-{source}",
            dataset_name=f"held-out {source}",
            metric_type="loss",
            metric_name="Loss (validation)",
            metric_value=round(loss, 6),
        )
        for source, loss in (_mean_losses(facts.validation) if facts.validation else {}).items()
    ]
    results += [
        EvalResult(
            task_type=task or "video-to-video",
            dataset_type=score.data,
            dataset_name=f"{score.data}: {score.protocol}",
            metric_type=score.metric,
            metric_name=SCORE_NAMES[score.metric],
            metric_value=score.value,
        )
        for score in (*_training_scores(facts.scores), *details.scores)
    ]
    named: dict[str, Any] = {"model_name": NAME, "eval_results": results} if results else {}
    tags = [*TAGS, *(["image-to-video"] if task == "video-to-video" else [])]
    return ModelCardData(library_name="gpdit_lightning", pipeline_tag=task, tags=tags, **named).to_yaml()


def _summary(facts: TrainingFacts, parameters: int, dtype: str) -> str:
    size = f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.2f}M"
    if facts.step is None:
        return f"{size} parameters in {dtype}. Their training is not recorded."
    kind = WEIGHTS_KINDS[facts.weights or "raw"]
    return f"{size} parameters in {dtype}: the {kind} weights after {facts.step:,} optimizer steps of {facts.stage}."


def _use(task: str | None, facts: TrainingFacts, takes_context: bool) -> list[str]:
    """Return the commands that generate with the model, as far as its record suffices for them."""
    if not (facts.codec and facts.geometry and facts.schedule):
        return [NETWORK_IN_PYTHON]
    option, argument = "", ""
    if facts.codec.is_custom:
        option, argument = f" --codec {facts.codec.name}", f', codec="{facts.codec.name}"'
    if task == "image-to-image":
        return [TRANSFORM.replace(" --examples", f"{option} --examples"), NETWORK_IN_PYTHON]
    example = generation_example(facts, takes_context)
    return [
        IN_PYTHON.format(codec=argument, arguments=example.arguments, out=example.out),
        ON_COMMAND_LINE.format(codec=option, options=example.options, out=example.out),
        NETWORK_IN_PYTHON,
    ]


def generation_example(facts: TrainingFacts, takes_context: bool) -> GenerationExample:
    """Return how to continue a video; of a model without context, or of images, how to generate from noise alone."""
    if takes_context and not _makes_images(facts):
        options = "--context VIDEO.mp4 --frames 16"
        return GenerationExample("continue a video", '"VIDEO.mp4", frames=16', options, "out.mp4")
    if facts.classes:
        name = facts.classes[0]
        arguments = f"label={json.dumps(name, ensure_ascii=False)}, count=8"
        options = f"--label {shlex.quote(name)} --count 8"
        return GenerationExample("generate samples of a class", arguments, options, "samples")
    if _makes_images(facts):
        return GenerationExample("generate an image", "frames=1", "--frames 1", "out.png")
    return GenerationExample("generate a video", "frames=16", "--frames 16", "out.mp4")


def _makes_images(facts: TrainingFacts) -> bool:
    """Return whether the clips of the training were single latent frames."""
    return facts.geometry is not None and facts.geometry.frames == 1


def _metrics(facts: TrainingFacts, details: CardDetails) -> list[str]:
    """Return the tables of the validation loss and of the scores."""
    parts = []
    if facts.validation:
        rows = ["| validation | loss | noise levels 0 to 1/4 | 1/4 to 1/2 | 1/2 to 3/4 | 3/4 to 1 |"]
        rows.append("|---|---|---|---|---|---|")
        for source, mean in _mean_losses(facts.validation).items():
            quarters = ("-" if loss is None else f"{loss:.4f}" for loss in facts.validation.quarters[source])
            rows.append(f"| held-out {source}, step {facts.validation.step:,} | {mean:.4f} | {' | '.join(quarters)} |")
        parts.append("\n".join(rows))
    if scores := [*_training_scores(facts.scores), *details.scores]:
        rows = [f"| {score.data}: {score.protocol} | {SCORE_NAMES[score.metric]} | {score.text} |" for score in scores]
        parts.append("\n".join(["| data | score | value |", "|---|---|---|", *rows]))
    return parts


def _training_scores(scores: TrainingScores | None) -> list[CardScore]:
    """Return the scores that were computed during the training, each beside that of repeating the last frame."""
    if scores is None:
        return []
    frames = f"{scores.generated_frames} frames from {scores.context_frames}" if scores.context_frames else "from noise"
    networks = "".join(f"; {SCORE_NAMES[name].split()[0]} by {network}" for name, network in scores.networks.items())
    protocol = (
        f"{scores.clips:,} clips decoded from latents, {frames}; {scores.sampler} sampler, {scores.sampler_steps} "
        f"steps{networks}; computed during the training, at step {scores.step:,}"
    )
    listed = []
    for name, value in scores.values.items():
        if name in SCORE_NAMES:  # and not of the last frame, repeated
            repeated = scores.values.get(f"{name}_repeated")
            text = f"{value:.4g}" if repeated is None else f"{value:.4g} (repeating the last frame: {repeated:.4g})"
            listed.append(CardScore(name, value, text, f"held-out {scores.source}", protocol))
    return listed


def _mean_losses(validation: ValidationLoss) -> dict[str, float]:
    """Return the mean loss of each source over the quarters of the noise levels."""
    measured = {source: [loss for loss in losses if loss is not None] for source, losses in validation.quarters.items()}
    return {source: sum(losses) / len(losses) for source, losses in measured.items() if losses}


def _classes(names: Sequence[str]) -> str:
    shown = [f"`{name}`" for name in names]
    if len(shown) > MAX_LISTED_CLASSES:
        shown[MAX_LISTED_CLASSES - 1 : -1] = ["..."]
    return (
        f"The model can be conditioned on one of {len(names)} classes, listed in `config.json` by their numbers: "
        f"{', '.join(shown)}. Samples of one: `python -m gpdit_lightning sample --checkpoint MODEL --label NAME "
        "--count 8 --out samples`."
    )


def _training(facts: TrainingFacts) -> dict[str, str]:
    """Return the facts of the training as sentences, as far as they are recorded."""
    rows = {}
    if facts.stage:
        rows["stage"] = facts.stage
    if facts.step is not None:
        rows["optimizer steps"] = f"{facts.step:,}"
        rows["initial weights"] = "random"
        if facts.origin:
            sha256 = f" (sha256 `{facts.origin.sha256[:16]}`)" if facts.origin.sha256 else ""
            rows["initial weights"] = f"of an earlier training of {facts.origin.step:,} steps{sha256}"
    if facts.schedule:
        rows["noise schedule"] = f"{facts.schedule.name}, shift {facts.schedule.shift:g}"
    if facts.geometry:
        geometry = facts.geometry
        sizes = ", ".join(f"{height}x{width}" for height, width in geometry.sizes)
        rate = f" of {geometry.fps:g} fps" if geometry.fps else ""
        rows["clips"] = f"up to {geometry.frames} latent frames, at stride {geometry.stride}{rate}; {sizes} pixels"
    for source in TASKS:
        if size := facts.data.get(f"data.{source}.batch_size"):
            rows[f"batch, {source}"] = f"{size} in each optimizer step"
    for source, counts in facts.run.get("samples", {}).items():
        rows[f"data, {source}"] = f"{counts['train']:,} samples, and {counts['validation']:,} held out"
    if optimizer := facts.run.get("optimizer"):
        algorithm = "Muon and AdamW" if optimizer.get("algorithm") == "muon" else "AdamW"
        settings = ", ".join(f"{name} {value}" for name, value in optimizer.items() if name != "algorithm")
        rows["optimizer"] = f"{algorithm}: {settings}"
    for name in ("precision", "hardware"):
        if name in facts.run:
            rows[name] = str(facts.run[name])
    if facts.lightning_version:
        rows["Lightning"] = facts.lightning_version
    return rows


def _codec(codec: CodecSpec) -> dict[str, Any]:
    """Return the record of a codec, without the path of its weights if that is not a name on the hub."""
    record = codec.to_dict()
    if codec.source is not None and not is_hub_name(codec.source):
        record["source"] = "a local file or folder"
    return record


def _as_code(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"`{json.dumps(value)}`" for name, value in values.items()}


def _table(first: str, rows: Mapping[str, str]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([f"| {first} | value |", "|---|---|", *lines])
