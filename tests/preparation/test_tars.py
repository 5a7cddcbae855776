"""Reading of images from tars."""

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from braceexpand import braceexpand
from PIL import Image
from webdataset import TarWriter, WebDataset

from gpdit_lightning.errors import InputError
from gpdit_lightning.options.shared import MAX_COUNT
from gpdit_lightning.preparation import tars
from gpdit_lightning.preparation.tars import TarSample, find_tars, inner_tars, iterate_samples, paths_in


def encoded(value: int = 0, kind: str = "JPEG", **options: Any) -> bytes:
    """Encode a gray image of 12 x 8 pixels."""
    file = io.BytesIO()
    Image.new("RGB", (8, 12), (value, value, value)).save(file, kind, **options)
    return file.getvalue()


def write(path: Path, *members: tuple[str | tarfile.TarInfo, bytes]) -> Path:
    """Write a tar of these members, in order."""
    with tarfile.open(path, "w") as tar:
        for member, content in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def read(path: Path) -> list[TarSample]:
    return list(iterate_samples(path))


def intact(samples: list[TarSample]) -> list[str]:
    """Return the keys of the samples without a problem."""
    return [sample.key for sample in samples if sample.pixels is not None and sample.problem is None]


@pytest.fixture
def laion(tmp_path: Path) -> Path:
    """A tar of six samples, as img2dataset writes them."""
    path = tmp_path / "00000.tar"
    with TarWriter(str(path), encoder=False) as tar:
        for number in range(6):
            fields = {"caption": f"caption {number}", "url": f"https://x/{number}", "width": 8, "score": float("nan")}
            tar.write(
                {
                    "__key__": f"{number:09d}",
                    ("jpg", "png", "webp")[number % 3]: encoded(number, ("JPEG", "PNG", "WEBP")[number % 3]),
                    "json": json.dumps(fields).encode(),
                    "txt": f"caption {number}".encode(),
                }
            )
    return path


def test_samples_equal_those_of_webdataset(laion: Path) -> None:
    expected = list(WebDataset(str(laion), shardshuffle=False))
    samples = read(laion)
    assert intact(samples) == [sample["__key__"] for sample in expected] == [f"{number:09d}" for number in range(6)]
    for number, (sample, raw) in enumerate(zip(samples, expected, strict=True)):
        assert sample.pixels is not None
        assert sample.pixels.dtype == torch.uint8
        assert sample.pixels.shape == (1, 3, 12, 8)
        image = next(raw[ending] for ending in ("jpg", "png", "webp") if ending in raw)
        assert (sample.pixels[0].permute(1, 2, 0).numpy() == np.array(Image.open(io.BytesIO(image)))).all()
        assert sample.metadata == {"caption": raw["txt"].decode(), "url": f"https://x/{number}"}


def test_captions_from_text_take_precedence_over_json(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.tar",
        ("0.jpg", encoded()),
        ("0.json", b'{"caption": "of json", "url": null}'),
        ("0.txt", b" of text\n"),
        ("1.JPG", encoded()),
        ("1.json", '{"caption": "è"}'.encode()),
        ("2.jpg", encoded()),
        ("2.txt", b""),
        ("2.json", b'{"caption": " ", "width": 3}'),
        ("3.jpg", encoded()),
    )
    samples = read(path)
    assert intact(samples) == ["0", "1", "2", "3"]
    assert [sample.metadata for sample in samples] == [{"caption": "of text"}, {"caption": "è"}, {}, {}]


