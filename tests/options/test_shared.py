"""Conversion of paths and single items in the records of options, and the types of their values."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpdit_lightning.errors import InputError
from gpdit_lightning.options.ablate import AblateOptions
from gpdit_lightning.options.estimate import EstimateOptions
from gpdit_lightning.options.evaluate import EvaluateOptions
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
        ("guidance_levels", "ab", r"tuple\[float, float\]"),
        ("guidance_levels", (0.0, 0.5, 1.0), r"tuple\[float, float\]"),
    ],
)
def test_a_value_of_another_type_is_refused(option: str, value: Any, kind: str) -> None:
    with pytest.raises(InputError, match=f"--{option} is {re.escape(repr(value))}; it must be of type {kind}\\."):
        SampleOptions(checkpoint="runs/a", **{option: value})


def test_a_value_in_the_place_of_a_mapping_or_a_record_is_refused() -> None:
    with pytest.raises(InputError, match=r"--arms is 'x'; it must be of type .*Mapping"):
        AblateOptions(config="gpdit:tiny", arms="x", out=Path("a"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"--overrides is None; it must be of type .*Mapping"):
        EstimateOptions(config="gpdit:tiny", overrides=None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"--video_network is 'x'; it must be of type .*NetworkOptions"):
        EvaluateOptions(checkpoint="a", videos="b", video_network="x", out=Path("c"))  # type: ignore[arg-type]


def test_integers_are_numbers_and_so_are_those_of_numpy() -> None:
    values: dict[str, Any] = {"guidance": 2, "frames": np.int64(4), "start": np.float32(0.5), "window": None}
    assert SampleOptions(checkpoint="runs/a", context="a.mp4", **values).frames == 4  # type: ignore[arg-type]
