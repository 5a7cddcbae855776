"""`features` on video files, compared with features of the whole model, pooled in loops."""

import errno
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from gpdit_lightning import GPDiT
from gpdit_lightning.checkpoints.reading import load_trained_model
from gpdit_lightning.cli import features as verb
from gpdit_lightning.cli import run
from gpdit_lightning.cli.parsing import parse
from gpdit_lightning.codecs import load_codec
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.videos import read_clip
from gpdit_lightning.media.images import parse_size
from gpdit_lightning.media.video_writer import write_video
from gpdit_lightning.options.features import FeaturesOptions
from gpdit_lightning.probing import features
from gpdit_lightning.probing.features import CHECKSUMS, SOURCES, FeatureRecord, VideoFeatures
from gpdit_lightning.regular_files import open_regular, sha256_of
from tests.cli.sampling import stripes

CODEC = load_codec("pca")


@pytest.fixture(scope="module")
def work(workspace: Path, tmp_path_factory: pytest.TempPathFactory, randomise: Callable[[GPDiT], GPDiT]) -> Path:
    """Folder with models and videos.

    `model` has three blocks and the geometry of 17 frames of 32x32 at stride 3; `two_sizes` has two sizes. `videos`
    contains three videos of 60 frames; `damaged` contains also one that is not a video and one of 12 frames.
    """
    work = tmp_path_factory.mktemp("features")
    trained = load_trained_model(workspace / "of2").backbone
    model = randomise(GPDiT(trained.config.replaced(layers=3)))
    model.facts = trained.facts
    model.save_pretrained(work / "model")
    model.facts = replace(trained.facts, geometry=replace(trained.facts.geometry, sizes=((32, 32), (32, 48))))
    model.save_pretrained(work / "two_sizes")
    for number, name in enumerate(("a", "jump/b", "jump/c.1")):
        (work / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(work / "videos" / f"{name}.mp4", stripes(number), 24)
    shutil.copytree(work / "videos", work / "damaged")
    (work / "damaged/unreadable.mp4").write_bytes(b"no video")
    write_video(work / "damaged/short.mp4", stripes(3)[:12], 24)
    return work


def extract(work: Path, out: Path, *options: Any, videos: str = "videos", model: str = "model") -> None:
    arguments = ["--checkpoint", work / model, "--videos", work / videos, "--out", out, "--layer=2", "--workers=0"]
    run("features", [str(option) for option in (*arguments, *options)])


def expected(work: Path, name: str, frames: int = 17, stride: int = 3, temporal_tokens: int = 5) -> torch.Tensor:
    """Compute the features of one video by the whole model, in loops."""
    clip = read_clip(work / "videos" / f"{name}.mp4", frames, stride, (32, 32), centred=True, resample_short=True)
    latents = (CODEC.encode(clip[None]) - CODEC.mean[:, None, None]) / CODEC.std[:, None, None]
    with torch.no_grad():
        features = load_trained_model(work / "model").backbone.features(latents, [2])[2][0].double()
    rows = [features[frame].mean(0) for frame in range(len(features))]
    rows += [torch.zeros(features.shape[-1])] * (temporal_tokens - len(features))
    rows += [features[:, token].mean(0) for token in range(features.shape[1])]
    return torch.stack([row.double() for row in rows])


def test_features_are_those_of_the_layer(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extract(work, tmp_path, "--batch_size=2")
    data = VideoFeatures(tmp_path, layer=2, frames=17, stride=3, size="32x32", weights="ema")
    assert set(data.names) == {"a", "jump/b", "jump/c.1"}
    assert data.record.shape == (5 + 4, 24)
    assert data.record.codec == CODEC.spec()
    for name in data.names:
        torch.testing.assert_close(data[name].double(), expected(work, name), rtol=2e-3, atol=2e-3)
    assert (
        "features of 3 videos after layer 2, 9 tokens of width 24 each; 3 of them are new, and 0"
        in capsys.readouterr().out
    )


def test_a_recipe_gives_options_and_the_command_line_overrides_them(work: Path, tmp_path: Path) -> None:
    settings = {"layer": 1, "frames": 9, "stride": 0, "temporal_tokens": 7, "format": "pickle", "workers": 0}
    (tmp_path / "features.yaml").write_text(yaml.safe_dump(settings))
    out = tmp_path / "out"
    given = [f"--config={tmp_path / 'features.yaml'}", "--checkpoint", work / "model", "--videos", work / "videos"]
    run("features", [str(word) for word in (*given, "--out", out, "--layer=2")])
    with (out / "jump/b.pkl").open("rb") as file:
        values = pickle.load(file)
    assert values.dtype == np.float16
    reference = expected(work, "jump/b", frames=9, stride=1000, temporal_tokens=7)
    np.testing.assert_allclose(values, reference, rtol=2e-3, atol=2e-3)
    assert not values[3:7].any()


def test_layer_clips_and_size_are_those_of_the_model_by_default(work: Path, tmp_path: Path) -> None:
    """Three quarters of three blocks, the clips of training, and the trained size that is closest to 32x48."""
    arguments = ["--checkpoint", work / "two_sizes", "--videos", work / "videos", "--out", tmp_path, "--workers=0"]
    run("features", [str(option) for option in arguments])
    record = VideoFeatures(tmp_path).record
    assert (record.layer, record.frames, record.stride, record.size) == (2, 17, 3, "32x48")


def test_the_recipe_is_that_of_section_a_2() -> None:
    given = ["--config=gpdit:video_chatgpt", "--checkpoint=run", "--videos=videos", "--out=out"]
    options = parse("features", "", FeaturesOptions, given)
    assert (options.layer, options.format) == (18, "pickle")
    assert options.size is not None
    rows, columns = (side // 16 for side in parse_size(options.size))
    assert options.temporal_tokens + rows * columns == 100 + 256  # tokens that Video-ChatGPT expects


def test_videos_that_cannot_be_read_are_named_and_skipped(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], messages: pytest.LogCaptureFixture
) -> None:
    extract(work, tmp_path / "out", videos="damaged")
    assert "3 of them are new, and 2 videos were skipped" in capsys.readouterr().out
    assert sum("unreadable.mp4" in line or "short.mp4 has 12" in line for line in set(messages.messages)) == 2
    with pytest.raises(InputError, match=r"none of the 1 videos in .*unreadable.mp4 can be used"):
        extract(work, tmp_path / "none", videos="damaged/unreadable.mp4")


def test_existing_features_are_not_computed_again(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extract(work, tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.rglob("*.npy")}
    kept = (tmp_path / "a.npy").stat()
    (tmp_path / "jump/b.npy").unlink()
    capsys.readouterr()
    extract(work, tmp_path, "--workers=1")
    printed = capsys.readouterr().out
    assert "features of 3 videos" in printed
    assert "1 of them are new" in printed
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*.npy")} == written
    assert (tmp_path / "a.npy").stat().st_mtime_ns == kept.st_mtime_ns


def test_features_of_version_0_1_0_are_kept_and_their_checksums_recorded(work: Path, tmp_path: Path) -> None:
    extract(work, tmp_path)
    file, checksums = tmp_path / "a.npy", tmp_path / CHECKSUMS
    lines = sorted(checksums.read_text().splitlines())
    assert f"{sha256_of(file)}  a.npy" in lines
    checksums.unlink()
    before = file.stat().st_mtime_ns
    extract(work, tmp_path)
    assert sorted(checksums.read_text().splitlines()) == lines
    assert file.stat().st_mtime_ns == before
    checksums.write_text(checksums.read_text()[:-9])  # as after a kill
    for _ in range(2):
        extract(work, tmp_path)
        assert set(lines) <= set(checksums.read_text().splitlines())
    assert len(checksums.read_text().splitlines()) == len(lines) + 1


def test_features_of_a_video_that_was_replaced_are_computed_again(
    work: Path, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    videos, out = shutil.copytree(work / "videos", tmp_path / "videos"), tmp_path / "out"
    extract(work, out, videos=str(videos))
    (out / SOURCES).unlink()  # as of an earlier version
    extract(work, out, videos=str(videos))
    first, second = (out / "jump" / name for name in ("b.npy", "c.1.npy"))
    expected = {path: path.read_bytes() for path in (first, second)}
    shutil.copy(videos / "a.mp4", videos / "jump/b.mp4")
    extract(work, out, videos=str(videos))
    extract(work, out, videos=str(videos))
    changed = (
        f"{videos / 'jump/b.mp4'} has another content than {out / SOURCES} records: its features are written again"
    )
    assert {message for message in messages.messages if "another content" in message} == {changed}
    assert first.read_bytes() == (out / "a.npy").read_bytes() != expected[first]
    assert second.read_bytes() == expected[second]


def test_complete_features_of_version_0_1_0_are_kept_on_a_read_only_file_system(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(work, tmp_path)
    for name in (CHECKSUMS, SOURCES):
        (tmp_path / name).unlink()

    def no_write(path: Path, flags: int = os.O_RDONLY) -> Any:
        if flags != os.O_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return open_regular(path, flags)

    monkeypatch.setattr(features, "open_regular", no_write)
    monkeypatch.setattr(os, "access", lambda *_: False)
    extract(work, tmp_path)
    assert not (tmp_path / CHECKSUMS).exists()
    assert not (tmp_path / SOURCES).exists()
    (tmp_path / "a.npy").unlink()
    monkeypatch.setattr(verb, "extract", None)  # nothing is computed
    with pytest.raises(InputError, match=f"{tmp_path} cannot be written, .* is not a writable folder"):
        extract(work, tmp_path)


@pytest.mark.parametrize("form", ["npy", "pickle"])
def test_damaged_features_are_computed_again(
    form: str, work: Path, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    extract(work, tmp_path, f"--format={form}")
    written = {path: path.read_bytes() for path in tmp_path.rglob("*.[np][pk][yl]")}
    first, second, third = sorted(written)
    first.write_bytes(b"" if form == "npy" else written[first][: len(written[first]) // 2])
    second.write_bytes(written[second][:-9] + b"\x01" + written[second][-8:])  # a changed value
    extract(work, tmp_path, f"--format={form}")
    assert {path: path.read_bytes() for path in written} == written
    warned = [f"{path} is damaged: it is written again" in messages.messages for path in (first, second, third)]
    assert warned == [True, True, False]
    first.unlink()
    os.mkfifo(first)
    with pytest.raises(InputError, match=f"{first.name} is not a regular file"):
        extract(work, tmp_path, f"--format={form}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer=1"], "has --layer 2, but 1 is expected"),
        (["--format=pickle"], "has --format 'npy', but 'pickle'"),
        (["--checkpoint", "OTHER"], r"has fingerprint \(of --checkpoint\) "),
    ],
)
def test_a_folder_with_other_features_is_refused(
    work: Path, tmp_path: Path, options: list[str], message: str, randomise: Callable[[GPDiT], GPDiT]
) -> None:
    record = tmp_path / "out" / "features.json"
    extract(work, tmp_path / "out")
    before = record.read_bytes()
    if "OTHER" in options:
        other = load_trained_model(work / "model").backbone
        with torch.no_grad():
            other.blocks[1].mlp.down.weight[0, 0] += 1e-3
        other.save_pretrained(tmp_path / "other")
        options = ["--checkpoint", str(tmp_path / "other")]
    with pytest.raises(InputError, match=message):
        extract(work, tmp_path / "out", *options)
    assert record.read_bytes() == before


def test_blocks_that_are_not_run_have_no_effect(work: Path, tmp_path: Path) -> None:
    other = load_trained_model(work / "model").backbone
    with torch.no_grad():
        other.blocks[2].mlp.down.weight.zero_()
    other.save_pretrained(tmp_path / "other")
    for name, model in (("a", work / "model"), ("b", tmp_path / "other")):
        extract(work, tmp_path / name, "--checkpoint", model, videos="videos/a.mp4")
    assert FeatureRecord.load(tmp_path / "a") == FeatureRecord.load(tmp_path / "b")
    assert (tmp_path / "a/a.npy").read_bytes() == (tmp_path / "b/a.npy").read_bytes()


def test_of_two_commands_with_different_models_that_start_at_once_one_is_refused(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one writes its record after this one has found none."""
    extract(work, tmp_path / "other", "--layer=1")
    save = FeatureRecord.save

    def save_later(record: FeatureRecord, folder: Path) -> None:
        save(FeatureRecord.load(tmp_path / "other"), folder)
        save(record, folder)

    monkeypatch.setattr(FeatureRecord, "save", save_later)
    with pytest.raises(InputError, match=r"features\.json has --layer 1, but 2 is expected"):
        extract(work, tmp_path / "out")


def test_the_codec_computes_in_float32_under_bf16(work: Path, tmp_path: Path) -> None:
    extract(work, tmp_path, "--precision=bf16", videos="videos/a.mp4")
    difference = (VideoFeatures(tmp_path, precision="bf16")["a"].double() - expected(work, "a")).abs().mean()
    assert 0 < difference < 0.02 * expected(work, "a").abs().mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer=4"], "layer 4 does not exist: give a number from 1 to 3"),
        (["--frames=16"], "--frames is 16, which is not 1 . 4 k"),
        (["--frames=129"], "--frames is 129, but the model has positions for 125"),
        (["--stride=-1"], "--stride is -1"),
        (["--batch_size=0"], "--batch_size is 0"),
        (["--temporal_tokens=4"], "--temporal_tokens is 4 for 5 latent frames"),
        (["--size=32x40"], "--size is 32x40, but the checkpoint was trained on 32x32"),
        (["--checkpoint", "WORK/two_sizes", "--size=64x64"], "trained on 32x32, 32x48: choose one of these"),
        (["--videos", "WORK/videos/jump", "WORK/copy"], "would both be written as b: give the folder above"),
        (["--videos", "WORK/nowhere"], "nowhere does not exist"),
        (["--layer=0"], "--layer is 0: give at least 1"),
        (["--out", "WORK"], "contains .npy files but no features.json"),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_an_error_leaves_no_folder(work: Path, tmp_path: Path, options: list[str], message: str) -> None:
    (work / "stray.npy").touch()
    shutil.copytree(work / "videos" / "jump", work / "copy", dirs_exist_ok=True)
    with pytest.raises(InputError, match=message):
        extract(work, tmp_path / "out", *(option.replace("WORK", str(work)) for option in options))
    assert not (tmp_path / "out").exists()


def test_more_frames_than_in_training_get_a_warning(
    work: Path, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    extract(work, tmp_path, "--frames=21", "--stride=1", videos="videos/a.mp4")
    assert "--frames is 21, but training clips had at most 17" in messages.text
    assert VideoFeatures(tmp_path)["a"].shape == (6 + 4, 24)
