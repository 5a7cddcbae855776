"""Damage of the headers of binary formats, so that the rest of the file stays as it is."""

import io
import json
import random
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

from benchmarks.fuzz.damage import Damage
from benchmarks.fuzz.values import STRANGE_VALUES
from gpdit_lightning.checkpoints.parts import OFFSETS, OFFSETS_OF_SLICE

SIZES = (0, 1, 2**15, 65535, 65536, 2**24, 2**30, 2**31 - 1, 2**31, 2**32 - 1)
ATOM = re.compile(
    rb"mvhd|tkhd|mdhd|hdlr|stsd|stts|stss|ctts|stsc|stsz|stco|co64|elst|avc1|avcC|moov|trak|mdat|ftyp|minf|stbl|vmhd|edts"
)
STRANGE_NAMES = (
    "../../outside",
    "/tmp/outside",
    "",
    "a/b.latent.npy",
    "x" * 200,
    "a.b.c",
    "\udce9.json",
    "000000.json",
)

OTHER_PARTS = tuple(f"part-{number}.safetensors" for number in ("00003-of-00003", "00003-of-00002", "00001-of-00001"))


def damage_npy(path: Path, siblings: Sequence[Path], numbers: random.Random) -> Damage:
    """Damage a byte index: its header, or the order and the values of its rows."""
    rows = np.load(path)
    kind = numbers.choice(
        ("reordered", "shifted", "value", "column", "fewer", "more", "type", "header", "order", "pickle")
    )
    if kind == "reordered":
        rows = rows[numbers.sample(range(len(rows)), len(rows))]
    elif kind == "shifted":
        rows = np.roll(rows, numbers.choice((-1, 1)), axis=numbers.choice((0, 1)))
    elif kind == "value":
        value = numbers.choice((-1, 0, 2**40, 2**62, -(2**63), 512, int(rows.flat[0]) + 1))
        rows.flat[numbers.randrange(rows.size)] = value
    elif kind == "column":
        rows[:, numbers.randrange(rows.shape[1])] += numbers.choice((-512, 512, 1024, 1, 2**50))
    elif kind == "fewer":
        rows = rows[:-1]
    elif kind == "more":
        rows = np.concatenate((rows, rows))
    elif kind == "type":
        rows = rows.astype(numbers.choice(("float64", "int32", ">i8", "uint8", "complex64")))
    elif kind == "order":
        rows = np.asfortranarray(rows)
    _write_npy(path, rows, kind, numbers)
    return Damage(f"{kind}: rows of {path.name}", (path,))


def _write_npy(path: Path, rows: np.ndarray, kind: str, numbers: random.Random) -> None:
    if kind == "pickle":
        np.save(path, np.array([{"a": 1}] * len(rows), dtype=object), allow_pickle=True)
        return
    np.save(path, rows)
    if kind == "header":
        content = path.read_bytes()
        shapes = ("(1000000000, 7)", "(99999999999999999999, 7)", "(-1, 7)", "()", "(2, 3, 4)", "('a', 7)", "(2.5, 7)")
        new = f"'shape': {numbers.choice(shapes)}, }}".encode()
        header = re.sub(rb"'shape': .*?\}", new, content[:128]).rstrip(b" \n")[10:]
        path.write_bytes(content[:8] + struct.pack("<H", 118) + header.ljust(117) + b"\n" + content[128:])


def damage_tar(path: Path, siblings: Sequence[Path], numbers: random.Random) -> Damage:
    """Damage the members of a tar, with valid checksums of its headers."""
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member)) for member in tar.getmembers()]
        contents = [(member, file.read() if file else b"") for member, file in members]
    kind = numbers.choice(
        ("reordered", "repeated", "renamed", "exchanged", "link", "removed", "kept", "replaced", "size")
    )
    place = numbers.randrange(len(contents))
    member, content = contents[place]
    if kind == "reordered":
        numbers.shuffle(contents)
    elif kind == "repeated":
        contents.insert(place, (member, content))
    elif kind == "renamed":
        member.name = numbers.choice(STRANGE_NAMES)
    elif kind == "exchanged":  # names of two members
        other = numbers.choice(contents)[0]
        member.name, other.name = other.name, member.name
    elif kind == "link":
        member.type, member.linkname, member.size = numbers.choice((b"1", b"2", b"6", b"5")), "/etc/passwd", 0
    elif kind == "removed":
        del contents[place]
    elif kind == "kept":
        contents = [contents[place]]
    elif kind == "replaced":
        contents[place] = (member, numbers.choice((b"", b"x", content * 3, json.dumps([1]).encode(), b"\xff" * 200)))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member, content in contents:
            member.size = len(content) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(content))
    damaged = bytearray(buffer.getvalue())
    if kind == "size":
        _set_tar_size(damaged, numbers)
    path.write_bytes(damaged)
    return Damage(f"{kind}: members of {path.name}", (path,))


