"""Reading of images in WebDataset tars, as img2dataset writes them: `KEY.jpg` (or .png, .webp), `KEY.txt`, `KEY.json`.

`KEY.cls` is the class. A tar whose first file is a tar, as ILSVRC2012_img_train.tar with one tar per class, is read as
these inner tars, each of which has the path OUTER.tar/INNER.tar.

As in webdataset, members form one sample if they are consecutive and their names agree up to the first dot of the last
path component. webdataset's own reader is not used, because it treats a broken header as the end of the tar, skips
links silently, and decodes members that are not needed.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from braceexpand import braceexpand
from torch import Tensor
from webdataset.tariterators import base_plus_ext

from gpdit_lightning.errors import InputError, TransientError
from gpdit_lightning.media.finding import FolderSearch, FoundFile, LeftOut
from gpdit_lightning.media.images import read_image
from gpdit_lightning.names import MAX_DIGITS, as_text, number_in
from gpdit_lightning.options.shared import MAX_COUNT
from gpdit_lightning.path_kinds import SEARCHED_EXTENSIONS, does_not_exist
from gpdit_lightning.regular_files import BoundedReader
from gpdit_lightning.retries import retried, transient_error

# Role of a member in its sample, by extension. Other members are not read.
ROLES = dict.fromkeys(SEARCHED_EXTENSIONS, "image") | {".txt": "text", ".json": "json", ".cls": "class"}
TAR = ".tar"
INNERMOST_BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
JSON_FIELDS = ("caption", "url")  # the fields of img2dataset's json that are kept


@dataclass(frozen=True)
class TarSample:
    """A sample of a tar, or the reason why it is missing."""

    key: str
    """Common part of the names of its members."""
    pixels: Tensor | None
    """uint8 (1, 3, H, W); None if there is no usable image."""
    metadata: dict[str, Any]
    """`caption` and `url`, if available."""
    sha256: str
    """Hash of the bytes of the image file, in hexadecimal digits; empty if there is none."""
    problem: str | None
    """The parts of the sample that are unusable, and why; None if there are none. The image may still be usable."""
    class_text: str | None = None
    """Content of its `.cls`: the index or the name of its class; None without one."""


class Member(NamedTuple):
    """A member of a tar that belongs to a sample."""

    name: str
    key: str
    role: str | None
    """A value of `ROLES`; None for members that are not read."""
    content: bytes
    problem: str | None


def find_tars(pattern: str) -> tuple[list[FoundFile], list[LeftOut]]:
    """Return the tars that match a pattern, in the order of the pattern, and the files and folders left out.

    Args:
        pattern: a tar, a folder that is searched for tars recursively, or either with braces, such as
            `laion/{00000..00012}.tar`. The names of the tars are relative to the part before the braces.

    Raises:
        InputError: braces are unbalanced or stand for more than `MAX_COUNT` paths, a tar is missing, or a folder
            contains no tar.
    """
    try:
        exists = os.path.exists(pattern)  # False for a pattern that is too long for a path
        if not exists and paths_in(pattern) > MAX_COUNT:
            raise InputError(f"{pattern} stands for more than {MAX_COUNT:,} paths: correct its braces.")
        paths = [Path(path) for path in ([pattern] if exists else braceexpand(pattern))]
    except InputError:
        raise
    except ValueError:
        raise InputError(f"{pattern} has unbalanced braces: write it like laion/{{00000..00012}}.tar.") from None
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise InputError(
            f"{missing[0]} {does_not_exist(missing[0])} ({len(missing)} of the {len(paths)} paths of {pattern!r} are "
            "missing): download it or correct the pattern."
        )
    root = Path(pattern) if Path(pattern).is_dir() else Path(pattern.partition("{")[0] + "*").parent
    tars: list[Path] = []
    unusable: list[LeftOut] = []
    for path in paths:
        if not path.is_dir():
            tars.append(path)
            continue
        search = FolderSearch(path)
        inside = sorted(file for file in search.files if file.suffix.lower() == TAR)
        if not inside:
            raise InputError(f"{path} has no .tar files: give another folder.")
        tars += inside
        unusable += search.findings.unusable
    return [FoundFile(path, as_text(path.relative_to(root).as_posix())) for path in tars], unusable


def paths_in(pattern: str) -> int:
    """Return the number of paths that a pattern with braces stands for, at most `MAX_COUNT` + 1, without making them.

    Groups are counted from the innermost on; a counted one is replaced by its number between null characters.
    """
    text, most = re.sub(r"\\.", "", pattern, flags=re.DOTALL).replace("\0", ""), MAX_COUNT + 1

    def product(part: str) -> int:
        return reduce(lambda count, other: min(count * int(other), most), re.findall("\0(\\d+)\0", part), 1)

    while group := INNERMOST_BRACES.search(text):
        if numbers := RANGE.fullmatch(group[1]):
            is_long = max(map(len, numbers.groups(""))) > MAX_DIGITS
            first, last, step = (0, most, 1) if is_long else map(int, numbers.groups("1"))
            count = abs(last - first) // (abs(step) or 1) + 1
        else:
            count = sum(map(product, group[1].split(",")))
        text = f"{text[: group.start()]}\0{min(count, most)}\0{text[group.end() :]}"
    return product(text)


class InnerTar(NamedTuple):
    """A tar in a tar."""

    name: str
    start: int
    """Position of its first byte in the outer tar."""
    size: int
    """Size in bytes."""


@retried
def inner_tars(path: Path) -> tuple[list[InnerTar], list[str]]:
    """Return the tars in a tar of tars, in order, and what is wrong with it; none for a tar whose first file is no tar.

    Of several tars with one name the first is used.

    Only the headers of a tar of tars are read, and of another one the first.

    Raises:
        TransientError: it cannot be read for a reason other than its content.
    """
    found: dict[str, InnerTar] = {}
    problems: list[str] = []
    try:
        with BoundedReader(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            end = os.fstat(file.fileno()).st_size
            for info in tar:
                is_tar = info.isreg() and not info.issparse() and info.name.lower().endswith(TAR)
                if not is_tar and info.isreg() and not found:
                    return [], []
                if info.size < 0 or info.offset_data + info.size > end:  # tarfile would loop at a negative size
                    raise tarfile.ReadError(f"{info.name!r} has {info.size} bytes, and the file ends before")
                name = as_text(info.name)
                if not is_tar:
                    continue
                if _check_safety(path, info) is not None:
                    problems.append(f"has {info.name!r} outside of its folder, which was not used: do not trust it")
                elif found.setdefault(name, inner := InnerTar(name, info.offset_data, info.size)) is not inner:
                    problems.append(f"has several tars {name!r}: only the first was used")
            _check_end(file, tar)
    except Exception as error:  # for many kinds of damage tarfile raises arbitrary exceptions
        if transient := transient_error(error, path):
            raise transient from None
        # A tar without inner ones is reported when its samples are read.
        if found:
            problems.append(f"is broken after {len(found)} tars ({error}): copy or download it again")
    return list(found.values()), problems


def _check_end(file: BinaryIO, tar: tarfile.TarFile) -> None:
    """Raise ReadError if the end-of-archive block does not follow the last member."""
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("the end-of-archive block is missing")


@lru_cache(maxsize=8)
def _inner_tars_by_name(path: Path, size: int, modified: int) -> dict[str, InnerTar]:
    return {inner.name: inner for inner in inner_tars(path)[0]}


def containing_file(path: Path) -> Path | None:
    """Return the file that a tar is or, for OUTER.tar/INNER.tar, the one that contains it; None if there is none."""
    return next((file for file in (path, *path.parents) if file.is_file()), None)


@contextmanager
def _open_tar(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a tar, which may be in another one, and yield the file at its first byte, and the position of its end."""
    outer = containing_file(path) or path
    with BoundedReader(outer) as file:
        status = os.fstat(file.fileno())
        if outer == path:
            yield file, status.st_size
            return
        inner = _inner_tars_by_name(outer, status.st_size, status.st_mtime_ns).get(
            as_text(path.relative_to(outer).as_posix())
        )
        if inner is None:
            raise tarfile.ReadError(f"{outer} has no complete {path.name}")
        file.seek(inner.start)
        yield file, inner.start + inner.size


