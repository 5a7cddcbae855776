"""Scores during training, with small scripted networks and the real codec `pca`."""

import logging
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from torch import Tensor, nn

from gpdit_lightning import GPDiT
from gpdit_lightning.checkpoints.files import open_checkpoint
from gpdit_lightning.codecs import Codec, load_codec
from gpdit_lightning.data.datamodule import LatentDataModule, SourceConfig
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.metrics import frechet_distance, psnr, ssim
from gpdit_lightning.generation import ClipInputs, GenerationConfig, rollout
from gpdit_lightning.options.evaluate import NetworkOptions
from gpdit_lightning.stages import GPDiTStage
from gpdit_lightning.training.callbacks import held_out as held_out_module
from gpdit_lightning.training.callbacks.ema import EMA
from gpdit_lightning.training.callbacks.run_checkpoint import RunCheckpoint
from gpdit_lightning.training.callbacks.scores import Scores
from gpdit_lightning.training.callbacks.stopping import Stopped
from tests.evaluation.scripted import ScriptedI3D, ScriptedInception, saved
from tests.training.callbacks.test_previews import (
    CONFIG,
    Borders,
    Constant,
    FixedOutput,
    data_of,
    events_of,
    held_out,
    logger_of,
    make_shards,
    stage_of,
)

Fit = Callable[..., Trainer]
Networks = dict[str, NetworkOptions]

CONTEXT, PIXEL_FRAMES = 5, 13
ERRORS = {"psnr", "psnr_repeated", "ssim", "ssim_repeated", "rollout_error_ratio"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_shards(tmp_path_factory.mktemp("score_shards"), pixel_frames=PIXEL_FRAMES)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Networks:
    folder = tmp_path_factory.mktemp("networks")
    with torch.random.fork_rng():
        return {"video_network": saved(ScriptedI3D(), folder), "image_network": saved(ScriptedInception(), folder)}


@pytest.fixture
def codec() -> Codec:
    return load_codec("pca")


def scores_of(**options: Any) -> Scores:
    """Score the five held-out clips in few steps of the sampler."""
    return Scores(**{"every_steps": 1, "clips": 5, "chunk": 2, "sampler_steps": 2} | options)


def logged(folder: Path) -> dict[str, dict[int, float]]:
    """The scores in the logs, by name and step."""
    events = events_of(folder)
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("scores_vs_decoded/")]
    return {
        tag.removeprefix("scores_vs_decoded/"): {event.step: event.value for event in events.Scalars(tag)}
        for tag in tags
    }


def frechet(real: Tensor, generated: Tensor) -> float:
    moments = [(values.double().mean(0), values.double().T.cov()) for values in (real, generated)]
    return frechet_distance(*moments[0], *moments[1])


def test_scores_are_those_of_the_decoded_clips(
    fit: Fit, codec: Codec, shards: str, networks: Networks, tmp_path: Path
) -> None:
    """Computed here from all frames at once; the model generates given frames."""
    data = data_of(shards)
    truth = held_out(data, "videos", 5)
    target = truth.flip(0)
    target[:, :2] = truth[:, :2]
    scores = scores_of(chunk=5, sampler_steps=3, **networks)
    fit(stage_of(FixedOutput(target, codec)), data, tmp_path, 1, [scores], logger=logger_of(tmp_path))
    real, generated = codec.decode(truth), codec.decode(target)
    repeated = real.clone()
    repeated[:, CONTEXT:] = real[:, CONTEXT - 1 : CONTEXT]
    i3d, inception = ScriptedI3D(), ScriptedInception()
    errors, expected = {}, {}
    for suffix, videos in (("", generated), ("_repeated", repeated)):
        features = [i3d(clips.float().transpose(1, 2), True, True, True) for clips in (real, videos)]
        expected[f"fvd{suffix}"] = frechet(*features)
        at_positions = [
            frechet(inception(real[:, frame], True), inception(videos[:, frame], True))
            for frame in range(CONTEXT, PIXEL_FRAMES)
        ]
        expected[f"fid{suffix}"] = float(np.mean(at_positions))
        new, true = videos[:, CONTEXT:], real[:, CONTEXT:]
        expected |= {f"{score.__name__}{suffix}": score(new, true).mean().item() for score in (psnr, ssim)}
        errors[suffix] = (new.float() - true.float()).square().mean().item()
    expected["rollout_error_ratio"] = errors[""] / errors["_repeated"]
    found = {name: values[1] for name, values in logged(tmp_path).items()}
    assert found == pytest.approx(expected, rel=2e-2)  # the sampler reaches the target up to rounding of pixels
    assert {name: found[name] for name in found if "repeated" in name} == pytest.approx(
        {name: expected[name] for name in expected if "repeated" in name}, rel=1e-5
    )
    assert found["rollout_error_ratio"] > 0.1


