"""Files of features compared with an independent implementation of Video-ChatGPT's layout."""

import io
import json
import pickle
import pickletools
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpdit_lightning.errors import InputError
from gpdit_lightning.probing.features import (
    CHECKSUMS,
    FeatureDigests,
    FeatureRecord,
    VideoFeatures,
    read_features,
    spatio_temporal,
    write_features,
)
from gpdit_lightning.regular_files import sha256_of
from gpdit_lightning.specs import CodecSpec

CODEC = CodecSpec("pca", None, 1, 8, 4, (0.0,), (1.0,), "0123456789abcdef")
RECORD = FeatureRecord(
    format="npy",
    layer=2,
    width=8,
    temporal_tokens=3,
    spatial_tokens=4,
    frames=9,
    stride=3,
    size="32x32",
    precision="32",
    codec=CODEC,
    weights="ema",
    step=1,
    fingerprint="fedcba9876543210",
    architecture={"width": 8},
)


def video_chatgpt_layout(features: np.ndarray, temporal_tokens: int = 100) -> np.ndarray:
    """Map (F, N, D) to (temporal tokens + N, D): means over positions, zeros, means over frames."""
    frames, tokens, width = features.shape
    rows = [np.mean(features[frame], axis=0) for frame in range(frames)]
    rows += [np.zeros(width)] * (temporal_tokens - frames)
    rows += [np.mean(features[:, token], axis=0) for token in range(tokens)]
    return np.stack(rows)


def random_features(seed: int = 0, shape: tuple[int, ...] = RECORD.shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("frames", "temporal_tokens"), [(5, 100), (100, 100), (1, 1)])
def test_the_layout_is_that_of_video_chatgpt(frames: int, temporal_tokens: int) -> None:
    features = random_features(shape=(2, frames, 6, 8))
    pooled = spatio_temporal(features, temporal_tokens)
    assert pooled.dtype == torch.float32
    for clip, given in zip(pooled, features.double().numpy(), strict=True):
        np.testing.assert_allclose(clip.numpy(), video_chatgpt_layout(given, temporal_tokens), atol=1e-6)
    if frames == temporal_tokens:
        assert torch.equal(pooled, spatio_temporal(features))


def test_means_are_computed_in_float32() -> None:
    features = torch.full((2, 4096, 1), 1.0, dtype=torch.bfloat16)
    features[:, 0] = 128.0
    assert spatio_temporal(features)[0].item() == pytest.approx(1 + 127 / 4096)


def test_more_frames_than_tokens_are_refused() -> None:
    with pytest.raises(InputError, match="2 temporal tokens are too few for 3 latent frames"):
        spatio_temporal(random_features(shape=(3, 4, 8)), 2)


def test_features_survive_the_round_trip_through_a_folder(tmp_path: Path) -> None:
    RECORD.save(tmp_path)
    names = ["jump/v_2", "jump/v_10", "v_1.2"]
    for seed, name in enumerate(names):
        write_features(RECORD.path_of(tmp_path, name), random_features(seed), RECORD)
    data = VideoFeatures(tmp_path, layer=2, fingerprint="fedcba9876543210")
    assert data.record == RECORD
    assert sorted(data.names) == sorted(names)
    assert data.names.index("jump/v_2") < data.names.index("jump/v_10")
    assert len(data) == 3
    for seed, name in enumerate(names):
        assert torch.equal(data[name], random_features(seed).half())
        assert torch.equal(data[data.names.index(name)], data[name])
    loaded = torch.utils.data.DataLoader(data, batch_size=3)
    assert next(iter(loaded)).shape == (3, 7, 8)


def test_a_pickle_is_readable_by_every_version_of_numpy(tmp_path: Path) -> None:
    record = replace(RECORD, format="pickle")
    path = record.path_of(tmp_path, "v_1")
    write_features(path, random_features(), record)
    assert path.name == "v_1.pkl"
    with path.open("rb") as file:
        values = pickle.load(file)  # as Video-ChatGPT does
    assert isinstance(values, np.ndarray)
    assert values.dtype == np.float16
    assert torch.equal(torch.tensor(values), random_features().half())
    strings = {value for _, value, _ in pickletools.genops(path.read_bytes()) if isinstance(value, str)}
    assert strings == {
        "numpy",
        "ndarray",
        "builtins",
        "bytearray",
        "<f2",
    }  # no numpy.core, which was renamed


