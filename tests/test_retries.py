"""Failures of the machine are not called damage of a file, and reading is attempted again."""

import errno
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from gpdit_lightning import retries
from gpdit_lightning.checkpoints.exported import read_exported
from gpdit_lightning.checkpoints.files import damage_of, read_content
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.errors import InputError, ResourceError, TransientError
from gpdit_lightning.evaluation.videos import select_videos
from gpdit_lightning.media.images import read_image
from gpdit_lightning.media.video import iterate_frames, video_info
from gpdit_lightning.media.video_writer import write_video
from gpdit_lightning.retries import retried, retried_iterator, transient_error
from tests.media.encoding import encode, rgb_frame


@pytest.fixture(autouse=True)
def no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "RETRY_DELAYS", (0.0, 0.0))


def allocation_error() -> RuntimeError:
    """Return what torch raises if memory runs out."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    return caught.value


def ffmpeg_error(number: int) -> BaseException:
    with pytest.raises(av.FFmpegError) as caught:
        av.error.err_check(-number)
    return caught.value


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (allocation_error, ResourceError),
        (MemoryError, ResourceError),
        (lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), ResourceError),
        (lambda: OSError(errno.EMFILE, os.strerror(errno.EMFILE)), ResourceError),
        (lambda: ffmpeg_error(errno.ENFILE), ResourceError),
        (lambda: ffmpeg_error(errno.ENOMEM), TransientError),
        (lambda: ffmpeg_error(errno.EIO), TransientError),
        (lambda: ffmpeg_error(errno.ETIMEDOUT), TransientError),
        (lambda: OSError(errno.ESTALE, os.strerror(errno.ESTALE)), TransientError),
        (lambda: InterruptedError(errno.EINTR, os.strerror(errno.EINTR)), TransientError),
        (ConnectionResetError, TransientError),
        (TimeoutError, TransientError),
        (lambda: av.error.InvalidDataError(1094995529, "Invalid data found"), type(None)),
        (lambda: OSError("image file is truncated (3 bytes not processed)"), type(None)),
        (lambda: RuntimeError("shape '[2]' is invalid for input of size 3"), type(None)),
    ],
)
def test_causes_outside_a_file_are_recognized(make: Callable[[], BaseException], expected: type) -> None:
    error = transient_error(make(), "a.mp4")
    assert type(error) is expected
    if error is not None:
        assert "a.mp4 could not be read" in str(error)
        assert "run the same command again." in str(error)
        assert "damaged" not in str(error)
        assert "replace" not in str(error)


def failing(times: int, error: BaseException, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that raises an error at its first calls."""
    calls = iter(range(times))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is not None:
            raise error
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_images_and_videos_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    write_video(tmp_path / "a.mp4", torch.zeros(3, 3, 16, 16, dtype=torch.uint8), 8)
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", failing(2, error, Image.open))
    assert read_image(tmp_path / "a.png")[0, :, 0, 0].tolist() == [255, 0, 0]
    monkeypatch.setattr(av, "open", failing(2, error, av.open))
    assert video_info(tmp_path / "a.mp4").frames == 3
    monkeypatch.setattr(av, "open", failing(2, error, av.open))
    assert len(list(iterate_frames(tmp_path / "a.mp4"))) == 3
    monkeypatch.setattr(av, "open", failing(3, error, av.open))
    with pytest.raises(TransientError, match="could not be read"):
        video_info(tmp_path / "a.mp4")


def test_a_disk_that_fails_is_not_called_damage(tmp_path: Path) -> None:
    """Reading address 0 of a process's memory is a genuine EIO of the kernel."""
    for name, read in {
        "a.png": read_image,
        "a.mp4": video_info,
        "b.mp4": lambda path: list(iterate_frames(path)),
    }.items():
        (tmp_path / name).symlink_to("/proc/self/mem")
        with pytest.raises(TransientError, match=r"could not be read \(Input/output error\): check its disk"):
            read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.mkv", "a.y4m"])
