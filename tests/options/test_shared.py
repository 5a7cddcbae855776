"""Conversion of paths and single items in the records of options, and the types of their values."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpdit_lightning.errors import InputError
from gpdit_lightning.options.prepare import PrepareOptions
from gpdit_lightning.options.probe import ProbeOptions
from gpdit_lightning.options.sample import SampleOptions


def test_strings_become_paths_and_single_items_become_tuples() -> None:
    sample = SampleOptions(checkpoint="runs/a", context="a.mp4", out="b.mp4")  # type: ignore[arg-type]
    assert (sample.checkpoint, sample.context, sample.out) == ("runs/a", ("a.mp4",), Path("b.mp4"))
    prepare = PrepareOptions(videos="a", images=["b", Path("c")], out="d")  # type: ignore[arg-type,list-item]
    assert (prepare.videos, prepare.images, prepare.out) == ((Path("a"),), (Path("b"), Path("c")), Path("d"))
    probe = ProbeOptions(checkpoint=("runs/a",), videos=("a",), split="folders", out="b")  # type: ignore[arg-type]
    assert probe.train_list is None
    assert probe.out == Path("b")


@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [
        ("frames", 1.5, "int | None"),
        ("frames", "4", "int | None"),
        ("seed", True, "int"),
        ("steps", None, "int"),
        ("guidance", "2", "float"),
        ("cache", "no", "bool"),
        ("sampler", 5, "str"),
        ("weights", "best", r"Literal\['ema', 'raw'\]"),
        ("precision", 32, r"Literal\['auto', '32', 'bf16'\]"),
        ("formats", "mp4", r".*Sequence\[.*\] \| None"),
        ("context", 5, r".*Sequence\[str\].*"),
        ("out", 5, r".*Path.*"),
    ],
)
def test_a_value_of_another_type_is_refused(option: str, value: Any, kind: str) -> None:
    with pytest.raises(InputError, match=f"--{option} is {value!r}; it must be of type {kind}\\."):
        SampleOptions(checkpoint="runs/a", **{option: value})


def test_integers_are_numbers_and_so_are_those_of_numpy() -> None:
    values: dict[str, Any] = {"guidance": 2, "frames": np.int64(4), "start": np.float32(0.5), "window": None}
    assert SampleOptions(checkpoint="runs/a", context="a.mp4", **values).frames == 4  # type: ignore[arg-type]
