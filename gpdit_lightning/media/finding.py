"""Search of folders and lists for videos and images: the same rules for every command."""

import os
import unicodedata
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from gpdit_lightning.errors import InputError
from gpdit_lightning.media.containers import MIME_TYPES, is_video
from gpdit_lightning.media.images import IMAGE_FORMATS
from gpdit_lightning.names import as_text, from_text
from gpdit_lightning.path_kinds import EXTENSIONS, NOUNS, Medium, does_not_exist, found_at, reason_and_cure
from gpdit_lightning.regular_files import check_regular, read_lines
from gpdit_lightning.retries import retried, transient_error

# Extensions of files that often accompany videos and images. These files are counted, but not opened.
COMPANIONS = {
    *(".txt", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".md", ".html", ".pdf", ".log", ".nfo"),
    *(".srt", ".vtt", ".ass", ".url", ".ini", ".db", ".py", ".sh", ".npy", ".npz", ".pkl", ".pt", ".pth", ".parquet"),
    *(".safetensors", ".tar", ".zip", ".gz", ".mp3", ".wav", ".m4a", ".flac", ".aac", ".opus"),
}
LIST_EXTENSION = ".txt"
VANISHED = "was removed while its folder was searched"
MAX_SHOWN = 5  # unusable files in a message


class FoundFile(NamedTuple):
    """A file that was found."""

    path: Path
    name: str
    """Path relative to the folder that was searched, with slashes; valid Unicode, so that JSON can store it."""


class LeftOut(NamedTuple):
    """A file, folder or image of a tar that is not used, or not as a whole."""

    source: str
    """Its name, as in `FoundFile`."""
    reason: str
    retry: bool = False
    """Whether the next preparation reads it again, since the reason may pass."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object; `retry` is left out if it is false."""
        return {"source": self.source, "reason": self.reason} | ({"retry": True} if self.retry else {})