class Careless(nn.Module):
    """A network that changes every random state and the precision of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, videos: Tensor) -> Tensor:
        torch.rand(3), np.random.rand(3), random.random()
        values: Tensor = self.layer(videos.float().mean((1, 3, 4)))
        return values


def test_scores_do_not_change_the_training(fit: Fit, shards: str, networks: Networks, tmp_path: Path) -> None:
    def run(every_steps: int) -> tuple[dict[str, Tensor], list[Any], list[bool]]:
        stage, borders, ema = stage_of(), Borders(), EMA(0.5)
        random.seed(0)
        np.random.seed(0)
        careless = {"video_network": NetworkOptions(kind=f"{__name__}.Careless")}
        scores = scores_of(every_steps=every_steps, **networks | careless)
        fit(stage, data_of(shards), tmp_path / str(every_steps), 4, [ema, borders, scores])
        state = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
        optimizer = stage.trainer.optimizers[0].state_dict()["state"]
        moments = {f"{place}.{name}": value for place, of in optimizer.items() for name, value in of.items()}
        average = {f"ema.{name}": value for name, value in ema.average.items()}
        return stage.state_dict() | average | moments, state, borders.normal

    tensors, randomness, _ = run(0)
    scored, scored_randomness, normal = run(1)
    assert tensors.keys() == scored.keys()
    assert all(torch.equal(tensors[name], scored[name]) for name in tensors)
    assert randomness == scored_randomness
    assert normal == [True] * 8


def test_scores_are_logged_at_their_steps_and_at_the_last(
    fit: Fit, shards: str, networks: Networks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    trainer = fit(
        stage_of(), data_of(shards), tmp_path, 5, [EMA(0.5), scores_of(every_steps=2, **networks)],
        logger=logger_of(tmp_path),
    )  # fmt: skip
    names = ERRORS | {"fvd", "fvd_repeated", "fid", "fid_repeated"}
    found = logged(tmp_path)
    assert {name: list(values) for name, values in found.items()} == {key: [2, 4, 5] for key in names}
    assert all(len(set(found[name].values())) == 1 for name in names if name.endswith("_repeated"))
    assert len(set(found["fvd"].values())) == 3
    assert trainer.callback_metrics["scores_vs_decoded/fvd"] == pytest.approx(found["fvd"][5])
    assert "scores: FVD, FID, PSNR, SSIM, the error ratio of 5 held-out clips of data.videos, every 2" in caplog.text
    assert "FVD of 5 samples in 6 dimensions is far too large" in caplog.text


@pytest.mark.parametrize(
    ("source", "given", "expected"),
    [
        ("videos", (), ERRORS),
        ("sequences", ("video_network", "image_network"), ERRORS | {"fid", "fid_repeated"}),
        ("images", ("video_network", "image_network"), {"fid"}),
        ("images", (), set()),
    ],
)
def test_scores_depend_on_the_data_and_the_networks(
    fit: Fit, shards: str, networks: Networks, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    source: str, given: tuple[str, ...], expected: set[str],
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO)
    scores = scores_of(every_steps=2, **{name: networks[name] for name in given})
    fit(stage_of(), data_of(shards, source), tmp_path, 2, [scores], logger=logger_of(tmp_path))
    assert logged(tmp_path).keys() == expected
    options = ["scores.video_network.path", "scores.image_network.path"]
    missing = [option for option in options if option in caplog.text]
    assert missing == ([] if given else options if source == "videos" else options[1:])
    if not expected:
        assert "no scores are computed: images have no score but FID" in caplog.text


def test_without_held_out_clips_the_run_trains_and_says_why_nothing_is_scored(
    fit: Fit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = data_of(make_shards(tmp_path / "shards", ("train",)))
    fit(stage_of(), data, tmp_path, 2, [scores_of()], logger=logger_of(tmp_path))
    assert caplog.text.count("no scores are computed: no samples of data.videos are held out") == 1
    assert not logged(tmp_path)


def test_clips_are_conditioned_on_their_labels(
    fit: Fit, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conditions = []

    def recorded(model: GPDiT, context: Tensor, frames: int, config: GenerationConfig, inputs: ClipInputs) -> Any:
        conditions.append((inputs.seeds, inputs.condition.tolist()))
        return rollout(model, context, frames, config, inputs)

    monkeypatch.setattr(held_out_module, "rollout", recorded)
    stage = GPDiTStage(CONFIG.replaced(classes=2))
    stage.configure_model()
    data = LatentDataModule(videos=SourceConfig([shards], batch_size=4), labels=True, seed=3)
    fit(stage, data, tmp_path, 1, [scores_of()])
    assert conditions == [(3, [1, 0]), (5, [1, 0]), (7, [1])]  # held out are the clips 5 to 9


class Long(Careless):
    """A network for longer clips."""

    min_frames = PIXEL_FRAMES + 1


class Failing(nn.Module):
    """A network that cannot take the clips."""

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.shape[-1] == 16:
            raise ValueError("16 columns are too few")
        return pixels.float().flatten(1)[:, :4]


VIDEO, IMAGE = "scores.video_network: the video network", "scores.image_network: the image network"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"video_network": NetworkOptions(path="gone.pt")}, f"{VIDEO} gone.pt is not a file"),
        ({"image_network": NetworkOptions(path=__file__)}, f"{IMAGE} .* is not a TorchScript"),
        ({"video_network": NetworkOptions(sha256="0")}, f"{VIDEO} has a sha256 but no path: give"),
        ({"video_network": NetworkOptions(kind=f"{__name__}.Long")}, "the clips of data.videos have 13 pixel frames"),
        ({"image_network": NetworkOptions(kind=f"{__name__}.Failing")}, "scores: the image network '.*Failing' failed"),
    ],
)
def test_what_cannot_be_scored_stops_the_run_before_it_trains(
    fit: Fit, shards: str, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    stage = stage_of()
    with pytest.raises(InputError, match=message):
        fit(stage, data_of(shards), tmp_path, 1, [scores_of(**options)])
    assert stage.trainer.global_step == 0


def test_another_file_than_that_of_the_sha256_is_refused(
    fit: Fit, shards: str, networks: Networks, tmp_path: Path
) -> None:
    network = NetworkOptions(path=networks["video_network"].path, sha256="0" * 64)
    with pytest.raises(InputError, match=r"scores.video_network: .* has sha256 \w{64}, but 0{64} is expected"):
        fit(stage_of(), data_of(shards), tmp_path, 1, [scores_of(video_network=network)])


@pytest.mark.parametrize("option", ["every_steps", "clips", "chunk", "context_frames", "sampler_steps"])
def test_invalid_numbers_are_refused(option: str) -> None:
    with pytest.raises(InputError, match=rf"scores\.{option} is -1; it must be"):
        Scores(**{option: -1})


class Interrupted(Constant):
    """A sampler during which the process receives SIGTERM at one call."""

    calls = 0
    signal_at = -1

    def solve(self, *arguments: Any) -> Tensor:
        type(self).calls += 1
        if self.calls == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().solve(*arguments)


def test_a_signal_ends_scoring_and_the_resumed_run_repeats_it(
    fit: Fit, shards: str, networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(folder: Path, resume_from: Path | None = None) -> None:
        callbacks = [EMA(0.5), scores_of(every_steps=2, sampler=f"{__name__}.Interrupted", **networks), RunCheckpoint()]
        fit(stage_of(), data_of(shards), folder, 6, callbacks, resume_from, logger=logger_of(folder))

    run(tmp_path / "whole")
    monkeypatch.setattr(Interrupted, "calls", 0)
    # A call at the start, as a test; then two frames of each of the three chunks. The second chunk of step 4:
    monkeypatch.setattr(Interrupted, "signal_at", 1 + 6 + 3)
    with pytest.raises(Stopped) as stopped:
        run(tmp_path / "broken")
    assert (stopped.value.code, stopped.value.step, stopped.value.saved) == (143, 4, True)
    assert Interrupted.calls == Interrupted.signal_at
    assert list(logged(tmp_path / "broken")["fvd"]) == [2]
    run(tmp_path / "broken", tmp_path / "broken/checkpoints/last.ckpt")
    assert logged(tmp_path / "broken") == logged(tmp_path / "whole")
    assert list(logged(tmp_path / "whole")["fvd"]) == [2, 4, 6]
    record = open_checkpoint(tmp_path / "broken").facts("ema")["scores"]
    assert record == open_checkpoint(tmp_path / "whole").facts("ema")["scores"]
    assert open_checkpoint(tmp_path / "whole").facts("raw")["weights"] == "raw"
    assert "scores" not in open_checkpoint(tmp_path / "whole").facts("raw")  # which are of the averaged weights
    assert record["values"] == pytest.approx({name: values[6] for name, values in logged(tmp_path / "whole").items()})
    assert (record["step"], record["source"], record["clips"]) == (6, "videos", 5)
    assert (record["context_frames"], record["generated_frames"]) == (CONTEXT, PIXEL_FRAMES - CONTEXT)
    assert record["networks"].keys() == {"fvd", "fid"}
