"""Estimates of the memory, FLOPs and duration of a recipe."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace

from gpdit_lightning.cli import main, measured_cluster
from gpdit_lightning.cli.estimate import estimate
from gpdit_lightning.cli.estimated_recipe import read_recipe, sharding_strategy
from gpdit_lightning.data.batches import LatentDataset
from gpdit_lightning.data.datamodule import LatentDataModule
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.source import SourceConfig
from gpdit_lightning.errors import InputError
from gpdit_lightning.estimation.loading import loaded_bytes
from gpdit_lightning.estimation.memory import parameter_count
from gpdit_lightning.estimation.requirements import memory, nearest_that_fits, overrides, source_flops, step_flops
from gpdit_lightning.estimation.time import UPDATE_BYTES, step_time
from gpdit_lightning.estimation.units import GIB
from gpdit_lightning.options.estimate import EstimateOptions

RECIPES = Path(__file__).parents[2] / "recipes"
STAGE2 = f"--config={RECIPES / 'stage2_mixed.yaml'}"


@pytest.fixture
def mixed(write_shards: Callable[..., Manifest], tmp_path: Path) -> Path:
    """Recipe with images of two sizes and clips of two lengths."""
    counts = {("train", "image", (1, 8, 8)): 8, ("train", "image", (1, 8, 12)): 8, ("train", "video", (3, 8, 8)): 16}
    shards = write_shards(tmp_path / "shards", counts).directory
    backbone = {"size": "tiny", "layers": 2, "latent_channels": 4}
    recipe = {
        "model": {"class_path": "MixedStage", "init_args": {"backbone": backbone}},
        "data": {
            "max_ranks": 2,
            "images": {"manifests": [str(shards)], "batch_size": 4},
            "videos": {"manifests": [str(shards)], "batch_size": 8, "micro_batches": 2, "frames": 3, "least_frames": 2},
        },
    }
    (tmp_path / "mixed.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "mixed.yaml"


def test_prepared_data_give_the_shapes(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = read_recipe([f"--config={mixed}"])
    images, videos = map(recipe.run.micro_batch_shapes, recipe.run.sources)
    assert sorted(images) == [(1, 8, 8, 4, 0.5), (1, 8, 12, 4, 0.5)]
    assert videos == ((2, 8, 8, 4, 0.5), (3, 8, 8, 4, 0.5))
    assert not recipe.assumed
    assert main(["estimate", f"--config={mixed}", "--gpus=2", "--trainer.max_steps=500"]) == 0
    text = capsys.readouterr().out
    assert "images: 4 per step, 2 per micro-batch and GPU, latent frames 1, 64x64, 64x96 (as prepared)" in text
    assert "videos: 8 per step, 2 per micro-batch and GPU, latent frames 2 to 3, 64x64 (as prepared)" in text
    assert "and 500 steps" in text


def test_clips_are_cut_to_the_blocks_of_the_backbone(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the estimate, and in training, which takes the blocks from the backbone of the recipe."""
    options = [
        *(f"--config={mixed}", "--data.images.batch_size=0", "--data.videos.frames=0", "--data.videos.least_frames=0"),
        *("--model.class_path=GPDiTStage", "--model.init_args.backbone.block_shape=[2,0,0]"),
    ]
    run = read_recipe(options).run
    assert [shape.frames for shape in run.micro_batch_shapes(run.sources[0])] == [2]
    fit = [*options, f"--run_dir={tmp_path / 'run'}", "--trainer.max_steps=1", "--trainer.accelerator=cpu"]
    assert main(["fit", *fit]) == 0
    assert "16 samples of data.videos are cut to whole blocks of the backbone" in capsys.readouterr().err
    broken = "--model.init_args.backbone.block_shape=[2,0,-1]"
    assert main(["fit", *fit[:-2], broken]) == 2
    assert "block_shape is (2, 0, -1); it must be three numbers" in capsys.readouterr().err


