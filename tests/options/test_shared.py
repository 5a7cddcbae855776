"""Conversion of paths and single items in the records of options."""

from pathlib import Path

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
