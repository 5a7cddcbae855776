"""Every mistake of a user's gets one sentence and a non-zero exit."""

import errno
import io
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gpdit_lightning import cli
from gpdit_lightning.cli import VERBS, main
from gpdit_lightning.cli.failures import describe
from gpdit_lightning.cli.recipe_cli import parse_recipe, recipe_parser
from gpdit_lightning.devices import environment_number
from gpdit_lightning.errors import InputError

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def recipe(tiny_shards: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "run_dir": str(tmp_path / "run"),
        "model": {
            "class_path": "GPDiTStage",
            "init_args": {
                "backbone": {
                    "size": "tiny", "layers": 1, "width": 24, "heads": 2, "mlp_width": 48, "latent_channels": 4
                }
            },
        },
        "data": {"videos": {"manifests": [str(tiny_shards)], "batch_size": 2}},
        "trainer": {
            "accelerator": "cpu", "max_steps": 2, "enable_progress_bar": False, "enable_model_summary": False
        },
    }  # fmt: skip


def merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        settings[key] = merged(settings.get(key, {}), value) if isinstance(value, dict) else value
    return settings


def backbone(**fields: Any) -> dict[str, Any]:
    return {"model": {"init_args": {"backbone": fields}}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (backbone(layerz=3), ["layerz", "did you mean 'model.init_args.backbone.layers'"]),
        (backbone(size="XXL"), ["size 'XXL' is not known", "tiny, B, H"]),
        (backbone(heads=12), ["head width 2", "RoPE"]),
        (backbone(attention="of3"), ["of3"]),
        ({"trainer": {"max_stepz": 1}}, ["max_stepz", "did you mean 'trainer.max_steps'"]),
        ({"data": {"videos": {"batchsize": 1}}}, ["batchsize", "did you mean 'data.videos.batch_size'"]),
        ({"modle": {"x": 1}}, ["modle"]),
        ({"optimizer": {"lr": 1}}, ["optimizer.lr", "did you mean 'model.init_args.optimizer.learning_rate'"]),
        ({"model": {"lr": 1}}, ["model.lr is not an option: write model.init_args.optimizer.learning_rate"]),
        ({"data": {"seed": "${nothing.here}"}}, ["interpolation", "nothing.here"]),
        ({"trainer": {"max_steps": "many"}}, ["trainer.max_steps", "many"]),
        ({"trainer": {"max_steps": 0}}, ["trainer.max_steps is 0"]),
        ({"data": {"videos": {"manifests": ["/nowhere"]}}}, ["/nowhere", "gpdit_lightning prepare"]),
        ({"data": {"videos": {"manifests": []}}}, ["no source of data", "data.videos", "--data_dir"]),
        ({"data": {"videos": {"batch_size": 0}}}, ["no source of data"]),
        ({"data": {"videos": {"batch_size": 3, "micro_batches": 2}}}, ["data.videos.batch_size is 3", "micro_batches"]),
        ({"trainer": {"accumulate_grad_batches": 3}}, ["accumulate_grad_batches is 3", "micro_batches"]),
        (
            {"model": {"class_path": "FewShotStage"}},
            ["data.sequences is not used, since it has no manifests", "prepare-pairs", "--data_dir latents/pairs"],
        ),
        (
            {"data": {"sources": ["images"]}},
            ["data.images is not used, since it has no manifests", "prepare --images", "--data_dir latents/mine"],
        ),
        ({"model": {"init_args": {"initial_weights": "/nowhere"}}}, ["/nowhere", "chain", "initial_weights null"]),
        ({"trainer": {"val_check_interval": 10}}, ["val_check_interval", "validate_every_steps"]),
        ({"trainer": {"limit_train_batches": 1}}, ["trainer.limit_train_batches is 1", "max_steps"]),
        ({"trainer": {"default_root_dir": "x"}}, ["trainer.default_root_dir is x", "run_dir"]),
        (
            {"trainer": {"log_every_n_steps": 0}},
            ["trainer.log_every_n_steps is 0: give a number of optimizer steps, at least 1"],
        ),
        ({"trainer": {"log_every_n_steps": None}}, ["trainer.log_every_n_steps is None"]),
        ({"trainer": {"strategy": "ddpp"}}, ["trainer.strategy 'ddpp' is not known (did you mean 'ddp'?)"]),
        ({"validate_every_steps": -3}, ["validate_every_steps is -3", "at least 0"]),
        ({"data": {"workers": -1}}, ["data.workers is -1"]),
        ({"data": {"videos": {"frames": -3}}}, ["data.videos.frames is -3"]),
        ({"model": {"init_args": {"optimizer": {"learning_rate": float("inf")}}}}, ["learning_rate is inf"]),
        ({"base": 3}, ["the `base` of", "is 3"]),
        ({"base": "nowhere.yaml"}, ["nowhere.yaml (the base of", "does not exist"]),
        ({"base": "recipe.yaml"}, ["recipe.yaml is a base of itself"]),
        ({"checkpoint": {"every_steps": 0}}, ["checkpoint.every_steps is 0"]),
        ({"ema": {"decay": 1.5}}, ["ema.decay is 1.5"]),
        ({"ema": {"decay": None}}, ["ema.decay is null; it must be a number"]),
        ({"ema": 3}, ["ema is 3; it must be names with values"]),
        ({"trainer": None}, ["trainer is null; it must be names with values"]),
        ({"data": {"videos": None}}, ["data.videos is null; it must be names with values"]),
        ({"data": {"videos": {"batch_size": None}}}, ["data.videos.batch_size is null; it must be a whole number"]),
        ({"data": {"videos": {"batch_size": 2**70}}}, ["data.videos.batch_size is 1180591620717411303424", "64 bits"]),
        ({"trainer": {"max_steps": 1e4}}, ["trainer.max_steps is 10000.0; it must be a whole number: write 10000."]),
        ({"trainer": {"max_steps": 1.5}}, ["trainer.max_steps is 1.5; it must be a whole number."]),
        (backbone(block_shape=[1e0, 0, 0]), ["block_shape is 1.0; it must be a whole number: write 1."]),
        ({"data": {"videos": {"weight": float("nan")}}}, ["data.videos.weight is nan: give a finite number"]),
        ({"data": {"videos": {"batch_size": 2**62}}}, ["data.videos.batch_size is 46", "at most 1048576"]),
        ({"data": {"workers": 2**62}}, ["data.workers is 46", "at most 1024"]),
        (backbone(layers=2**62), ["model.init_args.backbone.layers is 46", "at most 4096"]),
        ({"seed_everything": -1}, ["seed_everything is -1", "from 0 to 4294967295"]),
        ({"seed_everything": 2**40}, ["seed_everything is 1099511627776", "from 0 to 4294967295"]),
        ({"trainer": {"gradient_clip_val": -1}}, ["trainer.gradient_clip_val is -1", "positive number, or null"]),
        ({"trainer": {"gradient_clip_val": "abc"}}, ["trainer.gradient_clip_val is abc; it must be a number"]),
        ({"trainer": {"devices": 1000}}, ["trainer.devices is 1000: give 1 to 1, or raise data.max_ranks"]),
        ({"trainer": {"devices": 2**62}}, ["trainer.devices is 4611686018427387904"]),
        ({"trainer": {"max_steps": -1}}, ["trainer.max_steps is -1"]),
        ({"trainer": {"max_steps": 2**62}}, [f"trainer.max_steps is {2**62}: give a number from 1 to"]),
        ({"trainer": {"max_time": {}}}, ["trainer.max_time is {}"]),
        ({"trainer": {"max_time": {"hours": -1}}}, ["trainer.max_time is {'hours': -1}: give a time"]),
        ({"trainer": {"max_time": "1h"}}, ["trainer.max_time is '1h': give a time, as DD:HH:MM:SS"]),
        ({"trainer": {"max_time": 3}}, ["trainer.max_time is 3; it must be a string"]),
        ({"trainer": {"callbacks": 0}}, ["trainer.callbacks is 0; it must be a list or the import path"]),
        ({"trainer": {"detect_anomaly": None}}, ["trainer.detect_anomaly is null; it must be true or false"]),
        (backbone(layers=None), ["model.init_args.backbone.layers is null; it must be a whole number"]),
        ({"model": {"init_args": {"backbone": 3}}}, ["model.init_args.backbone is 3; it must be names with values"]),
        ({"run_dir": ""}, ["run_dir is '': give the path of a folder"]),
        ({"run_dir": None}, ["run_dir is null; it must be a string"]),
        ({"run_dir": []}, ["run_dir is []; it must be a string"]),
        ({"run_dir": "a\0b"}, ["run_dir is 'a\\x00b': remove the null character"]),
        ({"runs": "", "run_dir": "${runs}/mine"}, ["runs is '': give the path of a folder"]),
        ({"trainer": {"callbacks": ["EMA"]}}, ["trainer.callbacks has EMA, but every run has"]),
        *(
            (
                {"trainer": {"callbacks": [{"class_path": name, "init_args": arguments}]}},
                [f"trainer.callbacks has {name}, but every run averages its weights", "set ema.decay"],
            )
            for name, arguments in {
                "EMAWeightAveraging": {},
                "WeightAveraging": {},
                "StochasticWeightAveraging": {"swa_lrs": 0.1},
            }.items()
        ),
        (
            {
                "trainer": {
                    "callbacks": [
                        {
                            "class_path": "lightning.pytorch.callbacks.GradientAccumulationScheduler",
                            "init_args": {"scheduling": {0: 4}},
                        }
                    ]
                }
            },
            ["trainer.callbacks has GradientAccumulationScheduler", "micro_batches"],
        ),
        (
            {"trainer": {"logger": False, "callbacks": ["LearningRateMonitor"]}},
            ["LearningRateMonitor failed (MisconfigurationException: ", "remove it from the recipe"],
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_bad_recipe(
    recipe: dict[str, Any],
    changes: dict[str, Any],
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(merged(recipe, changes)))
    assert main(["fit", "--config", str(path)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    for word in words:
        assert word in errors[0]


GROUPS = (
    *("trainer", "data", "data.images", "data.cache", "scores", "scores.video_network", "preview", "ema", "checkpoint"),
    *("model.init_args", "model.init_args.backbone", "model.init_args.optimizer", "model.init_args.schedule"),
)


@pytest.mark.parametrize(
    ("value", "shown"), [(True, "True"), ([], "[]"), ("x", "'x'"), (None, "null")], ids=("true", "[]", "x", "null")
)
def test_a_group_that_is_no_mapping_is_refused_in_each_file(
    recipe: dict[str, Any], value: Any, shown: str, tmp_path: Path
) -> None:
    """A later file would replace such a group, and with it the defaults of its options."""
    parser, path = recipe_parser(), tmp_path / "base.yaml"
    over = tmp_path / "recipe.yaml"
    over.write_text(yaml.safe_dump(merged(recipe, {"base": "base.yaml"})))
    arguments = [f"--config={path}", f"--config={over}"]
    for group in GROUPS:
        nested: Any = value
        for name in reversed(group.split(".")):
            nested = {name: nested}
        for content in (nested, {group: value}):  # YAML may give the name of an option as one key too
            path.write_text(yaml.safe_dump(content))
            with pytest.raises(
                InputError, match=re.escape(f"{path}: {group} is {shown}; it must be names with values")
            ):
                parser.parse_args(arguments)


@pytest.mark.parametrize("value", [True, 3, []], ids=str)
def test_a_stage_that_is_no_class_is_refused(recipe: dict[str, Any], value: Any, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(merged(recipe, {"model": value})))
    with pytest.raises(InputError, match=re.escape(f"model is {value}; it must be the import path")):
        parse_recipe("fit", [f"--config={path}"])


def test_a_recipe_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "nearest"),
    [
        ("trainer.max_stepz", "--trainer.max_steps"),
        ("trainer.max_step", "--trainer.max_steps"),
        ("model.init_args.initial_w", "'initial_weights'"),
        ("model.init_args.backbone.laye", "'model.init_args.backbone.layers'"),
        ("optimizer.lr", "--model.init_args.optimizer.learning_rate"),
        ("trainer.lr", "--model.init_args.optimizer.learning_rate"),
        ("model.init_args.lr", "model.init_args.optimizer.learning_rate"),
        ("model.init_args.optimizer.wd", "'model.init_args.optimizer.weight_decay'"),
        ("model.init_args.backbone.depth", "'model.init_args.backbone.layers'"),
        ("batch_size", "--data.images.batch_size or --data.videos.batch_size or --data.sequences.batch_size"),
        ("data.videos.bs", "--data.videos.batch_size"),
        ("trainer.epochs", "--trainer.max_steps"),  # trainer.max_epochs is refused
        ("patch_size", "--model.init_args.backbone.patch_size"),  # which sets data.patch_size
    ],
)
def test_unknown_and_abbreviated_options_on_the_command_line(
    option: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", "gpdit:debug/overfit_one_clip", f"--{option}", "3"]) == 2
    assert f"did you mean {nearest}?" in capsys.readouterr().err


def test_validate_without_a_run(recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["validate", "--config", str(path)]) == 2
    assert "has no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
            "enforce fail",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nSee above."), "20.00 MiB.): "),
        (MemoryError(), "memory ran out: lower --batch_size or --window, or set --precision bf16"),
    ],
)
def test_a_lack_of_memory_in_the_main_process_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, reason: str
) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(cli, "run", fail)
    assert main(["sample"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: memory ran out")
    assert reason in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (RecursionError("maximum recursion depth exceeded"), 1, "unexpected RecursionError: maximum recursion depth"),
        (UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range"), 1, "unexpected UnicodeEncodeError: 'ascii'"),
        (RuntimeError("Caught KeyError.\nTraceback (most recent call last):\nKeyError: 'x'"), 1, "KeyError: 'x' ("),
        (AssertionError(), 1, "unexpected AssertionError: no message ("),
        (OSError(errno.EMFILE, "Too many open files", "x.tar"), 2, "x.tar: Too many open files: use fewer workers"),
        (OSError(errno.ENOSPC, "No space left on device", "x.tar"), 2, "x.tar: No space left on device: free some"),
        (RuntimeError("can't start new thread"), 2, "a thread could not be started: use fewer workers"),
        (InputError("x" * 5000), 2, "xxx...xxx"),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_every_exception_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    debug: bool,
    error: Exception,
    status: int,
    sentence: str,
) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(cli, "run", fail)
    assert main(["sample", *["--debug"] * debug]) == status
    *before, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ")
    assert sentence in last
    assert len(last) < 1300
    assert any("Traceback" in line for line in before) == debug
    if status == 1:
        assert f"{__file__}, line " in last
        assert f"a fault of the module {__name__}; --debug shows" in last
        assert not before or debug


def test_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in VERBS)
    assert main(["dream"]) == 2
    assert "no verb 'dream'" in capsys.readouterr().err


def test_print_config_resolves_interpolation_and_overlays(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "fit",
                f"--config={RECIPES / 'stage2_mixed.yaml'}",
                f"--config={RECIPES / 'size' / 'tiny.yaml'}",
                "--seed_everything=7",
                "--print_config",
            ]
        )
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["init_args"]["backbone"]["size"] == "tiny"
    assert config["data"]["images"]["weight"] == 1.0
    assert config["trainer"]["gradient_clip_val"] == 1.0
    assert config["data"]["seed"] == 7
    assert config["run_dir"] == "runs/tiny/stage2_mixed"
    assert config["model"]["init_args"]["initial_weights"] is None
    assert config["data"]["videos"]["manifests"] == ["latents/tiny/video"]


