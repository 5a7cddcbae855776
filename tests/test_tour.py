"""The tour of docs/ runs from its first to its last cell."""

import re
import subprocess
import sys
from pathlib import Path

from tests.test_readme import ROOT

TOUR = ROOT / "docs" / "tour.py"


def test_the_tour_runs(tmp_path: Path) -> None:
    """With two steps of training instead of a hundred, in a folder of its own."""
    source, replaced = re.subn(r"^STEPS = \d+", "STEPS = 2", TOUR.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert replaced == 1
    source = source.replace('tempfile.mkdtemp(prefix="gpdit_tour_")', repr(str(tmp_path)))
    script = tmp_path / "tour.py"
    script.write_text(source, encoding="utf-8")
    completed = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert (tmp_path / "continued.mp4").stat().st_size > 0
    assert re.search(r"loss/train: [\d.]+ at the beginning", completed.stdout)


def test_the_pages_that_it_names_exist() -> None:
    names = re.findall(r"docs/[\w/]+\.md", TOUR.read_text(encoding="utf-8"))
    assert names
    assert all((ROOT / name).is_file() for name in names)
