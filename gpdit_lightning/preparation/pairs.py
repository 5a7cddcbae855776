"""The pairs of pictures behind few-shot sequences: finding them, and holding out some by what they show."""

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

SUBFOLDERS = (("source", "target"), ("sources", "targets"))


class Picture(NamedTuple):
    """A file, what it shows, and what decides whether it is held out: sha256 in hexadecimal digits."""

    path: Path
    digest: str
    """Of a seed and the pixels: the same for every file that shows the same, pixel for pixel."""
    origin: str
    """Of a seed and the part of the name that all pictures of one recording share; without a pattern, the digest."""


class Pair(NamedTuple):
    """A source and what it shall become; twice the same picture where a task makes both from one."""

    source: Picture
    target: Picture

    @property
    def digests(self) -> tuple[str, str]:
        """What source and target show."""
        return self.source.digest, self.target.digest


def find_pair_folders(folder: Path) -> tuple[Path, Path] | None:
    """The folders of sources and of targets inside a folder, where both are there."""
    places = [(folder / sources, folder / targets) for sources, targets in SUBFOLDERS]
    return next((both for both in places if all(place.is_dir() for place in both)), None)


def pair_folders(folder: Path, otherwise: str = "give --sources and --targets") -> tuple[Path, Path]:
    """As `find_pair_folders`; raises `InputError` where they are not there, with another cure than naming them so."""
    if (found := find_pair_folders(folder)) is None:
        raise InputError(
            f"{folder} does not hold the folders source and target (or sources and targets): name them so, or "
            f"{otherwise}."
        )
    return found


def pairs_of_one(folder: Path, seed: int, pattern: str | None = None) -> list[Pair]:
    """Every picture of a folder as both sides of a pair; raises `InputError` for no pictures or an unreadable one."""
    shown = tqdm(images_in(folder), desc="reading", unit=" pictures", disable=None)
    pictures = [picture_of(path, read_image(path), seed, pattern) for path in shown]
    return [Pair(picture, picture) for picture in pictures]


def pairs_of_two(sources: Path, targets: Path, seed: int, pattern: str | None = None) -> list[Pair]:
    """The pictures of two folders, paired by their names without ending.

    Raises:
        InputError: as `match_by_name`, an unreadable picture, or one of another size than its counterpart.
    """
    pairs = []
    for paths in tqdm(match_by_name(sources, targets), desc="reading", unit=" pairs", disable=None):
        read = zip(paths, read_pair(paths), strict=True)
        pairs.append(Pair(*(picture_of(path, pixels, seed, pattern) for path, pixels in read)))
    return pairs


def hold_out(pairs: Sequence[Pair], fraction: float) -> tuple[list[Pair], list[Pair]]:
    """Pairs for training and pairs held out, each without doubles and in an order that depends on what they show alone.

    An origin is a number in [0, 1); if it is below `fraction`, every pair with a picture from there is held out, in
    whatever task and among whatever other pairs. So is every pair that shares a picture or an origin with such a pair,
    directly or through others: none stands on both sides. Where no origin is below, the lowest is taken as if it were,
    unless the fraction is 0.
    """
    ties = [{key for picture in pair for key in (picture.digest, picture.origin)} for pair in pairs]
    # The lowest origin of all the pairs that a picture hangs with.
    lowest = {key: picture.origin for pair in pairs for picture in pair for key in (picture.digest, picture.origin)}
    settled = False
    while not settled:
        settled = True
        for tied in ties:
            lows = {lowest[key] for key in tied}
            settled &= len(lows) == 1
            lowest |= dict.fromkeys(tied, min(lows))
    first = min(lowest.values(), default="")
    training: dict[tuple[str, str], Pair] = {}
    held_out: dict[tuple[str, str], Pair] = {}
    for pair in sorted(pairs, key=lambda pair: (lowest[pair.source.digest], pair.digests)):
        low = lowest[pair.source.digest]
        is_held_out = fraction > 0 and (low == first or int(low, 16) < fraction * 16**64)
        (held_out if is_held_out else training).setdefault(pair.digests, pair)
    return list(training.values()), list(held_out.values())


def images_in(folder: Path) -> list[Path]:
    """The pictures of a folder by name, but for hidden files; raises `InputError` where there are none."""
    endings = ", ".join(IMAGE_EXTENSIONS)
    if not folder.is_dir():
        reason = "is no folder" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {reason}: give a folder of {endings} files.")
    found = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in IMAGE_EXTENSIONS and not path.name.startswith(".") and path.is_file()
    ]
    if not found:
        raise InputError(f"{folder} holds no pictures: give a folder of {endings} files.")
    return found


def match_by_name(sources: Path, targets: Path) -> list[tuple[Path, Path]]:
    """The pictures of two folders, paired by their names without ending, in the order of the sources' names.

    Raises:
        InputError: no pictures, two of one name in a folder, or one without its counterpart.
    """
    match_in_folder(images_in(targets), sources)
    return match_in_folder(images_in(sources), targets)


def match_in_folder(pictures: Iterable[Path], folder: Path) -> list[tuple[Path, Path]]:
    """Each picture with that of its name, without ending, in a folder, which may hold others; raises `InputError`."""
    found = by_stem(images_in(folder))
    pairs = []
    for stem, path in by_stem(pictures).items():
        if stem not in found:
            raise InputError(f"{path} has no counterpart named {stem} in {folder}: add it or remove the picture.")
        pairs.append((path, found[stem]))
    return pairs


def by_stem(pictures: Iterable[Path]) -> dict[str, Path]:
    """Pictures by their names without ending, however accents are spelt; `InputError` where two share one."""
    found: dict[str, Path] = {}
    for path in pictures:
        if (other := found.setdefault(unicodedata.normalize("NFC", path.stem), path)) is not path:
            raise InputError(f"{other} and {path} have one name, endings aside: rename or remove one of them.")
    return found


def read_pair(paths: Sequence[Path]) -> list[Tensor]:
    """A picture and, if there is one, its counterpart: uint8 (1, 3, H, W) each; `InputError` if of different sizes."""
    pictures = [read_image(path) for path in paths]
    for path, picture in zip(paths, pictures, strict=True):
        if picture.shape != pictures[0].shape:
            raise InputError(
                f"{paths[0]} is {size_of(pictures[0])} and its counterpart {path} is {size_of(picture)}: bring both to "
                "one size, since they are scaled and cropped alike and would not lie on each other."
            )
    return pictures


def picture_of(path: Path, pixels: Tensor, seed: int, pattern: str | None = None) -> Picture:
    """A file's entry, from its pixels (1, 3, H, W) and, with a pattern, its name."""
    digest = hashlib.sha256(f"{seed} {list(pixels.shape)} ".encode() + pixels.numpy().tobytes()).hexdigest()
    origin = hashlib.sha256(f"{seed} {recording_of(path.name, pattern)}".encode()).hexdigest() if pattern else digest
    return Picture(path, digest, origin)


def size_of(pixels: Tensor) -> str:
    """A picture's size as people write it here: HEIGHTxWIDTH."""
    return "x".join(map(str, pixels.shape[-2:]))
