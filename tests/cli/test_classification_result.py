"""The result file of a classifier, which `fit` writes at its end and `validate` again."""

import json
from pathlib import Path

import numpy as np
import pytest

from gpdit_lightning.cli import main
from tests.data.labelled import write_labelled

RECIPE = """
run_dir: {run}
seed_everything: 0
model:
  class_path: ClassificationStage
  init_args:
    backbone: {{size: custom, layers: 1, width: 16, heads: 2, mlp_width: 16, latent_channels: 4}}
    classification: {{mixup: 0.8}}
data:
  labels: true
  label_dropout: 0.0
  images: {{manifests: [{shards}], batch_size: 6}}
trainer: {{accelerator: cpu, max_steps: 2, enable_progress_bar: false, enable_model_summary: false}}
validate_every_steps: 2
preview: {{every_steps: 0}}
ema: {{decay: 0.5}}
"""


def test_fit_and_validate_write_the_same_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 13 held-out images in batches of 6, each once."""
    numbers, names = np.random.default_rng(0), ("rot", "grün", "blau")

    def images(count: int) -> list[tuple[str | None, np.ndarray]]:
        return [(names[numbers.integers(3)], numbers.normal(size=(1, 4, 4, 4))) for _ in range(count)]

    held_out = images(13)
    write_labelled(tmp_path / "shards", names, images(12), held_out)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(run=tmp_path / "run", shards=tmp_path / "shards"))
    words = ["--config", str(tmp_path / "recipe.yaml")]
    assert main(["fit", *words]) == 0
    path = tmp_path / "run" / "classification.json"
    written = path.read_text()
    assert "## Fine-tuned classifier of" in capsys.readouterr().out
    path.unlink()
    assert main(["validate", *words]) == 0
    assert path.read_text() == written
    text = capsys.readouterr().out
    (result,) = json.loads(written)["results"]
    (score,), protocol = result["layers"], result["protocol"]
    assert f"val/top1_accuracy   {score['accuracy']:.5f}" in text
    assert round(score["accuracy"] * 13, 9) in range(14)
    assert (score["layer"], score["C"], score["top5"], result["weights"]) == (1, None, 1.0, "ema")
    assert score["interval"][0] <= score["accuracy"] <= score["interval"][1]
    assert (protocol["test_clips"], protocol["test_videos"], protocol["medium"]) == (13, 13, "images")
    frequencies = [sum(label == name for label, _ in held_out) / 13 for name in names]
    assert protocol["chance"] == pytest.approx(max(frequencies))
    assert "| 1 | **" in (tmp_path / "run" / "classification.md").read_text()