def test_the_memory_of_loader_processes_is_that_of_their_batches(
    mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two processes with two batches each; noise levels, of a few bytes, are not counted."""
    settings = yaml.safe_load(mixed.read_text())["data"]
    sources = {name: SourceConfig(**settings[name]) for name in ("images", "videos")}
    data = LatentDataModule(**sources, max_ranks=2, noise_draws=3)
    buckets = [data.buckets["train"][source.name] for source in data.plan.sources]
    loaded = LatentDataset(data.plan, buckets, data.codec.mean, data.codec.std, "frame", 0, 0, 2, noise_draws=3)
    batches = [loaded[number] for number in range(12)]
    largest = max(4 * (batch.latents.numel() + batch.noise.numel()) for batch in batches)
    options = [f"--config={mixed}", "--data.workers=2", "--data.noise_draws=3"]
    assert loaded_bytes(read_recipe(options, gpus=2).run, 2) == 4 * largest
    assert main(["estimate", *options, "--gpus=2"]) == 0
    line = f"loading: 2 processes per GPU hold {4 * largest / 2**20:.2g} MiB of batches in host memory; they need 0.1"
    assert line in capsys.readouterr().out
    assert main(["estimate", f"--config={mixed}"]) == 0
    assert "loading:" not in capsys.readouterr().out


def test_a_step_of_alternating_sources_takes_the_mean_of_their_flops(
    mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With weights of 3 and 1, images have three of four steps."""
    options = ["--data.images.micro_batches=2", "--data.images.weight=3", "--trainer.max_steps=9"]
    joint, alternate = (
        read_recipe([f"--config={mixed}", *options, f"--data.sampling={sampling}"]).run
        for sampling in ("joint", "alternate")
    )
    images, videos = (sum(source_flops(joint, source).values()) for source in joint.sources)
    assert sum(step_flops(joint).values()) == pytest.approx(images + videos)
    assert sum(step_flops(alternate).values()) == pytest.approx(0.75 * images + 0.25 * videos)
    assert memory(joint) == memory(alternate)
    assert main(["estimate", f"--config={mixed}", *options, "--data.sampling=alternate"]) == 0
    text = capsys.readouterr().out
    assert "images: 4 per step, in 75% of the steps, 2 per micro-batch and GPU" in text
    assert "videos: 8 per step, in 25% of the steps, 4 per micro-batch and GPU" in text
    assert re.search(r"takes \S+ [MG]FLOP on average \(images: \S+ [MG]FLOP, videos: \S+ [MG]FLOP\), ", text)


def test_small_sizes_keep_two_significant_digits(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--config={mixed}", "--data.sampling=alternate", "--data.videos.micro_batches=1"]
    options += ["--data.images.weight=1", "--data.videos.weight=11"]
    assert main(["estimate", *options]) == 0
    text = capsys.readouterr().out
    assert "images: 4 per step, in 8.33% of the steps" in text
    assert re.search(r"A checkpoint has 0\.0+[1-9]\d? GiB", text)
    weights, *_, total, _ = re.findall(r"\S+", text[text.index("> DDP") :].splitlines()[0])[2:12]
    assert 0 < float(weights) < 0.05
    assert re.fullmatch(r"\d\.\d", total)


@pytest.mark.parametrize("options", [[], ["--tflops=1"], ["--trainer.accelerator=auto"]])
def test_an_estimate_for_gpus_of_a_recipe_for_a_cpu_says_so(
    mixed: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", f"--config={mixed}", "--trainer.accelerator=cpu", "--gpu=a100", *options]) == 0
    said = "trainer.accelerator is cpu, but this estimate is for GPUs of the model A100 (--gpu): --measure computes it "
    assert (said in capsys.readouterr().out) == (not options)


def test_a_loss_on_targets_needs_fewer_flops(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = f"--config={RECIPES / 'stage4_few_shot.yaml'}"
    assert [source.config.loss_frames for source in read_recipe([recipe]).run.sources] == ["targets"]
    assert main(["estimate", recipe]) == main(["estimate", recipe, "--data.sequences.loss_frames=all"]) == 0
    text = capsys.readouterr().out
    assert text.count("latent frames 6, loss on targets only, 256x256") == 1
    targets, everything = map(float, re.findall(r"An optimizer step takes (\S+) TFLOP", text))
    assert targets / everything == pytest.approx(8 / 11, abs=0.01)


def test_a_token_budget_sets_the_batch_size_of_each_shape(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images of 16 and 24 tokens form micro-batches of six and four; both are equally frequent."""
    options = [f"--config={mixed}"]
    for name, tokens in (("images", 96), ("videos", 768)):
        options += [f"--data.{name}.batch_size=0", f"--data.{name}.tokens={tokens}"]
    run = read_recipe(options).run
    images, videos = map(run.micro_batch_shapes, run.sources)
    assert {shape[:3]: shape.fraction for shape in images} == pytest.approx({(1, 8, 8): 0.4, (1, 8, 12): 0.6})
    assert {shape[:3]: shape.fraction for shape in videos} == pytest.approx({(2, 8, 8): 0.5, (3, 8, 8): 0.5})
    assert main(["estimate", *options, "--gpus=2"]) == 0
    text = capsys.readouterr().out
    assert "images: 96 tokens per step, 2 to 3 per micro-batch and GPU, latent frames 1, 64x64, 64x96" in text
    assert "videos: 768 tokens per step, 4 to 6 per micro-batch and GPU, latent frames 2 to 3, 64x64" in text
    assert main(["estimate", *options, "--data.videos.tokens=100"]) == 2
    assert "data.videos.tokens is 100, too few for one sample" in capsys.readouterr().err


def test_the_estimate_of_gpdit_h(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", STAGE2, "--trainer.strategy=auto", "--gpus", "64"]) == 0
    text = capsys.readouterr().out
    assert "2,284,305,984 parameters" in text
    assert "256x256, 320x192 (assumed)" in text
    assert re.search(r"The recipe fits: it needs \d+\.\d of 80 GiB", text)
    assert re.search(r"\n> DDP .* fits\n.*ZeRO-2", text)
    assert re.search(r"\n  FSDP2 .* fits\n", text)
    assert "a third more to recompute" in text


@pytest.mark.parametrize(
    ("setting", "option"),
    [
        ("auto", "auto"),
        ("ddp_find_unused_parameters_false", "auto"),
        ("zero3_offload", "zero3_offload"),
        ("deepspeed", "zero2"),
        ("deepspeed_stage_2", "zero2"),
        ("deepspeed_stage_2_offload", "zero2_offload"),
        ("deepspeed_stage_3", "zero3"),
        ("deepspeed_stage_3_offload", "zero3_offload"),
        ("fsdp2", "fsdp2"),
        (Namespace(class_path="gpdit_lightning.training.strategies.fsdp.FSDP2", init_args=Namespace()), "fsdp2"),
        (Namespace(class_path="lightning.pytorch.strategies.DDPStrategy", init_args=Namespace()), "auto"),
        (
            Namespace(
                class_path="gpdit_lightning.training.strategies.zero.ZeRO",
                init_args=Namespace(stage=3, offload=True),
            ),
            "zero3_offload",
        ),
    ],
)  # fmt: skip
def test_a_setting_selects_a_strategy(setting: Any, option: str) -> None:
    assert sharding_strategy(setting).option == option


@pytest.mark.parametrize("sampling", ["joint", "alternate"])
def test_the_proposed_options_make_the_recipe_fit(sampling: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [STAGE2, "--trainer.strategy=auto", "--model.init_args.backbone.activation_checkpointing=false"]
    arguments.append(f"--data.sampling={sampling}")
    for gpus, capacity in ((8, 80), (64, 40), (1, 24)):
        run = read_recipe(arguments, gpus).run
        nearest = nearest_that_fits(run, capacity * GIB)
        assert nearest is not None
        options = overrides(run, nearest).split()
        assert read_recipe([*arguments, *options], gpus).run == nearest
        assert main(["estimate", *arguments, *options, f"--gpus={gpus}", f"--gpu_memory={capacity}"]) == 0
        assert "The recipe fits" in capsys.readouterr().out


def test_more_gpus_are_proposed_as_an_alternative_to_offloading(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", STAGE2, "--trainer.strategy=auto", "--gpu_memory", "24"]) == 0
    text = capsys.readouterr().out
    assert "zero2_offload\nWithout offloading, with" in text
    assert "GiB on each of 4 GPUs:\n  " in text


def test_a_recipe_may_not_fit_with_any_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", STAGE2, "--gpu_memory", "1"]) == 0
    assert "No setting makes it fit" in capsys.readouterr().out


def test_squares_of_an_image_have_a_clean_stream_and_patches_of_one_pixel(capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe has four squares of an 8x8 latent image; three of them are clean too."""
    squares = ["--config", str(RECIPES / "systems" / "acdit_image.yaml"), "--latents=none", "--video_sizes", "64x64"]
    run = read_recipe(squares[:-2], sizes={"videos": ["64x64"]}).run
    (source,) = run.sources
    flops, config = source_flops(run, source), run.backbone
    noisy, clean = 16 * 64, 0.9 * 16 * 48  # tokens of 16 images; a tenth of them has no context
    assert flops["embedding"] == pytest.approx(3 * 2 * (noisy + clean) * config.latent_channels * config.width)
    assert flops["modulation"] > 0
    assert main(["estimate", *squares]) == 0
    assert "latent frames 1, 64x64 (assumed)" in capsys.readouterr().out
    assert main(["estimate", *squares[:-1], "72x72"]) == 2
    assert "do not divide into the blocks of 4x4 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(("codec", "frames"), [("wan", 5), ("sd", 17), ("tests.codecs.test_custom.Correct", 9)])
def test_the_codec_determines_the_latent_frames_that_are_assumed(
    codec: str, frames: int, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = [STAGE2, "--latents=none", "--data.videos.frames=0", f"--codec={codec}"]
    assert main(["estimate", *recipe, "--image_sizes=256x256", "--video_sizes=256x256"]) == 0
    assert re.search(rf"videos: .* latent frames {frames}, 256x256 \(assumed\)", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus=3"], "3 GPUs do not divide data.max_ranks = 64"),
        (["--gpu=K20"], "--gpu is K20, whose peak FLOP/s are unknown"),
        (["--mfu=2"], "--mfu is 2.0"),
        (["--tflops=1e-320"], "--tflops is 1e-320: give a number from 1e-06 to 1e+09"),
        (["--gpus=0"], "--gpus is 0: give at least 1"),
        (["--gpu_memory=0"], "--gpu_memory is 0.0"),
        (["--gpu_memory=1e308"], "--gpu_memory is 1e+308: give a number from 1e-06 to 1e+09"),
        (["--video_sizes", "100x100"], "multiples of 16 pixels"),
        (["--sequence_sizes", "64x64"], "--sequence_sizes has no effect, since the recipe uses no sequences"),
        (["--trainer.strategy=fsdp"], "trainer.strategy is fsdp"),
        (["--trainer.precision=16-mixed"], "trainer.precision is 16-mixed"),
        (["--data.images.micro_batches=7"], "which is no multiple of micro_batches x data.max_ranks = 7 x"),
        (["--data.images.batch_size=0", "--data.videos.batch_size=0"], "no source of data"),
        (["--data.videos.loss_frames=targets"], "data.videos.loss_frames is targets, which only data.sequences has"),
        (["--data.image.batch_size=1"], "did you mean --data.images.batch_size"),
        (["--gpu_memroy", "80"], "did you mean --gpu_memory"),
    ],
)
def test_an_error_is_one_sentence(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", STAGE2, *options]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in error


def test_short_samples_are_used_in_full(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", f"--config={mixed}", "--data.videos.frames=5", "--data.videos.least_frames=5"]) == 0
    assert re.search(r"videos: .*, latent frames 3, ", capsys.readouterr().out)


@pytest.mark.parametrize(("kind", "used"), [("image", "images"), ("video", "videos")])
def test_data_dir_names_the_data_of_all_sources(
    kind: str,
    used: str,
    mixed: Path,
    write_shards: Callable[..., Manifest],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    frames = 1 if kind == "image" else 3
    folder = write_shards(tmp_path / "one", {("train", kind, (frames, 8, 8)): 4}).directory
    assert main(["estimate", f"--config={mixed}", f"--data_dir={folder}"]) == 0
    assert re.findall(r"^(\w+): .*prepared", capsys.readouterr().out, re.M) == [used]


def test_python_and_the_command_line_give_the_same_estimate(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    estimate(EstimateOptions(config=[str(mixed)], overrides=["--trainer.max_steps=7"], gpus=2))
    printed = capsys.readouterr().out
    assert main(["estimate", "-c", str(mixed), "--trainer.max_steps", "7", "--gpus", "2"]) == 0
    assert capsys.readouterr().out == printed
    assert "and 7 steps" in printed
    with pytest.raises(InputError, match="no recipe is given"):
        EstimateOptions(config=[])


def test_recipe_files_may_contain_options_of_the_verb(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mixed.yaml").write_text(f"base: {RECIPES / 'stage4_few_shot.yaml'}\ngpus: 2\ngpu: A100\n")
    with pytest.raises(SystemExit):
        main(["estimate", f"--config={tmp_path / 'mixed.yaml'}", "--mfu=0.5", "--print_config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert main(["estimate", f"--config={tmp_path / 'printed.yaml'}"]) == 0
    text = capsys.readouterr().out
    assert "GPUs: 2\n" in text
    assert "At 50% of 312 TFLOP/s" in text


@pytest.mark.slow
def test_durations_from_a_measurement_of_this_machine(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes train and communicate; the prediction has the parts of the measurement."""
    monkeypatch.setattr(measured_cluster, "TRAINING_STEPS", 3)
    monkeypatch.setattr(measured_cluster, "available_cores", lambda: 2)
    words = [f"--config={mixed}", "--trainer.accelerator=cpu", "--data.workers=0"]
    run = read_recipe(words, 2).run
    cluster = measured_cluster.measured_cluster(words, run, 8, 1e9)
    assert not cluster.overlaps
    assert 1e8 < cluster.flops_per_s < 1e13
    assert 1e6 < cluster.node.bytes_per_s < 1e12
    assert 0 < cluster.node.latency < 0.1
    step = step_time(run, cluster)
    assert step.update == pytest.approx(UPDATE_BYTES * parameter_count(run.backbone) / cluster.memory_bytes_per_s)
    assert step.waiting == step.communication > 0
    monkeypatch.setattr(measured_cluster.sys, "executable", "/bin/false")
    with pytest.raises(InputError, match="the measurement on device 0 failed: exit status 1"):
        measured_cluster.measured_cluster(words, run, 8, 1e9)