def iterate_samples(path: Path) -> Iterator[TarSample]:
    """Yield the samples of a tar in order, with one in memory at a time.

    A fault is reported as a sample with a `problem`, and the iteration continues. A broken tar ends with such a sample;
    the sample before it is omitted, because members of it may be missing.

    Args:
        path: the tar, or OUTER.tar/INNER.tar.

    Raises:
        TransientError: the tar cannot be read for a reason other than its content.
    """
    keys: set[str] = set()
    try:
        for key, group in groupby(_members(path), key=lambda member: member.key):
            members = list(group)
            if key in keys:
                names = ", ".join(repr(member.name) for member in members)
                problem = f"{path} has several samples with the key {key!r} ({names}): only the first was used."
                yield TarSample(key, None, {}, "", problem)
            else:
                keys.add(key)
                yield _build_sample(path, key, members)
        if not keys:
            yield TarSample(as_text(path.name), None, {}, "", f"{path} contains no files: leave it out.")
    except tarfile.ReadError as error:
        problem = f"{path} is broken after {len(keys)} samples ({error}): copy or download it again."
        yield TarSample(as_text(path.name), None, {}, "", problem)


def _members(path: Path) -> Iterator[Member]:
    """Yield the members that belong to samples.

    Raises:
        tarfile.ReadError: the tar is broken.
        TransientError: it cannot be read for another reason.
    """
    try:
        with _open_tar(path) as (file, end), tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                problem = _check_safety(path, info)
                # With a negative size tarfile would move backwards and loop forever.
                if info.size < 0 or (not problem and info.offset_data + info.size > end):
                    raise tarfile.ReadError(f"{info.name!r} has {info.size} bytes, and the file ends before")
                name = as_text(info.name)
                key, extension = base_plus_ext(name)
                role = ROLES.get(f".{extension}".lower())
                content = b""
                if role and not problem:
                    file.seek(info.offset_data)
                    content = file.read(info.size)
                if problem or (key and not info.isdir()):
                    yield Member(name, key or name, role, content, problem)
            _check_end(file, tar)
    except Exception as error:  # for many kinds of damage tarfile raises arbitrary exceptions
        raise transient_error(error, path) or tarfile.ReadError(str(error)) from None


