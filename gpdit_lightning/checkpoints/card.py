"""The model card (README.md) of an exported model, with the content of `config.json` in readable form."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gpdit_lightning.checkpoints.facts import TrainingFacts
from gpdit_lightning.model.config import GPDiTConfig

HEAD = """---
library_name: gpdit_lightning
tags:
- video-generation
- diffusion
- autoregressive
- gpdit
---

# GPDiT

A generative pre-trained autoregressive diffusion transformer ([GPDiT](https://arxiv.org/abs/2505.07344)): it generates
the latents of a video frame by frame, each frame denoised given the clean frames before it."""

IN_PYTHON = """## Use

```python
from gpdit_lightning import GPDiT

model = GPDiT.from_pretrained("MODEL")  # this folder, or its name on the hub
```"""

ON_COMMAND_LINE = """On the command line, with this folder as `MODEL`, to continue a video:

```bash
python -m gpdit_lightning sample --checkpoint MODEL --context VIDEO.mp4 --frames 16 --out out.mp4
```"""

LICENSE = """## License and limits

No license is stated, since the rights to the training data are not recorded. Before publishing these weights, add a
`license:` to the head of this file. No measure of quality is recorded either."""

MAX_LISTED_CLASSES = 10

WEIGHTS_KINDS = {"ema": "averaged (EMA)", "raw": "last trained"}


def model_card(config: GPDiTConfig, facts: TrainingFacts, parameters: int, dtype: str) -> str:
    """Return the card in Markdown, with the YAML head that the hub reads.

    Args:
        config: the architecture.
        facts: the record of the training.
        parameters: number of parameters.
        dtype: data type in which they are stored.
    """
    known = facts.to_dict()
    sections = [HEAD, _summary(facts, parameters, dtype), IN_PYTHON]
    if facts.codec and facts.geometry and facts.schedule:
        option = f"--codec {facts.codec.name} " if facts.codec.is_custom else ""
        sections.append(ON_COMMAND_LINE.replace("--context", f"{option}--context"))
    if facts.classes:
        sections += ["## Classes", _classes(facts.classes)]
    sections += ["## Architecture", _table("field", {"size": config.size, **config.architecture()})]
    if facts.codec:
        text = "Latents of this codec, whitened by its constants: `(latents - mean) / std` in each channel."
        sections += ["## Latents", text, _table("codec", known["codec"])]
    names = ("stage", "step", "schedule", "geometry", "origin", "validation", "lightning_version")
    training = {name: known[name] for name in names if name in known}
    if training:
        sections += ["## Training", _table("fact", training)]
    if facts.data:
        text = "The data and their order. Manifests are identified by the first 16 digits of their fingerprints."
        settings = {name: value for name, value in facts.data.items() if name != "data.labels"}  # listed above
        sections += [text, _table("setting", settings)]
    return "\n\n".join([*sections, LICENSE]) + "\n"


def _summary(facts: TrainingFacts, parameters: int, dtype: str) -> str:
    size = f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.2f}M"
    if facts.step is None:
        return f"{size} parameters in {dtype}. Their training is not recorded."
    kind = WEIGHTS_KINDS[facts.weights or "raw"]
    return f"{size} parameters in {dtype}: the {kind} weights after {facts.step:,} optimizer steps of {facts.stage}."


def _classes(names: Sequence[str]) -> str:
    shown = [f"`{name}`" for name in names]
    if len(shown) > MAX_LISTED_CLASSES:
        shown[MAX_LISTED_CLASSES - 1 : -1] = ["..."]
    return (
        f"The model can be conditioned on one of {len(names)} classes, listed in `config.json` by their numbers: "
        f"{', '.join(shown)}."
    )


def _table(first: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | `{json.dumps(value)}` |" for name, value in rows.items()]
    return "\n".join([f"| {first} | value |", "|---|---|", *lines])
