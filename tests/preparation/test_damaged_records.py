"""Damaged records of a preparation are refused or repaired: no sample is doubled or lost."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from benchmarks.fuzz.values import damage_every_field
from gpdit_lightning.codecs.pca import SHIPPED_WEIGHTS
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.shards import ShardReader, index_path
from gpdit_lightning.errors import InputError, ResourceError, TransientError
from gpdit_lightning.media.finding import LeftOut
from gpdit_lightning.preparation import PrepareOptions, prepare
from gpdit_lightning.preparation.inspection import explain
from gpdit_lightning.preparation.record_formats import PartResult, RecordedFile
from gpdit_lightning.retries import explain_write_errors
from gpdit_lightning.schema import CONTENT_HASH
from tests.preparation.earlier_version import remove_hashes
from tests.preparation.test_resume import prepare_until

Attack = Callable[[Path], object]


def sources(folder: Path, part: int = 1) -> Path:
    return folder / "preparation" / f"part-{part:05d}.sources.jsonl"


def result(folder: Path, part: int = 0) -> Path:
    return folder / "preparation" / f"part-{part:05d}.json"


def change_lines(change: Callable[[list[bytes]], list[bytes]]) -> Attack:
    return lambda folder: sources(folder).write_bytes(b"".join(change(sources(folder).read_bytes().splitlines(True))))


def swap(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def tar(folder: Path, number: int = 0) -> Path:
    return sorted(folder.glob("*.tar"))[number]


def end_of_another_preparation(lines: list[bytes]) -> list[bytes]:
    """Return the lines of a list with the same files that belongs to other options."""
    return [*lines[:-1], json.dumps(json.loads(lines[-1]) | {"options": "0" * 64}).encode() + b"\n"]


def swap_shards(folder: Path) -> None:
    swap(tar(folder), tar(folder, 1))
    swap(index_path(tar(folder)), index_path(tar(folder, 1)))


def remove_shards(folder: Path) -> None:
    content = json.loads(result(folder).read_text())
    result(folder).write_text(json.dumps(content | {"shards": []}))


ATTACKS: dict[str, tuple[Attack, str | None]] = {
    "list without its last lines": (change_lines(lambda lines: lines[:-2]), "lacks its last line"),
    "list without its first line": (change_lines(lambda lines: lines[1:]), "was damaged or edited"),
    "a line twice": (change_lines(lambda lines: lines[:1] + lines), "was damaged or edited"),
    "a list of other options": (change_lines(end_of_another_preparation), "was damaged or edited .* '000000"),
    "a changed bit in a list": (lambda folder: flip(sources(folder)), r"sources\.jsonl"),
    "an empty list": (lambda folder: sources(folder).write_bytes(b""), "lacks its last line"),
    "no list": (lambda folder: sources(folder).unlink(), "is missing, though later parts exist"),
    "lists exchanged": (lambda folder: swap(sources(folder, 0), sources(folder)), "was damaged or edited"),
    "deeply nested list": (lambda folder: sources(folder).write_bytes(b"[" * 10**5), "nested too deeply"),
    "changed options": (lambda folder: flip(folder / "preparation" / "options.json"), r"options\.json"),
    "an empty result": (lambda folder: result(folder).write_bytes(b""), None),
    "a changed bit in a result": (lambda folder: flip(result(folder)), None),
    "results exchanged": (lambda folder: swap(result(folder), result(folder, 1)), None),
    "a result without shards": (remove_shards, None),
    "a shard is missing": (lambda folder: tar(folder).unlink(), None),
    "an index is missing": (lambda folder: index_path(tar(folder)).unlink(), r"has no index .*: delete it"),
    "shards exchanged": (swap_shards, "has the sha256 .*, but its manifest records"),
}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> PrepareOptions:
    folder = tmp_path_factory.mktemp("images")
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return PrepareOptions(
        out=tmp_path_factory.mktemp("complete") / "out",
        images=[folder],
        codec="pca",
        image_sizes=["16x16"],
        validation_fraction=0.2,
        shard_size=5,
        part_size=1,
        workers=0,
        device="cpu",
    )


@pytest.fixture(scope="module")
def complete(options: PrepareOptions) -> list[str]:
    prepare(options)
    assert len(list((options.out / "preparation").glob("*.sources.jsonl"))) == 3
    return samples(options.out)


def samples(folder: Path) -> list[str]:
    """Return the split and the source of each sample, sorted."""
    found = []
    for entry in Manifest.load(folder).shards:
        reader = ShardReader(folder, entry)
        found += [f"{entry.split} {reader.read(number)[1]['source']}" for number in range(len(reader))]
    return sorted(found)


@pytest.mark.parametrize("name", ATTACKS)
def test_damaged_records_are_refused_or_repaired(
    options: PrepareOptions, complete: list[str], tmp_path: Path, name: str
) -> None:
    attack, message = ATTACKS[name]
    folder = shutil.copytree(options.out, tmp_path / "out")
    (folder / "manifest.json").unlink()  # of an unfinished preparation, whose last part has no result
    result(folder, 2).unlink()
    attack(folder)
    if message is not None:
        with pytest.raises(InputError, match=message):
            prepare(replace(options, out=folder))
        assert not (folder / "manifest.json").exists()
    else:
        prepare(replace(options, out=folder))
        assert samples(folder) == complete


def test_shards_of_another_preparation_are_refused_in_an_unfinished_part(
    options: PrepareOptions, complete: list[str], tmp_path: Path
) -> None:
    """They have the same names and sources, and another codec: without their result, with it, and with all records."""
    folder, other = replace(options, out=tmp_path / "out"), replace(options, out=tmp_path / "other")
    weights = tmp_path / "codec.safetensors"
    save_file(
        {name: np.ascontiguousarray(values[::-1]) for name, values in load_file(SHIPPED_WEIGHTS).items()}, weights
    )
    prepare(replace(other, codec_source=str(weights)))
    prepare_until(3, folder)
    interrupted = shutil.copytree(folder.out, tmp_path / "interrupted")
    shard = tar(folder.out)
    record = f"preparation/part-{shard.name.split('-')[-2]}.json"
    shards = record.replace(".json", ".shards.json")
    for names, message in (
        ((), f"{shard.name} is not the shard .*delete it and {index_path(shard).name} and run"),
        ((record,), f"{shard.name} is not the shard"),
        ((record, shards), "shards.json belongs to a preparation with other options or another codec"),
    ):
        for name in (shard.name, index_path(shard).name, *names):
            shutil.copy(other.out / name, folder.out / name)
        with pytest.raises(InputError, match=message):
            prepare(folder)
        shutil.rmtree(folder.out)
        shutil.copytree(interrupted, folder.out)
    manifest = prepare(folder)
    assert manifest is not None
    assert manifest.shards == Manifest.load(options.out).shards


def refusals(content: dict[str, Any], read: Callable[[bytes], object]) -> list[str]:
    """Read a record with every field damaged in turn; return the messages. Any other exception fails the test."""
    messages = []
    for damaged in damage_every_field(json.dumps(content).encode()):
        try:
            read(damaged.content)
        except InputError as error:
            messages.append(str(error))
    return messages


def test_every_field_of_the_records_of_a_part_is_checked(options: PrepareOptions, complete: list[str]) -> None:
    shard = Manifest.load(options.out).shards[0]
    left_out = (LeftOut("a.mp4", "too short", retry=True),)
    of_part = PartResult((shard,), {"train": 1, "validation": 0}, ("a",), left_out, left_out, ("b.mp4",))
    of_file = RecordedFile("a.tar", "image", None, 7, "a.tar", "", "name", is_tar=True)
    part = int(shard.path.split("-")[-2])
    messages = refusals(of_part.to_dict(part), lambda text: PartResult.from_dict(json.loads(text), part, "part.json"))
    messages += refusals(json.loads(of_file.to_json()), lambda line: RecordedFile.from_json(line, "part.json"))
    assert len(messages) > 150
    assert all("part.json" in message for message in messages)


def test_every_option_that_a_manifest_records_is_checked_before_it_explains_a_file(
    options: PrepareOptions, complete: list[str], tmp_path: Path
) -> None:
    folder = shutil.copytree(options.out, tmp_path / "out")
    manifest = folder / "manifest.json"
    content = {name: value for name, value in json.loads(manifest.read_text()).items() if name != CONTENT_HASH}

    def explain_file(preparation: bytes) -> None:
        manifest.write_text(json.dumps(content | {"preparation": json.loads(preparation)}))
        explain(Manifest.load(folder), "7.png")

    messages = refusals(content["preparation"], explain_file)
    assert len(messages) > 100
    assert all("manifest.json" in message for message in messages)


@pytest.mark.parametrize("is_refused", [True, False])
def test_records_of_an_earlier_version_are_completed(
    options: PrepareOptions, complete: list[str], tmp_path: Path, is_refused: bool
) -> None:
    """They have no hashes; a list that has lost lines does not fit its result."""
    folder = shutil.copytree(options.out, tmp_path / "out")
    remove_hashes(folder / "preparation")
    (folder / "manifest.json").unlink()
    result(folder, 2).unlink()
    if is_refused:
        change_lines(lambda lines: lines[:-2])(folder)
        with pytest.raises(InputError, match=r"lists 14 files, but .* is the result of 16"):
            prepare(replace(options, out=folder))
    else:
        prepare(replace(options, out=folder))
        assert samples(folder) == complete


@pytest.mark.parametrize(
    ("number", "expected"),
    [("ENOSPC", ResourceError), ("EIO", TransientError), ("ESTALE", TransientError), ("EROFS", InputError)],
)
def test_failed_writes_end_in_one_sentence(number: str, expected: type) -> None:
    code = getattr(errno, number)
    with pytest.raises(InputError, match=os.strerror(code)) as caught, explain_write_errors(Path("out"), "Kept."):
        raise OSError(code, os.strerror(code))
    assert type(caught.value) is expected
    assert str(caught.value).endswith("Kept.")


def test_an_unknown_field_of_an_input_file_is_named() -> None:
    """As in a record of a later version, with a matching hash."""
    line = json.dumps(
        {"name": "a", "kind": "video", "split": "train", "bytes": 1, "place": "0", "reason": "", "new": 1}
    )
    with pytest.raises(InputError, match=r"line 1 has the unknown field 'new', as of a later version: copy it again"):
        RecordedFile.from_json(line.encode(), "line 1")
