"""The benchmark of the data plan, on small data."""

import re

import pytest

from benchmarks import data_plan


def rows(printed: str) -> dict[str, list[float]]:
    """Return the numbers of each row of both tables."""
    lines = re.findall(r"^(.+?) {2,}([\d.e -]+)$", printed, flags=re.MULTILINE)
    return {name.strip(): [float(number) for number in numbers.split()] for name, numbers in lines}


@pytest.mark.skipif(not data_plan.Path("/proc/self/status").exists(), reason="the benchmark reads /proc")
def test_both_tables_are_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_plan, "STEPS", (10_000_000,))  # each starts a process
    data_plan.main(["--shards=30", "--samples=200", "--clip_shards=100", "--clip_samples=50"])
    printed = capsys.readouterr().out
    assert "6,000 images in 30 shards of 3 shapes" in printed
    assert "5,000 clips in 100 shards" in printed
    table = rows(printed)
    assert len(table["step 10000000"]) == 6
    assert table["step 10000000"][1] < 1000
    assert table["65,536 samples"] == table["all"]


def test_a_micro_batch_mixes_all_shards_of_its_window() -> None:
    """With k shards, 1/k of the pairs are in the same shard. With n clips, 9 of the other n - 1 share the recording."""
    assert data_plan.shuffle_quality(64, 512, 512)["same_shard"] == 1
    sixteen, whole = data_plan.shuffle_quality(64, 512, 16 * 512), data_plan.shuffle_quality(64, 512, 64 * 512)
    assert sixteen["same_shard"] == pytest.approx(1 / 16, rel=0.02)
    assert whole["same_shard"] == pytest.approx(1 / 64, rel=0.03)
    assert sixteen["same_recording"] == pytest.approx(9 / (16 * 512 - 1), rel=0.1)
    assert whole["gibibytes"] / sixteen["gibibytes"] == pytest.approx(4)
    assert sixteen["shards"] == pytest.approx(16, rel=0.01)
