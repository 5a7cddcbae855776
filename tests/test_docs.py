"""The documents explain every logged tag, and their links are valid."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from docs import figures
from gpdit_lightning.cli import main
from gpdit_lightning.codecs import load_codec
from gpdit_lightning.data.manifest import Manifest

ROOT = Path(__file__).parents[1]
DOCS = sorted([*(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").glob("*.md")])
# Without a GPU, without faults, and without classification, whose tags tests/stages/test_classification.py checks.
GENERATED = {"reference/verbs.md"}  # by docs/hooks.py
NOT_IN_RUN = {"system/mfu", "warnings/skipped_steps", "warnings/damaged_samples"}
NOT_IN_RUN |= {"val/top1_accuracy", "val/top5_accuracy"}


def explained_tags() -> set[str]:
    """Return the tags in the first columns of the tables of docs/monitoring.md."""
    text = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    tables = text.split("## Every tag")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", tables, flags=re.MULTILINE)
    return {tag for row in rows for tag in re.findall(r"`([^`]+)`", row)}


@pytest.fixture(scope="module")
def logged_tags(write_shards: Callable[..., Manifest], tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """All tags of a run with all sources, validation, previews, scores and gradient spikes."""
    folder = tmp_path_factory.mktemp("logged")
    counts = {
        (split, kind, shape): 4
        for split in ("train", "validation")
        for kind, shape in (("image", (1, 4, 4)), ("video", (3, 4, 4)), ("sequence", (4, 4, 4)))
    }
    shards = str(write_shards(folder / "shards", counts, codec=load_codec("pca").spec()).directory)
    backbone = {"size": "tiny", "layers": 1, "width": 16, "heads": 2, "mlp_width": 24}
    recipe = {
        "run_dir": str(folder / "run"),
        "model": {
            "class_path": "GPDiTStage",
            "init_args": {"backbone": backbone, "optimizer": {"learning_rate": 0.03}},
        },
        "data": {name: {"manifests": [shards], "batch_size": 4} for name in ("images", "videos", "sequences")},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 6,
            "log_every_n_steps": 3,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "validate_every_steps": 6,
        "preview": {"every_steps": 6, "clips": 1, "sampler_steps": 1},
        "scores": {
            "every_steps": 6,
            "clips": 2,
            "sampler_steps": 1,
            "video_network": {"kind": "tests.evaluation.scripted.ClipColours"},
            "image_network": {"kind": "tests.evaluation.scripted.ImageColours"},
        },
        "health": {"spike_factor": 1.001, "spike_window": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "--config", str(folder / "recipe.yaml")]) == 0
    events = EventAccumulator(str(folder / "run"))
    events.Reload()
    tags = {tag for kind in ("scalars", "images", "tensors") for tag in events.Tags()[kind]}
    return tags - {"custom_scalars__config__"}  # the layout of charts


def test_every_logged_tag_is_explained(logged_tags: set[str]) -> None:
    assert logged_tags - explained_tags() == set()


def test_every_explained_tag_is_logged(logged_tags: set[str]) -> None:
    assert explained_tags() - logged_tags == NOT_IN_RUN


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_links_and_images_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    headings = {re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in text.splitlines()}
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, heading = target.partition("#")
        assert not path or path in GENERATED or (document.parent / path).is_file(), target
        assert path or heading in headings, target


@pytest.mark.parametrize(
    ("page", "link", "shown"),
    [
        ("tutorials/first.md", "[data](../data.md#labels)", "[data](../data.md#labels)"),
        ("tutorials/first.md", "[a recipe](../../recipes/base.yaml)", "a recipe (`recipes/base.yaml`)"),
        ("scaling.md", "[a job](../recipes/slurm.sbatch#head)", "a job (`recipes/slurm.sbatch`)"),
        ("scaling.md", "[data](data.md)", "[data](data.md)"),
    ],
)
def test_the_site_keeps_links_between_its_pages(page: str, link: str, shown: str) -> None:
    pytest.importorskip("mkdocs")
    from docs import hooks

    at = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    assert hooks.on_page_markdown(f"See {link}.", page=at) == f"See {shown}."


def test_every_image_is_used() -> None:
    texts = "".join(path.read_text(encoding="utf-8") for path in (*DOCS, ROOT / "README.md"))
    for image in (ROOT / "docs" / "images").iterdir():
        assert f"images/{image.name})" in texts, image.name


def test_figures_are_made_by_one_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = {*figures.ATTENTION, *figures.TENSORBOARD, "architecture", "scaling", "generation_strip", "app"}
    assert made <= {path.stem for path in figures.IMAGES.iterdir()}
    monkeypatch.setattr(figures, "IMAGES", tmp_path)
    figures.main(["--only", "architecture"])
    assert [path.name for path in tmp_path.iterdir()] == ["architecture.png"]
    with pytest.raises(SystemExit, match="is no finished demo"):
        figures.main(["--only", "strip", "--run", str(tmp_path)])
