"""An error in a class of a recipe, or in its arguments, is one sentence with the option, the value and the cure."""

import contextlib
import logging
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpdit_lightning.cli import main
from gpdit_lightning.cli.class_errors import ClassSpec
from gpdit_lightning.errors import InputError
from gpdit_lightning.stages import GPDiTStage
from tests.cli.test_resume import recipe

PARTS = """
from lightning import Callback
from lightning.pytorch.loggers.logger import Logger

from gpdit_lightning.model import GPDiTConfig
from gpdit_lightning.stages import GPDiTStage


class Huber(GPDiTStage):
    def __init__(self, *args, delta: float, **options) -> None:
        super().__init__(*args, **options)


class Strict(GPDiTStage):
    def __init__(self, *args, delta: float = 1.0, **options) -> None:
        raise ValueError("delta must be positive")


class Untyped(GPDiTStage):
    def __init__(self, backbone, scale: float = 1.0) -> None:
        super().__init__(backbone)


class Counter(Callback):
    def __init__(self, name: str, every: int = 1) -> None:
        pass


class Incomplete(Logger):
    pass


class Stateful(Callback):
    def state_dict(self):
        return {"count": 1}


class Offline(Logger):
    name, version = "offline", ""

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        raise ConnectionRefusedError(111, "Connection refused")


class Plain:
    pass


number = 3
"""


@pytest.fixture(scope="module", autouse=True)
def parts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("parts")
    (folder / "recipe_parts").mkdir()
    for name, text in {"__init__": "", "good": PARTS, "wrong": "def (", "needy": "import no_such_package"}.items():
        (folder / "recipe_parts" / f"{name}.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield


ANNOUNCED = "outside this library: its code is imported and run"


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the message of `fit`, the only line on stderr besides those that announce imports."""
    assert main(["fit", *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(ANNOUNCED)]
    assert len(lines) == 1, lines
    return lines[0]


CLASSES = [
    ("good.Hubr", "does not exist: module recipe_parts.good"),
    ("good.Hubr", "(did you mean 'Huber'?)"),
    ("god.Huber", "cannot be imported (No module named 'recipe_parts.god' (did you mean 'good'?))"),
    ("wrong.Huber", "cannot be imported (SyntaxError: invalid syntax (wrong.py, line 1))"),
    ("needy.Huber", "cannot be imported (No module named 'no_such_package')"),
    ("good.Plain", "is not a subclass of"),
    ("good.number", "is not a subclass of"),
]


@pytest.mark.parametrize(("path", "words"), CLASSES, ids=lambda value: value[:20])
@pytest.mark.parametrize("option", ["model", "trainer.logger", "trainer.callbacks", "trainer.strategy"])
def test_a_class_that_cannot_be_used(
    path: str, words: str, option: str, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the command line and in YAML, there as an item of a list if the option takes one."""
    path = f"recipe_parts.{path}"
    settings, file = recipe(tiny_shards, tmp_path / "run"), tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings))
    error = error_of([f"--config={file}", f"--{option}", path], capsys)
    assert error.startswith(f"error: {option} '{path}'")
    assert words in error
    spec = {"class_path": path}
    if option == "model":
        settings["model"]["class_path"] = path
    else:
        settings["trainer"][option.split(".")[1]] = spec if option == "trainer.strategy" else [spec]
    file.write_text(yaml.safe_dump(settings))
    error = error_of([f"--config={file}"], capsys)
    assert error.startswith(f"error: {option}{'[0]' if option in ('trainer.logger', 'trainer.callbacks') else ''} ")
    assert words in error


HUBER, COUNTER = "recipe_parts.good.Huber", "recipe_parts.good.Counter"
ARGUMENTS = [
    (["--model", HUBER], f"model.init_args.delta is missing: {HUBER} requires it."),
    (["--model", HUBER, "--model.init_args.dleta=1"], f"model.init_args.dleta is not an argument of {HUBER} (did you"),
    (["--model", HUBER, "--model.delta=x"], "model.init_args.delta is x; it must be a number."),
    (["--trainer={max_steps: 1e4}"], "trainer.max_steps is 10000.0; it must be a whole number: write 10000."),
    (["--model.clas_path", HUBER], "model.init_args.clas_path is not an argument of"),
    (["--model", "MixdStage"], "model 'MixdStage' is not known (did you mean 'MixedStage'?)."),
    (["--model", "recipe_parts.good.Strict"], "Strict' cannot be constructed (ValueError: delta must be positive in "),
    (["--model", "recipe_parts.good.Untyped"], "annotate the parameter as `backbone: GPDiTConfig`"),
    (["--trainer.callbacks+", COUNTER], f"trainer.callbacks[0].init_args.name is missing: {COUNTER} requires it."),
    (
        ["--trainer.callbacks", f'[{{"class_path": "{COUNTER}", "init_args": {{"name": "n", "every": "e"}}}}]'],
        "trainer.callbacks[0].init_args.every is e; it must be a whole number.",
    ),
    (["--trainer.logger", "recipe_parts.good.Incomplete"], "does not define log_hyperparams, log_metrics"),
    (["--trainer.logger=CSVLogger", "--trainer.logger.save_dr=x"], "trainer.logger.init_args.save_dr is not"),
    (["--trainer.plugins", "recipe_parts.good.No"], "Problem with given class_path 'recipe_parts.good.No'"),
]