@dataclass
class Findings:
    """Result of a search."""

    files: list[FoundFile] = field(default_factory=list)
    """The videos, or the images, sorted by path."""
    unusable: list[LeftOut] = field(default_factory=list)
    """Dangling links, folders that cannot be read, special files, and files of unknown content."""
    repeated: list[LeftOut] = field(default_factory=list)
    """Links to folders that are searched under another name."""
    others: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Names of the other files by extension: hidden files, companions, and files of the other medium."""

    def describe_others(self) -> str | None:
        """Return one sentence about the number of other files by extension; None if there are none."""
        if not self.others:
            return None
        by_count = sorted(self.others.items(), key=lambda item: (-len(item[1]), item[0]))
        counts = ", ".join(f"{len(names)} {extension}" for extension, names in by_count)
        return f"other files were left out: {counts} (the first is {by_count[0][1][0]})"

    def has_others(self, medium: Medium) -> bool:
        """Return whether the other files include videos, or images."""
        return not self.others.keys().isdisjoint(EXTENSIONS[medium])

    def forget_others(self, medium: Medium) -> None:
        """Remove the videos, or the images, from the other files: another search uses them."""
        for extension in self.others.keys() & set(EXTENSIONS[medium]):
            del self.others[extension]

    def describe_left_out(self) -> list[str]:
        """Return sentences about everything that was left out, at most `MAX_SHOWN` of them about unusable files."""
        sentences = [f"{name} was left out: it {reason}" for name, reason, _ in self.unusable[:MAX_SHOWN]]
        if len(self.unusable) > MAX_SHOWN:
            sentences.append(f"{len(self.unusable) - MAX_SHOWN} more files were left out for such reasons")
        return sentences + ([others] if (others := self.describe_others()) else [])


def medium_of(path: Path) -> Medium | None:
    """Return the medium of a file, by its extension or else its content; None if it is neither video nor image."""
    by_extension = (medium for medium, extensions in EXTENSIONS.items() if path.suffix.lower() in extensions)
    if medium := next(by_extension, None):
        return medium
    if path.suffix.lower() in COMPANIONS:
        return None
    if path.is_file() and not path.stat().st_size:  # also files of /proc, of which some never end a read
        return None
    return "image" if is_image(path) else "video" if is_video(path) else None


def _is_known_kind(extension: str) -> bool:
    """Return whether files of an extension are known not to be videos or images that can be read."""
    return extension in COMPANIONS or MIME_TYPES.guess_type(f"file{extension}")[0] is not None


def is_image(path: Path) -> bool:
    """Return whether the header of a regular file is that of an image in a supported format."""
    if not path.is_file():
        return False
    try:
        with Image.open(path, formats=IMAGE_FORMATS):
            return True
    except Exception:  # for some files Pillow raises other exceptions than OSError
        return False


def search_folder(folder: Path, medium: Medium, recursive: bool = True) -> Findings:
    """Find the videos, or the images, in a folder.

    A file is used by its extension, whatever it contains; a file of an unknown extension is used if its content is of
    the medium. Symbolic links are followed. A folder that can be reached in several ways, also in a circle, is searched
    once; a real folder precedes links to it. Names that begin with a dot are left out.

    Args:
        folder: the folder.
        medium: what to find.
        recursive: whether to search subfolders.
    """
    search = FolderSearch(folder, recursive)
    findings = search.findings
    names: dict[str, Path] = {}
    for path in sorted(search.files):
        name, extension = as_text(path.relative_to(folder).as_posix()), path.suffix.lower()
        found = medium_of(path)
        if found is None and not _is_known_kind(extension):
            findings.unusable.append(LeftOut(name, f"is not a readable {medium} (unknown content)"))
            continue
        if found != medium:
            findings.others[extension or "without extension"].append(name)
            continue
        if names.setdefault(name, path) is not path:  # a name that contains an escape
            findings.unusable.append(LeftOut(name, "has the same name as another file, as text: rename it"))
        else:
            findings.files.append(FoundFile(path, name))
    return findings


class FolderSearch:
    """Search of a folder, and of its subfolders, for regular files; see `search_folder`.

    Args:
        root: the folder.
        recursive: whether to search subfolders.

    Attributes:
        files: paths of the files that are not hidden.
        findings: gets everything else.
    """

    def __init__(self, root: Path, recursive: bool = True) -> None:
        self.root, self.recursive = root, recursive
        self.files: list[Path] = []
        self.findings = Findings()
        # By device and inode: why the folder must not be searched (again).
        self._searched: dict[tuple[int, int], str] = {}
        for parent in Path(os.path.realpath(root)).parents:  # a link to one of them closes a circle
            with suppress(OSError):
                reason = f"is a link to {as_text(parent)}, which contains the folder that is searched"
                self._searched[_identity(os.stat(parent))] = reason
        folders, links = deque([root]), deque[Path]()
        while folders or links:
            folder = folders.popleft() if folders else links.popleft()
            self._search(folder, folders, links)

    def _search(self, folder: Path, folders: deque[Path], links: deque[Path]) -> None:
        """Search one folder; append its subfolders, and the links to folders, to the queues."""
        try:
            identity = _identity(os.stat(folder))
            if identity in self._searched:
                self.findings.repeated.append(LeftOut(self._name(folder), self._searched[identity]))
                return
            self._searched[identity] = f"is the same folder as {self._name(folder)}, under which its files are found"
            entries = _entries(folder)
        except OSError as error:
            reason = f"is a folder that cannot be read ({error.strerror}): check its permissions"
            self.findings.unusable.append(LeftOut(self._name(folder), reason))
            return
        for entry in entries:
            path = folder / entry.name
            try:
                kind = "folder" if entry.is_dir() else "file" if entry.is_file() else None
            except OSError:  # a link to itself
                kind = None
            if entry.name.startswith("."):
                self.findings.others["hidden"].append(self._name(path))
            elif kind == "folder" and not self.recursive:
                self.findings.others["folders"].append(self._name(path))
            elif kind == "folder":
                (links if entry.is_symlink() else folders).append(path)
            elif kind == "file":
                self.files.append(path)
            elif entry.is_symlink():
                try:
                    reason = f"is a link to {as_text(os.readlink(path))}, which does not exist"
                except OSError:
                    reason = VANISHED
                self.findings.unusable.append(LeftOut(self._name(path), reason))
            else:
                self.findings.unusable.append(LeftOut(self._name(path), "is not a regular file"))

    def _name(self, path: Path) -> str:
        return as_text(path.relative_to(self.root).as_posix() if path != self.root else path)


@retried
def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, sorted by name; raises TransientError if the disk or the network fails."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except PermissionError:
        raise
    except OSError as error:
        raise (transient_error(error, folder) or error) from None


def _identity(status: os.stat_result) -> tuple[int, int]:
    """Return device and inode, which are equal for a file or folder and the links to it."""
    return status.st_dev, status.st_ino


def without_repeated(files: Sequence[FoundFile]) -> tuple[list[FoundFile], list[LeftOut]]:
    """Return each file once, and the other names of files, with the reason.

    The name of a file precedes those of links to it; among equal ones the first precedes.
    """
    by_file: dict[tuple[int, int | Path], list[FoundFile]] = defaultdict(list)
    vanished = list[LeftOut]()
    for file in files:
        try:
            by_file[identity_of(file.path)].append(file)
        except FileNotFoundError:
            vanished.append(LeftOut(file.name, VANISHED))
    kept = {same[0] if len(same) == 1 else min(same, key=lambda file: is_link(file.path)) for same in by_file.values()}
    repeated = [
        LeftOut(file.name, f"is the same file as {other.name} and is used under that name")
        for same in by_file.values()
        for other in kept.intersection(same)
        for file in same
        if file not in kept
    ]
    return [file for file in dict.fromkeys(files) if file in kept], repeated + vanished


def identity_of(path: Path, status: os.stat_result | None = None) -> tuple[int, int | Path]:
    """Return device and inode of a file, which links to it share; on file systems without inodes, the real path.

    Args:
        path: the file.
        status: its status; None to read it.
    """
    status = status or path.stat()
    return status.st_dev, status.st_ino or Path(os.path.realpath(path))


def is_link(path: Path) -> bool:
    """Return whether a part of a path is a symbolic link."""
    return os.path.realpath(path) != os.path.abspath(path)


def read_file_list(path: Path) -> list[FoundFile]:
    """Return the files of a list: UTF-8 text with one path per line, absolute or relative to the folder of the list.

    Empty lines and comments (lines that begin with "#", unless a file has that name) are ignored. A path may be in
    quotes. Bytes of a name that are not UTF-8 are written as in messages, such as caf\\xe9.mp4.

    Raises:
        InputError: the list is unreadable or empty, or one of the files does not exist.
    """
    files = []
    for number, line in read_lines(path, "give a list that can be read"):
        file = next(filter(os.path.isfile, _paths_of_line(path.parent, line)), None)
        if file is not None:
            name = file.relative_to(path.parent).as_posix() if file.is_relative_to(path.parent) else file.name
            files.append(FoundFile(file, as_text(name)))
        elif line.strip() and not line.startswith("#"):
            file = path.parent / line.strip()
            problem = "is not a regular file" if file.exists() else does_not_exist(file)
            raise InputError(f"the list {path} contains {file} in line {number}, which {problem}: correct that line.")
    if not files:
        raise InputError(f"the list {path} is empty: write one path per line.")
    return files


def _paths_of_line(folder: Path, line: str) -> Iterator[Path]:
    """Yield the paths that a line of a list may mean: as written, without surrounding space, without quotes."""
    stripped = line.strip()
    texts = [line.rstrip("\r\n"), stripped]
    if len(stripped) > 2 and stripped[0] == stripped[-1] and stripped[0] in "'\"":
        texts.append(stripped[1:-1])
    for text in filter(str.strip, texts):
        for form in (text, from_text(text), *(unicodedata.normalize(form, text) for form in ("NFC", "NFD"))):
            if "\0" not in form:
                yield folder / form


def is_of_other_kind(path: Path) -> bool:
    """Return whether an existing path holds what is known not to be videos or images: a run, a model, data, a recipe.

    The folder of a run may contain videos and images too.
    """
    return found_at(path).kind not in ("media", None)


def find_media(path: Path, medium: Medium) -> Findings:
    """Find the videos, or the images, that a path specifies: a folder, a single file, or a .txt list of files.

    Raises:
        InputError: the path does not exist, or it has no files of the medium.
    """
    if path.is_dir():
        findings = search_folder(path, medium)
        if not findings.files:
            other: Medium = "image" if medium == "video" else "video"
            cure = f"give it as --{other}s" if findings.has_others(other) else "give another folder"
            reason = f", {reason_and_cure(path, 'media', cure)}" if is_of_other_kind(path) else f": {cure}"
            left_out = "".join(f"; {sentence}" for sentence in findings.describe_left_out())
            raise InputError(f"{path} has no {medium} files{reason}{left_out}.")
        return findings
    cure = f"give a folder, a file or a .txt list of {medium}s"
    if not path.exists():
        raise InputError(f"{path} {does_not_exist(path)}: {cure}.")
    check_regular(path, cure)
    if is_of_other_kind(path):
        raise InputError(f"{path} is no {medium}, {reason_and_cure(path, 'media', cure)}.")
    found = medium_of(path)
    if found and found != medium and path.suffix.lower() != ".gif":  # which is also an image
        raise InputError(f"{path} is {NOUNS[found]}, but {medium}s are needed: give it as --{found}s.")
    if path.suffix.lower() == LIST_EXTENSION:
        return Findings(read_file_list(path))
    return Findings([FoundFile(path, as_text(path.name))])
