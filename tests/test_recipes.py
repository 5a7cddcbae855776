"""Every recipe can be built and trains; the paper's numbers are the paper's."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.cli import main
from gpdit_lightning.training.checkpoints import read_checkpoint

RECIPES = Path(__file__).parents[1] / "recipes"
WHOLE = [
    path for path in sorted(RECIPES.rglob("*.yaml")) if path.parent.name != "size"
]  # those under size/ are overlays


def settings_of(*paths: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    arguments = [argument for path in paths for argument in ("--config", str(path))]
    with pytest.raises(SystemExit):
        main(["fit", *arguments, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def test_there_are_recipes() -> None:
    assert {path.stem for path in WHOLE} >= {"stage2_mixed", "digits", "overfit_one_clip"}


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_head_says_command_and_hardware(path: Path) -> None:
    head = path.read_text().split("\n\n", maxsplit=1)[0] + path.read_text().split("run_dir", maxsplit=1)[0]
    assert "python -m gpdit_lightning" in head
    assert "Hardware:" in head


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)
def test_the_backbone_can_be_built(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings_of(path, capsys=capsys)["model"]["init_args"]["backbone"]
    with torch.device("meta"):
        assert GPDiT(GPDiTConfig(**config)).config.layers > 0


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)
def test_it_trains_one_step_at_tiny_size(path: Path, tiny_shards: Path, tmp_path: Path) -> None:
    """The recipe as it stands, on tiny shards; only what needs hardware or real data is replaced."""
    overlays = ["--config", str(RECIPES / "size" / "tiny.yaml")] if path.parent == RECIPES else []
    settings = yaml.safe_load(path.read_text())
    sources = [name for name in ("images", "videos") if name in settings["data"]]
    arguments = [
        "fit",
        "--config",
        str(path),
        *overlays,
        f"--run_dir={tmp_path / 'run'}",
        *[f"--data.{name}.manifests=['{tiny_shards}']" for name in sources],
        *(["--data.videos.frames=0"] if overlays else []),
        "--model.init_args.backbone.latent_channels=4",
        "--model.init_args.backbone.layers=1",
        "--trainer.max_steps=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    ]
    assert main(arguments) == 0
    assert read_checkpoint(tmp_path / "run")["global_step"] == 1


def test_stage_2_has_the_numbers_of_section_5_1(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = settings_of(RECIPES / "stage2_mixed.yaml", capsys=capsys)
    assert recipe["model"]["class_path"].endswith("MixedStage")
    assert recipe["model"]["init_args"]["backbone"]["size"] == "H"
    assert recipe["trainer"]["max_steps"] == 200_000
    assert recipe["data"]["images"]["batch_size"] == 256
    assert recipe["data"]["videos"]["batch_size"] == 64
    assert recipe["data"]["images"]["weight"] == recipe["data"]["videos"]["weight"]
    assert 1 + 4 * (recipe["data"]["videos"]["frames"] - 1) == 17
    assert recipe["model"]["init_args"]["optimizer"]["learning_rate"] == 1e-4
    assert recipe["model"]["init_args"]["optimizer"]["weight_decay"] == 0
