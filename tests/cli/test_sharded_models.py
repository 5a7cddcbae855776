"""Checkpoints of ZeRO and FSDP2 on two processes are validated, sampled, exported and trained further as usual."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.checkpoints.files import checkpoint_path
from gpdit_lightning.checkpoints.parts import part_name
from gpdit_lightning.checkpoints.reading import sha256_of_weights
from gpdit_lightning.cli import main
from gpdit_lightning.estimation.memory import STRATEGIES
from gpdit_lightning.estimation.saving import saving_costs
from gpdit_lightning.media.video_writer import write_video
from gpdit_lightning.tensor_files import safetensors_header
from tests.checkpoints.content import read_checkpoint
from tests.cli.test_chain import damage_last_of
from tests.cli.test_export import assert_same, export, tensors_of
from tests.cli.test_resume import STEPS, logged_scalars, recipe
from tests.cli.test_sharded_runs import needs_deepspeed, run_verb
from tests.training.callbacks.test_previews import make_shards, moving

pytestmark = pytest.mark.slow

ALONE = ("--trainer.devices=1", "--trainer.strategy=auto")
LAST, BEFORE = STEPS, STEPS - 2  # the steps of the two checkpoints


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with a codec that can decode them."""
    return Path(make_shards(tmp_path_factory.mktemp("shards")))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("zero2", "32-true"), marks=needs_deepspeed, id="zero2"),
        pytest.param(("zero3", "bf16-mixed"), marks=needs_deepspeed, id="zero3-bf16"),
        pytest.param(("fsdp2", "32-true"), id="fsdp2"),
    ],
)
def trained(request: pytest.FixtureRequest, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`recipe.yaml`, and the finished run folder `run`. Do not change them."""
    folder = tmp_path_factory.mktemp("trained")
    settings = recipe(shards, folder / "run", max_ranks=2)
    settings["model"]["init_args"]["backbone"]["latent_channels"] = 16
    strategy, precision = request.param
    settings["trainer"] |= {"devices": 2, "strategy": strategy, "precision": precision}
    settings["checkpoint"] = {"every_steps": 2, "keep_last": 2}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    run_verb("fit", f"--config={folder / 'recipe.yaml'}")
    return folder


@pytest.fixture
def damaged(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run folder, to be damaged."""
    return Path(shutil.copytree(trained / "run", tmp_path / "damaged", symlinks=True))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "moving.mp4"
    write_video(path, moving(99, 20), 30)
    return path


def losses(printed: str) -> list[float]:
    """Return the values of loss/val that `validate` printed."""
    return [float(line.split()[1]) for line in printed.splitlines() if line.startswith("loss/val ")]


def begin_from(weights: Path, trained: Path, run_dir: Path) -> int:
    """Train a step of a following stage on one process, with a learning rate of almost zero."""
    rate = "--model.init_args.optimizer={learning_rate: 1.0e-12}"
    begin = (f"--model.init_args.initial_weights={weights}", f"--run_dir={run_dir}", "--trainer.max_steps=1")
    return main(["fit", f"--config={trained / 'recipe.yaml'}", *ALONE, rate, *begin])


def sample(checkpoint: Path, video: Path, out: Path) -> int:
    options = ["--context", str(video), "--out", str(out), "--steps=2", "--frames=4"]
    return main(["sample", "--checkpoint", str(checkpoint), *options])


def test_the_parts_have_the_bytes_that_estimate_prints(trained: Path) -> None:
    last = checkpoint_path(trained / "run", LAST)
    config = GPDiTConfig(**read_checkpoint(last)["gpdit"]["backbone"])
    costs = saving_costs(config, next(s for s in STRATEGIES if s.option == "fsdp2"), ranks=2)
    parts = [
        sum(tensor.bytes for tensor in safetensors_header(last / part_name(rank, 2), "")[0].values()) for rank in (0, 1)
    ]
    assert sum(parts) == costs.bytes
    assert parts == pytest.approx([costs.copied] * 2, rel=0.05)  # rows do not divide evenly


@pytest.mark.parametrize("kind", ["ema", "raw"])
def test_the_exported_weights_are_those_of_the_checkpoint(kind: str, trained: Path, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(trained / "run")
    weights = {"ema": checkpoint["ema"]["weights"], "raw": checkpoint["state_dict"]}
    assert weights["ema"].keys() == weights["raw"].keys()
    assert not torch.equal(weights["ema"]["backbone.output.weight"], weights["raw"]["backbone.output.weight"])
    expected = {name.removeprefix("backbone."): value for name, value in weights[kind].items()}
    assert {value.dtype for value in expected.values()} == {torch.float32}
    assert export(trained / "run", tmp_path / "model", *(["--weights=raw"] if kind == "raw" else [])) == 0
    assert_same(tensors_of(tmp_path / "model"), expected)
    assert_same(dict(GPDiT.from_pretrained(tmp_path / "model").state_dict()), expected)


def test_a_run_its_checkpoint_and_its_export_generate_the_same_video(
    trained: Path, video: Path, tmp_path: Path
) -> None:
    run, model = trained / "run", tmp_path / "model"
    assert export(run, model) == 0
    images = set()
    for checkpoint in (run, checkpoint_path(run, LAST), model):
        assert sample(checkpoint, video, tmp_path / "out.mp4") == 0
        images.add((tmp_path / "out.png").read_bytes())
    assert len(images) == 1


def test_validate_prints_the_loss_that_training_logged(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On two processes and on one; in bf16 sharded ranks round weights, and one process rounds factors of products."""
    loss = logged_scalars(trained / "run")["loss/val"][LAST]
    assert losses(run_verb("validate", f"--config={trained / 'recipe.yaml'}")) == pytest.approx([loss], abs=2e-5)
    assert main(["validate", f"--config={trained / 'recipe.yaml'}", *ALONE]) == 0
    assert losses(capsys.readouterr().out) == pytest.approx([loss], rel=2e-4)


@pytest.mark.parametrize("place", ["run", f"run/checkpoints/step-{LAST}.ckpt"])
def test_the_next_stage_starts_from_the_average(place: str, trained: Path, tmp_path: Path) -> None:
    weights, last = trained / place, checkpoint_path(trained / "run", LAST)
    assert begin_from(weights, trained, tmp_path / "next") == 0
    begun = read_checkpoint(tmp_path / "next")
    assert begun["gpdit"]["origin"] == {"path": str(weights), "step": LAST, "sha256": sha256_of_weights(last)}
    for name, average in read_checkpoint(last)["ema"]["weights"].items():
        torch.testing.assert_close(begun["state_dict"][name], average, rtol=0, atol=1e-9)


def test_a_checkpoint_with_a_changed_byte_is_refused_or_replaced_by_the_previous_one(
    trained: Path, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run folder gives the previous checkpoint; the path of the damaged one is refused."""
    loss = logged_scalars(trained / "run")["loss/val"][BEFORE]
    last = damage_last_of(damaged)
    assert main(["validate", f"--config={trained / 'recipe.yaml'}", *ALONE, f"--run_dir={damaged}"]) == 0
    assert losses(capsys.readouterr().out) == pytest.approx([loss], rel=2e-4)
    assert begin_from(damaged, trained, tmp_path / "next") == 0
    assert read_checkpoint(tmp_path / "next")["gpdit"]["origin"]["step"] == BEFORE
    capsys.readouterr()
    assert begin_from(last, trained, tmp_path / "none") == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {last} is not a complete checkpoint (step-6.ckpt/training.ckpt has another sha256 than when it was "
        "written): use another checkpoint of the run."
    )


def test_a_truncated_checkpoint_is_refused_or_replaced_by_the_previous_one(
    damaged: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last, model = checkpoint_path(damaged, LAST), tmp_path / "model"
    part = last / part_name(1, 2)
    os.truncate(part, part.stat().st_size - 1)
    assert export(damaged, model) == 0
    assert f"the averaged weights of step {BEFORE}" in capsys.readouterr().out
    assert json.loads((model / "config.json").read_text())["step"] == BEFORE
    assert sample(damaged, video, tmp_path / "out.mp4") == 0
    capsys.readouterr()
    assert export(last, tmp_path / "none") == 2
    assert sample(last, video, tmp_path / "none.mp4") == 2
    messages = capsys.readouterr().err.splitlines()
    assert len(messages) == 2
    for message in messages:
        assert message.startswith(f"error: {last} is not a complete checkpoint (step-6.ckpt/{part.name} has")
    assert {path.name for path in tmp_path.iterdir()} == {"damaged", "model", "out.mp4", "out.png"}
