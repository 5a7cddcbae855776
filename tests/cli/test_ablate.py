"""Ablations: interrupted ones equal uninterrupted ones, losses are comparable, and failed arms stop no others."""

import csv
import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Trainer

from gpdit_lightning.checkpoints.files import open_checkpoint
from gpdit_lightning.cli import ablation, main, record_of
from gpdit_lightning.cli.ablation import measured_step_seconds, read_ablation, record_ablation
from gpdit_lightning.cli.ablation_report import interval, spread
from gpdit_lightning.cli.parsing import parse
from gpdit_lightning.errors import InputError
from gpdit_lightning.options.ablate import FILES, AblateOptions
from gpdit_lightning.training.callbacks.ablation import record_in
from gpdit_lightning.training.callbacks.run_checkpoint import RunCheckpoint
from tests.checkpoints.content import read_checkpoint

STEPS = 4
BACKBONE = "model.init_args.backbone"
OF = {f"{BACKBONE}.attention": "of"}


@pytest.fixture
def base(tiny_shards: Path, tmp_path: Path) -> Path:
    """A base recipe."""
    backbone = {"size": "tiny", "layers": 2, "width": 24, "heads": 2, "mlp_width": 48, "latent_channels": 4}
    recipe = {
        "model": {
            "class_path": "GPDiTStage",
            "init_args": {"backbone": backbone, "optimizer": {"learning_rate": 1e-2}},
        },
        "data": {"videos": {"manifests": [str(tiny_shards)], "batch_size": 4}, "validation_batches": 1},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": STEPS,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "ema": {"decay": 0.5},
        "checkpoint": {"every_steps": 1},
    }
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def write_ablation(base: Path, arms: dict[str, Any], **others: Any) -> Path:
    """Write an ablation file, which builds on the base recipe."""
    path = base.with_name("ablation.yaml")
    path.write_text(
        yaml.safe_dump({"base": base.name, "arms": arms, "seeds": [0, 1], "validations": 2} | others, sort_keys=False)
    )
    return path


def results(out: Path) -> dict[str, Any]:
    """The results of an ablation without what differs from one training to the next: seconds and memory."""
    content = json.loads((out / "results.json").read_text())
    del content["title"]
    for arm in content["arms"]:
        for run in arm["runs"]:
            assert run.pop("seconds") > 0
            assert 0.01 < run.pop("peak_memory_gib") < 100
            run["curve"] = [(step, loss) for step, loss, _ in run["curve"]]
    return content


def die_at_step_3(self: RunCheckpoint, trainer: Trainer, *_: Any) -> None:
    """End the process as a kill does, before the checkpoint of step 3."""
    if trainer.global_step == 3:
        os._exit(9)
    RunCheckpoint._finish_step(self, trainer)


