import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from upath import UPath

from gpdit_lightning import retries
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.shard_writer import ShardSetWriter
from gpdit_lightning.errors import InputError
from gpdit_lightning.specs import CodecSpec

CODEC = CodecSpec("pca", None, 4, 8, 4, mean=(0.0,) * 4, std=(1.0,) * 4, fingerprint="0123456789abcdef")


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    with ShardSetWriter(tmp_path, shard_size=2) as writer:
        for number in range(3):
            writer.write("train", "video", np.full((2, 4, 3, 3), number, np.float32), {"source": f"{number}.mp4"})
        writer.write("validation", "image", np.zeros((1, 4, 3, 3), np.float32), {"source": "a.png"})
        shards = writer.close()
    manifest = Manifest(
        directory=tmp_path,
        codec=CODEC,
        shards=shards,
        preparation={"stride": 3},
        validation={"held_out_by": "source"},
        labels=("ball", "dog"),
        skipped=1,
    )
    manifest.save()
    return manifest


def test_a_saved_manifest_is_loaded_unchanged(manifest: Manifest) -> None:
    assert Manifest.load(manifest.directory) == manifest
    assert Manifest.load(manifest.path) == manifest
    assert Manifest.load(str(manifest.path)).shards[0].shape == (2, 4, 3, 3)
    assert not list(manifest.directory.glob("*.partial"))


def test_the_file_contains_no_absolute_path(manifest: Manifest) -> None:
    assert str(manifest.directory) not in manifest.path.read_text()


def test_shards_of_each_split(manifest: Manifest) -> None:
    assert [shard.count for shard in manifest.of_split("train")] == [2, 1]
    assert [shard.kind for shard in manifest.of_split("validation")] == ["image"]


def test_the_fingerprint_depends_on_latents_and_codec_only(manifest: Manifest) -> None:
    first = manifest.shards[0]
    other_latents = replace(manifest, shards=(replace(first, sha256="0" * 64), *manifest.shards[1:]))
    other_codec = replace(manifest, codec=replace(CODEC, fingerprint="f" * 16))
    assert len({manifest.fingerprint(), other_latents.fingerprint(), other_codec.fingerprint()}) == 3
    assert replace(manifest, preparation={}, labels=()).fingerprint() == manifest.fingerprint()


def test_a_missing_manifest_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no data at .*nowhere, since it does not exist: give a folder made by"):
        Manifest.load(tmp_path / "nowhere")


def test_broken_json_is_reported(manifest: Manifest) -> None:
    manifest.path.write_text(manifest.path.read_text()[:100])
    with pytest.raises(InputError, match=r"manifest\.json is not readable JSON"):
        Manifest.load(manifest.directory)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["format"], "gpdit_lightning-shards-9", "has format 'gpdit_lightning-shards-9' and this version reads"),
        (["codec", "std"], None, "lacks the field codec.std"),
        (["codec", "mean"], [0.0], r"codec.mean = \[0.0\], which is not one number for each of the 4"),
        (["shards"], None, "lacks the field shards"),
        (["shards"], {}, "has shards = {}; it must be a list"),
        (["shards"], [], r"has shards = \[\]; it must be a list of at least one shard"),
        (["labels"], None, "lacks the field labels"),
        (["more"], 1, "unknown field more"),
        (["shards", 0, "sha256"], None, r"lacks the field shards\[0\].sha256"),
        (["shards", 0, "split"], "test", r"shards\[0\].split = 'test'; it must be train or validation"),
        (["shards", 0, "kind"], "sound", r"shards\[0\].kind = 'sound'"),
        (
            ["shards", 0, "shape"],
            [2, 4, 3],
            r"shards\[0\].shape = \[2, 4, 3\]; it must be a list of four positive integers",
        ),
        (["shards", 0, "shape"], [2, 8, 3, 3], "8 channels where its codec has 4"),
        (["shards", 0, "count"], 0, r"shards\[0\].count = 0"),
        (["shards", 0, "bytes"], 1.5, r"shards\[0\].bytes = 1.5"),
        (["shards", 0, "path"], "../x.tar", "is outside the manifest's folder"),
        (["shards", 0, "index"], "/x.npy", "is outside the manifest's folder"),
        (
            ["shards", 0, "bytes"],
            7,
            r"has 10240 bytes where .*manifest\.json records 7, so it was truncated",
        ),
        (["shards", 0, "path"], "gone.tar", r"gone\.tar is missing though"),
        (["shards", 0, "index"], "gone.npy", r"gone\.npy is missing though"),
    ],
)
def test_invalid_fields_are_reported_by_name(manifest: Manifest, place: list[Any], value: Any, message: str) -> None:
    content = json.loads(manifest.path.read_text())
    *parents, last = place
    inner = content
    for step in parents:
        inner = inner[step]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    manifest.path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        Manifest.load(manifest.directory)


