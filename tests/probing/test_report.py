"""The report of linear probes: JSON, table and figure."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gpdit_lightning.probing.probe import LayerScore
from gpdit_lightning.probing.report import ProbeResult, make_protocol, markdown, plot_probe, videos_sha256, write_json
from gpdit_lightning.probing.splits import LabelledVideo


def videos_in(folder: Path) -> list[LabelledVideo]:
    """Write seven videos: three of class a and one of b for training, one of a and two of b for testing."""
    videos = []
    for number, (label, split) in enumerate(zip("aaababb", ["train"] * 4 + ["test"] * 3, strict=True)):
        path = folder / label / f"{number}.avi"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * number)
        videos.append(LabelledVideo(path, label, str(number), "train" if split == "train" else "test"))
    return videos


@pytest.fixture
def result(tmp_path: Path) -> ProbeResult:
    settings = {"data": "toys", "split": "split 1", "frames": 13, "stride": 3, "size": (32, 48)}
    protocol = make_protocol(videos_in(tmp_path), left_out=2, num_resampled=1, regularisation=None, **settings)
    layers = (LayerScore(0, 0.5, (0.25, 0.75), 0.1, 0.4), LayerScore(1, 0.875, (0.5, 1.0), 1.0, None))
    return ProbeResult("run", "0123456789abcdef" * 4, 500, "ema", "pca 01", layers, protocol)


def test_the_protocol_counts_the_videos(result: ProbeResult) -> None:
    protocol = result.protocol
    assert (protocol.classes, protocol.train_videos, protocol.test_videos, protocol.test_groups) == (2, 4, 3, 3)
    assert protocol.chance == pytest.approx(2 / 3)
    assert protocol.versions["scikit-learn"]


def test_the_hash_depends_on_the_videos_but_not_on_their_folder(tmp_path: Path) -> None:
    first, copy = videos_in(tmp_path / "first"), videos_in(tmp_path / "copy")
    assert videos_sha256(first) == videos_sha256(copy[::-1])
    copy[0].path.write_bytes(b"longer")
    changed = [copy, first[1:], [first[0]._replace(group="9"), *first[1:]]]
    assert len({videos_sha256(videos) for videos in (first, *changed)}) == 4


def test_json_and_table_contain_every_layer_and_the_protocol(result: ProbeResult, tmp_path: Path) -> None:
    write_json([result, replace(result, step=1000)], tmp_path / "probe.json")
    content = json.loads((tmp_path / "probe.json").read_text())["results"]
    assert [entry["step"] for entry in content] == [500, 1000]
    assert content[0]["layers"][1] == {
        "layer": 1, "accuracy": 0.875, "interval": [0.5, 1.0], "C": 1.0, "validation": None, "top5": None
    }  # fmt: skip
    assert content[0]["protocol"]["data_sha256"] == result.protocol.data_sha256
    text = markdown([result])
    assert "| 0 | 50.0% | 25.0% to 75.0% | 0.1 | 40.0% |" in text
    assert "| 1 | **87.5%** | 50.0% to 100.0% | 1 |  |" in text
    for phrase in (
        "4 training videos, 3 test videos in 3 groups",
        "2 unreadable videos left out",
        "(1 short videos sampled",
        "32x48",
        "66.7%",
        "step 500",
    ):
        assert phrase in text


@pytest.mark.parametrize("medium", ["videos", "images"])
def test_a_fine_tuned_classifier_has_a_row_of_the_same_form(result: ProbeResult, medium: Any) -> None:
    score = LayerScore(2, 0.75, (0.5, 1.0), None, None, top5=1.0)
    protocol = replace(result.protocol, medium=medium, test_clips=8, regularisation="mixup 0.8")
    tuned = replace(result, layers=(score,), protocol=protocol, classifier="fine-tuned")
    text = markdown([result, tuned])
    assert "## Linear probe of run, step 500" in text
    assert "## Fine-tuned classifier of run, step 500" in text
    assert "| layer | top-1 accuracy | 95 % interval | C | cross-validation accuracy | top-5 accuracy |" in text
    assert "| 2 | **75.0%** | 50.0% to 100.0% |  |  | 100.0% |" in text
    assert f"3 test {medium} in 3 groups" in text.partition("## Fine-tuned")[2]
    assert ("8 clips of up to 13 frames at stride" in text) == (medium == "videos")
    assert "all weights trained" in text
    assert "cross-entropy; mixup 0.8" in text


def test_several_checkpoints_add_a_panel_over_steps(result: ProbeResult, tmp_path: Path) -> None:
    plot_probe([result], tmp_path / "one.png")
    plot_probe([result, replace(result, step=1000, identity="other")], tmp_path / "two.png")
    of_one_step = [
        replace(result, checkpoint=name, identity=name) for name in ("$x_$/step-500.ckpt", "$$/step-500.ckpt")
    ]
    plot_probe(of_one_step, tmp_path / "names.png")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert (one.width * 2, one.height) == two.size
