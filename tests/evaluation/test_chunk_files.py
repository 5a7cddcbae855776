"""Files of chunks: round trip, and errors for damaged files and for other settings."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.chunk_files import ChunkFiles, complete_chunks, source_identities, write_chunk

SETTINGS = {"guidance": {"context": 1.5}, "size": (32, 32)}


def test_results_are_read_chunk_by_chunk(tmp_path: Path) -> None:
    image, noise = torch.rand(5, 4, 2), torch.rand(3, 4, 2)
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    first = {"truth/image": image[:2], "noise 8/image": noise[:2]}
    write_chunk(paths[0], ["a", "b"], first, SETTINGS)
    write_chunk(paths[1], ["c", "d"], {"truth/image": image[2:4], "noise 8/image": noise[2:]}, SETTINGS)
    write_chunk(paths[2], ["e"], {"truth/image": image[4:]}, SETTINGS)
    files = ChunkFiles(paths, SETTINGS)
    assert files.names == list("abcde")
    assert [len(values) for values in files.values("truth", "image")] == [2, 2, 1]

    def read(*key: str, **options: int | str) -> Tensor:
        return torch.cat(list(files.values(*key, **options)))

    assert torch.equal(read("truth", "image"), image)
    assert torch.equal(read("truth", "image", position=3), image[:, 3])
    assert torch.equal(read("truth", "image", limit_to="noise 8"), image[:3])
    assert torch.equal(read("noise 8", "image", position=0), noise[:, 0])
    assert not list(files.values("truth", "video"))
    assert [files.has(*key) for key in (("truth", "image"), ("truth", "video"), ("noise 8", "image"))] == [1, 0, 1]


def damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "without metadata":
        save_file({"truth/video": torch.ones(1, 9)}, path)
        return
    if kind in ("value", "name", "type"):
        place = {"value": len(content) - 5, "name": content.index(b"clip a"), "type": content.index(b"F32")}[kind]
        content[place : place + 3] = b"I32" if kind == "type" else bytes(b ^ 1 for b in content[place : place + 3])
    other = path.with_name("000018.safetensors").read_bytes() if kind == "of another place" else b""
    path.write_bytes({"truncated": content[:-5], "garbage": b"\x10" * 99}.get(kind, other or content))


DAMAGES = ("truncated", "garbage", "without metadata", "value", "name", "type", "of another place")


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_no_complete_chunk(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    path, intact = tmp_path / "000016.safetensors", tmp_path / "000017.safetensors"
    for file in (path, intact, tmp_path / "000018.safetensors"):
        write_chunk(file, ["clip a"], {"truth/video": torch.ones(1, 9)}, SETTINGS)
    damage(path, kind)
    assert complete_chunks([path, intact, tmp_path / "000019.safetensors"], SETTINGS, {}) == {intact}
    (message,) = set(caplog.messages)
    assert message.startswith(f"{path} is ")
    assert message.endswith(": it is computed again.")
    with pytest.raises(
        InputError, match=r"000016.safetensors is (damaged|not a complete).*: delete it and run the same"
    ):
        ChunkFiles([path], SETTINGS)


def test_results_of_videos_that_changed_are_no_complete_chunk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chunk, copy = tmp_path / "000000.safetensors", tmp_path / "copy"
    videos = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    for video in videos:
        video.write_bytes(bytes(range(256)) * 1024)
    write_chunk(chunk, ["a", "b"], {"truth/video": torch.ones(2, 9)}, SETTINGS, source_identities(videos))

    def is_complete() -> bool:
        return complete_chunks([chunk], SETTINGS, {chunk: videos}) == {chunk}

    shutil.copy(videos[1], copy)  # another time and inode
    copy.replace(videos[1])
    assert is_complete()
    content = videos[1].read_bytes()
    for changed in (b"x" + content[1:], content[:-1] + b"x", content[:-1], content + b"\0"):
        videos[1].write_bytes(changed)
        assert not is_complete()
    assert set(caplog.messages) == {f"{chunk} is of videos or images that have changed since: it is computed again"}
    videos[1].write_bytes(content)
    assert is_complete()


def test_other_settings_are_an_error_that_names_the_first_difference(tmp_path: Path) -> None:
    write_chunk(tmp_path / "0.safetensors", ["a"], {"truth/video": torch.ones(1, 9)}, SETTINGS)
    for other, message in (
        ({**SETTINGS, "guidance": {"context": 2.0}, "size": (8, 8)}, r"another --guidance \(1.5, not 2.0\)"),
        ({**SETTINGS, "size": (64, 64)}, r"another --size \(\[32, 32\], not \[64, 64\]\): give another --out"),
        ({**SETTINGS, "stride": 3}, r"another --stride \(None, not 3\)"),
    ):
        with pytest.raises(InputError, match=message):
            ChunkFiles([tmp_path / "0.safetensors"], other)
