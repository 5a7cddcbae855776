"""Statistics of real data in files: values that are no moments, or were changed, are errors that name the file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.metrics import Moments
from gpdit_lightning.evaluation.reference import RECORD, AdmFile, Reference, ReferenceRecord
from gpdit_lightning.recalled_files import CHECKSUM
from gpdit_lightning.tensor_files import safetensors_header

MEAN, COVARIANCE = np.zeros(3), np.eye(3)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": np.array(["a"] * 3)}, "has mu of <U1, not floating-point numbers"),
        ({"mu": np.zeros(3, "f4,f4")}, "has mu of"),
        ({"mu": np.zeros(3, "datetime64[s]")}, "has mu of datetime64"),
        ({"sigma": np.eye(3, dtype=complex)}, "has sigma of complex128"),
        ({"mu": np.full(3, np.nan)}, "moments that are not finite"),
        ({"sigma": np.full((3, 3), 1e308)}, "moments that are not finite or beyond 1e.100"),
        ({"sigma": np.triu(np.ones((3, 3)))}, "a covariance that is not symmetric"),
        ({"sigma": -COVARIANCE}, "or has a negative variance"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"a mean \(0,\)"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, r"has arr_0 of uint8 \(0, 8, 8, 3\)"),
    ],
)
def test_arrays_that_are_no_moments_or_images_are_refused(
    arrays: dict[str, np.ndarray], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "adm.npz"
    np.savez(path, **({"mu": MEAN, "sigma": COVARIANCE} | arrays))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=f"adm.npz has .*{words.removeprefix('has ')}"):
        AdmFile.load(path)


def test_moments_of_single_precision_are_read(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    np.savez(tmp_path / "adm.npz", mu=samples.mean(0), sigma=np.cov(samples.T).astype(np.float32))
    moments = AdmFile.load(tmp_path / "adm.npz").moments
    assert moments is not None
    assert moments.distance(moments) == pytest.approx(0, abs=1e-6)


def test_statistics_with_a_changed_value_are_refused_and_those_without_a_checksum_read(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    record = ReferenceRecord("data", "all", "0" * 64, 9, "image", 1, (8, 8), 1, None, "bicubic", {})
    moments = Moments(torch.zeros(3), torch.eye(3), 9)
    Reference(record, {"image": moments}, {"image": torch.ones(9, 3)}).save(path)
    intact = path.read_bytes()
    for place in (len(intact) - 2, intact.index(b'"items') + 11, intact.index(CHECKSUM.encode())):
        content = bytearray(intact)
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"reference.safetensors is damaged"):
            Reference.load(path)
    path.write_bytes(intact)
    metadata = safetensors_header(path, "")[1]
    old = {key: metadata[key] for key in (RECORD, "samples")}  # as version 0.1.0 wrote it
    save_file(load_file(path), path, old)
    assert Reference.load(path).record == record