def test_orientation_and_transparency(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise
    clear = io.BytesIO()
    Image.new("RGBA", (8, 12), (0, 0, 0, 0)).save(clear, "PNG")
    path = write(tmp_path / "a.tar", ("0.jpg", encoded(exif=exif)), ("1.png", clear.getvalue()))
    turned, white = (sample.pixels for sample in read(path))
    assert turned is not None
    assert turned.shape == (1, 3, 8, 12)
    assert white is not None
    assert (white == 255).all()


def test_other_members_are_not_read(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    trap = pickle.dumps(Trap())
    endings = ("pickle", "pyd", "pth", "pt", "npy", "ten", "jpg.pyd", "seg.png")
    members = [
        ("0.jpg", encoded()),
        *((f"0.{ending}", trap) for ending in endings),
        ("README", trap),
        ("._0.jpg", trap),
    ]
    samples = read(write(tmp_path / "a.tar", *members, ("folder/1.jpg", encoded())))
    assert intact(samples) == ["0", "folder/1"]
    assert len(samples) == 2
    assert not (tmp_path / "executed").exists()
    pickle.loads(trap)  # would have created the file
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "member",
    [
        special("1.jpg", tarfile.SYMTYPE, "/etc/hostname"),
        special("1.jpg", tarfile.LNKTYPE, "0.jpg"),
        special("1.jpg", tarfile.FIFOTYPE),
        special("1.jpg", tarfile.CHRTYPE),
        special("1.jpg", tarfile.GNUTYPE_SPARSE),
        special("/1.jpg", tarfile.REGTYPE),
        special("../1.jpg", tarfile.REGTYPE),
        special("a/../../1.jpg", tarfile.REGTYPE),
        special("../a", tarfile.DIRTYPE),
        special("link", tarfile.SYMTYPE, "/etc"),
    ],
    ids=lambda member: f"{member.name} {member.type.decode()}",
)
def test_unsafe_members_are_refused(tmp_path: Path, member: tarfile.TarInfo) -> None:
    path = write(tmp_path / "a.tar", ("./", b""), ("0.jpg", encoded()), (member, b""), ("2.jpg", encoded()))
    samples = read(path)
    assert intact(samples) == ["0", "2"]
    assert samples[1].pixels is None
    assert samples[1].problem is not None
    assert f"{path} has a member '{member.name}' " in samples[1].problem


def test_a_sparse_member_is_not_read(tmp_path: Path) -> None:
    info = special("1.jpg", tarfile.REGTYPE)
    info.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.map": "0,0",
        "GNU.sparse.size": str(2**50),
    }
    samples = read(write(tmp_path / "a.tar", ("0.jpg", encoded()), (info, b""), ("2.jpg", encoded())))
    assert intact(samples) == ["0", "2"]
    assert "not a regular file" in str(samples[1].problem)


def test_an_unreadable_caption_does_not_discard_the_image(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.tar",
        ("0.jpg", encoded()),
        ("0.json", b'{"caption": "of json"'),
        ("0.txt", b"of text"),
        ("1.jpg", encoded()),
        ("1.txt", b"caf\xe9"),
        ("1.json", b'{"caption": "of json"}'),
        ("2.jpg", encoded()),
        ("2.json", b'["caption"]'),
        ("3.jpg", encoded()),
        ("3.json", b'{"caption": "\\ud83d"}'),
        ("4.jpg", encoded()),
        ("4.json", b"[" * 100_000),
    )
    samples = read(path)
    assert all(sample.pixels is not None for sample in samples)
    captions = [sample.metadata.get("caption") for sample in samples]
    assert captions == ["of text", "of json", None, None, None]
    for sample, name in zip(samples, ("0.json", "1.txt", "2.json", "3.json", "4.json"), strict=True):
        assert f"{name} of {path} cannot be read" in str(sample.problem)


