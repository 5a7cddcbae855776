"""Loading of TorchScripts: programs of tensor operations, which may come from others.

Operations that open files or connect to other machines are refused before a file is loaded. So are files that would
take more memory than their size, and tensors larger than their bytes: torch compares neither, and would read other
memory of the process. What a program allocates while it runs is not bounded.

A TorchScript is a zip archive of code, of the pickles `data.pkl` and `constants.pkl`, and of the bytes of each tensor
(`data/0`, `constants/0`, ...), which the pickles name by a tuple ("storage", type, key, device, number of elements).
The pickles are read as a sequence of opcodes and never executed here. torch finds these parts by their names in upper
or lower case, and reads no others, such as `extra/NAME`.
"""

import pickletools
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from gpdit_lightning.evaluation.network_files import network_error
from gpdit_lightning.regular_files import open_regular
from gpdit_lightning.retries import transient_error

Interface = Literal["I3D", "Inception", "one input"]
"""Kind of network in a TorchScript, recognised by the arguments of its forward."""

# Operations on files and other machines, those of libraries besides torch, as the code names them, and the method that
# loading runs, in which nothing can interrupt a loop.
FORBIDDEN = re.compile(
    r"\b(?:torch|ops\.aten|ops\.prim)\.(?:save|from_file|PythonOp|IgnoredPythonOp)\b|\brpc_(?:async|remote|sync)\b"
    r"|\b__setstate__\b|\bops\.(?!aten\b|prim\b|quantized\b)\w+\.\w+"
)
PICKLES = ("data.pkl", "constants.pkl")
MAX_CODE_BYTES = 2**24  # of all code in a TorchScript, unpacked
ELEMENT_BYTES = {"Bool": 1, "Byte": 1, "Char": 1, "Short": 2, "Half": 2, "BFloat16": 2, "Int": 4, "Float": 4}
ELEMENT_BYTES |= {"UInt16": 2, "UInt32": 4, "UInt64": 8, "ComplexHalf": 4}
ELEMENT_BYTES |= dict.fromkeys(
    ("Float8_e5m2", "Float8_e4m3fn", "Float8_e5m2fnuz", "Float8_e4m3fnuz", "Float8_e8m0fnu"), 1
)
ELEMENT_BYTES |= {"Long": 8, "Double": 8, "ComplexFloat": 8, "ComplexDouble": 16, "QInt8": 1, "QUInt8": 1, "QInt32": 4}


def load_script(role: str, path: Path, *interfaces: Interface) -> tuple[nn.Module, Interface]:
    """Load a TorchScript in evaluation mode; return it and its interface, one of the expected ones.

    Raises:
        InputError: the file is not a TorchScript, has an operation on files or other machines, states more bytes than
            it has, or has none of these interfaces.
    """
    fault = _fault(role, path)
    if fault:
        raise network_error(role, path, fault)
    try:
        script = torch.jit.load(path, map_location="cpu")
    except (RuntimeError, ValueError):
        raise network_error(role, path, "is not a TorchScript") from None
    schema = getattr(script.forward, "schema", None)
    arguments = [] if schema is None else schema.arguments[1:]
    names = [argument.name for argument in arguments]
    interface: Interface | None = None
    if {"rescale", "resize", "return_features"} <= set(names):
        interface = "I3D"
    elif {"return_features", "no_output_bias"} <= set(names):
        interface = "Inception"
    elif sum(not argument.has_default_value() for argument in arguments) == 1:
        interface = "one input"
    if interface not in interfaces:
        raise network_error(role, path, f"is another network, since its forward takes ({', '.join(names)})")
    return script.eval(), interface