def test_help_explains_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "Samples per optimizer step that uses the source, over all ranks",
        "of the average per optimizer step",
        "--run_dir",
    ):
        assert words in shown
    with pytest.raises(SystemExit):
        main(["fit", "--model.help", "GPDiTStage"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "The clean blocks that a clean block attends to" in shown
    assert "Peak learning rate" in shown


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no checkpoint"),
        (b"PK\x03\x04 torn", "not a complete checkpoint"),
        ("tensor", "not a checkpoint of"),
    ],
)
def test_sample_from_a_bad_checkpoint(
    content: bytes | str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.ckpt"
    if content:
        path.mkdir()
    if isinstance(content, bytes):
        (path / "training.ckpt").write_bytes(content)
    elif content:
        torch.save({"weights": torch.zeros(3)}, path / "training.ckpt")
    assert main(["sample", "--checkpoint", str(path), "--context", "video.mp4"]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert str(path) in message


def test_closed_and_full_outputs(tmp_path: Path) -> None:
    """`>&-` and a full disk."""
    command = f"exec {sys.executable} -m gpdit_lightning recipes"
    assert subprocess.run(["sh", "-c", f"{command} >&- 2>&-"], check=False).returncode == 0
    full = subprocess.run(["sh", "-c", f"{command} >/dev/full"], check=False, capture_output=True, text=True)
    assert full.returncode == 2
    assert full.stderr.startswith("error: the output ")
    assert "No space left on device" in full.stderr
    assert full.stderr.count("\n") == 1


@pytest.mark.parametrize("verb", [["--help"], ["recipes"], ["fit", "--help"], ["sample", "--help"]], ids=" ".join)
def test_output_without_a_reader_ends_quietly(verb: list[str]) -> None:
    """As in `python -m gpdit_lightning recipes | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "gpdit_lightning", *verb]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert ended.stderr == ""
    assert ended.returncode in (0, 141)  # 0: argparse has ignored the error


def test_log_messages_follow_a_replaced_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook or a test that captures the output of each call of `main`."""
    for text in ("first", "second"):
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        cli._show_log("")
        logging.getLogger("gpdit_lightning.test").info(text)
        assert stream.getvalue() == f"{text}\n"
        stream.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "abc"), ("RANK", "2"), ("RANK", "9" * 5000), ("WORLD_SIZE", "0"), ("LOCAL_RANK", "-1")],
)
def test_impossible_variables_of_launchers_are_named(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable, text in ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"} | {name: value}).items():
        monkeypatch.setenv(variable, text)
    assert main(["inspect", "absent"]) == 2
    assert capsys.readouterr().err.startswith(f"error: the environment variable {name} is {value[:9]!r}"[:-1])
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("LOCAL_RANK", "abc")  # alone
    assert main(["inspect", "absent"]) == 2
    assert "error: the environment variable LOCAL_RANK is 'abc'" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    with pytest.raises(InputError, match="the environment variable LOCAL_WORLD_SIZE is '0': give 1 to"):
        environment_number("LOCAL_WORLD_SIZE", 1, least=1)


def test_a_working_directory_that_was_removed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["inspect", str(tmp_path)]) == 2
    message = "error: the working directory cannot be used (No such file or directory): change to another.\n"
    assert capsys.readouterr().err == message


