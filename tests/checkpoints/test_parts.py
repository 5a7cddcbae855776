"""Checkpoints in parts: any distribution of the elements over ranks has the content of one file, or is refused."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor
from torch.distributed import checkpoint as dcp

from benchmarks.fuzz.parts import content_of_rank, write_parts
from gpdit_lightning.checkpoints.content import read_content
from gpdit_lightning.checkpoints.distributed import BackgroundTask, as_bytes, save_parts
from gpdit_lightning.checkpoints.files import (
    checkpoint_path,
    damage_of,
    find_checkpoint,
    last_checkpoint,
    publish_checkpoint,
)
from gpdit_lightning.checkpoints.io import FolderCheckpointIO
from gpdit_lightning.checkpoints.parts import OFFSETS, part_name, places, take_slices
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import partial_path
from gpdit_lightning.tensor_files import TensorOnDisk, read_into

SHAPES = {"backbone.a": (7, 5), "backbone.b": (3,), "backbone.c": (2, 3, 4)}
CUTS = {  # the ends of the ranks' shares of all elements, flattened and in order
    "one": [1.0],
    "halves": [0.5, 1.0],
    "uneven": [0.01, 0.3, 0.31, 1.0],
    "an empty rank": [0.4, 0.4, 1.0],
}


def whole_content(step: int = 3) -> dict[str, Any]:
    """Return a small checkpoint with tensors of two types."""
    generator = torch.Generator().manual_seed(step)
    weights, average, state = (
        {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for _ in range(3)
    )
    moments = {
        number: {"step": torch.tensor(3.0), "exp_avg": values, "exp_avg_sq": values.square().bfloat16()}
        for number, values in enumerate(state.values())
    }
    return {
        "global_step": step,
        "state_dict": weights | {"scale": torch.tensor([2.0])},
        "gpdit": {"stage": "MixedStage"},
        "LatentDataModule": {"order": {}},
        "ema": {"weights": average, "updates": 2},
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 0.1, "params": [0, 1, 2]}]}],
    }


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, Mapping):
        assert one.keys() == other.keys()
        for name in one:
            assert_same(one[name], other[name])
    elif isinstance(one, list):
        for mine, theirs in zip(one, other, strict=True):
            assert_same(mine, theirs)
    else:
        assert one == other


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_parts_of_any_ranks_have_the_content_of_one_file(cuts: list[float], tmp_path: Path) -> None:
    content = whole_content()
    FolderCheckpointIO().save_checkpoint(content, tmp_path / "whole")
    parts = write_parts(tmp_path / "parts", content, cuts)
    assert_same(read_content(parts), read_content(tmp_path / "whole"))
    lazy, expected = read_content(parts, lazily=True), read_content(tmp_path / "whole")
    for stored, place in zip(places(lazy), places(expected), strict=True):
        assert isinstance(stored.value, TensorOnDisk)
        values = place.value.flatten()
        for start in range(0, values.numel() + 1, 3):
            for size in {0, 1, values.numel() - start}:
                if start + size <= values.numel():
                    assert torch.equal(stored.value.read_range(start, size), values[start : start + size])


@pytest.mark.parametrize("in_parts", [False, True])
def test_only_the_bytes_of_a_range_are_read(in_parts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, folder = whole_content(), tmp_path / "written"
    if in_parts:
        write_parts(folder, content, CUTS["halves"])
    else:
        FolderCheckpointIO().save_checkpoint(content, folder)
    stored = read_content(folder, lazily=True)["ema"]["weights"]["backbone.a"]
    counts: list[int] = []

    def counting(buffer: memoryview, *place: int) -> None:
        counts.append(len(buffer))
        read_into(buffer, *place)

    monkeypatch.setattr("gpdit_lightning.tensor_files.read_into", counting)
    assert torch.equal(stored.read_range(10, 20), content["ema"]["weights"]["backbone.a"].flatten()[10:30])
    assert sum(counts) == 20 * 4


def test_ranges_of_a_tensor_that_is_not_contiguous(tmp_path: Path) -> None:
    content = whole_content()
    content["state_dict"]["backbone.turned"] = torch.arange(12.0).view(3, 4).T
    content.pop("ema")
    FolderCheckpointIO().save_checkpoint(content, tmp_path / "whole")
    for name, stored in read_content(tmp_path / "whole", lazily=True)["state_dict"].items():
        values = content["state_dict"][name].flatten()
        assert torch.equal(stored.read_range(1, values.numel() - 1), values[1:])


def test_torchs_reader_opens_the_parts(tmp_path: Path) -> None:
    """They are in the format of torch.distributed.checkpoint for safetensors."""
    content = whole_content()
    folder = write_parts(tmp_path / "parts", content, CUTS["uneven"])
    loaded = {name: torch.empty(math.prod(shape)) for name, shape in SHAPES.items()}
    state = {f"ema.weights.{name}": values for name, values in loaded.items()}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    for name, values in loaded.items():
        assert torch.equal(values.view(SHAPES[name]), content["ema"]["weights"][name])


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def move_offset(header: dict[str, Any]) -> None:
    offsets = json.loads(header["__metadata__"][OFFSETS])
    offsets["state_dict.backbone.a"]["saved_offsets"] = [16]
    header["__metadata__"][OFFSETS] = json.dumps(offsets)


def rename(header: dict[str, Any]) -> None:
    header["__metadata__"][OFFSETS] = header["__metadata__"][OFFSETS].replace("state_dict.backbone.a", "other")
    header["other"] = header.pop("state_dict.backbone.a")


LAST = part_name(1, 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / LAST).unlink(), f"lacks {LAST}"),
        (lambda folder: (folder / LAST).rename(folder / part_name(2, 3)), f"lacks {part_name(0, 3)}"),
        (lambda folder: shutil.copy(folder / LAST, folder / part_name(0, 1)), f"lacks {part_name(0, 2)}"),
        (lambda folder: os.truncate(folder / LAST, 900), "is not a complete safetensors file"),
        (lambda folder: edit_header(folder / LAST, move_offset), "has a slice from element 16 on, not from 17 on"),
        (lambda folder: edit_header(folder / LAST, rename), "its slices have 17 of 35 elements"),
        (lambda folder: edit_header(folder / LAST, lambda header: header.pop("__metadata__")), "the offsets of"),
        (lambda folder: [path.unlink() for path in folder.glob("part-*")], "its slices have 0 of"),
        (lambda folder: (folder / "training.ckpt").unlink(), "is not a complete checkpoint"),
    ],
)
def test_parts_that_are_missing_or_do_not_fit_are_refused(
    damage: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    """Also where there is no mark, as in a copy without it."""
    folder = write_parts(tmp_path / "parts", whole_content(), CUTS["halves"])
    damage(folder)
    with pytest.raises(InputError, match=message):
        read_content(folder)


# All ranks together, and in the background


@pytest.fixture
def group() -> Iterator[torch.distributed.ProcessGroup]:
    """A process group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_a_checkpoint_is_published_with_the_hashes_of_its_parts(
    group: torch.distributed.ProcessGroup, tmp_path: Path
) -> None:
    path, content = checkpoint_path(tmp_path, 3), content_of_rank(whole_content(), [1.0], 0)
    slices = take_slices(content)
    save_parts(partial_path(path), as_bytes(content), slices, group, lambda files: publish_checkpoint(path, files))
    assert damage_of(path, verify=True) == ""
    assert last_checkpoint(tmp_path, verify=True) == path
    assert_same(read_content(find_checkpoint(tmp_path, verify=True))["state_dict"], whole_content()["state_dict"])
    data = bytearray((path / part_name(0, 1)).read_bytes())
    data[-1] ^= 1
    (path / part_name(0, 1)).write_bytes(data)
    assert "part-00001-of-00001.safetensors has another sha256" in damage_of(path, verify=True)


def test_an_error_in_the_background_is_kept_until_it_is_waited_for(
    group: torch.distributed.ProcessGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    path, content = checkpoint_path(tmp_path, 3), content_of_rank(whole_content(), [1.0], 0)
    slices, task = take_slices(content), BackgroundTask()
    monkeypatch.setattr("gpdit_lightning.checkpoints.distributed.write_part", full)
    task.start(lambda: save_parts(partial_path(path), as_bytes(content), slices, group, full))
    task.join()
    assert task.has_failed
    with pytest.raises(OSError, match="No space left on device"):
        task.wait()
    assert not task.has_failed
    assert not partial_path(path).exists()
    task.start(lambda: None)
    task.wait()
