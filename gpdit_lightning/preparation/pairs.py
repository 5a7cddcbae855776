"""Image pairs of few-shot sequences: finding them, and splitting them into training and held-out pairs by content."""

import hashlib
import logging
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.media.finding import FoundFile, search_folder
from gpdit_lightning.media.images import read_image
from gpdit_lightning.path_kinds import IMAGE_EXTENSIONS, does_not_exist
from gpdit_lightning.preparation.splits import recording_of
from gpdit_lightning.progress import progress_bar

log = logging.getLogger(__name__)

FOLDER_NAMES = (("source", "target"), ("sources", "targets"))


class PairImage(NamedTuple):
    """An image file with its hashes, which determine whether it is held out: sha256 in hexadecimal digits."""

    path: Path
    content_hash: str
    """Hash of the seed and the pixels: equal for files with equal pixels."""
    recording_hash: str
    """Hash of the seed and the part of the name that identifies the recording; without a pattern, `content_hash`."""
    name: str
    """Path relative to the folder that was searched."""


class Pair(NamedTuple):
    """A source and its target; the same image twice if a task makes both from one image."""

    source: PairImage
    target: PairImage

    @property
    def content_hashes(self) -> tuple[str, str]:
        """Content hashes of source and target."""
        return self.source.content_hash, self.target.content_hash


def find_pair_folders(folder: Path) -> tuple[Path, Path] | None:
    """Return the folders of the sources and of the targets inside a folder; None if either is missing."""
    candidates = [(folder / sources, folder / targets) for sources, targets in FOLDER_NAMES]
    return next((both for both in candidates if all(path.is_dir() for path in both)), None)


def pair_folders(folder: Path, alternative: str = "give --sources and --targets") -> tuple[Path, Path]:
    """Return the folders of the sources and of the targets inside a folder.

    Args:
        folder: folder that contains both.
        alternative: advice for the error message.

    Raises:
        InputError: either folder is missing.
    """
    if (folders := find_pair_folders(folder)) is None:
        raise InputError(
            f"{folder} does not contain the folders source and target (or sources and targets): rename them, or "
            f"{alternative}."
        )
    return folders


def pairs_from_folder(folder: Path, seed: int, pattern: str | None = None) -> list[Pair]:
    """Return a pair for each image of a folder and its subfolders, with the image on both sides.

    Unreadable images are skipped, and the log names them.

    Raises:
        InputError: the folder has no images.
    """
    images = []
    for file in progress_bar(images_in(folder), desc="reading", unit=" images", disable=None):
        try:
            images.append(hash_image(file, read_image(file.path), seed, pattern))
        except InputError as error:
            log.warning("skipped: %s", error)
    return [Pair(image, image) for image in images]


def pairs_from_folders(sources: Path, targets: Path, seed: int, pattern: str | None = None) -> list[Pair]:
    """Return the images of two folders and their subfolders, paired by relative path without extension.

    Raises:
        InputError: an image has no counterpart or is unreadable, or the images of a pair differ in size.
    """
    pairs = []
    for files in progress_bar(match_by_name(sources, targets), desc="reading", unit=" pairs", disable=None):
        images = zip(files, read_pair([file.path for file in files]), strict=True)
        pairs.append(Pair(*(hash_image(file, pixels, seed, pattern) for file, pixels in images)))
    return pairs


def split_pairs(pairs: Sequence[Pair], fraction: float) -> tuple[list[Pair], list[Pair]]:
    """Split pairs into training and held-out pairs, without duplicates and in an order that depends on content only.

    A recording hash is interpreted as a number in [0, 1). If it is below `fraction`, every pair with an image of that
    recording is held out, independently of the task and of the other pairs. Every pair that shares an image or a
    recording with such a pair, directly or through other pairs, is held out too, so that the splits have nothing in
    common. If no hash is below `fraction`, the recording with the lowest hash is held out, unless `fraction` is 0.

    Returns:
        Training pairs and held-out pairs.
    """
    lowest = _lowest_recordings(pairs)
    first = min(lowest.values(), default="")
    training: dict[tuple[str, str], Pair] = {}
    held_out: dict[tuple[str, str], Pair] = {}
    for pair in sorted(pairs, key=lambda pair: (lowest[pair.source.content_hash], pair.content_hashes)):
        hash = lowest[pair.source.content_hash]
        is_held_out = fraction > 0 and (hash == first or int(hash, 16) < fraction * 16**64)
        (held_out if is_held_out else training).setdefault(pair.content_hashes, pair)
    return list(training.values()), list(held_out.values())