def test_unreadable_images_are_reported(tmp_path: Path) -> None:
    bomb = bytearray(encoded(kind="BMP"))
    bomb[18:26] = (60_000).to_bytes(4, "little") * 2  # width and height in the header, for 10 GB of pixels
    path = write(
        tmp_path / "a.tar",
        ("0.jpg", b"not an image"),
        ("1.jpg", b""),
        ("2.jpg", encoded(quality=100)[:-40]),
        ("3.bmp", bytes(bomb)),
        ("4.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n"),
        ("5.txt", b"without an image"),
        ("6.jpg", encoded()),
    )
    samples = read(path)
    assert intact(samples) == ["6"]
    assert all(sample.pixels is None for sample in samples[:-1])
    for sample in (*samples[:3], samples[4]):
        assert f"{sample.key}.jpg of {path} is not a readable image (" in str(sample.problem)
    assert f"3.bmp of {path} is too large to read safely (" in str(samples[3].problem)
    assert "at 0x" not in "".join(str(sample.problem) for sample in samples)
    assert "has no image for the key '5'" in str(samples[5].problem)


def test_duplicates_are_reported(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.tar",
        ("0.jpg", encoded(10)),
        ("0.png", encoded(200, "PNG")),
        ("0.txt", b"first"),
        ("0.txt", b"second"),
        ("1.jpg", encoded()),
        ("0.jpg", encoded(200)),
    )
    first, other, again = read(path)
    assert first.pixels is not None
    assert first.pixels.max() < 20
    assert first.metadata == {"caption": "first"}
    assert "a second image '0.png'" in str(first.problem)
    assert "a second text '0.txt'" in str(first.problem)
    assert other.problem is None
    assert again.pixels is None
    assert "has several samples with the key '0' ('0.jpg')" in str(again.problem)


def test_samples_before_a_truncation_are_read(laion: Path) -> None:
    whole = laion.read_bytes()
    end = len(whole.rstrip(b"\0")) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE + tarfile.BLOCKSIZE
    for size in range(0, end + 1, 100):
        laion.write_bytes(whole[:size])
        *before, last = read(laion)
        assert intact(before) == [f"{number:09d}" for number in range(len(before))]
        assert last.pixels is None
        assert f"{laion} is broken after {len(before)} samples (" in str(last.problem)
    laion.write_bytes(whole[: end + tarfile.BLOCKSIZE])
    assert len(intact(read(laion))) == 6


def test_damage_in_the_middle_is_reported(laion: Path) -> None:
    with tarfile.open(laion) as tar:
        offset = tar.getmember("000000003.png" if "000000003.png" in tar.getnames() else "000000003.jpg").offset
    content = bytearray(laion.read_bytes())
    content[offset + 20] ^= 0xFF
    laion.write_bytes(content)
    samples = read(laion)
    assert intact(samples) == ["000000000", "000000001"]  # members of the sample before the damage may be missing
    assert "is broken after 2 samples (the end-of-archive block is missing)" in str(samples[-1].problem)


@pytest.mark.parametrize("size", [b"\xff" * 11 + b"\x00", b"\x80" + b"\xff" * 11], ids=["negative", "huge"])
def test_an_invalid_member_size_ends_the_tar(tmp_path: Path, size: bytes) -> None:
    path = write(tmp_path / "a.tar", ("0.jpg", encoded()), ("1.jpg", encoded()), ("2.jpg", encoded()))
    with tarfile.open(path) as tar:
        offset = tar.getmember("1.jpg").offset
    content = bytearray(path.read_bytes())
    content[offset + 124 : offset + 136] = size  # the size field of the header, in base 256
    header = content[offset : offset + 512]
    header[148:156] = b" " * 8
    content[offset + 148 : offset + 156] = f"{sum(header):06o}\0 ".encode()
    path.write_bytes(content)
    (last,) = read(path)
    assert "is broken after 0 samples ('1.jpg' has" in str(last.problem)


def test_a_file_that_is_not_a_tar_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar" * 1000)
    for name in ("a.tar", "absent.tar"):
        (last,) = read(tmp_path / name)
        assert f"{name} is broken after 0 samples (" in str(last.problem)


