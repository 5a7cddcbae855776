"""Checkpoints that are intact but whose content is not that of the run: one sentence each, before the first step."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpdit_lightning.checkpoints.io import FolderCheckpointIO
from tests.cli.test_resume import fit, recipe

Content = dict[str, Any]


@pytest.fixture(scope="module")
def trained(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder after two steps of three."""
    folder = tmp_path_factory.mktemp("restored")
    values = recipe(tiny_shards, folder / "run")
    values["trainer"]["max_steps"] = 2
    assert fit(folder / "recipe.yaml", values) == 0
    return folder / "run"


def without_health(content: Content) -> None:
    del content["callbacks"][next(key for key in content["callbacks"] if key.startswith("Health"))]


def with_other_shapes(content: Content) -> None:
    for state in content["optimizer_states"][0]["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros(state[name].numel() + 1)


def of_another_optimizer(content: Content) -> None:
    for state in content["optimizer_states"][0]["state"].values():
        del state["exp_avg_sq"]


def of_fewer_parameters(content: Content) -> None:
    content["optimizer_states"][0]["param_groups"][0]["params"].pop()


def without_a_setting(content: Content) -> None:
    del content["optimizer_states"][0]["param_groups"][0]["betas"]


def of_another_order(content: Content) -> None:
    content["LatentDataModule"]["order"]["data.seed"] = 6


def with_another_average(content: Content) -> None:
    content["ema"]["weights"].popitem()


@pytest.mark.parametrize(
    ("change", "words", "refused"),
    [
        (without_health, "the checkpoint has no state of Health, which therefore begins anew", False),
        (with_other_shapes, "as exp_avg of a parameter of shape", True),
        (of_another_optimizer, "has shape nothing as exp_avg_sq of a parameter", True),
        (of_fewer_parameters, "doesn't match the size of optimizer's group", True),
        (without_a_setting, "lacks betas", True),
        (of_another_order, "data.seed", True),
        (with_another_average, "the average", True),
    ],
)
def test_a_checkpoint_of_another_content_is_refused_in_one_sentence(
    tiny_shards: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    change: Callable[[Content], None],
    words: str,
    refused: bool,
) -> None:
    load = FolderCheckpointIO.load_checkpoint

    def changed(*arguments: Any, **options: Any) -> Content:
        content = copy.deepcopy(load(*arguments, **options))
        change(content)
        return content

    monkeypatch.setattr(FolderCheckpointIO, "load_checkpoint", changed)
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    values = recipe(tiny_shards, tmp_path / "run")
    values["trainer"]["max_steps"] = 3
    capsys.readouterr()
    assert fit(tmp_path / "recipe.yaml", values) == (2 if refused else 0)
    lines = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in lines)
    sentence = lines[-1] if refused else next(line for line in lines if words in line)
    assert words in sentence
    assert (tmp_path / "run" / "checkpoints" / "step-3.ckpt").exists() == (not refused)
