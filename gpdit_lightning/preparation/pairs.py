"""The image pairs of few-shot sequences: finding them, and holding some out by their content."""

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
    """An image file, and the hashes that decide whether it is held out: sha256 in hexadecimal digits."""

    path: Path
    content: str
    """Of the seed and the pixels: equal for files with equal pixels."""
    recording: str
    """Of the seed and the part of the name that identifies the recording; without a pattern equal to `content`."""


class Pair(NamedTuple):
    """A source and its target; the same image twice where a task makes both from one."""

    source: PairImage
    target: PairImage

    @property
    def contents(self) -> tuple[str, str]:
        """The content hashes of source and target."""
        return self.source.content, self.target.content


def find_pair_folders(folder: Path) -> tuple[Path, Path] | None:
    """The folders of the sources and of the targets inside a folder, if it holds both."""
    candidates = [(folder / sources, folder / targets) for sources, targets in FOLDER_NAMES]
    return next((both for both in candidates if all(path.is_dir() for path in both)), None)


def pair_folders(folder: Path, alternative: str = "give --sources and --targets") -> tuple[Path, Path]:
    """As `find_pair_folders`, but raises InputError, which offers the alternative, if the folder does not hold both."""
    if (folders := find_pair_folders(folder)) is None:
        raise InputError(
            f"{folder} does not hold the folders source and target (or sources and targets): name them so, or "
            f"{alternative}."
        )
    return folders


def pairs_from_folder(folder: Path, seed: int, pattern: str | None = None) -> list[Pair]:
    """Every image of a folder as both sides of a pair; raises InputError for no images or an unreadable one."""
    paths = tqdm(images_in(folder), desc="reading", unit=" images", disable=None)
    images = [hash_image(path, read_image(path), seed, pattern) for path in paths]
    return [Pair(image, image) for image in images]


def pairs_from_folders(sources: Path, targets: Path, seed: int, pattern: str | None = None) -> list[Pair]:
    """The images of two folders, paired by their names without extension.

    Raises:
        InputError: as `match_by_name`, an unreadable image, or a pair of two sizes.
    """
    pairs = []
    for paths in tqdm(match_by_name(sources, targets), desc="reading", unit=" pairs", disable=None):
        images = zip(paths, read_pair(paths), strict=True)
        pairs.append(Pair(*(hash_image(path, pixels, seed, pattern) for path, pixels in images)))
    return pairs


def split_pairs(pairs: Sequence[Pair], fraction: float) -> tuple[list[Pair], list[Pair]]:
    """Pairs for training and held-out pairs, each without duplicates and in an order that depends on the content only.

    A recording hash is a number in [0, 1). If it is below `fraction`, every pair with an image of that recording is
    held out, in every task and whatever the other pairs are. So is every pair that shares an image or a recording with
    such a pair, directly or through other pairs, so that nothing is in both splits. If no hash is below `fraction`, the
    lowest is taken as if it were, unless `fraction` is 0.
    """
    lowest = _lowest_recordings(pairs)
    first = min(lowest.values(), default="")
    training: dict[tuple[str, str], Pair] = {}
    held_out: dict[tuple[str, str], Pair] = {}
    for pair in sorted(pairs, key=lambda pair: (lowest[pair.source.content], pair.contents)):
        hash = lowest[pair.source.content]
        is_held_out = fraction > 0 and (hash == first or int(hash, 16) < fraction * 16**64)
        (held_out if is_held_out else training).setdefault(pair.contents, pair)
    return list(training.values()), list(held_out.values())


def _lowest_recordings(pairs: Sequence[Pair]) -> dict[str, str]:
    """For each content and recording hash, the lowest recording hash among all connected pairs.

    Pairs that share a hash are connected; the lowest is passed along connections until nothing changes.
    """
    groups = [{hash for image in pair for hash in (image.content, image.recording)} for pair in pairs]
    lowest = {hash: image.recording for pair in pairs for image in pair for hash in (image.content, image.recording)}
    changed = True
    while changed:
        changed = False
        for group in groups:
            candidates = {lowest[hash] for hash in group}
            changed |= len(candidates) > 1
            lowest |= dict.fromkeys(group, min(candidates))
    return lowest


def images_in(folder: Path) -> list[Path]:
    """The images of a folder by name, except hidden files; raises InputError if there are none."""
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
    """The images of two folders, paired by their names without extension, in the order of the sources' names.

    Raises:
        InputError: no images, two of one name in a folder, or an image without counterpart.
    """
    match_in_folder(images_in(targets), sources)
    return match_in_folder(images_in(sources), targets)


def match_in_folder(images: Iterable[Path], folder: Path) -> list[tuple[Path, Path]]:
    """Each image with the one of the same name in a folder, extensions aside; raises InputError if it is missing.

    The folder may hold other images.
    """
    candidates = _by_stem(images_in(folder))
    pairs = []
    for stem, path in _by_stem(images).items():
        if stem not in candidates:
            raise InputError(f"{path} has no counterpart named {stem} in {folder}: add it or remove the image.")
        pairs.append((path, candidates[stem]))
    return pairs


def read_pair(paths: Sequence[Path]) -> list[Tensor]:
    """An image and, if there is one, its counterpart: uint8 (1, 3, H, W) each; InputError if their sizes differ."""
    images = [read_image(path) for path in paths]
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            raise InputError(
                f"{paths[0]} is {_size_text(images[0])} and its counterpart {path} is {_size_text(image)}: give both "
                "one size, since both are scaled and cropped in the same way."
            )
    return images


def hash_image(path: Path, pixels: Tensor, seed: int, pattern: str | None = None) -> PairImage:
    """An image with its hashes.

    Args:
        path: of the file; the pattern finds the recording in its name.
        pixels: uint8 (1, 3, H, W).
        seed: of the choice of held-out images.
        pattern: regular expression; without it every image is a recording of its own.
    """
    content = hashlib.sha256(f"{seed} {list(pixels.shape)} ".encode() + pixels.numpy().tobytes()).hexdigest()
    if not pattern:
        return PairImage(path, content, content)
    return PairImage(path, content, hashlib.sha256(f"{seed} {recording_of(path.name, pattern)}".encode()).hexdigest())


def _by_stem(images: Iterable[Path]) -> dict[str, Path]:
    """Images by name without extension, in one Unicode form; raises InputError if two share one."""
    paths: dict[str, Path] = {}
    for path in images:
        if (other := paths.setdefault(unicodedata.normalize("NFC", path.stem), path)) is not path:
            raise InputError(f"{other} and {path} differ only in their extensions: rename or remove one of them.")
    return paths


def _size_text(pixels: Tensor) -> str:
    return "x".join(map(str, pixels.shape[-2:]))
