"""`sample` with every kind of context and option, compared with latents that the library generates."""

import json
import re
import shutil
import tarfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpdit_lightning.checkpoints.facts import ValidationLoss
from gpdit_lightning.checkpoints.reading import load_trained_model
from gpdit_lightning.cli import main
from gpdit_lightning.codecs.pca import SHIPPED_WEIGHTS
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.diffusion import SAMPLERS, Guidance
from gpdit_lightning.generation.context_loss import UNLIKE_TRAINING, relative_loss
from gpdit_lightning.media.video import video_info
from gpdit_lightning.media.video_writer import write_video
from tests.cli.sampling import (
    CODEC,
    LABELS,
    LATENT_FRAMES,
    VIDEO,
    assert_near,
    decoded,
    expected_latents,
    latents,
    looks_like,
    sample,
    stripe_context,
)
from tests.generation.test_contexts import stored, tar_of
from tests.media.videos import read_video


def assert_equal_up_to_rounding(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Check that pixels differ by at most one level, since sums over a batch are ordered differently."""
    assert first.keys() == second.keys()
    for name, frames in first.items():
        assert (frames.int() - second[name].int()).abs().max() <= 1, name


@pytest.mark.parametrize(
    ("context", "number", "rate", "context_frames", "frames"),
    [
        (VIDEO, 1, Fraction(8), 5, 12),
        (VIDEO, 1, Fraction(8), 13, 16),
        ("movie.gif", 2, Fraction(10, 3), 13, 16),
        ("frames", 2, Fraction(8), 5, 12),
    ],
)
def test_video_is_continued_at_its_rate(
    workspace: Path, tmp_path: Path, context: str, number: int, rate: Fraction, context_frames: int, frames: int
) -> None:
    options = [f"--context_frames={context_frames}"] if context_frames != 13 else []  # 13 is the default
    formats = ["--formats", "mp4", "safetensors"]
    assert sample(workspace, tmp_path / "out.mp4", f"--frames={frames}", *options, *formats, context=context) == 0
    shown, raw = read_video(tmp_path / "out.mp4"), latents(tmp_path / "out.safetensors")
    assert shown.shape == (context_frames + frames, 3, 32, 32)
    assert video_info(tmp_path / "out.mp4").fps == rate
    first = 59 - 3 * (context_frames - 1)  # so that the context ends at the last of 60 frames
    assert looks_like(shown[:context_frames], stripe_context(number, first, context_frames))
    assert looks_like(shown[context_frames:], decoded(tmp_path / "out.safetensors")[context_frames:])
    assert shown[context_frames:].float().std() > 10
    assert_near(raw, expected_latents(workspace, raw[: 1 + context_frames // 4], frames))


def test_context_begins_at_start(workspace: Path, tmp_path: Path) -> None:
    assert sample(workspace, tmp_path / "out.mp4", "--frames=1", "--context_frames=5", "--start=0.5") == 0
    assert looks_like(read_video(tmp_path / "out.mp4")[:5], stripe_context(1, 12, 5))


def test_image_is_continued(workspace: Path, tmp_path: Path) -> None:
    assert sample(workspace, tmp_path / "out.safetensors", "--frames=8", "--fps=30", context="still.png") == 0
    raw = latents(tmp_path / "out.safetensors")
    assert_near(raw[:1], CODEC.encode(stripe_context(2, 57, 1)[None])[0])
    assert_near(raw, expected_latents(workspace, raw[:1], 8))
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"fps": "10", "context_frames": "1"}


def test_video_is_generated_without_a_context(workspace: Path, tmp_path: Path) -> None:
    formats = ["--formats", "mp4", "safetensors"]
    assert sample(workspace, tmp_path / "out", "--frames=9", *formats, context=None) == 0
    raw = latents(tmp_path / "out" / "sample.safetensors")
    assert_near(raw, expected_latents(workspace, torch.empty(0, 16, 4, 4), 9))
    assert looks_like(read_video(tmp_path / "out" / "sample.mp4"), decoded(tmp_path / "out" / "sample.safetensors"))
    assert len(raw) == 3


def test_samples_of_a_shard_are_continued_by_number_by_key_or_all_together(workspace: Path, tmp_path: Path) -> None:
    tar = tar_of(workspace / "latents")
    options = ["--frames=6", "--formats", "safetensors"]
    assert sample(workspace, tmp_path / "all", *options, context=str(tar)) == 0
    for number, (key, raw) in enumerate(stored(tar).items()):
        for name in (str(number), key):
            assert sample(workspace, tmp_path / name, *options, context=f"{tar}#{name}") == 0
        by_number, by_key, in_batch = (
            latents(tmp_path / folder / f"{key}.safetensors") for folder in (str(number), key, "all")
        )
        assert torch.equal(by_number[:4], raw[:4])
        assert len(by_number) == 6
        assert torch.equal(by_number, by_key)
        assert_near(by_number, in_batch)


def test_video_is_independent_of_batch_composition(workspace: Path, tmp_path: Path) -> None:
    shard = tar_of(workspace / "latents")
    contexts = [
        workspace / "videos/jump/0.mp4",
        workspace / "still.png",
        workspace / VIDEO,
        f"{shard}#0",
        workspace / "movie.gif",
    ]
    names = ["0", "still", "1", next(iter(stored(shard))), "movie"]
    options = ["--frames=8", "--context_frames=5", "--guidance=1.5", "--formats", "safetensors"]

    def run(name: str, *more: str, part: slice = slice(None)) -> dict[str, Tensor]:
        assert sample(workspace, tmp_path / name, *options, *more, "--context", *contexts[part], context=None) == 0
        return {path.stem: decoded(path) for path in (tmp_path / name).iterdir()}

    one_by_one = run("1", "--batch_size=1")
    assert one_by_one.keys() == set(names)
    assert_equal_up_to_rounding(run("2", "--batch_size=2"), one_by_one)
    assert_equal_up_to_rounding(run("8", "--batch_size=8"), one_by_one)
    assert_equal_up_to_rounding(run("reversed", part=slice(None, None, -1)), one_by_one)
    assert_equal_up_to_rounding(run("fewer", part=slice(2, None)), {name: one_by_one[name] for name in names[2:]})


def test_samples_have_consecutive_seeds(workspace: Path, tmp_path: Path) -> None:
    options = ["--frames=8", "--formats", "safetensors", "--sampler=stochastic"]
    assert sample(workspace, tmp_path, *options, "--samples=3", "--seed=5") == 0
    three = {path.stem: decoded(path) for path in tmp_path.iterdir()}
    alone = {}
    for seed in (5, 6, 7):
        assert sample(workspace, tmp_path / str(seed), *options, f"--seed={seed}") == 0
        alone[f"1-seed{seed}"] = decoded(tmp_path / str(seed) / "1.safetensors")
    assert_equal_up_to_rounding(three, alone)
    first, second = alone["1-seed5"].float(), alone["1-seed6"].float()
    assert torch.equal(first[:13], second[:13])
    assert (first[13:] - second[13:]).abs().mean() > 10


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["--guidance=2"], {"guidance": Guidance(2.0)}),
        (["--guidance=2", "--guidance_levels", "0.4", "0.8"], {"guidance": Guidance(2.0, 1.0, 0.4, 0.8)}),
        (["--label=run", "--label_guidance=3"], {"guidance": Guidance(label=3.0), "label": 1}),
        *[([f"--sampler={name}", "--steps=3"], {"sampler": SAMPLERS[name](3)}) for name in SAMPLERS],
        (["--window=2"], {"window": 2}),
        (["--window=1", "--sinks=2"], {"window": 1, "sinks": 2}),
        (["--sinks=1"], {"window": LATENT_FRAMES - 2, "sinks": 1}),
        (["--precision=bf16"], {"autocast_dtype": torch.bfloat16}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_option_sets_the_rollout(workspace: Path, tmp_path: Path, options: list[str], settings: Any) -> None:
    assert sample(workspace, tmp_path / "out.safetensors", *options) == 0
    raw = latents(tmp_path / "out.safetensors")
    assert_near(raw, expected_latents(workspace, raw[:4], 16, **settings))
    assert not torch.equal(raw, expected_latents(workspace, raw[:4], 16))


def test_of_without_a_cache(workspace: Path, tmp_path: Path) -> None:
    assert sample(workspace, tmp_path / "out.safetensors", "--no_cache", "--guidance=2", model="of") == 0
    raw = latents(tmp_path / "out.safetensors")
    for cached in (True, False):
        expected = expected_latents(workspace, raw[:4], 16, "of", guidance=Guidance(2.0), use_cache=cached)
        assert_near(raw, expected)


def test_window_longer_than_in_training_causes_a_warning(
    workspace: Path, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    for options, warns in ((["--window=4"], False), (["--window=3", "--sinks=2"], True)):
        messages.clear()
        assert sample(workspace, tmp_path / "out.png", "--frames=8", *options) == 0
        assert ("up to 5 others (--window and --sinks), but in training to at most 4" in messages.text) == warns


def test_a_model_of_single_frames_that_is_to_continue_a_video_is_named(
    workspace: Path, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    trained = load_trained_model(workspace / "of2")
    trained.backbone.facts = replace(trained.backbone.facts, geometry=replace(trained.geometry, frames=1))
    trained.backbone.save_pretrained(tmp_path / "images")
    for frames, context, warns in (("4", str(workspace / VIDEO), True), ("1", None, False)):
        messages.clear()
        options = ["--size=32x32", "--label=run"] if context is None else []
        assert (
            sample(
                workspace, tmp_path / "out", f"--frames={frames}", *options, context=context, model=tmp_path / "images"
            )
            == 0
        )
        assert ("trained on single frames" in messages.text) == warns


def test_label_is_given_by_name_by_number_or_by_the_shard(workspace: Path, tmp_path: Path) -> None:
    shard = tar_of(workspace / "latents")
    with tarfile.open(shard) as file:
        recorded = {key: json.load(file.extractfile(f"{key}.json"))["label"] for key in stored(shard)}  # type: ignore[arg-type]
    assert set(recorded.values()) == set(LABELS)
    context_latents = {key: raw[:4] for key, raw in stored(shard).items()}

    def run(*more: str, context: str = str(shard), model: str = "of2") -> dict[str, Tensor]:
        out = tmp_path / "out"
        assert (
            sample(workspace, out, "--frames=4", "--formats", "safetensors", *more, context=context, model=model) == 0
        )
        return {path.stem: latents(path) for path in out.iterdir()}

    for key, raw in run().items():
        assert_near(raw, expected_latents(workspace, context_latents[key], 4, label=LABELS.index(recorded[key])))
    for number, label in enumerate(LABELS):
        by_name, by_number = run(f"--label={label}"), run(f"--label={number}")
        for key, raw in by_name.items():
            assert torch.equal(raw, by_number[key])
            assert_near(raw, expected_latents(workspace, context_latents[key], 4, label=number))
            assert not torch.allclose(raw, expected_latents(workspace, context_latents[key], 4), atol=0.1)


def test_run_and_its_exports_generate_the_same(workspace: Path, tmp_path: Path) -> None:
    for name, options in (("float32", []), ("bfloat16", ["--dtype=bfloat16"])):
        assert main(["export", "--checkpoint", str(workspace / "run"), "--out", str(tmp_path / name), *options]) == 0
    results = {}
    for model in (workspace / "run", tmp_path / "float32", tmp_path / "bfloat16"):
        out = tmp_path / f"{model.name}.safetensors"
        assert sample(workspace, out, "--label=run", model=str(model)) == 0
        results[model.name] = latents(out)
    assert torch.equal(results["run"], results["float32"])
    torch.testing.assert_close(results["bfloat16"], results["run"], rtol=0.05, atol=0.1)


@pytest.fixture
def other_codec(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `weights` of a codec that is not the checkpoint's, and `latents` whose manifest names another."""
    folder = tmp_path_factory.mktemp("other")
    weights = load_file(SHIPPED_WEIGHTS)
    save_file(weights | {"centre": weights["centre"] + 0.1}, folder / "weights")
    shutil.copytree(workspace / "latents", folder / "latents")
    manifest = Manifest.load(folder / "latents")
    replace(manifest, codec=replace(manifest.codec, fingerprint="0" * 16)).save()
    return folder


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--context_frames=33", ["1.mp4 has 20 frames", "needs 33"]),
        ("--context_frames=4", ["--context_frames is 4", "give 1 or 5"]),
        ("--context nowhere.mp4", ["nowhere.mp4 does not exist"]),
        ("--context latents/manifest.json", ["manifest.json is no video, since it is the manifest of prepared data"]),
        ("--checkpoint nowhere", ["no checkpoint at nowhere"]),
        ("--start=99", ["99 is after the end"]),
        ("--stride=1000000", ["--stride is 1000000, so that images would have", "per second: give another --stride"]),
        ("--size=40x40", ["40x40", "trained on 32x32"]),
        ("--codec_source=OTHER/weights", ["of different codecs (fingerprint"]),
        ("--codec_source=/nowhere", ["/nowhere"]),
        ("--context OTHER/latents/SHARD#0", ["of different codecs (fingerprint"]),
        ("--context latents/SHARD#2", ["no sample '2': give 0 to 1"]),
        ("--frames=0", ["--frames is 0"]),
        ("--samples=0", ["--samples is 0"]),
        ("--seed=-1", ["--seed is -1"]),
        ("--batch_size=0", ["--batch_size is 0"]),
        ("--steps=0", ["--steps is 0", "at least 1"]),
        ("--window=0", ["window is 0"]),
        ("--sinks=-1", ["sinks is -1"]),
        ("--guidance=nan", ["guidance is nan; it must be a number"]),
        ("--guidance_levels 0.9 0.1", ["from 0.9 to 0.1"]),
        ("--label=walk", ["'walk'", "give one of jump, run"]),
        ("--label=2", ["'2'", "give one of jump, run"]),
        ("--label=run --checkpoint unlabelled", ["trained without labels"]),
        ("--label_guidance=2", ["--label_guidance is 2.0, but 1 has no label", "give --label"]),
        ("--label_guidance=2 --checkpoint unlabelled", ["--label_guidance is 2.0, but 1 has no label"]),
        ("--no_cache", ["of2", "--window and --sinks allow 4"]),
        ("--device=gpu", ["torch has no device 'gpu': give auto, cpu or cuda"]),
        ("--out still.png/out.mp4", ["out.mp4 cannot be written", "still.png is not a writable folder"]),
        ("--out out.webm", ["out.webm is not of a format", "one of .mp4, .gif, .png, .safetensors"]),
        ("--out out.MP4", ["out.MP4 is not of a format"]),
        ("--samples=2", ["out.mp4 is one file, but 2 videos are requested: give a folder"]),
        (f"--context {VIDEO} still.png", ["out.mp4 is one file, but 2 videos are requested: give a folder"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_input_is_refused_in_one_sentence_and_writes_nothing(
    options: str,
    words: list[str],
    workspace: Path,
    other_codec: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(workspace)
    options = options.replace("OTHER", str(other_codec)).replace("SHARD", tar_of(workspace / "latents").name)
    assert sample(workspace, tmp_path / "out.mp4", *options.split()) == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert sentence.endswith(".")
    assert ". " not in sentence
    for word in words:
        assert word in sentence
    assert not list(tmp_path.iterdir())


def test_python_example_of_the_documentation_runs(workspace: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "generation.md").read_text(encoding="utf-8")
    example = next(block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "rollout" in block)
    names: dict[str, Any] = {}
    exec(example.replace("runs/demo/stage3_long_video", str(workspace / "of2")), names)
    assert names["frame"].shape == (2, 16, 8, 8)


def test_guidance_over_a_context_that_was_never_left_out_is_named(
    workspace: Path, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    trained = load_trained_model(workspace / "unlabelled")
    for dropout, guidance, warns in ((0.0, "1.5", True), (0.0, "1", False), (0.1, "1.5", False)):
        data = trained.backbone.facts.data | {"data.context_dropout": dropout}
        trained.backbone.facts = replace(trained.backbone.facts, data=data)
        folder = tmp_path / f"{dropout}-{guidance}"
        trained.backbone.save_pretrained(folder)
        messages.clear()
        options = ["--frames=4", "--formats=safetensors", f"--guidance={guidance}"]
        assert sample(workspace, tmp_path / f"{folder.name}_out", *options, model=folder) == 0
        assert ("trained with data.context_dropout 0" in messages.text) == warns


def test_contexts_unlike_the_training_data_are_named(
    workspace: Path, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    """Relative to the validation loss in the exported model; the generated frames do not depend on it."""
    trained = load_trained_model(workspace / "unlabelled")
    gray = torch.full((60, 3, 32, 48), 100, dtype=torch.uint8)
    write_video(tmp_path / "gray.mp4", gray, 24)
    measured = replace(trained, validation=ValidationLoss(1, {"videos": (1.0,) * 4}))
    contexts = {"gray": gray[:13, ..., 8:40], "1": stripe_context(1, 23, 13)}
    losses = {
        name: relative_loss(measured, CODEC.whitened(CODEC.encode(pixels[None]))[0])
        for name, pixels in contexts.items()
    }
    between = (losses["1"] + losses["gray"]) / (2 * UNLIKE_TRAINING)
    assert losses["1"] > 1.05 * losses["gray"]
    warnings = {}
    for name, reference in (("unknown", None), ("large", losses["1"]), ("between", between)):
        validation = reference and ValidationLoss(1, {"videos": (reference,) * 4})
        trained.backbone.facts = replace(trained.backbone.facts, validation=validation)
        trained.backbone.save_pretrained(tmp_path / name)
        messages.clear()
        options = ["--frames=4", "--samples=2", "--formats=safetensors", "--context", tmp_path / "gray.mp4"]
        assert sample(workspace, tmp_path / f"{name}_out", *options, workspace / VIDEO, model=tmp_path / name) == 0
        warnings[name] = {line for line in messages.messages if "unlike the training data" in line}
    assert warnings["unknown"] == warnings["large"] == set()
    (warning,) = warnings["between"]
    assert warning.endswith(f"may be poor: 1 (loss {losses['1'] / between:.1f} times the validation loss)")
    before, after = (sorted((tmp_path / name).iterdir()) for name in ("unknown_out", "between_out"))
    assert len(before) == 4
    for first, second in zip(before, after, strict=True):
        assert_near(latents(first), latents(second))