def test_one_image_is_decoded_at_a_time(laion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    monkeypatch.setattr(tars, "read_image", lambda file, name, remarks: decoded.append(name))
    for number, _ in enumerate(iterate_samples(laion), start=1):
        assert len(decoded) == number


def test_expansion_of_patterns_folders_and_files(tmp_path: Path) -> None:
    for name in ("0003.tar", "0001.tar", "0002.tar", "deep/0000.tar", "{x}.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "0001_stats.json").touch()

    def names(pattern: str) -> list[str]:
        return [path.relative_to(tmp_path).as_posix() for path, _ in find_tars(f"{tmp_path}/{pattern}")[0]]

    assert names("0002.tar") == ["0002.tar"]
    assert names("{0001..0003}.tar") == ["0001.tar", "0002.tar", "0003.tar"]
    assert names("{0003,deep/0000}.tar") == ["0003.tar", "deep/0000.tar"]
    assert names("") == ["0001.tar", "0002.tar", "0003.tar", "deep/0000.tar", "{x}.tar"]
    assert names("{deep,0001.tar}") == ["deep/0000.tar", "0001.tar"]
    assert names("{x}.tar") == ["{x}.tar"]


def test_errors_of_expansion(tmp_path: Path) -> None:
    (tmp_path / "0001.tar").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"0000\.tar does not exist \(2 of the 3 paths of .* are missing\)"):
        find_tars(f"{tmp_path}/{{0000..0002}}.tar")
    with pytest.raises(InputError, match=r"absent\.tar does not exist"):
        find_tars(f"{tmp_path}/absent.tar")
    with pytest.raises(InputError, match="unbalanced braces"):
        find_tars(f"{tmp_path}/{{0000..0002.tar")
    with pytest.raises(InputError, match=r"empty has no \.tar files"):
        find_tars(f"{tmp_path}/empty")


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("a{000..099}.tar", 100),
        ("{a,b{0..9..2},c}{x}{1..-1}.tar", 21),
        (r"\{a{1,2}.tar", 2),
        ("a{0..999999999999}.tar", MAX_COUNT + 1),
        ("a{" + "1" * 5000 + ".." + "2" * 5000 + "}.tar", MAX_COUNT + 1),
        ("{1,2}" * 25, MAX_COUNT + 1),
        ("{a," + "{1,2}" * 25 + "}", MAX_COUNT + 1),
    ],
)
def test_paths_of_a_pattern_are_counted_before_they_are_made(pattern: str, paths: int) -> None:
    assert paths_in(pattern) == paths
    if paths <= MAX_COUNT:
        assert len(list(braceexpand(pattern))) == paths
        return
    with pytest.raises(InputError, match=r"stands for more than 1,048,576 paths: correct its braces"):
        find_tars(f"x{pattern}")


def test_a_tar_without_samples_is_reported(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar")
    assert [sample.problem for sample in read(path)] == [f"{path} contains no files: leave it out."]


def test_indices_of_classes_beyond_all_counts_are_no_classes(tmp_path: Path) -> None:
    texts = (b"007", b"9" * 12, b"9" * 5000)
    members = [
        (f"{i}.{end}", content) for i, text in enumerate(texts) for end, content in (("jpg", encoded()), ("cls", text))
    ]
    samples = read(write(tmp_path / "a.tar", *members))
    assert [sample.class_text for sample in samples] == ["7", None, None]
    assert all("cls of" in str(sample.problem) and "is no class" in str(sample.problem) for sample in samples[1:])


def test_tars_in_a_tar_that_cannot_be_used_are_reported(tmp_path: Path) -> None:
    inner = write(tmp_path / "inner.tar", ("0.jpg", encoded())).read_bytes()
    path = write(tmp_path / "outer.tar", ("a.tar", inner), ("../b.tar", inner), ("a.tar", inner))
    found, problems = inner_tars(path)
    assert [tar.name for tar in found] == ["a.tar"]
    assert ["'../b.tar' outside" in problems[0], "several tars 'a.tar'" in problems[1]] == [True, True]