def _lowest_recordings(pairs: Sequence[Pair]) -> dict[str, str]:
    """Return, for each content and recording hash, the lowest recording hash among all connected pairs.

    Pairs that share a hash are connected. The lowest hash is propagated along connections until nothing changes.
    """
    groups = [{hash for image in pair for hash in (image.content_hash, image.recording_hash)} for pair in pairs]
    lowest = {
        hash: image.recording_hash
        for pair in pairs
        for image in pair
        for hash in (image.content_hash, image.recording_hash)
    }
    changed = True
    while changed:
        changed = False
        for group in groups:
            candidates = {lowest[hash] for hash in group}
            changed |= len(candidates) > 1
            lowest |= dict.fromkeys(group, min(candidates))
    return lowest


def images_in(folder: Path, recursive: bool = True) -> list[FoundFile]:
    """Return the images of a folder, sorted by path; the log names the files that are left out.

    Args:
        folder: the folder.
        recursive: whether to search subfolders.

    Raises:
        InputError: the folder does not exist or has no images.
    """
    extensions = ", ".join(IMAGE_EXTENSIONS)
    if not folder.is_dir():
        reason = "is not a folder" if folder.exists() else does_not_exist(folder)
        raise InputError(f"{folder} {reason}: give a folder of {extensions} files.")
    findings = search_folder(folder, "image", recursive)
    left_out = findings.describe_left_out()
    if not findings.files:
        reasons = "".join(f"; {sentence}" for sentence in left_out)
        raise InputError(f"{folder} has no images: give a folder of {extensions} files{reasons}.")
    for sentence in left_out:
        log.info("%s: %s", folder, sentence)
    return findings.files


def match_by_name(sources: Path, targets: Path, recursive: bool = True) -> list[tuple[FoundFile, FoundFile]]:
    """Match the images of two folders by relative path without extension, in the order of the sources.

    Args:
        sources, targets: the folders.
        recursive: whether to search subfolders.

    Raises:
        InputError: a folder has no images or two images of the same name, or an image has no counterpart.
    """
    of_sources, of_targets = images_in(sources, recursive), images_in(targets, recursive)
    _match(of_targets, of_sources, sources)
    return _match(of_sources, of_targets, targets)


def match_in_folder(images: Iterable[FoundFile], folder: Path) -> list[tuple[FoundFile, FoundFile]]:
    """Match each image with the image of the same name, without extension, in a folder.

    The folder may contain other images. Its subfolders are not searched.

    Raises:
        InputError: an image has no counterpart, or two images have the same name.
    """
    return _match(images, images_in(folder, recursive=False), folder)


def _match(
    images: Iterable[FoundFile], candidates: Iterable[FoundFile], folder: Path
) -> list[tuple[FoundFile, FoundFile]]:
    """Match each image with the candidate of the same name, else with the only one whose name is the same in NFC."""
    by_name = _by_name_without_extension(candidates)
    by_normal_form: dict[str, list[FoundFile]] = defaultdict(list)
    for name, file in by_name.items():
        by_normal_form[unicodedata.normalize("NFC", name)].append(file)
    pairs = []
    for name, image in _by_name_without_extension(images).items():
        similar = by_normal_form[unicodedata.normalize("NFC", name)]
        counterpart = by_name.get(name) or (similar[0] if len(similar) == 1 else None)
        if counterpart is None:
            raise InputError(f"{image.path} has no counterpart named {name} in {folder}: add it or remove the image.")
        pairs.append((image, counterpart))
    return pairs


def read_pair(paths: Sequence[Path]) -> list[Tensor]:
    """Read an image and, if given, its counterpart: uint8 (1, 3, H, W); raises InputError if their sizes differ."""
    images = [read_image(path) for path in paths]
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            raise InputError(
                f"{paths[0]} is {_size_text(images[0])} but its counterpart {path} is {_size_text(image)}: give both "
                "the same size, since both are scaled and cropped in the same way."
            )
    return images


def hash_image(file: FoundFile, pixels: Tensor, seed: int, pattern: str | None = None) -> PairImage:
    """Compute the hashes of an image.

    Args:
        file: the file.
        pixels: uint8 (1, 3, H, W).
        seed: seed of the choice of held-out images.
        pattern: regular expression for the part of the file name that identifies the recording; without it every image
            is a separate recording.
    """
    path, name = file
    content = hashlib.sha256(f"{seed} {list(pixels.shape)} ".encode() + pixels.numpy().tobytes()).hexdigest()
    if not pattern:
        return PairImage(path, content, content, name)
    recording = hashlib.sha256(f"{seed} {recording_of(name, pattern)}".encode()).hexdigest()
    return PairImage(path, content, recording, name)


def _by_name_without_extension(images: Iterable[FoundFile]) -> dict[str, FoundFile]:
    """Return images by name without extension; raises InputError if two have the same one."""
    by_name: dict[str, FoundFile] = {}
    for image in images:
        name = PurePosixPath(image.name).with_suffix("").as_posix()
        if (other := by_name.setdefault(name, image)) is not image:
            raise InputError(f"{other.path} and {image.path} differ only in their extensions: rename or remove one.")
    return by_name


def _size_text(pixels: Tensor) -> str:
    return "x".join(map(str, pixels.shape[-2:]))
