"""`export`: the exported folder, and everything that reads it."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from lightning import Trainer
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from gpdit_lightning import GPDiT, GPDiTConfig, GPDiTPipeline
from gpdit_lightning.checkpoints.facts import Origin
from gpdit_lightning.checkpoints.reading import load_trained_model, open_weights
from gpdit_lightning.cli import main
from gpdit_lightning.codecs import load_codec
from gpdit_lightning.codecs.pca import SHIPPED_WEIGHTS
from gpdit_lightning.data.datamodule import LatentDataModule, SourceConfig
from gpdit_lightning.diffusion import Guidance
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.report import Protocol, Report, Score
from gpdit_lightning.evaluation.report_text import write_report
from gpdit_lightning.regular_files import sha256_of
from gpdit_lightning.stages import GPDiTStage
from gpdit_lightning.training.callbacks.ema import EMA
from gpdit_lightning.training.callbacks.run_checkpoint import RunCheckpoint
from gpdit_lightning.training.optimizer import OptimizerConfig
from tests.checkpoints.content import read_checkpoint
from tests.conftest import TINY_CODEC
from tests.data.labelled import write_labelled

Fit = Callable[..., Trainer]


@pytest.fixture(scope="module")
def run(tiny_shards: Path, tiny_config: GPDiTConfig, fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with averaged weights. Do not change it."""
    folder = tmp_path_factory.mktemp("run")
    stage = GPDiTStage(tiny_config, optimizer=OptimizerConfig(learning_rate=0.03, warmup_steps=0))
    data = LatentDataModule(videos=SourceConfig([str(tiny_shards)], batch_size=4))
    fit(stage, data, folder, 3, [EMA(0.5), RunCheckpoint()])
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's averaged weights, exported. Do not change it."""
    out = tmp_path_factory.mktemp("exported") / "model"
    assert export(run, out) == 0
    return out


def export(checkpoint: Path, out: Path, *options: str) -> int:
    return main(["export", "--checkpoint", str(checkpoint), "--out", str(out), *options])


def velocity(model: GPDiT) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    noisy, clean = torch.randn(2, 2, 3, 4, 8, 8, generator=generator)
    with torch.no_grad():
        return model(noisy, torch.rand(2, 3, generator=generator), clean)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_exported_model_equals_the_checkpoint(run: Path, exported: Path) -> None:
    trained, reopened = load_trained_model(run), load_trained_model(exported)
    assert {path.name for path in exported.iterdir()} == {"model.safetensors", "config.json", "README.md", "SHA256SUMS"}
    assert_same(tensors_of(exported), trained.backbone.state_dict())
    expected = velocity(trained.backbone)
    assert expected.std() > 0.01
    assert torch.equal(velocity(GPDiT.from_pretrained(exported)), expected)
    assert torch.equal(velocity(reopened.backbone), expected)
    for name in ("schedule", "codec", "geometry", "step", "classes"):
        assert getattr(reopened, name) == getattr(trained, name)
    assert trained.classes == ()
    assert reopened.backbone.config == trained.backbone.config
    assert reopened.backbone.facts == trained.backbone.facts
    assert len({path.stat().st_mode for path in exported.iterdir()}) == 1


def test_config_and_card_state_the_facts_of_the_checkpoint(run: Path, exported: Path) -> None:
    content, checkpoint = json.loads((exported / "config.json").read_text()), read_checkpoint(run)
    data = checkpoint["LatentDataModule"]
    assert content["codec"] == data["codec"]
    assert content["geometry"] == data["geometry"]
    assert content["data"] == data["order"]
    assert content["config"] == checkpoint["gpdit"]["backbone"]
    assert content["schedule"] == checkpoint["gpdit"]["schedule"]
    assert (content["weights"], content["step"], content["stage"]) == ("ema", 3, "GPDiTStage")
    assert "origin" not in content  # its initial weights were random
    card = (exported / "README.md").read_text()
    assert data["order"]["data.videos.manifests"][0] in card
    assert "averaged (EMA) weights after 3 optimizer steps of GPDiTStage" in card