def test_features_of_another_model_are_refused(tmp_path: Path) -> None:
    RECORD.save(tmp_path)
    write_features(RECORD.path_of(tmp_path, "v_1"), random_features(), RECORD)
    with pytest.raises(InputError, match=r"features.json has layer 2, but 18 is expected"):
        VideoFeatures(tmp_path, layer=18)
    with pytest.raises(InputError, match="has no field 'layers'"):
        VideoFeatures(tmp_path, layers=2)
    VideoFeatures(tmp_path, codec=replace(CODEC, source="moved"))
    with pytest.raises(InputError, match=r"features\.json and the expected features are of different codecs \(fingerp"):
        VideoFeatures(tmp_path, codec=replace(CODEC, fingerprint="0" * 16))


def test_unusable_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"features.json cannot be read"):
        VideoFeatures(tmp_path)
    RECORD.save(tmp_path)
    with pytest.raises(InputError, match="contains no features yet"):
        VideoFeatures(tmp_path)
    (tmp_path / "features.json").unlink()
    replace(RECORD, format="pickle").save(tmp_path)
    with pytest.raises(InputError, match="pickled features, which VideoFeatures does not read"):
        VideoFeatures(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not readable JSON"),
        ("[]", r"is \[\], which is not a value"),
        (json.dumps({"layer": 2}), "lacks the field 'architecture'"),
        (json.dumps({**asdict(RECORD), "layer": True}), "layer is True"),
        (json.dumps({**asdict(RECORD), "format": "zip"}), "format is 'zip'"),
        (
            json.dumps({**asdict(RECORD), "codec": "pca 0123456789abcdef"}),
            "codec is 'pca 0123456789abcdef'",
        ),
    ],
)
def test_an_invalid_record_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "features.json").write_text(content)
    with pytest.raises(InputError, match=rf"features.json.*{message}"):
        FeatureRecord.load(tmp_path)


def npy_with_header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def npy(values: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values, **options)
    return file.getvalue()


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, random_features().half().numpy())
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(random_features().half().numpy())[:-2], "not a complete .npy"),
        (npy(np.array([{}]), allow_pickle=True), "contains object"),
        (pickle.dumps(random_features().half().numpy()), "not a complete .npy"),
        (npy(random_features().numpy()), r"float32 \(7, 8\), but float16"),
        (npy(random_features().half().numpy().T), r"\(8, 7\), but"),
        (npz(), "not a complete .npy"),
        *((npy_with_header(text), "not a complete .npy") for text in ("{'descr': (", "{'descr': ('<f2',)}", "{[]: 1}")),
    ],
)
def test_a_damaged_file_is_refused_without_unpickling(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "v_1.npy").write_bytes(content)
    with pytest.raises(InputError, match=rf"v_1.npy.*{message}"):
        read_features(tmp_path / "v_1.npy", RECORD.shape)


def test_a_file_is_compared_with_its_checksum(tmp_path: Path) -> None:
    RECORD.save(tmp_path)
    names = ("v_1", "a\\b\nc")
    for number, name in enumerate(names):
        write_features(RECORD.path_of(tmp_path, name), random_features(number), RECORD)
        file = RECORD.path_of(tmp_path, name)
        FeatureDigests(tmp_path).add({file: sha256_of(file)})
    result = subprocess.run(["sha256sum", "--check", CHECKSUMS], cwd=tmp_path, capture_output=True)
    assert result.returncode == 0, result.stderr
    path = RECORD.path_of(tmp_path, "v_1")
    intact = VideoFeatures(tmp_path)
    assert torch.equal(intact["v_1"], random_features(0).half())
    assert torch.equal(intact[names[1]], random_features(1).half())
    shutil.copyfile(RECORD.path_of(tmp_path, names[1]), path)
    with pytest.raises(InputError, match=r"v_1.npy is not the file whose sha256 features.sha256 has: remove it"):
        VideoFeatures(tmp_path)["v_1"]
    (tmp_path / CHECKSUMS).unlink()  # as of version 0.1.0
    assert torch.equal(VideoFeatures(tmp_path)["v_1"], random_features(1).half())


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"v_9.npy does not exist"):
        read_features(tmp_path / "v_9.npy", RECORD.shape)


def test_features_that_cannot_be_stored_leave_no_file(tmp_path: Path) -> None:
    path = RECORD.path_of(tmp_path, "v_1")
    with pytest.raises(InputError, match="exceed the range of float16"):
        write_features(path, random_features() * 1e6, RECORD)
    with pytest.raises(InputError, match=r"have shape \(6, 8\), but features.json states \(7, 8\)"):
        write_features(path, random_features()[1:], RECORD)
    assert not list(tmp_path.iterdir())
