"""TorchScripts that state other bytes than they have are refused before torch reads them."""

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation import torchscript
from gpdit_lightning.evaluation.torchscript import load_script
from tests.evaluation.scripted import ScriptedInception, saved

Damage = Callable[[str, bytes], bytes]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A TorchScript with a weight (4, 6) and a bias (4,), both float32."""
    return Path(saved(ScriptedInception(), tmp_path).path or "")


def replaced(old: bytes, new: bytes) -> Damage:
    def damage(name: str, content: bytes) -> bytes:
        if not name.endswith("/data.pkl"):
            return content
        assert old in content
        return content.replace(old, new)

    return damage


def rewritten(script: Path, damage: Damage, compression: int = zipfile.ZIP_STORED) -> Path:
    """Return a copy of an archive with damaged parts."""
    copy = script.with_name("copy.pt")
    with zipfile.ZipFile(script) as archive, zipfile.ZipFile(copy, "w") as written:
        for part in archive.infolist():
            method = part.compress_type if "/code/" in part.filename else compression
            written.writestr(part.filename, damage(part.filename, archive.read(part)), compress_type=method)
    return copy


def unchanged(_: str, content: bytes) -> bytes:
    return content


def test_an_archive_that_is_written_again_loads(script: Path) -> None:
    loaded, interface = load_script("image", rewritten(script, unchanged), "Inception")
    original, _ = load_script("image", script, "Inception")
    assert interface == "Inception"
    for name, value in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_traced_modules_and_extra_files_load(tmp_path: Path) -> None:
    """A traced module has another pickle, whose tensors torch does not write."""
    traced = torch.jit.trace(torch.nn.Linear(6, 4), torch.zeros(2, 6))
    path = tmp_path / "traced.pt"
    torch.jit.save(traced, str(path), _extra_files={"model.json": b"{}", "a.pkl": b"no pickle"})
    assert load_script("image", path, "one input")[1] == "one input"


def test_parts_in_upper_case_are_checked(script: Path) -> None:
    """torch finds the parts of an archive by their names in upper or lower case."""

    def upper(old: str, damage: Damage) -> Path:
        copy = script.with_name("upper.pt")
        with zipfile.ZipFile(rewritten(script, damage)) as archive, zipfile.ZipFile(copy, "w") as written:
            for part in archive.infolist():
                written.writestr(part.filename.replace(old, old.upper()), archive.read(part))
        return copy

    def with_operation(name: str, content: bytes) -> bytes:
        return content + b"# torch.save" if name.endswith(".py") else content

    with pytest.raises(InputError, match=r"the operation torch\.save"):
        load_script("image", upper("/code/", with_operation), "Inception")
    with pytest.raises(InputError, match="DATA/0 of 261120 bytes"):
        load_script("image", upper("data.pkl", replaced(b"K\x18t", b"M\x00\xfft")), "Inception")


# The opcodes BININT1 (K) and BININT2 (M) before the closing tuple (t) are the number of elements.
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (replaced(b"K\x18t", b"M\x00\xfft"), r"has a tensor \S+/data/0 of 261120 bytes, of which 96 are present"),
        (replaced(b"FloatStorage", b"DoubleStorage"), "data/0 of 192 bytes, of which 96 are present"),
        (replaced(b"FloatStorage", b"OtherStorage"), "of 24 elements of type torch OtherStorage"),
        (replaced(b"K\x18t", b"J" + struct.pack("<i", -1) + b"t"), "of -1 elements"),
        (replaced(b"K\x18t", b"K\x18K\x18t"), "a tensor in ScriptedInception/data.pkl that torch.jit.save does not"),
        (replaced(b"K\x18t", b"K\x180K\x18t"), "a tensor in ScriptedInception/data.pkl that torch.jit.save does not"),
        (replaced(b"cpu", b"cpu" * 2**20), "is not a TorchScript"),
    ],
    ids=["elements", "type", "unknown type", "negative", "surplus value", "popped value", "cut text"],
)
def test_tensors_that_exceed_their_bytes_are_refused(script: Path, damage: Damage, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_script("image", rewritten(script, damage), "Inception")


def test_a_tensor_that_is_named_many_times_is_refused(script: Path) -> None:
    """torch reads the bytes again for each name, so that a short pickle would take any amount of memory."""
    with zipfile.ZipFile(script) as archive:
        pickled = archive.read("ScriptedInception/data.pkl")
    start = pickled.index(b"(X\x07\x00\x00\x00storage")
    name = pickled[start : pickled.index(b"Q", start) + 1]
    with pytest.raises(InputError, match=r"has tensors of \d+ bytes, more than its \d+"):
        load_script("image", rewritten(script, replaced(name, name * 2000)), "Inception")


def test_compressed_tensors_and_code_that_unpacks_to_much_are_refused(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def zeros(name: str, content: bytes) -> bytes:
        return bytes(2**20) if name.endswith("/data/0") else content

    with pytest.raises(InputError, match="has compressed tensors"):
        load_script("image", rewritten(script, zeros, zipfile.ZIP_DEFLATED), "Inception")
    monkeypatch.setattr(torchscript, "MAX_CODE_BYTES", 10)
    with pytest.raises(InputError, match="bytes of code, more than 10"):
        load_script("image", script, "Inception")


def test_archives_that_torch_may_read_otherwise_are_refused(script: Path) -> None:
    content = script.read_bytes()
    script.write_bytes(b"before" + content)
    with pytest.raises(InputError, match=r"is an archive that torch\.jit\.save does not write"):
        load_script("image", script, "Inception")
    script.write_bytes(content)
    with zipfile.ZipFile(script, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("ScriptedInception/data/0", bytes(96))
    with pytest.raises(InputError, match=r"is an archive that torch\.jit\.save does not write"):
        load_script("image", script, "Inception")
