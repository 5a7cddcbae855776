"""Every recipe can be built and trained, has a complete head, and has the numbers of the paper."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.checkpoints.reading import load_trained_model
from gpdit_lightning.cli import main
from gpdit_lightning.cli.chain import stages_of
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.shard_entry import ARRAYS, Kind
from gpdit_lightning.data.shard_writer import ShardSetWriter
from gpdit_lightning.estimation.loading import shared_memory_bytes
from gpdit_lightning.model.layout import BlockLayout
from tests.checkpoints.content import read_checkpoint
from tests.conftest import TINY_CODEC
from tests.data.labelled import write_labelled

RECIPES = Path(__file__).parents[1] / "recipes"
CONTENTS = {path: yaml.safe_load(path.read_text()) for path in sorted(RECIPES.rglob("*.yaml"))}
CHAINS = [path for path, content in CONTENTS.items() if "stages" in content]
ABLATIONS = [path for path, content in CONTENTS.items() if "arms" in content]
WHOLE = [
    path
    for path, content in CONTENTS.items()
    if "class_path" in content.get("model", {}) or "demo/stage" in str(path) or path.parent.name == "few_shot"
]
OF_THE_PAPER = [path for path in WHOLE if path.parent == RECIPES]
BASES = {RECIPES / name for name in ("base.yaml", "size/h.yaml", "demo/digits.yaml", "systems/clips.yaml")}
BASES |= {RECIPES / "acdit" / "imagenet.yaml", RECIPES / "acdit" / "ucf101.yaml"}
TINY = RECIPES / "size" / "tiny.yaml"
ACDIT_LAPTOP = RECIPES / "acdit" / "laptop.yaml"
LAPTOP_VIDEOS = RECIPES / "acdit" / "laptop_videos.yaml"
LAPTOP_CLASSIFICATION = RECIPES / "acdit" / "laptop_classification.yaml"
LAPTOP_VIDEOS_CLASSIFICATION = RECIPES / "acdit" / "laptop_videos_classification.yaml"
IMAGENET = ("imagenet_b", "imagenet_l", "imagenet_xl", "imagenet_h")
UCF101 = ("ucf101_xl", "ucf101_h")
FULL_SEQUENCE = ("acdit/imagenet_xl", "acdit/ucf101_xl", "vidgpt/ucf101")  # recipes with a bidirectional baseline
SYSTEMS = ("gpdit", "acdit_video", "acdit_image", "vidgpt", "full_sequence")
# Recipes of other verbs than `fit`, which are tested with their verbs.
EVALUATIONS = {path for path in CONTENTS if path.name.startswith("eval_")}
VIDEO_CHATGPT = RECIPES / "video_chatgpt.yaml"
LABELS = RECIPES / "labels" / "ucf101.yaml"


def name_of(path: Path) -> str:
    return path.relative_to(RECIPES).as_posix()


def head_of(path: Path) -> str:
    return path.read_text().split("\n" + next(iter(CONTENTS[path])), maxsplit=1)[0]


def settings_of(*paths: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    arguments = [argument for path in paths for argument in ("--config", str(path))]
    with pytest.raises(SystemExit):
        main(["fit", *arguments, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


@pytest.fixture(scope="module")
def shards(write_shards: Callable[..., Manifest], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards for every source of every recipe: clips of 7 and 12 latent frames, images, sequences."""
    counts = {
        (split, kind, (frames, 8, 8)): 4
        for split in ("train", "validation")
        for kind, frames in (("image", 1), ("video", 7), ("video", 12), ("sequence", 6))
    }
    return write_shards(tmp_path_factory.mktemp("shards"), counts).directory