def test_an_interpreter_without_docstrings_is_refused() -> None:
    command = [sys.executable, "-OO", "-m", "gpdit_lightning", "prepare", "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "-OO removes the texts of options" in ended.stderr


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), "or set TMPDIR."),
        (ImportError("liba.so: failed to map segment from shared object"), "raise the limit of memory (ulimit -v)."),
    ],
)
def test_full_disks_and_memory_at_the_start_are_named(error: Exception, words: str) -> None:
    sentence, status = describe(error, "fit")
    assert (sentence.endswith(words), status) == (True, 2)


def test_a_variable_that_a_package_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ValueError("The value of TORCH_DISTRIBUTED_DEBUG must be OFF, INFO, or DETAIL")
    assert describe(error, "fit")[1] == 1
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "x")
    sentence, status = describe(error, "fit")
    assert (sentence.startswith("the environment variable TORCH_DISTRIBUTED_DEBUG is 'x'"), status) == (True, 2)


def test_a_warning_that_the_user_made_an_error_is_no_fault_of_the_library() -> None:
    sentence, status = describe(DeprecationWarning("\n  old\n"), "fit")
    assert status == 2
    assert sentence.startswith("a warning is an error here (DeprecationWarning: old): leave PYTHONWARNINGS=error")


def test_a_file_that_a_library_names_by_bytes_is_shown_as_text() -> None:
    error = OSError(errno.EMFILE, "Too many open files", b"run/events")
    assert describe(error, "fit")[0].startswith("run/events: Too many open files: use fewer workers")
