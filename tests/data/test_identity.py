"""No sample is read from other bytes than those of its manifest, however files and manifest are exchanged."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpdit_lightning.cli.inspect import report_faults
from gpdit_lightning.data.buckets import Bucket, _reader
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.shards import ShardReader, build_index, checksum, index_path
from gpdit_lightning.errors import InputError
from gpdit_lightning.regular_files import sha256_of

COUNTS = {("train", "video", (2, 4, 4)): 7, ("validation", "video", (2, 4, 4)): 3}
Attack = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path, made_once: Callable[..., Path], write_shards: Callable[..., Manifest]) -> Path:
    made = made_once("identity", lambda folder: write_shards(folder, COUNTS, shard_size=3))
    return shutil.copytree(made, tmp_path / "latents")


def read_all(folder: Path) -> dict[tuple[str, int], tuple[bytes, str, bool]]:
    """Return of each sample, by split and number: its latents, its key, and whether it replaces a damaged one."""
    _reader.cache_clear()
    manifest, found = Manifest.load(folder), {}
    for split in ("train", "validation"):
        bucket = Bucket([(manifest, entry) for entry in manifest.of_split(split)], [2])  # type: ignore[arg-type]
        for number in range(len(bucket)):
            sample = bucket.read(number)
            found[split, number] = sample.latents.tobytes(), sample.metadata["key"], bool(sample.damaged)
    return found


def tar(folder: Path, number: int = 0, split: str = "train") -> Path:
    return sorted(folder.glob(f"{split}-*.tar"))[number]


def swap(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def swap_both(folder: Path) -> None:
    swap(tar(folder), tar(folder, 1))
    swap(index_path(tar(folder)), index_path(tar(folder, 1)))


def copy_validation(folder: Path, endings: tuple[str, ...]) -> None:
    for ending in endings:
        source = tar(folder, split="validation")
        shutil.copy(source.with_suffix(ending), tar(folder).with_suffix(ending))


def change_rows(change: Callable[[np.ndarray], np.ndarray]) -> Attack:
    def run(folder: Path) -> None:
        index = index_path(tar(folder))
        np.save(index, np.ascontiguousarray(change(np.load(index))))

    return run


def other_latent(rows: np.ndarray) -> np.ndarray:
    rows[0, 0], rows[0, 4:] = rows[1, 0], rows[1, 4:].copy()
    return rows


def damage_and_index_again(folder: Path) -> None:
    path = tar(folder)
    content = bytearray(path.read_bytes())
    content[int(np.load(index_path(path))[0, 0]) + 200] ^= 1
    path.write_bytes(content)
    np.save(index_path(path), build_index(path, (2, 4, 4, 4)))


def change_manifest(change: Callable[[dict[str, Any]], object], is_of_earlier_version: bool = False) -> Attack:
    def run(folder: Path) -> None:
        content = json.loads((folder / "manifest.json").read_text())
        change(content)
        if is_of_earlier_version:
            del content["content_sha256"]
        (folder / "manifest.json").write_text(json.dumps(content))

    return run


def duplicate(content: dict[str, Any]) -> None:
    content["shards"].append(content["shards"][0] | {"path": f"./{content['shards'][0]['path']}"})


def exchange_names(content: dict[str, Any]) -> None:
    """Let two entries exchange all but their names, so that the manifest agrees with exchanged files."""
    first, second = content["shards"][:2]
    for name in ("sha256", "index_sha256"):
        first[name], second[name] = second[name], first[name]


def exchange_consistently(folder: Path) -> None:
    swap_both(folder)
    change_manifest(exchange_names, is_of_earlier_version=True)(folder)


def use_validation(content: dict[str, Any]) -> None:
    content["shards"][-1]["split"] = "train"


ATTACKS: dict[str, Attack] = {
    "tars exchanged": lambda folder: swap(tar(folder), tar(folder, 1)),
    "indices exchanged": lambda folder: swap(index_path(tar(folder)), index_path(tar(folder, 1))),
    "shards exchanged": swap_both,
    "shards and their hashes exchanged": exchange_consistently,
    "validation shard over a training shard": lambda folder: copy_validation(folder, (".tar", ".index.npy")),
    "validation tar over a training tar": lambda folder: copy_validation(folder, (".tar",)),
    "validation index over a training index": lambda folder: copy_validation(folder, (".index.npy",)),
    "rows reversed": change_rows(lambda rows: rows[::-1]),
    "rows shifted": change_rows(lambda rows: np.roll(rows, 1, axis=0)),
    "latent of another sample": change_rows(other_latent),
    "damaged and indexed again": damage_and_index_again,
    "a folder as index": lambda folder: (index_path(tar(folder)).unlink(), index_path(tar(folder)).mkdir()),
    "entry twice": change_manifest(duplicate),
    "entry twice, earlier version": change_manifest(duplicate, is_of_earlier_version=True),
    "validation for training": change_manifest(use_validation),
    "validation for training, earlier version": change_manifest(use_validation, is_of_earlier_version=True),
    "entries reversed": change_manifest(lambda content: content["shards"].reverse()),
    "other whitening": change_manifest(lambda content: content["codec"].update(mean=[0.0] * 4)),
    "other labels": change_manifest(lambda content: content.update(labels=["cat"])),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_exchanged_and_changed_files_are_refused_or_replaced(folder: Path, name: str) -> None:
    expected = read_all(folder)
    assert not any(replaced for _, _, replaced in expected.values())
    ATTACKS[name](folder)
    try:
        found = read_all(folder)
    except InputError:
        return
    assert found.keys() == expected.keys()
    assert any(replaced for _, _, replaced in found.values())
    of_split = {key: latents for (split, _), (latents, key, _) in expected.items() if split == "train"}
    for place, (latents, key, replaced) in found.items():
        assert replaced or (latents, key) == expected[place][:2]
        assert place[0] == "validation" or latents == of_split[key], "a replacement is another training sample"


def test_a_manifest_of_an_earlier_version_is_opened_and_verification_adds_its_hash(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, before = read_all(folder), (folder / "manifest.json").read_bytes()
    change_manifest(lambda content: None, is_of_earlier_version=True)(folder)
    assert read_all(folder) == expected
    assert not Manifest.load(folder).has_content_hash
    assert report_faults(folder, 1)
    assert "recorded the hash of its content" in capsys.readouterr().out
    assert (folder / "manifest.json").read_bytes() == before


def many_lists(content: bytes) -> bytes:
    return b'{"x": [' + b"[]," * 2**22 + b"[]]}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: b"[" * 10**6, "nested too deeply"),
        (lambda content: content.replace(b'"preparation": {', b'"preparation": {"x": ' + b"[" * 10**5), "too deeply"),
        (
            lambda content: content.replace(b'"stride"', b'"x": ' + b"[" * 100 + b"]" * 100 + b', "stride"'),
            "too deeply",
        ),
        (many_lists, "brackets, more than"),
        (lambda content: content.replace(b"-0.25", b"NaN"), "NaN is not a JSON value"),
        (lambda content: content.replace(b"-0.25", b"1e999"), "the number '1e999' is not finite"),
        (lambda content: content.replace(b"-0.25", b"9" * 5000), "is not readable JSON"),
        (lambda content: content.replace(b"-0.25", b"9" * 400), r"codec.mean\[1\] = 9+\.\.\.9+; it must be"),
        (lambda content: content.replace(b'"count": 3', b'"count": 1000000000000000000', 1), "integer from 1 to"),
        (lambda content: content.replace(b'"count": 3', b'"count": 3000', 1), "samples of shape .* take at least"),
        (lambda content: content.replace(b'"labels": []', b'"labels": [], "labels": ["a"]'), "'labels' occurs twice"),
        (lambda content: content.replace(b'"labels": []', b'"labels": [{}]'), "labels = .*; it must be a list of diff"),
        (lambda content: content.replace(b"00000.tar", b"\\u0000.tar", 1), "it must be a path of printable"),
        (lambda content: content.replace(b"00000.tar", b"\\ud800.tar", 1), "it must be a path of printable"),
        (lambda content: content.replace(b"00000.tar", b"0" * 5000, 1), "cannot be read .File name too long."),
        (lambda content: content.replace(b'"stride": 3', b'"stride": "x"'), "preparation.stride = 'x'"),
        (lambda content: content.replace(b"2.0,", b"0.0,", 1), r"codec\.(std\[0\] = 0.0; it must|mean)|hash"),
        (lambda content: b"", "is not readable JSON"),
        (lambda content: content.decode().encode("utf-16"), "is not readable JSON"),
    ],
)
def test_hostile_manifests_are_refused_with_bounded_memory(
    folder: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    path = folder / "manifest.json"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        Manifest.load(folder)
    assert len(str(caught.value)) < 6000


def test_files_without_an_end_are_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match=r"manifest\.json is not a regular file"):
        Manifest.load(folder)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match=r"manifest\.json has 1099511627776 bytes, more than the"):
        Manifest.load(folder)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"manifest\.json is not a regular file"):
        Manifest.load(folder)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (b"[]", "it must be an object"),
        (b"[" * 100_000, "nested too deeply"),
        (b"{}", "lacks the field key"),
        (b'{"key": null, "kind": "video"}', "key = None; it must be a string"),
        (b'{"key": "a", "kind": "video", "label": ["cat"]}', "label = "),
        (b'{"key": "a", "kind": "image"}', "has the kind 'image' instead of 'video'"),
        (b'{"key": "validation-video-2x4x4-00000-000000", "kind": "video"}', "instead of 'train-video"),
        (b'{"key": "a", "kind": "video", "fps": -1}', "fps = -1"),
    ],
)
def test_metadata_are_checked_although_all_hashes_agree(folder: Path, metadata: bytes, message: str) -> None:
    """As in a shard that another person provides."""
    manifest = Manifest.load(folder)
    entry = manifest.shards[0]
    path = folder / entry.path
    row = np.load(index_path(path))[0]
    latent = path.read_bytes()[row[0] : row[0] + 128 + 2 * 2 * 4 * 16]
    path.write_bytes(latent + metadata + bytes(2000))
    np.save(index_path(path), np.array([[0, len(latent), len(metadata), checksum(metadata), *row[4:]]]))
    changed = dataclasses.replace(
        entry,
        count=1,
        bytes=path.stat().st_size,
        sha256=sha256_of(path),
        index_sha256=sha256_of(index_path(path)),
    )
    with pytest.raises(InputError, match=message):
        ShardReader(folder, changed).read(0)
