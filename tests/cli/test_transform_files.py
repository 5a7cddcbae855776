"""`transform` on files, compared with the function `transform` of the library."""

import errno
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from torch import Tensor

from gpdit_lightning import GPDiT
from gpdit_lightning.checkpoints.reading import load_trained_model
from gpdit_lightning.cli import main
from gpdit_lightning.cli import transform as verb
from gpdit_lightning.codecs import load_codec
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.diffusion import RotationSampler
from gpdit_lightning.generation import GenerationConfig
from gpdit_lightning.generation.transform import transform
from gpdit_lightning.media.image_tasks import grayscale
from gpdit_lightning.media.images import read_image, resize_and_crop

CODEC = load_codec("pca")
WIDE, TALL = (32, 48), (48, 32)  # the sizes of training
CELL = 144, 144  # pixels of a cell of a sheet, in which an image's shorter side has 96
GAP, HEAD = 4, 24


def save(path: Path, seed: int, height: int = 40, width: int = 64) -> None:
    """Write a smooth random image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="module")
def workspace(
    tmp_path_factory: pytest.TempPathFactory,
    write_shards: Callable[..., Manifest],
    randomise: Callable[[GPDiT], GPDiT],
) -> Path:
    """A folder of images and models.

    `pairs` (of which p2 is the first in natural order, and p10 in alphabetical order), `sources` of both sizes and
    their `truths`, `single` images, a `run` of one step on sequences of three pairs, and the same architecture with
    random weights as `model`, and as `of_videos` if trained on videos and images.
    """
    workspace = tmp_path_factory.mktemp("transform")
    for number in (2, 10, 11):
        save(workspace / f"pairs/source/p{number}.png", number)
        save(workspace / f"pairs/target/p{number}.jpg", 20 + number)
    for name, seed, sides in (("a", 40, (40, 64)), ("b", 41, (64, 40)), ("c", 42, (50, 80)), ("d", 43, (40, 64))):
        save(workspace / f"sources/{name}.png", seed, *sides)
        save(workspace / f"truths/{name}.png", 10 + seed, *sides)
        save(workspace / f"single/{name}.png", 20 + seed, *sides)
    counts = {("train", "sequence", (6, 4, 6)): 2, ("train", "sequence", (6, 6, 4)): 2}
    write_shards(workspace / "shards", counts, codec=CODEC.spec())
    recipe: dict[str, Any] = {
        "run_dir": str(workspace / "run"),
        "model": {
            "class_path": "FewShotStage",
            "init_args": {"backbone": {"size": "tiny", "layers": 2, "width": 24, "heads": 2, "mlp_width": 48}},
        },
        "data": {"sequences": {"manifests": [str(workspace / "shards")], "batch_size": 1}},
        "trainer": {"accelerator": "cpu", "max_steps": 1, "enable_progress_bar": False, "enable_model_summary": False},
    }
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "--config", str(workspace / "recipe.yaml")]) == 0
    # After one step the output layer is almost 0, so that results would hardly depend on anything.
    trained = load_trained_model(workspace / "run").backbone
    model = randomise(GPDiT(trained.config))
    model.facts = trained.facts
    model.save_pretrained(workspace / "model")
    model.facts = replace(trained.facts, data={"data.videos.manifests": [], "data.images.manifests": []})
    model.save_pretrained(workspace / "of_videos")
    return workspace


def run(workspace: Path, *options: Any) -> int:
    """Run `transform` with two steps and further options, which override earlier ones; return its exit status."""
    basic = ["--checkpoint", workspace / "model", "--examples", workspace / "pairs", "--steps=2"]
    return main(["transform", *map(str, [*basic, *options])])


def read(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    image = read_image(path)
    return (image if size is None else resize_and_crop(image, size))[0]


def expected(workspace: Path, examples: list[tuple[Tensor, Tensor]], source: Tensor, seed: int = 0) -> Tensor:
    """Transform one source with the function of the library."""
    model = load_trained_model(workspace / "model").backbone
    return transform(model, CODEC, examples, source[None], GenerationConfig(RotationSampler(2)), seeds=seed)[0]


def first_pairs(workspace: Path, count: int, size: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    return [
        (read(workspace / f"pairs/source/p{number}.png", size), read(workspace / f"pairs/target/p{number}.jpg", size))
        for number in (2, 10, 11)[:count]
    ]


def nearly_equal(first: Tensor, second: Tensor) -> bool:
    """Return whether images are equal up to rounding."""
    return first.shape == second.shape and bool((first.int() - second.int()).abs().max() <= 1)


def cell(sheet: Path, row: int, column: int, columns: int) -> np.ndarray:
    with Image.open(sheet) as image:
        left = image.width - (columns - column) * (CELL[0] + GAP)
        top = HEAD + row * (CELL[1] + GAP)
        return np.array(image)[top : top + CELL[1], left : left + CELL[0]]


def expected_cell(image: Tensor) -> np.ndarray:
    """Return a cell of a sheet with an image at its centre."""
    height, width = (3 * side for side in image.shape[1:])
    result = np.full((CELL[1], CELL[0], 3), 255, np.uint8)
    large = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BICUBIC)
    top, left = (CELL[1] - height) // 2, (CELL[0] - width) // 2
    result[top : top + height, left : left + width] = np.array(large)
    return result


@pytest.mark.parametrize(("options", "count"), [([], 2), (["--pairs=1", "--seed=3"], 1)])
def test_one_image_is_transformed(
    workspace: Path, tmp_path: Path, options: list[str], count: int, messages: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "new" / "out.png"
    assert run(workspace, "--source", workspace / "sources/a.png", "--out", out, *options) == 0
    assert "replaced" not in messages.text
    assert run(workspace, "--source", workspace / "sources/a.png", "--out", out, *options) == 0
    assert f"2 existing files are replaced, such as {out}" in messages.text
    source = read(workspace / "sources/a.png", WIDE)
    target = expected(workspace, first_pairs(workspace, count, WIDE), source, seed=3 if options else 0)
    assert nearly_equal(read(out), target)
    assert {path.name for path in out.parent.iterdir()} == {"out.png", "out_sheet.png"}


def test_folder_of_images_of_several_sizes_is_transformed_in_any_batch(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truths = ["--truth", workspace / "truths"]
    assert run(workspace, "--source", workspace / "sources", "--out", tmp_path / "out", "--batch_size=2", *truths) == 0
    printed = capsys.readouterr().out
    others = [workspace / f"sources/{name}.png" for name in "dbca"]
    assert run(workspace, "--source", *others, "--out", tmp_path / "alone", "--batch_size=1") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{name}.png" for name in "abcd"}
    errors, copied = [], []
    for row, (name, size) in enumerate(zip("abcd", (WIDE, TALL, WIDE, WIDE), strict=True)):
        examples, source = first_pairs(workspace, 2, size), read(workspace / f"sources/{name}.png", size)
        truth, result = read(workspace / f"truths/{name}.png", size), read(tmp_path / f"out/{name}.png")
        assert nearly_equal(result, expected(workspace, examples, source))
        assert nearly_equal(result, read(tmp_path / f"alone/{name}.png"))
        images = [*(image for pair in examples for image in pair), source, result, truth]
        for column, image in enumerate(images):
            assert np.array_equal(cell(tmp_path / "out_sheet.png", row, column, 7), expected_cell(image))
        errors.append((result.double() - truth).square().mean().item())
        copied.append((source.double() - truth).square().mean().item())
    with Image.open(tmp_path / "out_sheet.png") as sheet, Image.open(tmp_path / "alone_sheet.png") as without_truth:
        assert sheet.height == without_truth.height == HEAD + 4 * (CELL[1] + GAP)
        assert sheet.width - without_truth.width == CELL[0] + GAP
    (line,) = (line for line in printed.splitlines() if "mean squared error" in line)
    assert "on 4 images" in line
    figures = [float(figure) for figure in re.findall(r"\d+\.\d", line)]
    assert figures == pytest.approx([sum(errors) / 4, sum(copied) / 4], abs=0.06)


def test_task_makes_examples_source_and_ground_truth_from_single_images(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, sheet = tmp_path / "out.png", tmp_path / "sheets" / "rows.png"
    options = ["--task=colourisation", "--examples", workspace / "single", "--sheet", sheet]
    assert run(workspace, "--source", workspace / "sources/a.png", "--out", out, *options) == 0
    images = [
        read(path, WIDE)
        for path in (workspace / "single/a.png", workspace / "single/b.png", workspace / "sources/a.png")
    ]
    (a, b, truth), (gray_a, gray_b, source) = images, (grayscale(image[None])[0] for image in images)
    assert nearly_equal(read(out), expected(workspace, [(gray_a, a), (gray_b, b)], source))
    ours, copied = ((image.double() - truth).square().mean() for image in (read(out), source))
    error = f"on 1 image: {ours:.1f}; of copying the source: {copied:.1f}"
    assert error in capsys.readouterr().out
    assert sheet.exists()
    assert not (tmp_path / "out_sheet.png").exists()


def test_examples_may_have_another_task_than_the_sources(workspace: Path, tmp_path: Path) -> None:
    image = read(workspace / "sources/a.png", WIDE)
    single = [read(workspace / f"single/{name}.png", WIDE) for name in "ab"]
    gray, gray_single = grayscale(image[None])[0], [grayscale(other[None])[0] for other in single]
    to_colour, to_gray = list(zip(gray_single, single, strict=True)), list(zip(single, gray_single, strict=True))
    for name, options, examples, source in (
        ("single", ["--task=grayscale", "--examples_task=colourisation"], to_colour, image),
        ("pairs", ["--task=colourisation", "--examples_task=pairs"], first_pairs(workspace, 2, WIDE), gray),
        ("single", ["--examples_task=grayscale"], to_gray, image),
    ):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
        options = ["--examples", workspace / name, "--out", out, *options]
        assert run(workspace, "--source", workspace / "sources/a.png", *options) == 0
        assert nearly_equal(read(out), expected(workspace, examples, source))


def test_examples_change_the_result(workspace: Path, tmp_path: Path) -> None:
    for name, target in (("before", 22), ("after", 99)):
        for number in (2, 10):
            save(tmp_path / f"{name}/sources/p{number}.png", number)
            save(tmp_path / f"{name}/targets/p{number}.png", target)
        examples = ["--examples", tmp_path / name, "--out", tmp_path / f"{name}.png"]
        assert run(workspace, "--source", workspace / "sources/a.png", *examples) == 0
    before, after = (read(tmp_path / f"{name}.png").float() for name in ("before", "after"))
    assert (before - after).abs().mean() > 1


def test_sources_of_one_name_get_different_files(workspace: Path, tmp_path: Path) -> None:
    sources = [workspace / "sources/a.png", workspace / "single/a.png"]
    assert run(workspace, "--source", *sources, "--out", tmp_path / "out") == 0
    for name, source in zip(("a", "a-2"), sources, strict=True):
        assert nearly_equal(
            read(tmp_path / f"out/{name}.png"), expected(workspace, first_pairs(workspace, 2, WIDE), read(source, WIDE))
        )


def test_default_sheet_has_the_name_of_the_current_folder(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results").mkdir()
    monkeypatch.chdir(tmp_path / "results")
    assert run(workspace, "--source", workspace / "sources/a.png", workspace / "sources/b.png", "--out", ".") == 0
    assert {path.name for path in Path().iterdir()} == {"a.png", "b.png", "results_sheet.png"}


@pytest.mark.parametrize(("writer", "option"), [("atomic_write", "--out"), ("write_sheet", "--sheet")])
def test_write_error_is_reported_in_one_sentence(
    writer: str,
    option: str,
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(verb, writer, refuse)
    assert run(workspace, "--source", workspace / "sources/a.png", "--out", tmp_path / "out.png") == 2
    assert f"cannot be written (Input/output error): correct that, or give another {option}." in capsys.readouterr().err


def test_examples_of_an_image_do_not_contain_it(workspace: Path, tmp_path: Path) -> None:
    """Neither under its own name nor as a copy; each source of a folder has other examples."""
    numbers = (2, 10, 11)
    folder = workspace / "pairs"
    pairs = {
        number: (read(folder / f"source/p{number}.png", WIDE), read(folder / f"target/p{number}.jpg", WIDE))
        for number in numbers
    }
    (tmp_path / "in").mkdir()
    shutil.copy(folder / "source/p2.png", tmp_path / "in/copy.png")
    (tmp_path / "in/link.png").symlink_to(folder / "source/p10.png")
    shutil.copy(folder / "target/p2.jpg", tmp_path / "in/target.jpg")
    shutil.copy(workspace / "sources/a.png", tmp_path / "in/other.png")
    assert run(workspace, "--source", tmp_path / "in", "--out", tmp_path / "out") == 0
    for name, chosen in (
        ("copy.png", (10, 11)),
        ("link.png", (2, 11)),
        ("target.jpg", (10, 11)),
        ("other.png", (2, 10)),
    ):
        result = expected(workspace, [pairs[number] for number in chosen], read(tmp_path / "in" / name, WIDE))
        assert nearly_equal(read((tmp_path / "out" / name).with_suffix(".png")), result)


def test_unusual_examples_cause_warnings(workspace: Path, tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    assert run(workspace, "--source", workspace / "sources/a.png", "--out", tmp_path / "out.png") == 0
    assert "warning" not in messages.text
    source = ["--source", workspace / "sources/a.png"]
    assert run(workspace, *source, "--out", tmp_path / "out.png", "--pairs=3") == 0
    assert "--pairs is 3, but training gave at most 2" in messages.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--pairs=4"], ["pairs contains 3 examples for --pairs 4"]),
        (
            ["--pairs=3", "--source", "WORKSPACE/pairs/source/p2.png"],
            ["pairs contains 2 examples other than", "source/p2.png for --pairs 3"],
        ),
        (["--pairs=0"], ["--pairs is 0"]),
        (["--examples=WORKSPACE/single"], ["single does not contain the folders source and target", "--task"]),
        (["--examples=WORKSPACE/single", "--task=copy", "--examples_task=pairs"], ["give another --examples_task"]),
        (["--examples=WORKSPACE/pairs", "--task=copy"], ["pairs contains pairs", "give --examples_task pairs"]),
        (["--examples=WORKSPACE/nowhere", "--task=grayscale"], ["nowhere does not exist"]),
        (["--examples=WORKSPACE/lonely"], ["source/2.png has no counterpart named 2"]),
        (["--examples=WORKSPACE/left_over"], ["target/2.png has no counterpart named 2"]),
        (["--examples=WORKSPACE/unequal"], ["target/1.png is 40x60", "source/1.png is 40x64"]),
        (["--source", "WORKSPACE/sources/a.png", "WORKSPACE/broken/x.png"], ["x.png is not a readable image"]),
        (["--source", "WORKSPACE/nowhere.png"], ["nowhere.png does not exist"]),
        (["--source", "WORKSPACE/shards"], ["shards has no images"]),
        (["--source", "WORKSPACE/sources", "--out=OUT/out.png"], ["out.png is one file for 4 sources"]),
        (["--source", "WORKSPACE/sources/a.png", "--out=OUT/out.jpg"], ["out.jpg, but images are written as PNG"]),
        (["--source", "WORKSPACE/sources/a.png", "--sheet=OUT/sheet"], ["--sheet is", "name it sheet.png"]),
        (["--source", "WORKSPACE/sources/a.png", "--sheet=OUT/out/a.png"], ["two images", "one file"]),
        (
            ["--source", "WORKSPACE/sources/a.png", "--out=WORKSPACE/sources"],
            ["a.png is an input and would be overwritten"],
        ),
        (
            ["--source", "WORKSPACE/sources/a.png", "--out=WORKSPACE/recipe.yaml/out.png"],
            ["is not a writable folder"],
        ),
        (["--source", "WORKSPACE/sources/a.png", "--sheet=WORKSPACE/recipe.yaml/a.png"], ["give another --sheet"]),
        (
            ["--source", "WORKSPACE/sources/a.png", f"--out=OUT/{'a' * 252}.png"],
            ["(File name too long)", "another --out"],
        ),
        (
            ["--source", "WORKSPACE/sources/a.png", "WORKSPACE/single/a.png", "--truth=WORKSPACE/truths"],
            ["sources/a.png and", "single/a.png differ only"],
        ),
        (["--truth=WORKSPACE/truths/a.png"], ["a.png is one image for 4 sources"]),
        (
            ["--truth=WORKSPACE/single", "--task=edges", "--examples=WORKSPACE/single"],
            ["edges makes the ground truth itself"],
        ),
        (["--truth=WORKSPACE/pairs/source"], ["a.png has no counterpart named a in"]),
        (["--size=32x32"], ["--size is 32x32", "32x48, 48x32"]),
        (["--checkpoint=WORKSPACE/of_videos"], ["of_videos was trained on videos and images, not on sequences"]),
        (["--batch_size=0"], ["--batch_size is 0"]),
        (["--device=cuda:99"], ["'cuda:99' cannot be used"]),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_invalid_input_is_refused_in_one_sentence_and_writes_nothing(
    options: list[str], words: list[str], workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (workspace / "broken").exists():
        save(workspace / "unequal/source/1.png", 1)
        save(workspace / "unequal/target/1.png", 2, width=60)
        for path in ("lonely/source/1.png", "lonely/source/2.png", "lonely/target/1.png", "unequal/source/2.png"):
            save(workspace / path, 3)
        save(workspace / "unequal/target/2.png", 3)
        for path in ("left_over/source/1.png", "left_over/target/1.png", "left_over/target/2.png"):
            save(workspace / path, 3)
        save(workspace / "broken/x.png", 3)
        (workspace / "broken/x.png").write_bytes(b"not an image")
    before = sorted(workspace.rglob("*"))
    options = [option.replace("WORKSPACE", str(workspace)).replace("OUT", str(tmp_path)) for option in options]
    source = [] if "--source" in options else ["--source", workspace / "sources"]
    assert run(workspace, "--out", tmp_path / "out", *source, *options) == 2
    (message,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    for word in words:
        assert word in message
    assert list(tmp_path.iterdir()) == []
    assert sorted(workspace.rglob("*")) == before


def test_unknown_task_is_refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(workspace, "--source", workspace / "sources", "--task=greyscale") == 2
    message = "there is no task 'greyscale' (did you mean 'grayscale'?): give one of pairs, grayscale, "
    assert message in capsys.readouterr().err


def test_python_example_of_the_documentation_runs(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "generation.md").read_text(encoding="utf-8")
    example = next(block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "transform" in block)
    for seed, name in enumerate(("PAIRS/source/1", "PAIRS/source/2", "PAIRS/target/1", "PAIRS/target/2", "a", "b")):
        save(tmp_path / f"{name}.png", seed)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example.replace("runs/demo/stage4_few_shot", str(workspace / "model")), names)
    assert names["targets"].shape == (2, 3, *names["size"])
