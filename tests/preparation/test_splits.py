"""Which recordings are held out by a hash."""

from typing import Any

import pytest

from gpdit_lightning.preparation.annotations import Annotations
from gpdit_lightning.preparation.splits import choose_splits

NO_ANNOTATIONS = Annotations()


def held_out(names: list[str], fraction: float, recorded: dict[str, Any] | None = None) -> set[str]:
    chosen = choose_splits(names, fraction, None, NO_ANNOTATIONS, recorded or {})
    return {name for name, choice in chosen.items() if choice.split == "validation"}


@pytest.mark.parametrize(
    ("files", "fraction", "expected"),
    [(42, 0.001, 4), (15, 0.001, 3), (8, 0.001, 2), (2, 0.001, 1), (1, 0.5, 0), (42, 0.0, 0), (2, 0.99, 1)],
)
def test_a_minimum_of_recordings_is_held_out(files: int, fraction: float, expected: int) -> None:
    names = [f"{number}.mp4" for number in range(files)]
    assert len(held_out(names, fraction)) == expected


def test_large_data_are_held_out_by_the_fraction_alone() -> None:
    names = [f"{number}.mp4" for number in range(4000)]
    chosen = held_out(names, 0.05)
    assert 160 < len(chosen) < 240
    assert held_out(names[:3000], 0.05) == chosen & set(names[:3000])  # independent of the other files


def test_recorded_splits_are_kept_and_new_files_complete_the_minimum() -> None:
    names = [f"{number}.mp4" for number in range(42)]
    recorded: dict[str, Any] = dict.fromkeys(names[:40], "train") | {"0.mp4": "validation"}
    chosen = held_out(names, 0.001, recorded)
    assert chosen == {"0.mp4", "40.mp4", "41.mp4"}
    reason = choose_splits(names, 0.001, None, NO_ANNOTATIONS, recorded)["40.mp4"].reason
    assert reason.endswith("not below the fraction 0.001, but at least 4 of 42 recordings are held out")
    enough: dict[str, Any] = dict.fromkeys(names[:40], "train") | dict.fromkeys(names[:4], "validation")
    assert held_out(names, 0.001, enough) == set(names[:4])
