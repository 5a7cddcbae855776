"""Two ranks, each of which reads its files for itself."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from gpdit_lightning.cli.saved_recipe import SaveRecipe
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.ranks import check_same_on_ranks
from gpdit_lightning.errors import InputError
from tests.cli.test_several_ranks import write_recipe
from tests.data.test_cache import Server

FIRST = {"last checkpoint": (4, "ab"), "initial weights": None}


class OtherRank:
    """A strategy of two ranks: the first has the facts `FIRST`; this is the second."""

    root_device = torch.device("cpu")

    def broadcast(self, _: Any) -> dict[str, Any]:
        return FIRST

    def reduce(self, differing: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "sum"
        return differing + 0  # the first rank agrees with itself


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({}, ""),
        ({"last checkpoint": (2, "ab")}, "last checkpoint"),
        ({"last checkpoint": (4, "cd"), "initial weights": "ef"}, "last checkpoint and the weights"),
        ({"data.seed": 1}, "recipe"),
    ],
)
def test_facts_that_differ_are_named(change: dict[str, Any], named: str) -> None:
    trainer = SimpleNamespace(strategy=OtherRank(), world_size=2)
    facts, texts = FIRST | change, {"initial weights": "the weights"}
    if not named:
        check_same_on_ranks(trainer, facts, texts)
        return
    with pytest.raises(InputError, match=f"1 of 2 ranks found another {named} than the first rank: make the same"):
        check_same_on_ranks(trainer, facts, texts)


class TwoRanks(OtherRank):
    """The strategy of both ranks in turn: the facts of the first are kept for the second."""

    def __init__(self) -> None:
        self.first: dict[str, Any] = {}

    def broadcast(self, facts: dict[str, Any]) -> dict[str, Any]:
        self.first = self.first or facts
        return self.first


def test_ranks_with_different_settings_end_before_the_first_step() -> None:
    """With DDP their weights would diverge. Folders and workers may differ, and random seeds of the weights."""
    recipe = {
        "run_dir": "/node0/run",
        "seed_everything": 11,
        "model": {"init_args": {"optimizer": {"learning_rate": 1e-3, "betas": [0.9, 0.999]}}},
        "data": {"videos": {"manifests": ["/node0/latents"], "batch_size": 4}, "workers": 4},
        "trainer": {"max_steps": 6, "logger": None},
    }
    texts = [yaml.safe_dump(recipe)]
    texts.append(texts[0].replace("node0", "node1").replace("workers: 4", "workers: 2").replace("11", "12"))
    texts += [texts[1].replace("0.001", "0.1"), texts[1].replace("max_steps: 6", "max_steps: 8")]
    trainer: Any = SimpleNamespace(strategy=TwoRanks(), world_size=2)
    module: Any = None
    for text in texts[:2]:
        SaveRecipe(text).setup(trainer, module, "fit")
    for text, name in zip(texts[2:], ("model.init_args.optimizer.learning_rate", "trainer.max_steps"), strict=True):
        with pytest.raises(InputError, match=f"1 of 2 ranks found another {name} than the first rank"):
            SaveRecipe(text).setup(trainer, module, "fit")


class ChangingServer(Server):
    """A server whose manifest has another content from its second download on."""

    def __init__(self) -> None:
        super().__init__()
        self.later: dict[str, bytes] = {}
        server = self

        class Files(dict[str, bytes]):
            def get(self, path: str, default: Any = None) -> Any:
                return super().get(path, default) if server.gets[path] < 2 else server.later.get(path, default)

        self.files = Files()


@pytest.fixture
def server() -> Iterator[ChangingServer]:
    server = ChangingServer()
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_ranks_that_read_different_manifests_end_before_the_first_step(
    tiny_shards: Path, tmp_path: Path, server: ChangingServer
) -> None:
    """Each rank reads a manifest once. These are of the same latents, so they have the same fingerprint."""
    dataclasses.replace(Manifest.load(tiny_shards), directory=tmp_path, preparation={"stride": 7}).save()
    url = server.add_folder(tiny_shards)
    server.later[f"/{tiny_shards.name}/manifest.json"] = (tmp_path / "manifest.json").read_bytes()
    path = Path(write_recipe(tmp_path / "runs", tiny_shards, 2, "recipe").removeprefix("--config="))
    recipe = yaml.safe_load(path.read_text())
    for source in ("images", "videos"):
        recipe["data"][source]["manifests"] = [url]
    recipe["data"]["cache"] = {"directory": str(tmp_path / "cache")}
    del recipe["trainer"]["callbacks"]
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "gpdit_lightning", "fit", "--config", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 2, run.stderr
    assert f"1 of 2 ranks found another {url}/manifest.json than the first rank: " in run.stderr
    assert server.gets[f"/{tiny_shards.name}/manifest.json"] == 2
    assert not any("manifest" not in path for path in server.gets), server.gets
