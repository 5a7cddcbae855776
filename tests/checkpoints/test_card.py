"""Model cards: the system that a model is, and commands that run as the card shows them."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from gpdit_lightning import GPDiT
from gpdit_lightning.checkpoints.card import model_card
from gpdit_lightning.checkpoints.exported import write_checksums
from gpdit_lightning.checkpoints.facts import TrainingFacts
from gpdit_lightning.cli import main
from gpdit_lightning.codecs import load_codec
from gpdit_lightning.diffusion import NoiseSchedule
from gpdit_lightning.media.video_writer import write_video
from gpdit_lightning.specs import ClipGeometry
from tests.model.toys import toy_config, toy_model

CODEC = load_codec("pca").spec()  # a latent frame after the first has 4 frames
SIDE = 32  # pixels, which are 2x2 tokens
NOISE = {"time_conditioning": "adaln", "target": "epsilon"}
CLASSES = ("night snake", "tench")
GPDIT, ACDIT, VIDGPT, WHOLE = "GPDiT", "ACDiT", "ViD-GPT", "Full-sequence diffusion transformer"
# architecture, latent frames of training clips, classes -> title, first words, arXiv number, options of the command
CARDS: dict[str, tuple[dict[str, Any], int, tuple[str, ...], str, str, str, str]] = {
    "gpdit": ({}, 5, (), GPDIT, "frame by frame", "2505.07344", "--context VIDEO.mp4 --frames 16"),
    "gpdit, images": ({}, 1, (), GPDIT, "trained on images", "2505.07344", "--frames 1"),
    "acdit, video": (
        {"block_shape": (2, 0, 0), "first_block_frames": 1, **NOISE}, 5, (), ACDIT,
        "the latents of a video block by block", "2412.07720", "--context VIDEO.mp4 --frames 16",
    ),
    "acdit, image": (
        {"block_shape": (1, 1, 2), **NOISE}, 1, CLASSES, ACDIT, "has 1 x 2 tokens", "2412.07720",
        "--label 'night snake' --count 8 --sampler dpm2m --steps 25 --label_guidance 1.5",
    ),
    "rotated squares of a video": (
        {"block_shape": (1, 1, 2)}, 3, (), ACDIT, "a rotation of pairs of hidden channels", "2505.07344",
        "--context VIDEO.mp4 --frames 4",
    ),
    "vid-gpt": (
        {"block_shape": (2, 0, 0), "first_block_frames": 3, "causal_in_block": True, "factorized": True, **NOISE}, 7,
        (), VIDGPT, "A chunk has 2 latent frames, and the first one 3", "2406.10981", "--context VIDEO.mp4 --frames 16",
    ),
    "whole clips": ({"block_shape": (0, 0, 0)}, 3, (), WHOLE, "denoises all latents of a video together",
                    "peebles2023dit", "--frames 9"),
    "whole clips of classes": ({"block_shape": (0, 0, 0), **NOISE}, 2, CLASSES, WHOLE, "enters by adaLN-Zero",
                               "peebles2023dit", "--label 'night snake' --count 8"),
    "whole clips after a context": (
        {"block_shape": (0, 0, 0), "first_block_frames": 2}, 4, (), WHOLE,
        "after the first 2 latent frames, its context", "peebles2023dit", "--context VIDEO.mp4 --frames 8",
    ),
}  # fmt: skip


def exported(folder: Path, frames: int, classes: tuple[str, ...], source: str, **fields: Any) -> Path:
    """Save a model with random weights, as if trained on clips of `frames` latent frames."""
    config = toy_config(latent_channels=16, layers=1, classes=len(classes), **fields)
    model = GPDiT(config).eval()
    model.load_state_dict(toy_model(config).float().state_dict())
    schedule = NoiseSchedule("linear" if fields.get("target") else "cosine")
    model.facts = TrainingFacts(
        weights="ema", step=3, stage="GPDiTStage", schedule=schedule, codec=CODEC,
        geometry=ClipGeometry(1, ((SIDE, SIDE),), frames, None), classes=classes,
        data={f"data.{source}.manifests": ["0"], **({"data.label_dropout": 0.1} if classes else {})},
    )  # fmt: skip
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", CARDS)
def test_a_card_describes_its_system_and_its_commands_run(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields, frames, classes, title, words, paper, options = CARDS[kind]
    folder = exported(tmp_path / "MODEL", frames, classes, "images" if frames == 1 else "videos", **fields)
    card = (folder / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    assert body.lstrip().startswith(f"# {title}\n")
    for text in (words, paper):
        assert text in " ".join(body.split())
    assert ("autoregressive" in yaml.safe_load(head)["tags"]) == (title != WHOLE)
    assert (title == GPDIT) == ("gpdit" in yaml.safe_load(head)["tags"])

    monkeypatch.chdir(tmp_path)
    write_video(Path("VIDEO.mp4"), torch.randint(0, 255, (40, 3, SIDE, SIDE), dtype=torch.uint8), fps=24)
    (command,) = re.findall(r"^python -m gpdit_lightning (sample .+)$", card, re.MULTILINE)
    assert f"--checkpoint MODEL {options}" in command
    out = Path(command.rpartition(" ")[2])
    assert main([*shlex.split(command), "--steps", "1"]) == 0
    assert out.exists()
    if kind not in ("gpdit", "acdit, image", "whole clips"):
        return
    code = re.findall(r"```python\n(.+?)```", card, re.DOTALL)[0].replace("seed=0", "seed=0, steps=1")
    code = code.replace("steps=25, ", "").replace(f'"{out}"', f'"python-{out}"')
    exec(code, {})
    assert Path(f"python-{out}").exists()


def test_the_card_of_a_few_shot_model_transforms_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exported(tmp_path / "MODEL", 6, (), "sequences")
    for name in ("IMAGE.png", "PAIRS/source/a.png", "PAIRS/target/a.png", "PAIRS/source/b.png", "PAIRS/target/b.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(len(name) + ord(name[-5])).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(name)
    card = Path("MODEL/README.md").read_text()
    assert "sample --checkpoint" not in card
    (command,) = re.findall(r"^python -m gpdit_lightning (transform .+)$", card, re.MULTILINE)
    assert main([*shlex.split(command), "--steps", "1"]) == 0
    assert Path("out.png").exists()


def test_a_model_without_the_record_of_its_training_has_the_network_alone() -> None:
    card = model_card(toy_config(), TrainingFacts(), 1000, "float32")
    assert "GPDiT.from_pretrained" in card
    assert "python -m gpdit_lightning" not in card
    custom = replace(CODEC, name="my_parts.MyCodec")
    facts = TrainingFacts(codec=custom, geometry=ClipGeometry(1, ((32, 32),), 5, None), schedule=NoiseSchedule())
    card = model_card(toy_config(), facts, 1000, "float32")
    assert "--checkpoint MODEL --codec my_parts.MyCodec --context" in card
    assert 'GPDiTPipeline.from_pretrained("MODEL", codec="my_parts.MyCodec")' in card


def test_a_record_with_invalid_unicode_and_a_hostile_codec_is_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported(tmp_path / "model", 3, (), "videos")
    record = json.loads((folder / "config.json").read_text())
    record |= {"stage": "Stage\ud800", "codec": record["codec"] | {"source": "a b; touch c\x1b[2J"}}
    (folder / "config.json").write_text(json.dumps(record))
    write_checksums(folder)
    assert main(["export", "--checkpoint", str(folder), "--out", str(tmp_path / "again"), "--no_samples"]) == 0
    assert capsys.readouterr().out.endswith(" --codec_source 'a b; touch c\\x1b[2J'\n")
    assert "Stage\\ud800" in (tmp_path / "again" / "README.md").read_text()
