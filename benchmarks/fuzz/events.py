"""Damage of TensorBoard's event files: their records, with valid checksums, and the events in these."""

import random
import struct
from collections.abc import Sequence
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from benchmarks.fuzz.damage import Damage

STEPS = (0, -1, 1, 2**31, 2**62, -(2**63))
VALUES = (float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e38, 1e-45)
TIMES = (0.0, -1e18, 1e300, float("nan"), float("inf"))
TAGS = ("", "loss/train", "train/loss_q1", "x" * 10_000, "\0", "../a", "é\n", "val/\u202e")
LENGTHS = (0, 1, 2**16, 2**16 + 1, 2**31, 2**62, 2**64 - 1)


def damage_events(path: Path, siblings: Sequence[Path], numbers: random.Random) -> Damage:
    """Damage a file: the order of its records, a length, an event, or a value in one."""
    records = _records(path.read_bytes())
    place = numbers.randrange(len(records))
    kind = numbers.choice(
        (
            "step",
            "value",
            "value",
            "time",
            "tag",
            "noise",
            "empty",
            "reordered",
            "repeated",
            "many",
            "removed",
            "length",
        )
    )
    if kind in ("step", "value", "time", "tag"):
        place = numbers.choice([n for n, record in enumerate(records) if Event.FromString(record).summary.value])
        records[place] = _damaged_event(records[place], kind, numbers)
    elif kind == "noise":
        records[place] = numbers.randbytes(numbers.choice((1, 10, 1000, 2**16 + 1)))
    elif kind == "empty":
        records[place] = b""
    elif kind == "reordered":
        numbers.shuffle(records)
    elif kind == "repeated":
        records.insert(place, records[place])
    elif kind == "many":
        records += [records[place]] * 2000
    elif kind == "removed":
        del records[place]
    content = [_packed(record) for record in records]
    if kind == "length":
        content[min(place, len(content) - 1)] = _packed(b"x", numbers.choice(LENGTHS))
    path.write_bytes(b"".join(content))
    return Damage(f"{kind}: events of {path.name}", (path,))


def _damaged_event(content: bytes, kind: str, numbers: random.Random) -> bytes:
    event = Event.FromString(content)
    if kind == "step":
        event.step = numbers.choice(STEPS)
    elif kind == "time":
        event.wall_time = numbers.choice(TIMES)
    elif kind == "tag":
        event.summary.value[0].tag = numbers.choice(TAGS)
    else:
        event.summary.value[0].simple_value = numbers.choice(VALUES)
    return bytes(event.SerializeToString())


def _records(content: bytes) -> list[bytes]:
    """Return the records of an undamaged file."""
    records, place = [], 0
    while place < len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        records.append(content[place + 12 : place + 12 + length])
        place += 16 + length
    return records


def _packed(record: bytes, length: int | None = None) -> bytes:
    """Return a record with its length, or another one, and valid checksums."""
    head = struct.pack("<Q", len(record) if length is None else length)
    checksums = (struct.pack("<I", masked_crc32c(part)) for part in (head, record))
    return head + next(checksums) + record + next(checksums)
