"""The benchmark of generation: its figures cover all rollouts."""

import json
from pathlib import Path

import pytest

from benchmarks import generation


def test_figures_cover_all_rollouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--frame=16x16", "--steps=1", "--guidance=1.5", "--window=3", "--frames=30", "--growing_frames=15"]
    generation.main([*small, "--device=cpu", f"--out={tmp_path / 'figures.json'}"])
    printed = capsys.readouterr().out
    for phrase in ("| of2 | window | 1.00x", "| of | window, no cache |", "decoding by pca", "caching a frame (of)"):
        assert phrase in printed
    report = json.loads((tmp_path / "figures.json").read_text())
    found = {(figure["variant"], figure["history"], figure["frame"]) for figure in report["figures"]}
    expected = {(v, h, f) for v in ("of2", "of") for h, f in (("window", 15), ("window", 30), ("all frames", 15))}
    assert found == expected | {("of", "window, no cache", 15), ("of2", "all frames, no cache", 15)}
    assert all(figure["seconds"] > 0 and figure["mebibytes"] > 0 for figure in report["figures"])
