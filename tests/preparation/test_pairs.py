"""Finding pairs of pictures, and keeping held-out ones apart by what they show."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gpdit_lightning.errors import InputError
from gpdit_lightning.preparation.pairs import Pair, Picture, folders_in, hold_out, pairs_of_one, pairs_of_two


def write_pictures(folder: Path, count: int, first: int = 0, size: tuple[int, int] = (6, 4)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for place in range(first, first + count):
        pixels = np.random.default_rng(place).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"p{place}.png")
    return folder


def pair(source: int, target: int) -> Pair:
    """A pair of pictures whose places in [0, 1) are hundredths."""
    return Pair(*(Picture(Path(f"{number}.png"), f"{number * 16**64 // 100:064x}") for number in (source, target)))


def numbers(pairs: list[Pair]) -> list[tuple[str, str]]:
    return [(source.path.stem, target.path.stem) for source, target in pairs]


def names(pairs: list[Pair]) -> set[str]:
    return {picture.path.name for pair in pairs for picture in pair}


def test_the_pictures_below_the_fraction_are_held_out_with_all_that_they_hang_with() -> None:
    chained = [pair(80, 60), pair(60, 40), pair(40, 5)]  # 5 takes 40 along, that 60, and that 80
    pairs = [pair(70, 50), pair(30, 90), pair(9, 99), pair(11, 98), *chained]
    for shuffled in itertools.islice(itertools.permutations(pairs), 0, None, 97):
        training, held_out = hold_out(shuffled, 0.1)
        assert numbers(training) == [("11", "98"), ("30", "90"), ("70", "50")]
        assert numbers(held_out) == [("40", "5"), ("60", "40"), ("80", "60"), ("9", "99")]


def test_one_is_held_out_at_least_unless_none_is_wanted() -> None:
    pairs = [pair(30, 30), pair(20, 20), pair(40, 40)]
    assert numbers(hold_out(pairs, 0.01)[1]) == [("20", "20")]
    assert hold_out(pairs, 0.0)[1] == []
    assert hold_out([], 0.1) == ([], [])


def test_files_that_show_the_same_are_one_source(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path, 12)
    before = hold_out(pairs_of_one(folder, seed=0), 0.3)
    for place in range(12):
        shutil.copy(folder / f"p{place}.png", folder / f"q{place}.png")
        with Image.open(folder / f"p{place}.png") as image:
            image.save(folder / f"r{place}.bmp")
    assert hold_out(pairs_of_one(folder, seed=0), 0.3) == before


def test_who_is_held_out_stays_so_when_pictures_are_added_and_when_names_change(tmp_path: Path) -> None:
    training, held_out = hold_out(pairs_of_one(write_pictures(tmp_path / "few", 20), seed=0), 0.3)
    assert len(held_out) > 1
    more = write_pictures(tmp_path / "more", 60)
    found = hold_out(pairs_of_one(more, seed=0), 0.3)
    assert names(training) <= names(found[0])
    assert names(held_out) <= names(found[1])
    assert names(hold_out(pairs_of_one(more, seed=1), 0.3)[1]) != names(found[1])
    for place in range(20):
        (tmp_path / "few" / f"p{place}.png").rename(tmp_path / "few" / f"{99 - place}.png")
    renamed = {int(name.removesuffix(".png")) for name in names(hold_out(pairs_of_one(tmp_path / "few", 0), 0.3)[1])}
    assert {f"p{99 - number}.png" for number in renamed} == names(held_out)


def test_ready_pairs_are_held_out_alike_in_both_directions_and_with_their_pictures(tmp_path: Path) -> None:
    sources, targets = write_pictures(tmp_path / "source", 20), write_pictures(tmp_path / "raw", 20, first=50)
    for place in range(20):
        (targets / f"p{place + 50}.png").rename(targets / f"p{place}.png")
    _, held_out = hold_out(pairs_of_two(sources, targets, seed=0), 0.2)
    _, back = hold_out(pairs_of_two(targets, sources, seed=0), 0.2)
    assert held_out == [Pair(target, source) for source, target in back]
    alone = names(hold_out(pairs_of_one(sources, seed=0), 0.2)[1])
    assert alone
    assert alone <= {pair.source.path.name for pair in held_out}


def test_folders_in_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not hold the folders source and target"):
        folders_in(tmp_path)
    (tmp_path / "sources").mkdir()
    (tmp_path / "target").mkdir()
    with pytest.raises(InputError, match="does not hold the folders"):
        folders_in(tmp_path)
    (tmp_path / "targets").mkdir()
    assert folders_in(tmp_path) == (tmp_path / "sources", tmp_path / "targets")


def test_what_cannot_be_paired_is_named(tmp_path: Path) -> None:
    sources, targets = write_pictures(tmp_path / "a", 5), write_pictures(tmp_path / "b", 5)
    write_pictures(targets, 1, size=(5, 4))
    with pytest.raises(InputError, match=r"a/p0\.png is 4x6 and its counterpart .*b/p0\.png is 4x5: bring both to one"):
        pairs_of_two(sources, targets, seed=0)
    (targets / "p0.png").write_text("no picture")
    with pytest.raises(InputError, match=r"b/p0\.png is no readable picture"):
        pairs_of_two(sources, targets, seed=0)
    with pytest.raises(InputError, match=r"b/p0\.png is no readable picture"):
        pairs_of_one(targets, seed=0)
    (targets / "p3.png").unlink()
    with pytest.raises(InputError, match=r"p3\.png has no counterpart named p3 in .*b: add it"):
        pairs_of_two(sources, targets, seed=0)
    (sources / "p3.png").unlink()
    (sources / "p4.png").unlink()
    with pytest.raises(InputError, match=r"p4\.png has no counterpart named p4 in .*a: add it"):
        pairs_of_two(sources, targets, seed=0)
    shutil.copy(sources / "p1.png", sources / "p1.jpg")
    with pytest.raises(InputError, match=r"p1\.jpg and .*p1\.png have one name but for the ending"):
        pairs_of_two(sources, targets, seed=0)
    with pytest.raises(InputError, match=r"nowhere holds no pictures"):
        pairs_of_one(tmp_path / "nowhere", seed=0)