def test_card_shows_images_and_scores_of_the_run(
    tiny_config: GPDiTConfig, write_shards: Callable[..., Any], fit: Fit, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    counts = {(split, "video", (5, 4, 4)): 3 for split in ("train", "validation")}
    codec = tmp_path / "fitted.safetensors"
    shutil.copyfile(SHIPPED_WEIGHTS, codec)
    manifest = write_shards(tmp_path / "shards", counts, codec=load_codec("pca", str(codec)).spec())
    replace(manifest, preparation={"stride": 1}).save()  # as its samples
    shards = manifest.directory
    run, evaluation = tmp_path / "run", tmp_path / "run" / "evaluation"
    data = LatentDataModule(videos=SourceConfig([str(shards)], batch_size=3))
    fit(GPDiTStage(tiny_config.replaced(latent_channels=16)), data, run, 1, [EMA(), RunCheckpoint()])
    (run / "config.yaml").write_text(json.dumps({"data": {"videos": {"manifests": [str(shards)]}}}))

    def card(name: str, *options: str, of: Path = run) -> ModelCard:
        assert export(of, tmp_path / name, *options) == 0
        for image in re.findall(r"!\[.*\]\((.*)\)", text := (tmp_path / name / "README.md").read_text()):
            assert (tmp_path / name / image).is_file()
        assert str(tmp_path) not in text
        return ModelCard(text)

    card("without_codec")  # a record of a checkpoint does not choose which file is read and copied
    assert not (tmp_path / "without_codec" / "codec.safetensors").exists()
    continued = card("continued", "--codec_source", str(codec))
    assert "Held-out clips: 5 context frames, then generated frames (adams sampler, 8 steps)" in continued.text
    assert "| data, videos | 3 samples, and 3 held out |" in continued.text
    assert "| optimizer | AdamW: learning_rate 0.0001, betas [0.9, 0.999]" in continued.text
    assert "| precision | 32-true |" in continued.text
    assert "| hardware | 1 x CPU (" in continued.text
    with Image.open(tmp_path / "continued" / "sample.gif") as animation:
        assert animation.n_frames == 17
    assert card("continued", "--codec_source", str(codec)).content == continued.content  # the same folder again
    assert "sample.png" in card("again", of=tmp_path / "continued").text

    (run / "previews").mkdir()
    for number in (0, 1, 2):
        (run / "previews" / f"step-{number:06d}.png").write_text(f"strip {number}")
    assert "Preview of step 1: generated" in card("preview").text
    assert (tmp_path / "preview" / "sample.png").read_text() == "strip 1"
    assert "](sample.png)" not in card("plain", "--no_samples").text

    assert [card("plain").text.count(image) for image in ("](sample.png)", "](sample.gif)")] == [1, 0]  # replaced

    write_report(report_of(run), evaluation)
    scored = card("scored")
    row = "| digits: 64 videos of 32x32, 12 frames from 5; rotation sampler, 25 steps | FVD ↓ | 212.0 ± 2.8 |"
    assert row in scored.text
    (score,) = [result for result in scored.data.eval_results or () if result.metric_type == "fvd"]
    assert (score.task_type, score.metric_value) == ("video-to-video", 212.0)
    assert export(run, tmp_path / "raw", "--weights=raw", "--evaluation", str(evaluation)) == 2
    assert "is of another checkpoint or of other weights" in capsys.readouterr().err
    assert not (tmp_path / "raw").exists()

    codec.unlink()  # its copies are in the exported folders
    for name in ("continued", "again"):
        assert len(GPDiTPipeline.from_pretrained(tmp_path / name)(frames=1, steps=1).frames[0]) == 1


def report_of(run: Path) -> Report:
    """A report of an evaluation of the averaged weights of a run."""
    trained = load_trained_model(run)
    protocol = Protocol(
        data="digits", choice="all", split_sha256="0", videos=64, context_frames=5, generated_frames=12,
        fvd_frames="all", size=(32, 32), stride=3, resize="", sampler="rotation", steps=25, guidance=Guidance(),
        schedule=trained.schedule, seeds=(0, 1), window=None, precision="float32", checkpoint=str(run),
        checkpoint_sha256=trained.sha256, step=1, weights="ema", codec="pca", codec_sha256="0", networks={},
        versions={}, hardware="",
    )  # fmt: skip
    return Report(protocol, {"fvd": Score.of([210.0, 214.0])})


def test_class_names_are_exported(tiny_config: GPDiTConfig, fit: Fit, tmp_path: Path) -> None:
    latents = [(name, np.zeros((1, 4, 4, 4))) for name in ("jump", "run")]
    shards = write_labelled(tmp_path / "shards", ["run", "jump"], latents).directory
    data = LatentDataModule(images=SourceConfig([str(shards)], batch_size=2), labels=True)
    fit(GPDiTStage(tiny_config.replaced(classes=2)), data, tmp_path / "run", 1, [EMA(), RunCheckpoint()])
    assert export(tmp_path / "run", tmp_path / "model") == 0
    assert load_trained_model(tmp_path / "model").classes == load_trained_model(tmp_path / "run").classes
    assert GPDiT.from_pretrained(tmp_path / "model").facts.classes == ("run", "jump")
    assert (
        "one of 2 classes, listed in `config.json` by their numbers: `run`, `jump`."
        in (tmp_path / "model/README.md").read_text()
    )


def test_raw_weights_are_exported_on_request(run: Path, exported: Path, tmp_path: Path) -> None:
    assert export(run, tmp_path / "raw", "--weights=raw") == 0
    raw = load_trained_model(run, weights="raw").backbone
    assert_same(tensors_of(tmp_path / "raw"), dict(raw.state_dict()))
    assert not torch.equal(velocity(raw), velocity(load_trained_model(exported).backbone))
    for kind in ("ema", "raw"):  # an export without averaged weights is opened with its raw weights
        assert open_weights(tmp_path / "raw", kind).weights.facts.weights == "raw"
    with pytest.raises(InputError, match=r"model has averaged weights only: use those, or export again with"):
        load_trained_model(exported, weights="raw")


def test_run_without_averaged_weights_is_exported_with_raw_ones(run: Path, tmp_path: Path) -> None:
    content = torch.load(run / "checkpoints/last.ckpt/training.ckpt", weights_only=True)
    del content["ema"]
    (tmp_path / "last.ckpt").mkdir()
    torch.save(content, tmp_path / "last.ckpt/training.ckpt")
    assert export(tmp_path / "last.ckpt", tmp_path / "model") == 0
    assert_same(tensors_of(tmp_path / "model"), dict(load_trained_model(run, weights="raw").backbone.state_dict()))
    assert json.loads((tmp_path / "model/config.json").read_text())["weights"] == "raw"


def test_weights_are_converted_to_another_data_type(run: Path, tmp_path: Path) -> None:
    assert export(run, tmp_path / "bfloat16", "--dtype=bfloat16") == 0
    rounded = {name: value.bfloat16() for name, value in load_trained_model(run).backbone.state_dict().items()}
    assert_same(tensors_of(tmp_path / "bfloat16"), rounded)
    assert GPDiT.from_pretrained(tmp_path / "bfloat16").output.weight.dtype == torch.bfloat16
    assert export(tmp_path / "bfloat16", tmp_path / "float32", "--dtype=float32") == 0  # an export is exported again
    assert_same(tensors_of(tmp_path / "float32"), {name: value.float() for name, value in rounded.items()})


def test_second_export_replaces_the_folder_unless_its_card_was_edited(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "model"
    assert export(run, out) == 0
    content, card = (out / "model.safetensors").read_bytes(), (out / "README.md").read_text()
    (out / "model.safetensors").write_bytes(content[:100])
    edited = card.replace("## Use", "## How to use")
    assert edited != card
    (out / "README.md").write_text(edited)
    assert export(run, out) == 2
    assert f"{out / 'README.md'} was edited, or written by an earlier version, and would be" in capsys.readouterr().err
    assert (out / "README.md").read_text() == edited
    (out / "README.md").unlink()
    (tmp_path / "new" / "model.partial").mkdir()  # left by a killed export
    assert export(run, out) == 0
    assert (out / "model.safetensors").read_bytes() == content
    assert (out / "README.md").read_text() == card
    assert export(run, out) == 0
    assert [path.name for path in out.parent.iterdir()] == ["model"]


def test_folder_with_other_files_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, other = tmp_path / "photos", tmp_path / "other"
    photos.mkdir()
    (photos / "me.jpg").write_text("a photo")
    assert export(run, other, "--weights=raw") == 0
    before = (other / "model.safetensors").read_bytes()
    for out in (photos, other, run):
        assert export(run, out) == 2
        assert f"{out} contains something other than an export of this model" in capsys.readouterr().err
    assert (photos / "me.jpg").read_text() == "a photo"
    assert (other / "model.safetensors").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "other"}


def test_a_link_to_itself_is_replaced(run: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to("model")
    assert export(run, tmp_path / "model", "--no_samples") == 0
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_failed_export_leaves_no_files(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr("gpdit_lightning.checkpoints.exported.save_file", fail)
    assert export(run, tmp_path / "model") == 2
    assert not list(tmp_path.iterdir())


def test_stage_starts_from_an_exported_folder(
    exported: Path, tiny_config: GPDiTConfig, tiny_shards: Path, fit: Fit, tmp_path: Path
) -> None:
    stage = GPDiTStage(tiny_config, initial_weights=str(exported))
    stage.configure_model()
    assert_same(dict(stage.backbone.state_dict()), tensors_of(exported))
    sha256 = sha256_of(exported / "model.safetensors")
    assert stage.origin == Origin(str(exported), 3, sha256)
    data = LatentDataModule(videos=SourceConfig([str(tiny_shards)], batch_size=4))
    fit(stage, data, tmp_path / "run", 1, [EMA(), RunCheckpoint()])
    assert export(tmp_path / "run", tmp_path / "next") == 0
    assert json.loads((tmp_path / "next/config.json").read_text())["origin"] == asdict(stage.origin)
    with pytest.raises(InputError, match="is of a model with layers = 2, but this one has 3"):
        GPDiTStage(tiny_config.replaced(layers=3), initial_weights=str(exported)).configure_model()


def test_stage_refuses_an_export_of_another_codec(
    exported: Path, tiny_config: GPDiTConfig, write_shards: Callable[..., Any], fit: Fit, tmp_path: Path
) -> None:
    shards = write_shards(
        tmp_path / "other", {("train", "video", (3, 8, 8)): 4}, codec=replace(TINY_CODEC, fingerprint="f" * 16)
    ).directory
    data = LatentDataModule(videos=SourceConfig([str(shards)], batch_size=4))
    with pytest.raises(InputError, match="are of different codecs"):
        fit(GPDiTStage(tiny_config, initial_weights=str(exported)), data, tmp_path / "run", 1)


def test_untrained_model_has_no_training_facts(tiny_config: GPDiTConfig, tmp_path: Path) -> None:
    GPDiT(tiny_config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="does not record the schedule, codec, geometry, step of its training"):
        load_trained_model(tmp_path)
    stage = GPDiTStage(tiny_config, initial_weights=str(tmp_path))  # a stage can start from it
    stage.configure_model()
    assert stage.origin is not None
    assert (stage.origin.path, stage.origin.step) == (str(tmp_path), 0)


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_malicious_checkpoints_and_exports_are_not_unpickled(
    run: Path, exported: Path, tiny_config: GPDiTConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace"
    checkpoint, pickled = tmp_path / "last.ckpt", tmp_path / "pickled.ckpt"
    for folder in (checkpoint, pickled):
        shutil.copytree(run / "checkpoints/last.ckpt", folder)
    content = torch.load(run / "checkpoints/last.ckpt/training.ckpt", weights_only=True)
    torch.save(content | {"hyper_parameters": Malicious(trace)}, checkpoint / "training.ckpt")
    torch.save({"backbone.output.weight": Malicious(trace)}, pickled / "ema.safetensors")
    unpickled, disguised, described = (tmp_path / name for name in ("unpickled", "disguised", "described"))
    for folder in (unpickled, disguised, described):
        folder.mkdir()
        (folder / "config.json").write_bytes((exported / "config.json").read_bytes())
        torch.save(Malicious(trace), folder / "pytorch_model.bin")
    torch.save(Malicious(trace), disguised / "model.safetensors")
    (described / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes())
    (described / "config.json").write_text('{"format": "gpdit_lightning-model-1", "config": {"size": ["os.system"]}}')
    for path, words in (
        (checkpoint, "training.ckpt cannot be read as a checkpoint"),
        (pickled, "ema.safetensors is not a complete safetensors file"),
        (unpickled, "model.safetensors does not exist, and weights in other files are not opened"),
        (disguised, "model.safetensors is not a complete safetensors file"),
        (described, "config.json: size is ['os.system']"),
    ):
        assert export(path, tmp_path / "out") == 2
        message = capsys.readouterr().err
        assert words in message
        assert message.count("\n") == 1
        with pytest.raises(InputError):
            load_trained_model(path)
        with pytest.raises(InputError):
            GPDiT.from_pretrained(path)
        with pytest.raises(InputError):
            GPDiTStage(tiny_config, initial_weights=str(path)).configure_model()
    assert not trace.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["state_dict", "gpdit", "LatentDataModule"])
def test_checkpoint_with_invalid_entries_is_refused(part: str, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoints/last.ckpt", tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt/training.ckpt", weights_only=True)
    torch.save(content | {part: [1, 2]}, tmp_path / "last.ckpt/training.ckpt")
    with pytest.raises(InputError, match=r"training\.ckpt is not a checkpoint of gpdit_lightning"):
        load_trained_model(tmp_path / "last.ckpt")
    torch.save(content | {part: {"backbone.output.bias": 3, "codec": 3}}, tmp_path / "last.ckpt/training.ckpt")
    with pytest.raises(InputError, match=r"last\.ckpt (has|lacks)"):
        load_trained_model(tmp_path / "last.ckpt", weights="raw")
