"""The benchmarks of block sizes and of the time conditioning: complete tables, and FLOPs as predicted."""

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import block_size, time_conditioning
from gpdit_lightning import GPDiTConfig


def test_saved_fraction_is_equation_6() -> None:
    """Of the FLOPs 2 L theta + 4 h L^2 of a layer, half of those of attention are saved, except inside blocks."""
    config = GPDiTConfig.preset("acdit-xl")
    theta, tokens, block, h = 12 * config.width**2, 4096, 1024, config.width
    full = 2 * tokens * theta + 4 * h * tokens**2
    pairs = sum(block * context for context in range(block, tokens + 1, block))  # equation 5
    assert block_size.saved_fraction(config, block, tokens) == pytest.approx(4 * h * (tokens**2 - pairs) / full)


def test_counted_flops_follow_the_equation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without adaLN, the equation leaves out only the patch embedding and the output layer."""
    out, image = tmp_path / "figures.json", tmp_path / "curves.png"
    small = ["--frames=4", "--latent_size=16x12", "--block_frames", "1", "2", "--repeats=1", "--device=cpu"]
    block_size.main([*small, "--time_conditioning=rotation", f"--out={out}", f"--image={image}"])
    printed = capsys.readouterr().out
    assert "| 1 (48) |" in printed
    assert "| 4 (192), all | 1 |" in printed
    figures = json.loads(out.read_text())["figures"]
    assert [(figure["frames"], figure["tokens"]) for figure in figures] == [(1, 48), (2, 96), (4, 192)]
    whole = figures[-1]
    assert whole["equation"] == 1
    for figure in figures[:-1]:
        assert figure["flops"]["step"] / whole["flops"]["step"] == pytest.approx(figure["equation"], abs=2e-3)
        assert figure["flops"]["first_step"] > figure["flops"]["step"]
        assert figure["flops"]["training"] > whole["flops"]["training"]  # of the clean blocks
    assert all(min(figure["seconds"].values()) > 0 for figure in figures)
    with Image.open(image) as opened:
        assert opened.size[0] > 500


def test_table_of_time_conditioning(capsys: pytest.CaptureFixture[str]) -> None:
    time_conditioning.main(["--frames=4", "--latent_size=8x8", "--layers=1", "--repeats=1", "--device=cpu"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| (")]
    assert [row.split(" | ")[:2] for row in rows] == [
        [f"| ({frames}, 0, 0)", name] for frames in (1, 4) for name in ("rotation", "adaln")
    ]
    assert " | 1.000 | " in rows[0]
    assert " | 1.000 | " not in rows[3]