def test_the_listing_separates_names_and_titles(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [re.fullmatch(r"gpdit:(\S+) {2,}(\S.*)", line) for line in lines]
    assert {row and row[1] for row in rows} == {name_of(path).removesuffix(".yaml") for path in CONTENTS}


def test_list_of_recipes() -> None:
    of_acdit = {"acdit/eval_imagenet.yaml", "acdit/eval_ucf101.yaml"}
    assert {name_of(path) for path in EVALUATIONS} == {
        f"eval_{name}.yaml" for name in ("ucf101", "msrvtt", "long")
    } | of_acdit
    assert {name_of(path) for path in WHOLE} >= {
        "stage1_image_warmup.yaml",
        "stage2_mixed.yaml",
        "stage3_long_video.yaml",
        "stage4_few_shot.yaml",
        "ucf101_b.yaml",
        "demo/stage3_long_video.yaml",
        "debug/overfit_one_clip.yaml",
        *(f"systems/{name}.yaml" for name in SYSTEMS),
        *(f"acdit/{name}.yaml" for name in (*IMAGENET, *UCF101)),
        *(f"{name}_full_sequence.yaml" for name in FULL_SEQUENCE),
        "vidgpt/ucf101.yaml",
        "acdit/imagenet_xl_classification.yaml",
        "acdit/ucf101_xl_classification.yaml",
    }
    others = {
        *CHAINS,
        *ABLATIONS,
        *BASES,
        *EVALUATIONS,
        TINY,
        ACDIT_LAPTOP,
        LAPTOP_VIDEOS,
        LAPTOP_CLASSIFICATION,
        LAPTOP_VIDEOS_CLASSIFICATION,
        LABELS,
        VIDEO_CHATGPT,
        RECIPES / "size" / "b.yaml",
    }
    assert set(CONTENTS) == {*WHOLE, *others}


@pytest.mark.parametrize("path", CONTENTS, ids=name_of)
def test_head_is_complete(path: Path) -> None:
    """A title of one sentence, commands, hardware, figures with their origin, and the settings of the paper."""
    head = head_of(path)
    assert head.partition("\n")[0].endswith(".")
    for file in re.findall(r"--config (recipes/[\w/]+\.yaml)", head):
        assert (RECIPES.parent / file).is_file(), file
    if path in BASES:
        return
    assert "python -m gpdit_lightning" in head
    assert "Hardware:" in head
    entries = dict(re.findall(r"^# (Memory|Time|Expect): (.+(?:\n#   .+)*)", head, re.MULTILINE))
    for name in ("Memory", "Time"):
        assert re.search(r"\d.*\((measured|estimated)\b", entries[name], re.DOTALL), name
    if re.search(r"\d", entries["Expect"]):
        assert re.search(r"\(measured\b|the paper reports|not run", entries["Expect"])
    assert path not in OF_THE_PAPER or "\n# From the paper:" in head


# The sizes of ACDiT differ in one field, which the overlay replaces: one of them stands for all.
ACDIT_TRAINED = ("imagenet_xl", "ucf101_xl", "imagenet_xl_classification", "ucf101_xl_classification")
DISTINCT = [path for path in WHOLE if path.parent.name != "acdit" or path.stem in ACDIT_TRAINED]


@pytest.mark.parametrize("path", DISTINCT, ids=name_of)
def test_head_has_the_shared_memory_of_the_loader_processes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needed = shared_memory_bytes(settings_of(path, capsys=capsys)["data"]["workers"])
    stated = f"{needed / 2**20:.1f} MiB of /dev/shm per GPU" if needed else "none"
    assert f"\n# Shared memory: {stated} " in head_of(path)


@pytest.mark.parametrize("path", [path for path in WHOLE if path.parent.name != "acdit"], ids=name_of)
def test_backbone_can_be_built(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings_of(path, capsys=capsys)["model"]["init_args"]["backbone"]
    with torch.device("meta"):
        model = GPDiT(GPDiTConfig(**config))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    expected = {"H": 2.28e9, "B": 85e6}.get(config["size"])
    assert expected is None or abs(parameters / expected - 1) < 0.01


@pytest.mark.parametrize("overlay", ["b", "tiny"])
@pytest.mark.parametrize("path", OF_THE_PAPER, ids=name_of)
def test_overlays_change_size_and_batches_only(path: Path, overlay: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Stage and sources are unchanged; the run folder gets a prefix."""
    whole = settings_of(path, capsys=capsys)
    small = settings_of(path, RECIPES / "size" / f"{overlay}.yaml", capsys=capsys)
    assert small["model"]["init_args"]["backbone"]["size"] == {"b": "B", "tiny": "tiny"}[overlay]
    assert small["model"]["class_path"] == whole["model"]["class_path"]
    assert small["run_dir"] == whole["run_dir"].replace("runs/", f"runs/{overlay}/")
    for name in ("images", "videos", "sequences"):
        source, original = small["data"][name], whole["data"][name]
        assert bool(source["manifests"]) == bool(original["manifests"])
        if overlay == "b" and source["manifests"]:
            assert source["batch_size"] == original["batch_size"]
        assert source["batch_size"] % (source["micro_batches"] * small["data"]["max_ranks"]) == 0


@pytest.mark.parametrize("path", DISTINCT, ids=name_of)
def test_recipe_trains_one_step_at_tiny_size(
    path: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only settings that require hardware or real data are replaced."""
    overlay = {RECIPES: TINY, RECIPES / "acdit": ACDIT_LAPTOP, RECIPES / "vidgpt": TINY}.get(path.parent)
    if path.stem.startswith("ucf101_"):
        overlay = LAPTOP_VIDEOS if path.parent.name == "acdit" else TINY
    if path.stem.endswith("_classification"):
        overlay = LAPTOP_VIDEOS_CLASSIFICATION if path.stem.startswith("ucf101") else LAPTOP_CLASSIFICATION
    arguments = ["--config", str(path)] + (["--config", str(overlay)] if overlay else [])
    for source in (
        "laion",
        "video",
        "few_shot",
        "ucf101",
        "copy",
        "grayscale",
        "many_grayscale",
        "many_sketch",
        "systems",
    ):
        (tmp_path / "latents").mkdir(exist_ok=True)
        (tmp_path / "latents" / source).symlink_to(shards)
    arguments += [
        f"--runs={tmp_path / 'runs'}",
        f"--run_dir={tmp_path / 'run'}",
        f"--latents={tmp_path / 'latents'}",
        "--model.init_args.initial_weights=null",
        "--model.init_args.backbone.latent_channels=4",
        "--model.init_args.backbone.layers=1",
        "--preview.every_steps=0",  # the shards are random, so no codec can decode them
        "--trainer.max_steps=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    ]
    if path.parent.name == "debug":
        arguments.append(f"--data.videos.manifests=['{shards}']")
    if path.parent.name in ("acdit", "vidgpt"):
        images = path.stem.startswith("imagenet")
        arguments += ["--model.init_args.optimizer.warmup_steps=0", "--model.init_args.optimizer.decay_steps=1"]
        arguments += ["--data.posterior=sample", f"--data.flips={str(images).lower()}"]
        if overlay in (LAPTOP_VIDEOS, LAPTOP_VIDEOS_CLASSIFICATION):  # the codec of the recipe, not that of the overlay
            backbone = "--model.init_args.backbone"
            arguments += [f"{backbone}.block_shape=[4,0,0]", f"{backbone}.first_block_frames=0"]
        if images:
            write_posteriors(tmp_path / "latents" / "imagenet", "image", 1, classes=1000)
        for name, frames in (("ucf101_acdit", 16), ("ucf101_vidgpt", 33)):
            write_posteriors(tmp_path / "latents" / name, "video", frames, classes=101)
    assert main(["fit", *arguments]) == 0
    assert read_checkpoint(tmp_path / "run")["global_step"] == 1
    capsys.readouterr()
    saved = settings_of(tmp_path / "run" / "config.yaml", capsys=capsys)  # a complete recipe without its bases
    assert saved["run_dir"] == str(tmp_path / "run")


def write_posteriors(folder: Path, kind: Kind, frames: int, classes: int) -> None:
    """Write 16 labelled samples with their posteriors, and images with their flips."""
    arrays, names = ARRAYS[-1 if kind == "image" else 1], [f"n{number:08d}" for number in range(classes)]
    latent = np.random.default_rng(0).normal(size=(frames, len(arrays) * 4, 8, 8))
    with ShardSetWriter(folder) as writer:
        for number in range(16):
            writer.write("train", kind, latent, {"source": str(number), "label": names[number]}, arrays)
        shards = writer.close()
    Manifest(folder, TINY_CODEC, shards, labels=tuple(names)).save()


def test_the_overlay_for_labels_trains_a_conditional_model(tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(101)]
    clips = [(name, np.zeros((5, 4, 8, 8))) for name in names[:8]]
    write_labelled(tmp_path / "ucf101", names, clips)
    arguments = [f"--config={path}" for path in (RECIPES / "ucf101_b.yaml", LABELS, TINY)]
    arguments += [
        f"--runs={tmp_path / 'runs'}",
        f"--latents={tmp_path}",
        "--model.init_args.backbone.latent_channels=4",
        "--model.init_args.backbone.layers=1",
        "--preview.every_steps=0",
        "--trainer.max_steps=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    ]
    assert main(["fit", *arguments]) == 0
    trained = load_trained_model(tmp_path / "runs" / "ucf101_b_labels")
    assert trained.classes == tuple(names)
    assert trained.backbone.config.classes == 101


@pytest.mark.parametrize("path", ABLATIONS, ids=name_of)
def test_all_arms_of_an_ablation_can_be_trained(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their options exist, their backbones can be built, and each differs from the others."""
    assert main(["ablate", f"--config={path}", "--dry_run"]) == 0
    rows = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[1:] == [f"| {name}" for name in CONTENTS[path]["arms"]]


@pytest.mark.parametrize("path", CHAINS, ids=name_of)
def test_each_stage_of_a_chain_starts_from_the_run_folder_of_its_predecessor(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the chain: a recipe trained alone begins from random weights."""
    alone = [settings_of(recipe, capsys=capsys) for recipe in stages_of(path)]
    assert [settings["model"]["init_args"]["initial_weights"] for settings in alone] == [None] * len(alone)
    assert main(["chain", f"--config={path}", "--print_config"]) == 0
    predecessor = None
    for settings in yaml.safe_load_all(capsys.readouterr().out):
        assert settings["model"]["init_args"]["initial_weights"] == predecessor
        predecessor = settings["run_dir"]


# Numbers of sections 5.1 and 5.4 of the paper: recipe -> settings in the output of --print_config.
PAPER: dict[str, dict[str, Any]] = {
    "stage1_image_warmup": {
        "model.class_path": "ImageWarmupStage",
        "model.init_args.backbone.size": "H",
        "model.init_args.optimizer.learning_rate": 1e-4,
        "data.images.batch_size": 960,
        "trainer.max_steps": 200_000,
    },
    "stage2_mixed": {
        "model.class_path": "MixedStage",
        "model.init_args.backbone.size": "H",
        "model.init_args.optimizer.learning_rate": 1e-4,
        "data.images.batch_size": 256,
        "data.videos.batch_size": 64,
        "data.sampling": "alternate",  # inferred from Table 2: 6.4M videos are 100k x 64
        "data.images.weight": 1.0,
        "data.videos.weight": 1.0,
        "data.videos.frames": 1 + (17 - 1) // 4,
        "data.videos.least_frames": 0,
        "trainer.max_steps": 200_000,
    },
    "stage3_long_video": {
        "model.class_path": "LongVideoStage",
        "model.init_args.backbone.size": "H",
        "model.init_args.optimizer.learning_rate": 2e-5,
        "data.videos.batch_size": 24_000_000 // 150_000,  # inferred from Table 2
        "data.max_ranks": 32,
        "data.videos.least_frames": 1 + (17 - 1) // 4,
        "data.videos.frames": 1 + (45 - 1) // 4,
        "trainer.max_steps": 150_000,
    },
    "stage4_few_shot": {
        "model.class_path": "FewShotStage",
        "model.init_args.backbone.size": "H",
        "data.sequences.batch_size": 4,
        "trainer.max_steps": 500,
    },
    "ucf101_b": {
        "model.init_args.backbone.size": "B",
        "model.init_args.optimizer.learning_rate": 1e-4,
        "data.videos.batch_size": 96,
        "trainer.max_steps": 400_000,
    },
}


# Numbers of ACDiT's section 5.1 and of the defaults of its code, the same for all sizes of Table 1.
ACDIT: dict[str, Any] = {
    "model.init_args.backbone.block_shape": [1, 16, 16],
    "model.init_args.backbone.patch_size": 1,
    "model.init_args.backbone.latent_channels": 4,
    "model.init_args.backbone.classes": 1000,
    "model.init_args.backbone.time_conditioning": "adaln",
    "model.init_args.backbone.target": "epsilon",
    "model.init_args.schedule.name": "linear",
    "model.init_args.optimizer.learning_rate": 3e-4,
    "model.init_args.optimizer.weight_decay": 0,
    "model.init_args.optimizer.betas": [0.9, 0.95],
    "model.init_args.optimizer.decay": "wsd",
    "model.init_args.optimizer.decay_steps": 0.15 * 1_200_000,
    "data.images.batch_size": 1024,
    "data.label_dropout": 0.1,
    "data.context_dropout": 0,
    "data.posterior": "sample",
    "data.flips": True,
    "ema.decay": 0.9999,
    "trainer.max_steps": 1_200_000,
    "trainer.gradient_clip_val": 1,
}
ACDIT_PARAMETERS = {"imagenet_b": 132e6, "imagenet_l": 460e6, "imagenet_xl": 677e6, "imagenet_h": 954e6}


# Numbers of MAE's Table 9, and of its code for vectors and ViT-H; the number of epochs is ACDiT's.
MAE: dict[str, Any] = {
    "model.init_args.optimizer.learning_rate": 1e-3 * 1024 / 256,
    "model.init_args.optimizer.betas": [0.9, 0.999],
    "model.init_args.optimizer.weight_decay": 0.05,
    "model.init_args.optimizer.decay_vectors": False,
    "model.init_args.optimizer.layer_decay": 0.75,
    "model.init_args.optimizer.warmup_steps": round(5 * 1_281_167 / 1024),
    "model.init_args.optimizer.decay": "cosine",
    "model.init_args.classification.label_smoothing": 0.1,
    "model.init_args.classification.mixup": 0.8,
    "model.init_args.classification.cutmix": 1.0,
    "model.init_args.classification.drop_path": 0.3,
    "data.images.batch_size": 1024,
    "data.label_dropout": 0,
    "trainer.max_steps": round(100 * 1_281_167 / 1024),
    "trainer.gradient_clip_val": None,
}


# Numbers of the script and the code with which VideoMAE is fine-tuned on UCF-101, which has 9,537 training videos.
VIDEOMAE: dict[str, Any] = MAE | {
    "model.init_args.optimizer.learning_rate": 5e-4 * 128 / 256,
    "model.init_args.optimizer.final_learning_rate_fraction": 1e-5 / 5e-4,
    "model.init_args.optimizer.layer_decay": 0.7,
    "model.init_args.optimizer.warmup_steps": 5 * (9537 // 128),
    "model.init_args.classification.drop_path": 0.2,
    "data.videos.batch_size": 128,
    "trainer.max_steps": 100 * (9537 // 128),
}


@pytest.mark.parametrize(("name", "published"), [("imagenet_xl", MAE), ("ucf101_xl", VIDEOMAE)])
def test_settings_of_classification_are_those_of_mae(
    name: str, published: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = settings_of(RECIPES / "acdit" / f"{name}_classification.yaml", capsys=capsys)
    for key, expected in published.items():
        value: Any = recipe
        for part in key.split("."):
            value = value[part]
        assert value == expected or (name == "ucf101_xl" and key == "data.images.batch_size"), key
    generative = settings_of(RECIPES / "acdit" / f"{name}.yaml", capsys=capsys)
    assert recipe["model"]["init_args"]["backbone"] == generative["model"]["init_args"]["backbone"]
    assert recipe["model"]["init_args"]["initial_weights"] == generative["run_dir"]


@pytest.mark.parametrize("name", IMAGENET)
def test_settings_and_size_are_those_of_acdit(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = settings_of(RECIPES / "acdit" / f"{name}.yaml", capsys=capsys)
    for key, expected in ACDIT.items():
        value: Any = recipe
        for part in key.split("."):
            value = value[part]
        assert value == expected, key
    assert recipe["model"]["class_path"].endswith("GPDiTStage")
    with torch.device("meta"):
        model = GPDiT(GPDiTConfig(**recipe["model"]["init_args"]["backbone"]))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert abs(parameters / ACDIT_PARAMETERS[name] - 1) < 0.02


# The values of section 5.1 that differ for videos.
ACDIT_VIDEO: dict[str, Any] = {
    "model.init_args.backbone.block_shape": [4, 0, 0],
    "model.init_args.backbone.patch_size": 2,
    "model.init_args.backbone.classes": 101,
    "data.sources": ["videos"],
    "data.videos.batch_size": 96,
    "data.videos.frames": 16,
    "trainer.max_steps": 400_000,
    "model.init_args.optimizer.decay_steps": 60_000,
}


@pytest.mark.parametrize("name", UCF101)
def test_settings_for_videos_are_those_of_acdit(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As for images, except where the section names others."""
    recipe, images = (
        flat(settings_of(RECIPES / "acdit" / f"{recipe}.yaml", capsys=capsys))
        for recipe in (name, f"imagenet_{name.rpartition('_')[2]}")
    )
    assert {key: recipe[key] for key in ACDIT_VIDEO} == ACDIT_VIDEO
    others = {*ACDIT, "model.init_args.backbone.size"} - {*ACDIT_VIDEO}
    for key in others - {key for key in others if key.startswith(("data.images", "data.flips", "data.max_ranks"))}:
        assert recipe[key] == images[key], key


@pytest.mark.parametrize("name", FULL_SEQUENCE)
def test_baselines_differ_in_blocks_and_context_only(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    system, baseline = (
        flat(settings_of(RECIPES / f"{recipe}.yaml", capsys=capsys)) for recipe in (name, f"{name}_full_sequence")
    )
    changed = {key for key in system if system[key] != baseline[key]}
    assert changed - {"base", "run_dir"} <= {
        *(f"model.init_args.backbone.{field}" for field in ("block_shape", "first_block_frames", "causal_in_block")),
        "data.videos.frames_without_loss",
    }
    assert baseline["model.init_args.backbone.block_shape"] == [0, 0, 0]


def test_the_clips_of_vidgpt_have_the_four_prompts_of_the_public_code(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = settings_of(RECIPES / "vidgpt" / "ucf101.yaml", capsys=capsys)
    layout = BlockLayout.of(GPDiTConfig(**recipe["model"]["init_args"]["backbone"]), 32, 32)
    videos = recipe["data"]["videos"]
    noisy = layout.blocks_of(range(videos["frames_without_loss"], videos["frames"]))
    groups = [layout.group_of(block, videos["frames"]) for block in noisy]
    assert [group.start for group in groups] == [1, 9, 17, 25]
    assert {len(group) for group in groups} == {8}


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings by their names in a recipe."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        inner = flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
        result |= inner
    return result


@pytest.mark.parametrize("name", PAPER)
def test_settings_are_those_of_the_paper(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = settings_of(RECIPES / f"{name}.yaml", capsys=capsys)
    for key, expected in PAPER[name].items():
        value: Any = recipe
        for part in key.split("."):
            value = value[part]
        assert (value.rsplit(".", 1)[-1] if key == "model.class_path" else value) == expected, key
    optimizer = recipe["model"]["init_args"]["optimizer"]
    assert optimizer["weight_decay"] == 0  # "Adam"
    assert optimizer["decay"] == "constant"  # the paper mentions no schedule
