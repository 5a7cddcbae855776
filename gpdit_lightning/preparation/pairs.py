"""Image pairs of few-shot sequences: finding them, and splitting them into training and held-out pairs by content."""

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from tqdm import tqdm

from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import IMAGE_EXTENSIONS, read_image
from gpdit_lightning.preparation.input_files import recording_of

FOLDER_NAMES = (("source", "target"), ("sources", "targets"))


class PairImage(NamedTuple):
    """An image file with its hashes, which determine whether it is held out: sha256 in hexadecimal digits."""

    path: Path
    content_hash: str
    """Hash of the seed and the pixels: equal for files with equal pixels."""
    recording_hash: str
    """Hash of the seed and the part of the name that identifies the recording; without a pattern, `content_hash`."""


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
    """Return a pair for each image of a folder, with the image on both sides.

    Raises:
        InputError: the folder has no images, or an image is unreadable.
    """
    paths = tqdm(images_in(folder), desc="reading", unit=" images", disable=None)
    images = [hash_image(path, read_image(path), seed, pattern) for path in paths]
    return [Pair(image, image) for image in images]


def pairs_from_folders(sources: Path, targets: Path, seed: int, pattern: str | None = None) -> list[Pair]:
    """Return the images of two folders, paired by name without extension.

    Raises:
        InputError: an image has no counterpart or is unreadable, or the images of a pair differ in size.
    """
    pairs = []
    for paths in tqdm(match_by_name(sources, targets), desc="reading", unit=" pairs", disable=None):
        images = zip(paths, read_pair(paths), strict=True)
        pairs.append(Pair(*(hash_image(path, pixels, seed, pattern) for path, pixels in images)))
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


def images_in(folder: Path) -> list[Path]:
    """Return the images of a folder, sorted by name and without hidden files; raises InputError if there are none."""
    extensions = ", ".join(IMAGE_EXTENSIONS)
    if not folder.is_dir():
        reason = "is not a folder" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {reason}: give a folder of {extensions} files.")
    paths = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in IMAGE_EXTENSIONS and not path.name.startswith(".") and path.is_file()
    ]
    if not paths:
        raise InputError(f"{folder} has no images: give a folder of {extensions} files.")
    return paths


def match_by_name(sources: Path, targets: Path) -> list[tuple[Path, Path]]:
    """Match the images of two folders by name without extension, in the order of the sources' names.

    Raises:
        InputError: a folder has no images or two images of the same name, or an image has no counterpart.
    """
    match_in_folder(images_in(targets), sources)
    return match_in_folder(images_in(sources), targets)


def match_in_folder(images: Iterable[Path], folder: Path) -> list[tuple[Path, Path]]:
    """Match each image with the image of the same name, without extension, in a folder.

    The folder may contain other images.

    Raises:
        InputError: an image has no counterpart, or two images have the same name.
    """
    candidates = _by_stem(images_in(folder))
    pairs = []
    for stem, path in _by_stem(images).items():
        if stem not in candidates:
            raise InputError(f"{path} has no counterpart named {stem} in {folder}: add it or remove the image.")
        pairs.append((path, candidates[stem]))
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


def hash_image(path: Path, pixels: Tensor, seed: int, pattern: str | None = None) -> PairImage:
    """Compute the hashes of an image.

    Args:
        path: path of the file.
        pixels: uint8 (1, 3, H, W).
        seed: seed of the choice of held-out images.
        pattern: regular expression for the part of the file name that identifies the recording; without it every image
            is a separate recording.
    """
    content = hashlib.sha256(f"{seed} {list(pixels.shape)} ".encode() + pixels.numpy().tobytes()).hexdigest()
    if not pattern:
        return PairImage(path, content, content)
    return PairImage(path, content, hashlib.sha256(f"{seed} {recording_of(path.name, pattern)}".encode()).hexdigest())


def _by_stem(images: Iterable[Path]) -> dict[str, Path]:
    """Return images by name without extension, in Unicode form NFC; raises InputError if two have the same name."""
    paths: dict[str, Path] = {}
    for path in images:
        if (other := paths.setdefault(unicodedata.normalize("NFC", path.stem), path)) is not path:
            raise InputError(f"{other} and {path} differ only in their extensions: rename or remove one of them.")
    return paths


def _size_text(pixels: Tensor) -> str:
    return "x".join(map(str, pixels.shape[-2:]))