def _set_tar_size(tar: bytearray, numbers: random.Random) -> None:
    """Set the size in the first header, with a valid checksum."""
    tar[124:136] = numbers.choice((b"77777777777\0", b"\x80" + b"\0" * 3 + b"\x7f" * 8, b"\xff" * 12, b"-0000000001\0"))
    tar[148:156] = b" " * 8
    tar[148:156] = b"%06o\0 " % sum(tar[:512])


def damage_safetensors(path: Path, siblings: Sequence[Path], numbers: random.Random) -> Damage:
    """Damage the header of a safetensors file, or its tensors with a valid header."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    kind = numbers.choice(
        ("length", "json", "entry", "nan", "shape", "renamed", "removed", "type", "empty", "metadata")
    )
    if kind == "length":
        length = numbers.choice((0, 1, length - 1, length + 1, len(content), 10**8, 2**40, 2**63, 2**64 - 1))
        path.write_bytes(struct.pack("<Q", length) + content[8:])
    elif kind in ("json", "entry", "metadata"):
        header = json.loads(content[8 : 8 + length])
        text = json.dumps(_damaged_header(header, kind, numbers))
        if kind == "json":
            text = numbers.choice(("[" * 100_000, "{}", "[]", "null", text[:-1], text.replace(":", ": NaN,", 1)))
        path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + content[8 + length :])
    else:
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
        path.write_bytes(_with_metadata(save(_damaged_tensors(_tensors(path), kind, numbers)), metadata))
    return Damage(f"{kind}: tensors of {path.name}", (path,))


def _with_metadata(content: bytes, metadata: dict[str, str]) -> bytes:
    """Return a safetensors file with metadata, in an order that does not vary, unlike that of the library."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length]) | {"__metadata__": dict(sorted(metadata.items()))}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def damage_part(path: Path, siblings: Sequence[Path], numbers: random.Random) -> Damage:
    """Damage a part of a checkpoint: as any safetensors file, the places of its slices, or which parts there are."""
    kinds = ("tensors", "tensors", "offsets", "step", "ranks", "extra")
    kind = numbers.choice(kinds)
    if kind == "tensors":
        return damage_safetensors(path, siblings, numbers)
    if kind == "offsets":
        path.write_bytes(_with_damaged_offsets(path.read_bytes(), numbers))
    elif kind == "step":  # the part of another checkpoint of the run, which has the same slices
        path.write_bytes((path.parents[1] / "step-1.ckpt" / path.name).read_bytes())
    elif kind == "ranks":
        path.rename(path.with_name(numbers.choice(OTHER_PARTS)))
    else:
        path.with_name(numbers.choice(OTHER_PARTS)).write_bytes(path.read_bytes())
    return Damage(f"{kind}: slices of {path.name}", (path,))


