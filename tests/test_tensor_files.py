"""Tensors in files: valid and damaged headers of safetensors, and numbers that are not finite."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpdit_lightning.errors import InputError
from gpdit_lightning.tensor_files import StoredTensor, check_finite, safetensors_header

Header = dict[str, Any]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    numbers = torch.Generator().manual_seed(0)
    tensors = {
        "matrix": torch.randn(3, 4, generator=numbers),
        "vector": torch.randn(5, generator=numbers).bfloat16(),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
        "eight": torch.randn(6, generator=numbers).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "file", {"key": "value"})
    return tmp_path / "file"


def rewrite(path: Path, change: Callable[[Header], Any]) -> None:
    """Replace the header of a file; `change` changes it, or returns the text that replaces it."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    changed = change(header)
    text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def test_tensors_are_those_of_the_library(path: Path) -> None:
    stored, metadata = safetensors_header(path, "cure")
    tensors, expected = {name: tensor.read() for name, tensor in stored.items()}, load_file(path)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(
            tensor.view(torch.uint8) if tensor.ndim else tensor,
            expected[name].view(torch.uint8) if tensor.ndim else expected[name],
        )
    assert metadata == {"key": "value"}


def set_entry(name: str, **values: Any) -> Callable[[Header], None]:
    return lambda header: header[name].update(values)


def exchange(header: Header) -> None:
    header["matrix"]["data_offsets"], header["eight"]["data_offsets"] = (
        header["eight"]["data_offsets"],
        header["matrix"]["data_offsets"],
    )


def repeat(header: Header) -> bytes:
    return (json.dumps(header)[:-1] + f', "matrix": {json.dumps(header["matrix"])}}}').encode()


@pytest.mark.parametrize(
    "change",
    [
        set_entry("matrix", shape=[2**40, 2**40]),
        set_entry("matrix", shape=[2**62, 12]),
        set_entry("matrix", shape=[-3, -4]),
        set_entry("matrix", shape=[3.0, 4.0]),
        set_entry("matrix", shape="34"),
        set_entry("matrix", shape=[1] * 1000 + [12]),
        set_entry("matrix", dtype="F64"),
        set_entry("matrix", dtype="F33"),
        set_entry("matrix", dtype=["F32"]),
        set_entry("matrix", data_offsets=[0, 2**63]),
        set_entry("matrix", data_offsets=[48, 0]),
        set_entry("matrix", data_offsets=[0]),
        set_entry("matrix", more=1),
        exchange,
        repeat,
        lambda header: header.pop("vector"),
        lambda header: header.update(__metadata__={"key": [1]}),
        lambda header: header.update(other=header["matrix"]),
        lambda _: b"[" * 100_000,
        lambda _: b"[]",
        lambda _: b"{",
        lambda _: b'{"a": NaN}',
        lambda _: b'{"\xff": 1}',
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(path: Path, change: Callable[[Header], Any]) -> None:
    rewrite(path, change)
    with pytest.raises(InputError, match=r"file is not a complete safetensors file \(.+\): cure\.$"):
        safetensors_header(path, "cure")


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**60, 2**64 - 1])
def test_the_length_of_the_header_is_bounded_by_the_file(path: Path, length: int) -> None:
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with pytest.raises(InputError, match="not a complete safetensors file"):
        safetensors_header(path, "cure")


def test_what_is_not_a_file_or_ends_early_is_refused(path: Path) -> None:
    tensor = safetensors_header(path, "cure")[0]["matrix"]
    os.truncate(path, tensor.offset + 5)
    with pytest.raises(InputError, match="file changed while it was read"):
        tensor.read()
    path.unlink()
    with pytest.raises(InputError, match=r"file could not be read \(No such file"):
        tensor.read()
    os.mkfifo(path)
    for read in (tensor.read, lambda: safetensors_header(path, "cure")):
        with pytest.raises(InputError, match="file is not a regular file"):
            read()


@pytest.mark.parametrize("in_place", [True, False])
def test_tensors_of_a_file_that_was_changed_after_its_header_was_read_are_refused(path: Path, in_place: bool) -> None:
    """Its hash was compared before, so that weights of another model with the same shapes would be used."""
    tensors = safetensors_header(path, "cure")[0]
    assert tensors["matrix"].read().shape == (3, 4)
    other = path.with_name("other")
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}, other, {"key": "value"})
    if in_place:
        path.write_bytes(other.read_bytes())
    else:
        other.replace(path)
    with pytest.raises(InputError, match="file changed while it was read: wait until the program that writes it"):
        tensors["vector"].read()


@pytest.mark.parametrize(
    ("shape", "strides", "first"), [((10**12,), (0,), 0), ((3,), (2,), 0), ((4,), (1,), 1), ((2, 3), (3, 1), 0)]
)
def test_a_tensor_has_no_more_elements_than_its_storage(
    shape: tuple[int, ...], strides: tuple[int, ...], first: int
) -> None:
    with pytest.raises(InputError, match="has a tensor of shape"):
        StoredTensor(Path("file"), (), 0, 16, torch.float32, shape, strides, first).check_bounds()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_named(dtype: torch.dtype, value: float) -> None:
    tensors: dict[str, Any] = {"good": torch.full((4, 5), -2.0).to(dtype), "count": torch.arange(3), "text": "nan"}
    check_finite(tensors | {"empty": torch.zeros(0)}, "file", "cure")
    bad = torch.ones(4, 5)
    bad[3, 1] = value
    with pytest.raises(InputError, match=r"^file has numbers in bad that are not finite \(NaN or infinity\): cure\.$"):
        check_finite(tensors | {"bad": bad.to(dtype)}, "file", "cure")