@pytest.mark.parametrize(("options", "words"), ARGUMENTS, ids=lambda value: str(value)[:60])
def test_an_argument_that_cannot_be_used(
    options: list[str], words: str, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(tiny_shards, tmp_path / "run")))
    assert words in error_of([f"--config={file}", *options], capsys)


def test_arguments_that_a_later_class_does_not_take_are_dropped(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message concerns another option: the earlier argument `delta` is not an error."""
    settings, file = recipe(tiny_shards, tmp_path / "run"), tmp_path / "recipe.yaml"
    settings["model"] |= {"class_path": HUBER}
    settings["model"]["init_args"]["delta"] = 1.0
    file.write_text(yaml.safe_dump(settings))
    arguments = [f"--config={file}", "--model=MixedStage", "--trainer.max_steps=many"]
    assert "trainer.max_steps is many; it must be a whole number" in error_of(arguments, capsys)


def test_a_run_cannot_resume_with_another_stage(
    tiny_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Validation of the run with another stage is possible, where there is something to validate."""
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(tiny_shards, tmp_path / "run")))
    arguments = [f"--config={file}", "--trainer.max_steps=1"]
    assert main(["fit", *arguments]) == 0
    other = [*arguments, "--model", HUBER, "--model.init_args.delta=1"]
    capsys.readouterr()
    assert main(["fit", *other]) == 2
    assert "was trained with MixedStage, but `model` of the recipe is Huber" in capsys.readouterr().err
    monkeypatch.setattr(logging.getLogger("gpdit_lightning"), "handlers", [caplog.handler])
    assert main(["validate", *other]) == 0
    assert "loss/val" in capsys.readouterr().out
    assert "the run was trained with MixedStage; this loss is that of Huber" in caplog.messages
    assert main(["validate", *arguments, "--data.validation_batches=0"]) == 2
    assert "there is nothing to validate: data.validation_batches is 0" in capsys.readouterr().err
    for verb, limit in (("validate", "trainer.limit_val_batches"), ("test", "trainer.limit_test_batches")):
        assert main([verb, *arguments, f"--{limit}=0"]) == 2
        assert f"there is nothing to {verb}: {limit} is 0; leave it out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trainer.logger", "recipe_parts.good.Offline"], "good.Offline failed (ConnectionRefusedError: "),
        (
            ["--trainer.callbacks", '[{"class_path": "recipe_parts.good.Stateful"}, {"class_path": "recipe_parts.good.'
             'Stateful"}]'],
            "several callbacks of the class Stateful, whose states have one name",
        ),
    ],
)  # fmt: skip
def test_an_error_of_a_logger_or_callback(
    options: list[str], words: str, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A connection that a logger loses is not reported as an error of the disk."""
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(tiny_shards, tmp_path / "run")))
    assert main(["fit", f"--config={file}", "--trainer.log_every_n_steps=1", *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error
    assert "free space" not in error


@pytest.mark.parametrize("arguments", ["backbone", 5, [1]])
def test_arguments_that_are_no_mapping_are_refused(arguments: object) -> None:
    with pytest.raises(InputError, match=r"^model.init_args is .*; it must be names with values"):
        ClassSpec("model", GPDiTStage).update({"class_path": "MixedStage", "init_args": arguments})


def write_announced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a module `announced`, outside the library, whose import writes the file `announced.imported`."""
    (folder / "announced.py").write_text(
        "import pathlib\nfrom lightning import Callback\nfrom gpdit_lightning.stages import MixedStage\n"
        "pathlib.Path(__file__).with_suffix('.imported').touch()\n\nclass Call(Callback):\n    pass\n\n"
        "class Stage(MixedStage):\n    def __init__(self, extra: int = 1, **others):\n"
        "        super().__init__(**others)\n\ndef function():\n    pass\n\n"
        "def make_call(number: int = 1) -> Call:\n    return Call()\n"
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "announced", raising=False)


@pytest.mark.parametrize(
    ("options", "is_imported"),
    [
        (["--ema.decay=abc"], False),
        (["--ema.nope=3"], False),
        (["--data.seed=null"], False),
        (["--model=announced.Stage", "--model.init_args.extra=4", "--model.init_args.backbone.width=abc"], False),
        (["--model=announced.Stage", "--model.init_args.extra=4", "--print_config"], True),
    ],
)
def test_outside_code_is_announced_and_imported_only_by_a_valid_recipe(
    options: list[str],
    is_imported: bool,
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_announced(tmp_path, monkeypatch)
    settings = recipe(tiny_shards, tmp_path / "run")
    settings["trainer"]["callbacks"] = [{"class_path": "announced.Call"}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    try:
        assert main(["fit", f"--config={tmp_path / 'recipe.yaml'}", *options]) == 2
    except SystemExit:
        assert is_imported  # after --print_config
    lines = capsys.readouterr().err.splitlines()
    assert (tmp_path / "announced.imported").exists() == is_imported
    if is_imported:
        named = ("model names announced.Stage", "trainer.callbacks names announced.Call")
        assert {*lines} == {f"{name}, {ANNOUNCED}" for name in named}
    else:
        assert len(lines) == 1


CALL = "{class_path: announced.Call}"


@pytest.mark.parametrize(
    ("trainer", "words", "path"),
    [
        ({"callbacks": ["call.yaml"]}, ["--config=sub/ema.yaml"], "announced.Call"),
        ({"callbacks": "call.yaml"}, [], "announced.Call"),
        ({"callbacks+": [{"class_path": "announced.Call"}]}, [], "announced.Call"),
        ({"callbacks": [{"class_path": "announced.make_call"}]}, [], "announced.make_call"),
        ("trainer.yaml", [], "announced.Call"),
        ({}, ["--trainer.callbacks=call.yaml"], "announced.Call"),
        ({}, ["--trainer=trainer.yaml"], "announced.Call"),
        ({}, ["--trainer", f"{{callbacks: [{CALL}]}}"], "announced.Call"),
        ({}, ["--trainer.callbacks", f"\n- {CALL}"], "announced.Call"),
        ({}, ["--trainer.callbacks+", "class_path: announced.Call"], "announced.Call"),
        ({}, ["--config=dotted.yaml"], "announced.Call"),
        (
            {},
            ["--trainer.callbacks=LambdaCallback", "--trainer.callbacks.on_fit_start=announced.function"],
            ".function",
        ),
    ],
)
def test_outside_code_is_announced_in_whatever_way_it_is_named(
    trainer: Any,
    words: list[str],
    path: str,
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_announced(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    settings = recipe(tiny_shards, tmp_path / "run")
    settings["trainer"] = settings["trainer"] | trainer if isinstance(trainer, dict) else trainer
    for name, text in {
        "recipe.yaml": yaml.safe_dump(settings),
        "call.yaml": CALL,
        "trainer.yaml": "callbacks: [call.yaml]",
        "dotted.yaml": f"trainer.callbacks: [{CALL}]",
        "cosine": "has the name of a value of the recipe",
    }.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "ema.yaml").write_text(f"ema: average.yaml\ntrainer.callbacks: {CALL}")  # relative to sub
    (tmp_path / "sub" / "average.yaml").write_text("decay: 0.5")
    fit = ["fit", "--config=recipe.yaml", *words]
    assert main([*fit, "--ema.decay=abc"]) == 2
    assert not (tmp_path / "announced.imported").exists()
    capsys.readouterr()
    with contextlib.suppress(SystemExit):
        main([*fit, "--print_config"])
    assert (tmp_path / "announced.imported").exists()
    assert f"{path}, {ANNOUNCED}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        [f"--model.init_args.schedule={CALL}"],
        [f"--scores.video_network={CALL}"],
    ],
)
def test_outside_code_is_not_imported_where_no_class_is_expected(
    words: list[str],
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_announced(tmp_path, monkeypatch)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(tiny_shards, tmp_path / "run")))
    assert "announced.Call" in error_of([f"--config={tmp_path / 'recipe.yaml'}", *words], capsys)
    assert not (tmp_path / "announced.imported").exists()


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("trainer.deterministic=-", "trainer.deterministic is -; it must be true or false or one of warn."),
        ("trainer.plugins=[logging.Logger]", "it must be the import path of a subclass of Precision or "),
        ("trainer.callbacks={class_path: LearningRateMonitor, dict_kwargs: {x: 1}}", "unexpected keyword argument 'x'"),
    ],
)
def test_a_value_of_the_trainer_is_refused_without_types_of_python(
    option: str, sentence: str, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(tiny_shards, tmp_path / "run")))
    message = error_of([f"--config={tmp_path / 'recipe.yaml'}", f"--{option}"], capsys)
    assert sentence in message
    assert "<class" not in message


def test_an_address_in_the_place_of_a_class_is_not_opened(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(tiny_shards, tmp_path / "run")))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/logger.yaml"
        message = error_of([f"--config={tmp_path / 'recipe.yaml'}", f"--trainer.logger={address}"], capsys)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert f"trainer.logger '{address}' is not known" in message