def _with_damaged_offsets(content: bytes, numbers: random.Random) -> bytes:
    """Change where the slices of a part begin in their tensors."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    offsets = json.loads(header["__metadata__"][OFFSETS])
    name = numbers.choice(list(offsets))
    (start,) = offsets[name][OFFSETS_OF_SLICE]
    value = numbers.choice((start + 1, -1, 2**62, 2**70, float(start), True, str(start), None))
    values: tuple[Any, ...] = ([value], [], [start, 0], start, {})
    offsets[name] = numbers.choice(({OFFSETS_OF_SLICE: numbers.choice(values)}, {}, [start], None))
    header["__metadata__"][OFFSETS] = numbers.choice((json.dumps(offsets), json.dumps(offsets), "", "[]", "[" * 9000))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def _damaged_header(header: dict[str, Any], kind: str, numbers: random.Random) -> dict[str, Any]:
    if kind == "metadata":
        return header | {
            "__metadata__": numbers.choice(({"a": 1}, [], {"format": "x" * 100_000}, None, {"format": "tf"}))
        }
    entry = header[numbers.choice([name for name in header if name != "__metadata__"])]
    field = numbers.choice(("shape", "data_offsets", "dtype"))
    values: dict[str, tuple[Any, ...]] = {
        "shape": ([2**62, 4], [], [-1], [0], [2**31, 2**31], [1] * 1000, entry["shape"][::-1]),
        "data_offsets": ([0, 2**60], [0, 0], [8, 4], [-4, 0], [1], entry["data_offsets"][::-1]),
        "dtype": ("F64", "BOOL", "F16", "C64", "X", 1, None),
    }
    entry[field] = numbers.choice(values[field])
    return header


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def _damaged_tensors(tensors: dict[str, torch.Tensor], kind: str, numbers: random.Random) -> dict[str, torch.Tensor]:
    """Damage one tensor of a state dict."""
    name = numbers.choice([name for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)])
    tensor = tensors[name]
    if kind == "nan":
        if tensor.is_floating_point() and tensor.numel():
            values = (float("nan"), float("inf"), -float("inf"), 1e38)
            tensor.view(-1)[numbers.randrange(tensor.numel())] = numbers.choice(values)
    elif kind == "shape":
        tensors[name] = numbers.choice((tensor[None], tensor.flatten(), tensor[:0], torch.zeros(())))
    elif kind == "renamed":
        tensors[numbers.choice((f"{name}x", "", "../x", "a" * 5000))] = tensors.pop(name)
    elif kind == "removed":
        del tensors[name]
    elif kind == "type":
        types = (torch.float64, torch.int32, torch.bool, torch.float16, torch.complex64, torch.uint8)
        tensors[name] = tensor.to(numbers.choice(types))
    elif kind == "empty":
        tensors.clear()
    return tensors


def damage_pickle(path: Path, siblings: Sequence[Path], numbers: random.Random) -> Damage:
    """Damage a file of `torch.save`: its objects, its tensors, or the members of its archive."""
    kind = numbers.choice(("object", "object", "object", "nan", "shape", "removed", "type", "archive", "global"))
    if kind == "archive":
        return _damage_archive(path, numbers)
    content = torch.load(path, map_location="cpu", weights_only=True)
    description = kind
    if kind == "global":
        content["gpdit"]["origin"] = Path("x")  # an object of a class that may not be unpickled
    elif kind == "object":
        places = list(_places(content))
        container, key = numbers.choice([place for place in places if place[0] is not content.get("state_dict")])
        value = numbers.choice(STRANGE_VALUES)
        if numbers.random() < 0.3:
            del container[key]
            description = f"{key} was removed"
        else:
            description = f"{key} was {container[key]!r:.40} and is {value!r:.40}"
            container[key] = value
    else:
        _damaged_tensors(content["state_dict"], kind, numbers)
    torch.save(content, path)
    return Damage(f"{description}: content of {path.name}", (path,))


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Return every (dictionary or list, key or index) of a tree."""
    items = list(tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ())
    return [(tree, key) for key, _ in items] + [place for _, value in items for place in _places(value)]


def _damage_archive(path: Path, numbers: random.Random) -> Damage:
    """Replace, remove or repeat a member of a zip file."""
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    place = numbers.randrange(len(members))
    name, content = members[place]
    kind = numbers.choice(("removed", "emptied", "repeated", "outside", "random", "compressed bomb"))
    if kind == "removed":
        del members[place]
    elif kind == "repeated":
        members.insert(place, (name, content))
    else:
        bomb = bytes(2**27) if kind == "compressed bomb" else b""
        new = {"emptied": b"", "random": numbers.randbytes(len(content)), "compressed bomb": bomb}.get(kind, content)
        members[place] = ("../../outside" if kind == "outside" else name, new)
    compression = zipfile.ZIP_DEFLATED if kind == "compressed bomb" else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return Damage(f"{kind}: {name} in the archive {path.name}", (path,))


def damage_media(path: Path, siblings: Sequence[Path], numbers: random.Random) -> Damage:
    """Damage the header of an image or a video: dimensions, counts, sizes of parts."""
    content = path.read_bytes()
    if content.startswith(b"\x89PNG"):
        damaged, description = _damaged_png(content, numbers)
    elif content.startswith(b"\xff\xd8"):
        damaged, description = _damaged_jpeg(content, numbers)
    elif content.startswith((b"GIF8", b"BM", b"II*\0")):
        damaged, description = _with_field(content, numbers.randrange(2, min(60, len(content) - 4)), numbers)
    elif content[4:8] == b"ftyp":
        places = [match.start() for match in ATOM.finditer(content)]
        damaged, description = _with_field(content, numbers.choice(places) + 4 * numbers.randrange(-1, 9), numbers)
    elif content.startswith(b"\x1aE\xdf\xa3"):
        place = numbers.randrange(4, min(600, len(content) - 8))
        huge = numbers.choice(
            (b"\x01\xff\xff\xff\xff\xff\xff\xfe", b"\x01" + b"\xff" * 7, b"\x10\x00\x00\x00", b"\x40\x00")
        )
        damaged, description = content[:place] + huge + content[place + len(huge) :], f"size at {place}"
    else:
        damaged, description = _with_field(content, numbers.randrange(4, min(300, len(content) - 4)), numbers)
    path.write_bytes(damaged)
    return Damage(f"{description}: header of {path.name}", (path,))