def _check_safety(path: Path, info: tarfile.TarInfo) -> str | None:
    """Return the reason why a member must not be read, or None."""
    if info.name.startswith("/") or ".." in PurePosixPath(info.name).parts:
        return f"{path} has a member {info.name!r} outside of its folder, which was not used: do not trust this tar."
    # A sparse file of a few bytes may declare any size.
    if not (info.isreg() or info.isdir()) or info.issparse():
        return f"{path} has a member {info.name!r} that is not a regular file and was not used: do not trust this tar."
    return None


def _build_sample(path: Path, key: str, members: Sequence[Member]) -> TarSample:
    problems = [member.problem for member in members if member.problem]
    by_role: dict[str, Member] = {}
    for member in members:
        if member.role and not member.problem and by_role.setdefault(member.role, member) is not member:
            problems.append(
                f"{path} has a second {member.role} {member.name!r} for the same sample: only the first was used."
            )
    pixels: Tensor | None = None
    metadata: dict[str, Any] = {}
    class_text = None
    if "image" in by_role:
        image = by_role["image"]
        try:
            pixels = read_image(io.BytesIO(image.content), f"{image.name} of {path}", remarks=problems)
        except TransientError:
            raise
        except InputError as error:
            problems.append(str(error))
    else:
        problems.append(f"{path} has no image for the key {key!r}: remove this sample.")
    # A caption in a text member takes precedence over one in the JSON.
    for role, read in (("json", _json_metadata), ("text", _text_metadata)):
        if role in by_role:
            try:
                metadata |= read(by_role[role].content)
            except (ValueError, RecursionError) as error:
                problems.append(
                    f"{by_role[role].name} of {path} cannot be read ({error}): the rest of the sample was used."
                )
    if "class" in by_role:
        class_text = _class_text(by_role["class"].content)
        if class_text is None:
            name = by_role["class"].name
            problems.append(
                f"{name} of {path} is no class (a name, or an index below {MAX_COUNT:,}): the rest of the sample was "
                "used."
            )
    sha256 = "" if pixels is None else hashlib.sha256(by_role["image"].content).hexdigest()
    return TarSample(key, pixels, metadata, sha256, " ".join(problems) or None, class_text)


def _class_text(content: bytes) -> str | None:
    """Return the text of a `.cls`, an index without leading zeros; None if it is empty, no UTF-8 or too large."""
    try:
        text = content.decode().strip()
    except UnicodeDecodeError:
        return None
    if text.isdecimal():
        number = number_in(text)
        return None if number is None or number >= MAX_COUNT else str(number)
    return text or None


def _json_metadata(content: bytes) -> dict[str, str]:
    values = json.loads(content)
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    return {
        name: _encodable(values[name])
        for name in JSON_FIELDS
        if isinstance(values.get(name), str) and values[name].strip()
    }


def _text_metadata(content: bytes) -> dict[str, str]:
    caption = content.decode().strip()
    return {"caption": caption} if caption else {}


def _encodable(text: str) -> str:
    """Strip a text; raises `ValueError` for a lone surrogate, which may occur in JSON but UTF-8 cannot encode."""
    text.encode()
    return text.strip()
