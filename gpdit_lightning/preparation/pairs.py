"""The pairs of pictures behind few-shot sequences: finding them, and holding out some by what they show."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from tqdm import tqdm

from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import IMAGE_ENDINGS, read_image

SUBFOLDERS = (("source", "target"), ("sources", "targets"))


class Picture(NamedTuple):
    """A file and what it shows."""

    path: Path
    digest: str
    """sha256 of a seed and the pixels, in hexadecimal digits: the same for every file that shows the same."""


class Pair(NamedTuple):
    """A source and what it shall become; twice the same picture where a task makes both from one."""

    source: Picture
    target: Picture

    @property
    def digests(self) -> tuple[str, str]:
        """What source and target show."""
        return self.source.digest, self.target.digest


def folders_in(folder: Path) -> tuple[Path, Path]:
    """The folders of sources and of targets inside a folder; raises `InputError` where they are not there."""
    for names in SUBFOLDERS:
        sources, targets = (folder / name for name in names)
        if sources.is_dir() and targets.is_dir():
            return sources, targets
    raise InputError(
        f"{folder} does not hold the folders source and target (or sources and targets): name them so, or give "
        "--sources and --targets."
    )


def pairs_of_one(folder: Path, seed: int) -> list[Pair]:
    """Every picture of a folder as both sides of a pair; raises `InputError` for no pictures or an unreadable one."""
    shown = tqdm(pictures_in(folder), desc="reading", unit=" pictures", disable=None)
    pictures = [Picture(path, digest_of(read_image(path), seed)) for path in shown]
    return [Pair(picture, picture) for picture in pictures]


def pairs_of_two(sources: Path, targets: Path, seed: int) -> list[Pair]:
    """The pictures of two folders, paired by their names without ending.

    Raises:
        InputError: no pictures, an unreadable one, one without its counterpart or with two, or one of another size than
            its counterpart.
    """
    first, second = by_stem(sources), by_stem(targets)
    for here, there, folder in ((first, second, targets), (second, first, sources)):
        for stem, path in here.items():
            if stem not in there:
                raise InputError(f"{path} has no counterpart named {stem} in {folder}: add it or remove the picture.")
    pairs = []
    for stem, path in tqdm(first.items(), desc="reading", unit=" pairs", disable=None):
        source, target = read_image(path), read_image(second[stem])
        if source.shape != target.shape:
            raise InputError(
                f"{path} is {size_of(source)} and its counterpart {second[stem]} is {size_of(target)}: bring both to "
                "one size, since they are scaled and cropped alike and would not lie on each other."
            )
        pairs.append(Pair(Picture(path, digest_of(source, seed)), Picture(second[stem], digest_of(target, seed))))
    return pairs


def hold_out(pairs: Sequence[Pair], fraction: float) -> tuple[list[Pair], list[Pair]]:
    """Pairs for training and pairs held out, each without doubles and in an order that depends on what they show alone.

    A digest is a number in [0, 1) that belongs to a picture; if it is below `fraction`, every pair with that picture is
    held out, in whatever task and among whatever other pairs. So is every pair that shares a picture with such a pair,
    directly or through others: no picture stands on both sides. Where no picture is below, the lowest is taken as if it
    were, unless the fraction is 0.
    """
    lowest = {digest: digest for pair in pairs for digest in pair.digests}  # of all the pairs that a picture hangs with
    settled = False
    while not settled:
        settled = True
        for source, target in (pair.digests for pair in pairs):
            low = min(lowest[source], lowest[target])
            settled &= lowest[source] == lowest[target]
            lowest[source] = lowest[target] = low
    first = min(lowest.values(), default="")
    training: dict[tuple[str, str], Pair] = {}
    held_out: dict[tuple[str, str], Pair] = {}
    for pair in sorted(pairs, key=lambda pair: (lowest[pair.source.digest], pair.digests)):
        low = lowest[pair.source.digest]
        is_held_out = fraction > 0 and (low == first or int(low, 16) < fraction * 16**64)
        (held_out if is_held_out else training).setdefault(pair.digests, pair)
    return list(training.values()), list(held_out.values())


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder by name; raises `InputError` where there are none."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [path for path in paths if path.suffix.lower() in IMAGE_ENDINGS]
    if not found:
        raise InputError(f"{folder} holds no pictures: give a folder of {', '.join(IMAGE_ENDINGS)} files.")
    return found


def by_stem(folder: Path) -> dict[str, Path]:
    """The pictures of a folder by their names without ending; raises `InputError` where two share one."""
    found: dict[str, Path] = {}
    for path in pictures_in(folder):
        if (other := found.setdefault(path.stem, path)) is not path:
            raise InputError(f"{other} and {path} have one name but for the ending: rename or remove one of them.")
    return found


def digest_of(pixels: Tensor, seed: int) -> str:
    """sha256 of a seed and of a picture's pixels and size."""
    return hashlib.sha256(f"{seed} {list(pixels.shape)} ".encode() + pixels.numpy().tobytes()).hexdigest()


def size_of(pixels: Tensor) -> str:
    """A picture's size as people write it here: HEIGHTxWIDTH."""
    return "x".join(map(str, pixels.shape[-2:]))
