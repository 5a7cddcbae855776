"""`data_dir` names the data of all sources of a run, whatever kinds of samples the folders contain."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from gpdit_lightning.cli import main
from gpdit_lightning.data.manifest import Manifest
from tests.checkpoints.content import read_checkpoint

SHAPES = {"image": (1, 8, 8), "video": (3, 8, 8)}  # clips with fewer frames than the recipe takes
SMALL = (
    "--model.init_args.backbone.latent_channels=4",
    "--model.init_args.backbone.layers=1",
    "--preview.every_steps=0",  # the shards are random, so no codec can decode them
    "--validate_every_steps=0",
    "--trainer.enable_progress_bar=false",
)
WriteShards = Callable[..., Manifest]


def fit(*words: str, recipe: str = "stage2_mixed", steps: int = 2) -> int:
    recipes = [f"--config=gpdit:{recipe}", "--config=gpdit:tiny"]
    return main(["fit", *recipes, *SMALL, f"--trainer.max_steps={steps}", *words])


@pytest.fixture
def folders(
    write_shards: WriteShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> Path:
    """Folders of three samples: `image`, `video`, and `both`, in the working directory. `caplog` has the messages."""
    monkeypatch.chdir(tmp_path)
    for name, kinds in {"image": ["image"], "video": ["video"], "both": ["image", "video"]}.items():
        write_shards(tmp_path / name, {("train", kind, SHAPES[kind]): 3 for kind in kinds})
    write_shards(tmp_path / "odd", {("train", "video", (3, 3, 4)): 3})
    return tmp_path


@pytest.mark.parametrize("folder", ["image", "video", "both"])
def test_a_stage_trains_on_the_kinds_that_the_data_have(
    folder: str, folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert fit("--data_dir", folder) == 0
    shown = caplog.text
    assert shown.count("training begins from random weights") == 1
    order = read_checkpoint(folders / "runs" / "tiny" / "stage2_mixed")["LatentDataModule"]["order"]
    used = [name for name in ("images", "videos", "sequences") if f"data.{name}.manifests" in order]
    assert used == {"image": ["images"], "video": ["videos"], "both": ["images", "videos"]}[folder]
    other = {"image": "videos", "video": "images"}.get(folder)
    assert shown.count(f"without data.{other}, since there are no {other} for training in {folder}") == (
        other is not None
    )
    assert fit("--data_dir", folder, steps=3) == 0  # resumes
    assert caplog.text.count("random weights") == 1


def test_later_manifests_replace_those_of_data_dir(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folders / "mine.yaml").write_text(yaml.safe_dump({"base": "gpdit:stage2_mixed", "data_dir": ["image", "video"]}))
    words = ["fit", "--config", "mine.yaml", "--config", "gpdit:tiny", *SMALL]

    def resolved(*more: str) -> tuple[object, list[list[str]]]:
        with pytest.raises(SystemExit):
            main([*words, *more, "--print_config"])
        recipe = yaml.safe_load(capsys.readouterr().out)
        return recipe["data_dir"], [recipe["data"][name]["manifests"] for name in ("images", "videos", "sequences")]

    assert resolved() == (["image", "video"], [[], [], []])
    assert resolved("--data.videos.manifests=['both']") == (["image", "video"], [[], ["both"], []])
    assert resolved("--data.videos.manifests=['both']", "--data_dir", "image", "both") == (["image", "both"], [[]] * 3)


@pytest.mark.parametrize(
    ("words", "recipe", "expected"),
    [
        (
            ["--data_dir", "video"],
            "stage1_image_warmup",
            ["no images for training in video", "prepare --images", "--data_dir"],
        ),
        (
            ["--data_dir", "both"],
            "stage4_few_shot",
            ["no sequences for training in both", "prepare-pairs", "--data_dir"],
        ),
        (
            ["--data_dir", "."],
            "stage2_mixed",
            ["folder of such folders: give some of those in it: both image odd video"],
        ),
        (["--data_dir", "nowhere"], "stage2_mixed", ["data_dir is nowhere", "prepare --videos"]),
        (["--data_dir"], "stage2_mixed", ["--data_dir has no folder"]),
        (["--data_dir", "odd"], "stage2_mixed", ["data.videos have 3x4", "backbone.patch_size 1", "multiples of 16"]),
        ([], "stage2_mixed", ["data.images.manifests is latents/tiny/laion", "prepare --videos", "--data_dir"]),
    ],
)
def test_missing_data_are_refused_with_the_command_that_makes_them(
    words: list[str], recipe: str, expected: list[str], folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(*words, recipe=recipe) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    for part in expected:
        assert part in error
    assert not (folders / "runs").exists()


def test_an_overlay_or_an_option_for_all_stages_turns_no_source_on(
    folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert fit("--data_dir", "both", "--data.videos.manifests=['video']", recipe="stage1_image_warmup") == 0
    assert "data.videos.manifests is not used, since this stage trains on data.images" in caplog.text
    words = ["--data_dir=both", "--trainer.max_steps=1", *SMALL]  # any source, but the recipe has videos only
    assert main(["fit", "--config=gpdit:ucf101_b", "--config=gpdit:tiny", *words]) == 0
    order = read_checkpoint(folders / "runs" / "tiny" / "ucf101_b")["LatentDataModule"]["order"]
    assert "data.images.manifests" not in order