def test_errors_of_the_system_that_content_causes_are_called_damage(tmp_path: Path, name: str) -> None:
    """FFmpeg reports EIO for a Matroska file that ends in its header, and EBUSY for a frame of a billion pixels."""
    path = tmp_path / name
    path.write_bytes(b"YUV4MPEG2 W32000 H32000 F24:1\nFRAME\n")
    if name == "a.mkv":
        encode(path, [rgb_frame(torch.zeros(3, 16, 16, dtype=torch.uint8))], "ffv1")
        path.write_bytes(path.read_bytes()[:100])
    for read in (video_info, lambda path: list(iterate_frames(path))):
        with pytest.raises(InputError, match=rf"{name} is not a readable video") as caught:
            read(path)
        assert not isinstance(caught.value, TransientError)


@pytest.mark.parametrize("has_memory", [True, False])
def test_memory_that_a_video_requests_is_its_fault_if_memory_is_ample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_memory: bool
) -> None:
    write_video(tmp_path / "a.mp4", torch.zeros(3, 3, 16, 16, dtype=torch.uint8), 8)
    if not has_memory:
        monkeypatch.setattr(retries.mmap, "mmap", failing(1, OSError(errno.ENOMEM, "Cannot allocate memory"), len))
    monkeypatch.setattr(av, "open", failing(3, ffmpeg_error(errno.ENOMEM), av.open))
    with pytest.raises(InputError) as caught:
        video_info(tmp_path / "a.mp4")
    assert isinstance(caught.value, TransientError) != has_memory


def test_damage_is_still_called_damage(tmp_path: Path) -> None:
    content = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(content, "PNG")
    (tmp_path / "a.png").write_bytes(content.getvalue()[:300])
    (tmp_path / "a.mp4").write_bytes(b"no video")
    for read, name in ((read_image, "a.png"), (video_info, "a.mp4")):
        with pytest.raises(InputError, match="replace or remove it") as caught:
            read(tmp_path / name)
        assert not isinstance(caught.value, TransientError)


def test_an_iterator_continues_after_its_last_item() -> None:
    attempts: list[int] = []

    @retried_iterator
    def count() -> Iterator[int]:
        attempts.append(0)
        for number in range(6):
            if number == 2 * len(attempts):
                raise TransientError("interrupted")
            yield number

    assert list(count()) == [0, 1, 2, 3, 4, 5]
    assert len(attempts) == 3


def test_attempts_are_bounded_also_where_both_caller_and_callee_repeat_them() -> None:
    calls: list[int] = []

    @retried
    def inner() -> None:
        calls.append(0)
        raise TransientError("the disk fails")

    with pytest.raises(TransientError):
        retried(inner)()
    assert len(calls) == 3


def test_readers_of_other_files_do_not_call_a_failed_disk_damage(tmp_path: Path) -> None:
    """Of checkpoints, exported models, JSON and videos of an evaluation, which would be left out of it."""
    memory, folder = Path("/proc/self/mem"), tmp_path / "step-1.ckpt"
    folder.mkdir()
    for name in ("training.ckpt", "config.json", "model.safetensors", "manifest.json", "a.mp4", "a.npy"):
        (folder / name).symlink_to(memory)
    (tmp_path / "step-1.ckpt.complete").symlink_to(memory)
    for read in (
        lambda: read_content(folder),
        lambda: damage_of(folder),
        lambda: read_exported(folder),
        lambda: Manifest.load(folder),
        lambda: select_videos([folder / "a.mp4"], 1, 0, 1),
    ):
        with pytest.raises(TransientError, match=r"could not be read .*Input/output error"):
            read()
    rust = SafetensorError("I/O error: Input/output error (os error 5)")
    assert isinstance(transient_error(rust, "a.safetensors"), TransientError)
    assert transient_error(SafetensorError("HeaderTooSmall"), "a.safetensors") is None
