"""The model card (README.md) of an exported model: its use, sample images, scores, and the record of its training.

The card contains no local paths, since exported folders are published; `config.json` keeps them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from textwrap import fill
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from gpdit_lightning.checkpoints.facts import TrainingFacts, TrainingScores, ValidationLoss
from gpdit_lightning.checkpoints.first_use import TASKS, first_use, makes_images, source_of_training
from gpdit_lightning.checkpoints.systems import System, system_of
from gpdit_lightning.model.config import GPDiTConfig
from gpdit_lightning.names import SCORE_NAMES, as_text, is_hub_name
from gpdit_lightning.specs import CodecSpec

THIS_MODEL = ", with this folder or its name on the hub as `MODEL`"

IN_PYTHON = """In Python{model}:

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

ON_COMMAND_LINE = """On the command line{model}:

```bash
{command}
```"""

PAIRS = "`PAIRS` contains the folders `source` and `target`, whose images of the same name are the examples."

LICENSE = """## License

No license is stated, since the rights to the training data are not recorded. Before publishing these weights, add a
`license:` to the head of this file."""

SIGNATURE = "<!-- Written by gpdit_lightning; sha256 of the text above: "
MAX_LISTED_CLASSES = 10

UNNAMED_TASK = "video-generation"  # of metrics, where the hub has no name for the task
WEIGHTS_KINDS = {"ema": "averaged (EMA)", "raw": "last trained"}


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
    system = system_of(config, makes_images(facts))
    head = _head(system, config, facts, details)
    introduction = fill(system.introduction, 120, break_long_words=False, break_on_hyphens=False)
    sections = [f"---\n{head}\n---", f"# {system.name}\n\n{introduction}", _summary(facts, parameters, dtype)]
    sections += [f"![{caption}]({name})\n\n*{caption}*" for name, caption in details.images.items()]
    sections += ["## Use", *_use(config, facts)]
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
    sections += ["## Citation", "```bibtex\n" + "\n".join(system.papers) + "\n```"]
    text = as_text("\n\n".join([*sections, LICENSE]) + "\n\n")  # a record may have text that is not valid Unicode
    return text + _signature(text)


def is_unedited(card: str) -> bool:
    """Return whether a card is as `model_card` returned it; cards of earlier versions count as edited."""
    text, _, _ = card.rpartition(SIGNATURE)
    return card == text + _signature(text)


def _signature(text: str) -> str:
    """Return the last line of a card, an HTML comment with a hash of the text above, by which edits are detected."""
    return f"{SIGNATURE}{sha256(text.encode()).hexdigest()[:16]} -->\n"


def _head(system: System, config: GPDiTConfig, facts: TrainingFacts, details: CardDetails) -> str:
    """Return the YAML head, with metrics in the form of a model index."""
    task = _task(config, facts)
    results = [
        EvalResult(
            task_type=task or UNNAMED_TASK,
            dataset_type=f"held-out-{source}",
            dataset_name=f"held-out {source}",
            metric_type="loss",
            metric_name="Loss (validation, mean over quarters of the noise levels)",
            metric_value=round(loss, 6),
        )
        for source, loss in (_mean_losses(facts.validation) if facts.validation else {}).items()
    ]
    results += [
        EvalResult(
            task_type=task or UNNAMED_TASK,
            dataset_type=score.data,
            dataset_name=f"{score.data}: {score.protocol}",
            metric_type=score.metric,
            metric_name=SCORE_NAMES[score.metric],
            metric_value=score.value,
        )
        for score in (*_training_scores(facts.scores), *details.scores)
    ]
    named: dict[str, Any] = {"model_name": system.name, "eval_results": results} if results else {}
    tags = [*system.tags, *(["image-to-video"] if task == "video-to-video" and config.block_frames[0] == 1 else [])]
    return ModelCardData(library_name="gpdit_lightning", pipeline_tag=task, tags=tags, **named).to_yaml()


def _summary(facts: TrainingFacts, parameters: int, dtype: str) -> str:
    size = f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.2f}M"
    if facts.step is None:
        return f"{size} parameters in {dtype}. Their training is not recorded."
    kind = WEIGHTS_KINDS[facts.weights or "raw"]
    return f"{size} parameters in {dtype}: the {kind} weights after {facts.step:,} optimizer steps of {facts.stage}."


def _task(config: GPDiTConfig, facts: TrainingFacts) -> str | None:
    """Return the task of a model on the hub; None for videos without context, and if it is not recorded."""
    source = source_of_training(facts)
    return None if source is None or (source == "videos" and not config.takes_context) else TASKS[source]


def _use(config: GPDiTConfig, facts: TrainingFacts) -> list[str]:
    """Return how to use the model, as far as its record suffices."""
    use = first_use(config, facts)
    if use is None or facts.codec is None:
        return [NETWORK_IN_PYTHON]
    codec = facts.codec.name if facts.codec.is_custom else None
    command = use.command("MODEL", codec)
    if not use.arguments:
        return [ON_COMMAND_LINE.format(model=THIS_MODEL, command=command), PAIRS, NETWORK_IN_PYTHON]
    codec_argument = f', codec="{codec}"' if codec else ""
    in_python = IN_PYTHON.format(model=THIS_MODEL, codec=codec_argument, arguments=use.arguments, out=use.out)
    return [in_python, ON_COMMAND_LINE.format(model="", command=command), NETWORK_IN_PYTHON]


def _metrics(facts: TrainingFacts, details: CardDetails) -> list[str]:
    """Return the tables of the validation loss and of the scores."""
    parts = []
    if facts.validation:
        rows = ["| validation loss | mean of the four | noise levels 0 to 1/4 | 1/4 to 1/2 | 1/2 to 3/4 | 3/4 to 1 |"]
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
        clips = f"up to {geometry.frames} latent frames, at stride {geometry.stride}{rate}; {sizes} pixels"
        rows |= {"images": f"{sizes} pixels"} if makes_images(facts) else {"clips": clips}
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
