"""Pipes, sockets, devices, folders and links to nothing in the place of a file: refused, and never opened."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger

from gpdit_lightning.app.uploads import UploadLimits, read_upload
from gpdit_lightning.checkpoints.content import read_content
from gpdit_lightning.checkpoints.exported import has_edited_card, read_exported
from gpdit_lightning.cli.ablation import read_record
from gpdit_lightning.cli.recipe_files import read_yaml
from gpdit_lightning.codecs.pca import PcaCodec
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.chunk_files import ChunkFiles
from gpdit_lightning.evaluation.network_files import verify_file
from gpdit_lightning.evaluation.reference import AdmFile, Reference
from gpdit_lightning.evaluation.report import Report
from gpdit_lightning.evaluation.torchscript import load_script
from gpdit_lightning.files import atomic_write, check_writable, process_lock
from gpdit_lightning.hashes import content_identity, remembered_sha256
from gpdit_lightning.media.containers import open_video
from gpdit_lightning.media.finding import find_media
from gpdit_lightning.media.image_headers import check_png_texts
from gpdit_lightning.media.images import read_image
from gpdit_lightning.media.mp4_headers import check_mp4_header
from gpdit_lightning.preparation.annotations import read_annotations
from gpdit_lightning.probing.features import read_features
from gpdit_lightning.probing.layer_features import _FeatureBlock
from gpdit_lightning.regular_files import BoundedReader, read_bounded, read_lines, sha256_of
from gpdit_lightning.tensor_files import safetensors_header
from gpdit_lightning.training.loggers import keep_earlier_rows
from gpdit_lightning.training.run_folder import RunFolderFiles


def lock(path: Path) -> None:
    with process_lock(path):
        pass


def video(path: Path) -> None:
    with open_video(path):
        pass


# Name of the file -> its reader.
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "text": ("a", read_bounded),
    "bounded reader": ("a", BoundedReader),
    "lines": ("a.txt", lambda path: list(read_lines(path, "give a list"))),
    "hash": ("a", sha256_of),
    "remembered hash": ("a", remembered_sha256),
    "hash of both ends": ("a", content_identity),
    "lock": ("lock", lock),
    "recipe": ("a.yaml", read_yaml),
    "manifest": ("manifest.json", lambda path: Manifest.load(path.parent)),
    "header of tensors": ("a.safetensors", lambda path: safetensors_header(path, "replace it")),
    "checkpoint": ("training.ckpt", lambda path: read_content(path.parent)),
    "exported model": ("config.json", lambda path: read_exported(path.parent)),
    "card": ("README.md", lambda path: has_edited_card(path.parent)),
    "weights of a codec": ("a.safetensors", lambda path: PcaCodec.load(str(path))),
    "network": ("a.pt", lambda path: load_script("video", path, "I3D")),
    "file of a network": ("a.pt", lambda path: verify_file("video", str(path), None, "give one")),
    "video": ("a.mp4", video),
    "mp4 header": ("a.mp4", check_mp4_header),
    "texts of a PNG": ("a.apng", check_png_texts),
    "image": ("a.png", read_image),
    "list of videos": ("a.txt", lambda path: find_media(path, "video")),
    "upload": ("a.mp4", lambda path: read_upload(path, path.name, None, UploadLimits(1, 1.0))),  # type: ignore[arg-type]
    "annotations": ("a.csv", lambda path: read_annotations([path])),
    "annotations in JSON": ("a.json", lambda path: read_annotations([path])),
    "ImageNet's kit": ("ILSVRC2012_devkit_t12.tar.gz", lambda path: read_annotations([path])),
    "ImageNet's classes": ("meta.mat", lambda path: read_annotations([path])),
    "features": ("a.npy", lambda path: read_features(path, (1, 8))),
    "features of layers": ("a.safetensors", lambda path: _FeatureBlock.recall(path, (3, 8))),
    "chunk of scores": ("a.safetensors", lambda path: ChunkFiles([path], {})),
    "reference": ("reference.safetensors", Reference.load),
    "reference of ADM": ("a.npz", AdmFile.load),
    "report": ("results.json", Report.load),
    "ablation": ("ablation.json", read_record),
    "recipe in a run folder": ("config.yaml", lambda path: RunFolderFiles(path.parent)),
    "rows of metrics": ("metrics.csv", lambda path: keep_earlier_rows(CSVLogger(path.parent, "", ""), 1)),
}


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(_: int, __: FrameType | None) -> None:
        raise TimeoutError("the reader waits")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def refusal(read: Callable[[Path], Any], path: Path) -> str:
    try:
        read(path)
    except (InputError, OSError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_refuses_what_is_no_regular_file(reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, read = READERS[reader]
    for number, kind in enumerate(("pipe", "socket", "endless device", "folder", "link to nothing", "link to itself")):
        path = tmp_path / str(number) / name
        path.parent.mkdir()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            monkeypatch.chdir(path.parent)  # the path of a socket is short
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(name)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to({"endless device": "/dev/zero", "link to nothing": "nothing"}.get(kind, name))
        with time_limit(20):
            error = refusal(read, path)
        assert "the reader waits" not in error, kind
        # The reader of an optional file may take a link to nothing as absent.
        assert path.name in error or path.parent.name in error or "link" in kind, f"{kind}: {error}"


def test_a_recipe_in_a_run_folder_that_is_larger_than_a_text_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    os.truncate(tmp_path / "config.yaml", 2**40)  # without blocks on the disk
    with pytest.raises(InputError, match=r"config.yaml has 1099511627776 bytes, more than the .*: replace it"):
        RunFolderFiles(tmp_path)


def test_a_write_replaces_no_pipe_and_no_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renaming a file to /dev/null would replace it for all programs."""
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    os.mkfifo("pipe.png")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind("socket.png")
        for name in ("pipe.png", "socket.png"):
            path = tmp_path / name
            with pytest.raises(InputError, match=f"{name} cannot be written, since it is a pipe, .*give another --out"):
                check_writable(path)
            with pytest.raises(InputError, match=f"{name} cannot be written"), atomic_write(path) as partial:
                partial.write_bytes(b"")
            assert not path.is_file()
            assert path.exists()


def test_a_leftover_pipe_does_not_stop_an_atomic_write(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.partial")
    (tmp_path / "b.partial").symlink_to(tmp_path / "other")
    for name in ("a", "b"):
        with time_limit(5), atomic_write(tmp_path / name) as path:
            path.write_text(name)
        assert (tmp_path / name).read_text() == name
    assert not (tmp_path / "other").exists()