def _with_field(content: bytes, place: int, numbers: random.Random) -> tuple[bytes, str]:
    """Overwrite a 2- or 4-byte field, in either byte order."""
    place, value = max(0, min(place, len(content) - 4)), numbers.choice(SIZES)
    field = numbers.choice((struct.pack("<I", value), struct.pack(">I", value), struct.pack("<H", value & 0xFFFF)))
    return content[:place] + field + content[place + len(field) :], f"field at {place} is {field.hex()}"


def _chunk(name: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG with a valid checksum."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


@cache
def _bomb() -> bytes:
    """Return 128 MiB of zeros, packed."""
    return zlib.compress(bytes(2**27), 9)


def _damaged_png(content: bytes, numbers: random.Random) -> tuple[bytes, str]:
    """Damage a PNG: dimensions, or a chunk that unpacks to much data; all checksums are valid."""
    header = bytearray(content[16:29])
    kind = numbers.choice(("width", "height", "both", "type", "profile", "text", "exif", "frames", "data"))
    rest, bomb = content[33:], _bomb()
    if kind == "data":
        rest = _chunk(b"IDAT", bomb) + _chunk(b"IEND", b"")
    elif kind in ("profile", "text", "exif", "frames"):
        chunks = {
            "profile": _chunk(b"iCCP", b"icc\0\0" + bomb),
            "text": _chunk(b"zTXt", b"a\0\0" + bomb) * 20,
            "exif": _chunk(b"eXIf", b"II*\0\x08\0\0\0" + b"\xff" * 2 + numbers.randbytes(4000)),
            "frames": _chunk(b"acTL", struct.pack(">II", numbers.choice(SIZES), 0)),
        }
        rest = chunks[kind] + rest
    elif kind == "type":
        header[8:10] = bytes((numbers.choice((1, 2, 4, 8, 16, 32)), numbers.choice((0, 2, 3, 4, 6, 7))))
    else:
        size = struct.pack(">I", numbers.choice(SIZES))
        header[0:4] = size if kind in ("width", "both") else header[0:4]
        header[4:8] = size if kind in ("height", "both") else header[4:8]
    return content[:8] + _chunk(b"IHDR", bytes(header)) + rest, f"{kind} of a PNG"


def _damaged_jpeg(content: bytes, numbers: random.Random) -> tuple[bytes, str]:
    """Damage a JPEG: dimensions, number of components, EXIF data or colour profile."""
    kind = numbers.choice(("size", "exif", "profile", "components", "progressive"))
    frame = re.search(rb"\xff[\xc0\xc1\xc2]", content)
    start = frame.start() if frame else 2
    if kind == "size":
        side = struct.pack(">HH", numbers.choice((0, 1, 65500, 65535)), numbers.choice((0, 1, 65500, 65535)))
        return content[: start + 5] + side + content[start + 9 :], "dimensions of a JPEG"
    if kind in ("components", "progressive"):
        place, value = (start + 9, numbers.randrange(256)) if kind == "components" else (start + 1, 0xC2)
        return content[:place] + bytes((value,)) + content[place + 1 :], f"{kind} of a JPEG"
    if kind == "exif":
        entry = struct.pack("<HHII", 0x0112, numbers.randrange(16), numbers.choice(SIZES), numbers.choice(SIZES))
        body = b"Exif\0\0II*\0" + struct.pack("<IH", 8, numbers.choice((1, 65535))) + entry + bytes(4)
        return content[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + content[2:], "EXIF data of a JPEG"
    profile = b"ICC_PROFILE\0" + bytes((numbers.randrange(256), numbers.randrange(256))) + numbers.randbytes(60_000)
    return content[:2] + (b"\xff\xe2" + struct.pack(">H", len(profile) + 2) + profile) * 20 + content[
        2:
    ], "profile of a JPEG"