def test_a_truncated_shard_is_reported(manifest: Manifest) -> None:
    tar = manifest.directory / manifest.shards[0].path
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(InputError, match=rf"{tar.name} has \d+ bytes where"):
        Manifest.load(manifest.directory)


def test_an_invalid_manifest_is_not_saved(manifest: Manifest) -> None:
    before = manifest.path.read_text()
    with pytest.raises(InputError, match=r"codec\.mean"):
        replace(manifest, codec=replace(CODEC, mean=(0.0,))).save()
    with pytest.raises(InputError, match="split"):
        replace(manifest, shards=(replace(manifest.shards[0], split="test"),)).save()  # type: ignore[arg-type]
    assert manifest.path.read_text() == before


@pytest.fixture
def remote_address(manifest: Manifest) -> str:
    """Return the address of a remote copy of the manifest; its shards are not read."""
    fsspec.filesystem("memory").pipe("/remote/latents/manifest.json", manifest.path.read_bytes())
    return "memory://remote/latents"


def test_a_remote_manifest_is_loaded_by_its_address(manifest: Manifest, remote_address: str) -> None:
    for address in (remote_address, f"{remote_address}/", f"{remote_address}/manifest.json", UPath(remote_address)):
        loaded = Manifest.load(address)
        assert loaded.directory == UPath(remote_address)
        assert str(loaded.path) == f"{remote_address}/manifest.json"
        assert replace(loaded, directory=manifest.directory) == manifest
    assert Manifest.load(f"file://{manifest.directory}").shards == manifest.shards


def test_errors_of_remote_manifests_are_reported(
    manifest: Manifest, remote_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "DOWNLOAD_DELAYS", (0.0, 0.0))
    fsspec.filesystem("memory").pipe("/remote/cut/manifest.json", manifest.path.read_bytes()[:100])
    fsspec.filesystem("memory").pipe("/remote/old/manifest.json", b'{"format": "x"}')
    for address, message in {
        "memory://remote/nowhere": r"memory://remote/nowhere/manifest\.json does not exist: check the address",
        "memory://remote/cut": r"memory://remote/cut/manifest\.json is not readable JSON \(.*\): check the address, or",
        "memory://remote/old": r"memory://remote/old/manifest\.json has format 'x'",
        "http://127.0.0.1:9/latents": r"http://127\.0\.0\.1:9/latents/manifest\.json cannot be read \(ClientConnector",
        "nowhere://latents": r"nowhere://latents is not an address of a folder \(.*\): give one that fsspec supports",
        "simplecache::http://latents": r"simplecache::http://latents is not an address of a folder",
    }.items():
        with pytest.raises(InputError, match=f"^{message}"):
            Manifest.load(address)


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="s3fs is installed")
def test_a_protocol_without_its_package_is_reported() -> None:
    with pytest.raises(InputError, match=r"^s3://bucket/latents/manifest\.json needs a package .*s3fs.*: install it"):
        Manifest.load("s3://bucket/latents")


def test_a_remote_manifest_is_not_saved(remote_address: str) -> None:
    with pytest.raises(InputError, match=r"manifest\.json is not on this machine: prepare in a local folder"):
        Manifest.load(remote_address).save()