def test_a_killed_ablation_that_is_run_again_equals_an_uninterrupted_one(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is killed in its third run of four, after the checkpoint of the second step."""
    path, whole, killed = write_ablation(base, {"of2": {}, "of": OF}), tmp_path / "whole", tmp_path / "killed"
    assert main(["ablate", f"--config={path}", f"--out={whole}"]) == 0
    for done in ("ablation.json", "of2/seed-0", "of/seed-0"):
        (killed / done).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (whole / done).is_dir() else shutil.copy)(whole / done, killed / done)
    if (child := os.fork()) == 0:
        monkeypatch.setattr(RunCheckpoint, "on_train_batch_end", die_at_step_3)
        main(["ablate", f"--config={path}", f"--out={killed}"])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert open_checkpoint(killed / "of2" / "seed-1").step == 2
    capsys.readouterr()
    assert main(["ablate", f"--config={path}", f"--out={killed}"]) == 0
    printed = capsys.readouterr().out
    assert "of2, seed 1:" in printed
    assert "seed 0:" not in printed  # finished runs are not trained again
    assert results(killed) == results(whole)
    one, other = (read_checkpoint(out / "of2" / "seed-1") for out in (killed, whole))
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())
    of2, of = results(whole)["arms"]
    assert [step for step, _ in of2["runs"][0]["curve"]] == [2, 4]
    for first, second in (("of2/seed-0", "aside"), ("of/seed-0", "of2/seed-0"), ("aside", "of/seed-0")):
        (killed / first).rename(killed / second)
    assert main(["ablate", f"--config={path}", f"--out={killed}"]) == 2
    assert "is of the run 'of/seed-0' and not of of2/seed-0: move" in capsys.readouterr().err
    finals = [[run["curve"][-1][1] for run in arm["runs"]] for arm in (of2, of)]
    assert len({*finals[0], *finals[1]}) == 4  # the seeds and the arms differ
    assert of2["loss"]["mean"] == pytest.approx(sum(finals[0]) / 2)
    assert of["difference"]["mean"] == pytest.approx(sum(finals[1]) / 2 - sum(finals[0]) / 2)
    with (whole / "results.csv").open() as file:
        assert [(row["arm"], float(row["loss"])) for row in csv.DictReader(file)] == [
            *(("of2", loss) for loss in finals[0]),
            *(("of", loss) for loss in finals[1]),
        ]
    assert (whole / "curves.png").stat().st_size > 10_000
    capsys.readouterr()
    for option, message in (
        ("--budget=flops", 'an ablation with another --budget ("steps" instead of "flops")'),
        ("--trainer.max_steps=5", "an ablation with another trainer.max_steps (4 instead of 5)"),
    ):
        assert main(["ablate", f"--config={path}", f"--out={whole}", option]) == 2
        assert message in capsys.readouterr().err
    record = whole / "ablation.json"
    content = json.loads(record.read_text())
    del content["base"]["trainer"]["max_steps"]
    for edited, message in (
        (content, "so it was damaged or edited"),
        ({"arms": content["arms"]}, "lacks the field base"),
    ):
        record.write_text(json.dumps(edited))
        assert main(["ablate", f"--config={path}", f"--out={whole}"]) == 2
        assert message in (error := capsys.readouterr().err)
        assert f"{record} " in error
        assert "restore it, or give another --out" in error


def test_an_ablation_from_other_initial_weights_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the base recipe or of an arm; arms may be added and left out."""
    weights, others = "model.init_args.initial_weights", tmp_path / "others"
    for name, seed in (("w.1", 0), ("w.2", 1), ("others", 2)):
        fit = ["fit", f"--config={base}", f"--run_dir={tmp_path / name}", "--trainer.max_steps=1"]
        assert main([*fit, f"--seed_everything={seed}"]) == 0
    path = write_ablation(base, {"a": {}, "b": {weights: str(tmp_path / "w.2")}}, seeds=[0])
    command = ["ablate", f"--config={path}", f"--out={tmp_path / 'out'}", f"--{weights}={tmp_path / 'w.1'}"]
    command.append("--trainer.max_steps=1")
    assert main(command) == 0
    for name in ("w.1", "w.2"):
        kept = (tmp_path / name).rename(tmp_path / "kept")
        shutil.copytree(others, tmp_path / name)
        capsys.readouterr()
        assert main(command) == 2
        assert f"has an ablation with another content of {tmp_path / name}: give another" in capsys.readouterr().err
        shutil.rmtree(tmp_path / name)
        kept.rename(tmp_path / name)
    write_ablation(base, {"c": {"model.init_args.optimizer.learning_rate": 0.02}, "a": {}}, seeds=[0])
    assert main(command) == 0
    assert len(json.loads((tmp_path / "out" / "ablation.json").read_text())["initial_weights"]) == 2


def test_losses_are_those_of_the_same_clips_noise_and_angles_and_failed_arms_are_reported(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A network that does not learn predicts zero, so its loss is a function of the held-out batches alone."""
    arms = {
        "base": {},
        "others": {
            "data": {"videos": {"batch_size": 8, "micro_batches": 2}, "noise_levels": "clip", "noise_draws": 2},
            "data.context_noise": 0.3,
            "model.init_args.schedule.shift": 4.0,
        },
        "invalid": {f"{BACKBONE}.width": 7},
        "diverges": {"model.init_args.optimizer.learning_rate": 1e30},
    }
    path = write_ablation(base, arms, out=str(tmp_path / "out"))
    overrides = ["--trainer.max_steps=2", "--model.init_args.optimizer.learning_rate=1e-30"]
    assert main(["ablate", f"--config={path}", *overrides]) == 1
    found = {arm["name"]: arm for arm in results(tmp_path / "out")["arms"]}
    losses = {run["curve"][-1][1] for name in ("base", "others") for run in found["base"]["runs"] + found[name]["runs"]}
    assert len(losses) == 1
    reasons = {"invalid": "width 7", "diverges": "not finite"}
    for name, reason in reasons.items():
        assert found[name]["runs"] == []
        assert [failure["seed"] for failure in found[name]["failures"]] == [0, 1]
        assert all(reason in failure["reason"] for failure in found[name]["failures"])
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_file()} == set(FILES)
    text = (tmp_path / "out" / "ablation.md").read_text()
    assert text in capsys.readouterr().out
    assert text.count("\nfailed: ") == 4
    assert "| invalid | 0, 2 failed | - |" in text


def test_arms_that_cannot_be_meant_are_refused_before_anything_is_trained(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"a": {}, "b": {f"{BACKBONE}.attention": "of2"}}, "the arms 'a' and 'b' have the same settings"),
        ({"a": {f"{BACKBONE}.atention": "of"}}, "the arm 'a' cannot be used: .*did you mean .*attention"),
        ({"a": {"data": {"seed": 3}}}, "the arm 'a' sets data.seed"),
        ({"../a": {}}, "the arm '../a' cannot name a folder"),
        ({"results.json": {}}, "the arm 'results.json' has the name of a file of the ablation"),
        ({"a" * 256: {}}, "has a name of more than 255 bytes: shorten it"),
        ({}, "--arms is empty"),
    ]
    for arms, message in cases:
        path = write_ablation(base, arms, out=str(tmp_path / "out"))
        assert main(["ablate", f"--config={path}"]) == 2
        assert re.search(message, capsys.readouterr().err)
        assert not (tmp_path / "out").exists()
    assert main(["fit", f"--config={write_ablation(base, {'a': OF}, out='out')}"]) == 2
    assert f"{path.parent}/ablation.yaml is an ablation with several arms: give it to" in capsys.readouterr().err


def test_a_file_and_a_command_line_give_the_same_ablation(base: Path, tmp_path: Path) -> None:
    """Options of the recipe in the file of the ablation, or after it, override the base, and the arms both."""
    arms = {"of2": {}, "wide": {"model": {"init_args": {"backbone": {"width": 48}}}, "ema.decay": 0.1}}
    path = write_ablation(base, arms, out="out", ema={"decay": 0.2}, trainer={"max_steps": 9})
    record = record_of("ablate")
    by_file = parse("ablate", "", record, [f"--config={path}", "--trainer.max_steps=7"])
    words = [f"--config={base}", f"--arms={json.dumps(arms)}", "--seeds", "0", "1", "--validations=2", "--out=out"]
    by_words = parse("ablate", "", record, [*words, "--ema.decay=0.2", "--trainer.max_steps=7"])
    in_python = AblateOptions(
        config=(str(base),),
        arms=arms,
        seeds=(0, 1),
        validations=2,
        out="out",
        overrides={"ema.decay": 0.2, "trainer.max_steps": 7},
    )
    one, two, three = map(read_ablation, (by_file, by_words, in_python))
    assert one.costs == two.costs == three.costs
    assert one.arms == two.arms == three.arms
    assert [arm.settings.ema.decay for arm in one.arms if arm.settings] == [0.2, 0.1]
    assert [arm.costs.steps for arm in one.arms if arm.costs] == [7, 7]
    restarted = parse("ablate", "", record, one.options.command_line)
    assert replace(restarted, config=by_file.config) == by_file


def test_arms_may_have_numbers_as_names_and_classes_as_values(tmp_path: Path) -> None:
    """Neither is changed before the recipe of the arm is parsed; no class is created."""
    logger = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "x"}}
    arms = {1: {}, 2: {"trainer": {"logger": logger, "callbacks": [logger]}}}
    (tmp_path / "base.yaml").write_text("run_dir: x\n")
    words = [
        f"--config={tmp_path}/base.yaml",
        f"--arms={yaml.safe_dump(arms, default_flow_style=True, width=1000)}",
        "--out=out",
    ]
    options = parse("ablate", "", record_of("ablate"), words)
    assert list(options.arms) == ["1", "2"]
    given = options.arms["2"]["trainer"]
    for found in (given["logger"], given["callbacks"][0]):
        assert found["class_path"] == logger["class_path"]
        assert found["init_args"]["save_dir"] == "x"
    assert any("TensorBoardLogger" in word for word in options.command_line)


@pytest.mark.parametrize("budget", ["flops", "time"])
def test_budgets(base: Path, tmp_path: Path, budget: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the base with twice as many clips has half as many steps."""
    monkeypatch.setattr(
        ablation, "measured_step_seconds", lambda words: 2.0 if "--data.videos.batch_size=8" in words else 1.0
    )
    path = write_ablation(base, {"a": {}, "b": {"data.videos.batch_size": 8}}, out=str(tmp_path / "out"), budget=budget)
    read = read_ablation(parse("ablate", "", record_of("ablate"), [f"--config={path}", "--trainer.max_steps=30"]))
    assert [arm.costs.steps for arm in read.arms if arm.costs] == [30, 15]
    recorded = record_ablation(read)
    assert recorded.arms == read.arms
    monkeypatch.setattr(ablation, "measured_step_seconds", lambda words: 5.0)
    assert record_ablation(read).arms == recorded.arms  # measured once


def test_the_trial_measures_a_step(base: Path) -> None:
    assert 0 < measured_step_seconds([f"--config={base}"]) < 2


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (None, "lacks the field ablation"),
        ({"curve": []}, r"ablation.curve = \[\]; it must be a non-empty list"),
        ({"curve": [["a", 1.0, 1.0]]}, r"ablation.curve\[0\] = .* it must be an optimizer step, a loss and seconds"),
        ({"seconds": "x"}, "ablation.seconds = 'x'; it must be a finite number"),
        ({"run": "b/seed-0"}, "is of the run 'b/seed-0' and not of a/seed-0: move the folders back"),
    ],
)
def test_checkpoints_without_a_record_are_named(record: dict[str, Any] | None, words: str) -> None:
    valid = {"run": "a/seed-0", "curve": [[1, math.nan, 0.5]], "seconds": 0.5, "peak_memory_gib": 0.1}
    assert record_in({"ablation": valid}, "step-1.ckpt", "a/seed-0") == valid
    content = {} if record is None else {"ablation": valid | record}
    with pytest.raises(InputError, match=f"step-1.ckpt .*{words}.*move its run folder away"):
        record_in(content, "step-1.ckpt", "a/seed-0")


def test_statistics_over_seeds() -> None:
    """Student's t with two degrees of freedom has the 97.5 % quantile 4.303."""
    assert spread([1.0, 2.0, 3.0]) == "2 ± 1"
    assert spread([0.25]) == "0.25"
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)
    assert interval([1.0]) is None
