"""Interpolations are bounded: a short chain of them can stand for gigabytes."""

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError

from gpdit_lightning.cli import main
from gpdit_lightning.cli.bounded_visitor import bounded_interpolations
from gpdit_lightning.cli.interpolations import MAX_RESOLVED, MAX_SIZE
from gpdit_lightning.cli.recipe_cli import parse_recipe


def chain(kind: str, length: int, width: int) -> dict[str, Any]:
    """Return values of which each refers `width` times to the one before."""
    first: Any = {"text": "x" * 10, "list": ["x"], "mapping": {"x": 1}}[kind]
    values = {"k0": first}
    for number in range(1, length):
        reference = f"${{k{number - 1}}}"
        if kind == "text":
            values[f"k{number}"] = reference * width
        elif kind == "list":
            values[f"k{number}"] = [reference] * width
        else:
            values[f"k{number}"] = {f"a{item}": reference for item in range(width)}
    return values


@pytest.mark.parametrize("kind", ["text", "list", "mapping"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_chain_that_stands_for_gigabytes_is_refused(kind: str, reverse: bool) -> None:
    items = list(chain(kind, 12, 10).items())
    values = OmegaConf.create(dict(reversed(items) if reverse else items))
    refused = pytest.raises(InterpolationResolutionError, match="all interpolations together stand for too many")
    with refused, bounded_interpolations(MAX_SIZE // 16, MAX_RESOLVED // 16):
        OmegaConf.to_container(values, resolve=True)


@pytest.mark.parametrize("kind", ["text", "list", "mapping"])
def test_a_short_chain_has_its_value(kind: str) -> None:
    values = OmegaConf.create(chain(kind, 3, 3))
    with bounded_interpolations(MAX_SIZE, MAX_RESOLVED):
        bounded = OmegaConf.to_container(values, resolve=True)
    assert bounded == OmegaConf.to_container(values, resolve=True)
    assert str(bounded["k2"]).count("x") >= 9  # type: ignore[index, call-overload]


def test_verbs_refuse_a_bomb_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos = ["x" * 10, *(f"${{videos[{number}]}}" * 2 for number in range(30))]
    (tmp_path / "options.yaml").write_text(yaml.safe_dump({"out": "a", "videos": videos}))
    start = time.monotonic()
    assert main(["prepare", f"--config={tmp_path / 'options.yaml'}"]) == 2
    assert time.monotonic() - start < 10
    assert capsys.readouterr().err.startswith("error: an interpolation cannot be resolved: all interpolations together")


def test_many_paths_in_one_folder_are_no_bomb(tmp_path: Path) -> None:
    manifests = [f"${{latents}}/part{number}" for number in range(300)]
    (tmp_path / "data.yaml").write_text(
        yaml.safe_dump({"latents": "/data/latents", "data": {"images": {"manifests": manifests}}})
    )
    recipe = parse_recipe("fit", ["--config=gpdit:stage1_image_warmup", f"--config={tmp_path / 'data.yaml'}"])
    assert recipe.data.images.manifests == [f"/data/latents/part{number}" for number in range(300)]