def _fault(role: str, path: Path) -> str:
    """Return why a TorchScript may not be loaded; empty if it may.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            size = file.seek(0, 2)
            return _fault_of_layout(archive, size) or _fault_of_code(archive) or _fault_of_tensors(archive, size)
    except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        known = transient_error(error, path)
        raise known or network_error(role, path, "is not a TorchScript") from None


def _is_code(part: zipfile.ZipInfo) -> bool:
    return "/code/" in part.filename.lower()


def _fault_of_layout(archive: zipfile.ZipFile, size: int) -> str:
    """Return why an archive may be read differently by torch, or unpacks to more than its size; empty if neither."""
    parts = archive.infolist()
    names = [part.filename.lower() for part in parts]
    # With two equal names, a comment, or bytes before the archive, torch may find other parts than Python. The layout
    # before torch 1.4 states its tensors in model.json.
    is_ambiguous = len(set(names)) < len(names) or archive.comment or min(part.header_offset for part in parts)
    if is_ambiguous or any(name.partition("/")[2] == "model.json" for name in names):
        return "is an archive that torch.jit.save does not write"
    code = sum(part.file_size for part in parts if _is_code(part))
    if code > MAX_CODE_BYTES:
        return f"has {code} bytes of code, more than {MAX_CODE_BYTES}"
    if any(part.file_size > part.compress_size for part in parts if not _is_code(part)):
        return "has compressed tensors, which torch.jit.save does not write"
    if sum(part.compress_size for part in parts) > size:
        return f"states more bytes than the {size} that it has"
    return ""


def _fault_of_code(archive: zipfile.ZipFile) -> str:
    """Return which operation of the code is forbidden; empty without any."""
    for part in archive.infolist():
        if _is_code(part) and not part.filename.endswith(".debug_pkl"):
            found = FORBIDDEN.search(archive.read(part).decode("utf-8", errors="replace"))
            if found:
                return f"contains the operation {found[0]}, which no network needs"
    return ""


def _fault_of_tensors(archive: zipfile.ZipFile, size: int) -> str:
    """Return which tensor exceeds its bytes, or that all tensors exceed the file; empty if none does."""
    total, present = 0, {part.filename.lower(): part.file_size for part in archive.infolist()}
    for part in archive.infolist():
        folder, name_in_archive = part.filename[:-4], part.filename.lower().partition("/")[2]
        if name_in_archive not in PICKLES:
            continue
        for storage in _storages(archive.read(part)):
            match storage:
                case ("storage", str(kind), str(key), str(), int(elements)):
                    name = f"{folder}/{key}"
                case _:
                    return f"has a tensor in {part.filename} that torch.jit.save does not write"
            element = ELEMENT_BYTES.get(kind.removeprefix("torch ").removesuffix("Storage"))
            if element is None or elements < 0:
                return f"has a tensor {name} of {elements} elements of type {kind}"
            total += elements * element
            found = present.get(name.lower(), 0)
            if elements * element > found:
                return f"has a tensor {name} of {elements * element} bytes, of which {found} are present"
    return f"has tensors of {total} bytes, more than its {size}" if total > size else ""


def _storages(pickled: bytes) -> Iterator[tuple[Any, ...] | None]:
    """Yield the tuple that names the bytes of each tensor in a pickle; None for one that is not written plainly.

    Of the pickle's stack only the values after the last mark are followed, since torch.jit.save writes a mark, the five
    values and the opcodes TUPLE and BINPERSID in a row. Everything else becomes None.
    """
    memo: dict[Any, Any] = {}
    values: list[Any] = [None]
    named: tuple[Any, ...] | None = None
    for opcode, argument, _ in pickletools.genops(pickled):
        match opcode.name:
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = values[-1] if values else None
                continue
            case "BINPERSID":
                yield named
                values = [None]
            case "MARK":
                values = []
            case "BINGET" | "LONG_BINGET":
                values.append(memo.get(argument))
            case "BINUNICODE" | "SHORT_BINUNICODE" | "GLOBAL" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                values.append(argument)
            case "TUPLE":
                named, values = tuple(values), [None]
                continue
            case _:
                values = [None]
        named = None
