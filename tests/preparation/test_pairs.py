"""Finding pairs of pictures, and keeping held-out ones apart by what they show."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gpdit_lightning.errors import InputError
from gpdit_lightning.preparation.pairs import (
    Pair,
    Picture,
    hold_out,
    images_in,
    match_by_name,
    pair_folders,
    pairs_of_one,
    pairs_of_two,
)


def write_pictures(folder: Path, count: int, first: int = 0, size: tuple[int, int] = (6, 4)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for place in range(first, first + count):
        pixels = np.random.default_rng(place).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"p{place}.png")
    return folder


def pair(source: int, target: int) -> Pair:
    """A pair of pictures whose places in [0, 1) are hundredths."""
    return Pair(*(picture(number, number) for number in (source, target)))


def picture(number: int, origin: int) -> Picture:
    return Picture(Path(f"{number}.png"), *(f"{place * 16**64 // 100:064x}" for place in (number, origin)))


def numbers(pairs: list[Pair]) -> list[tuple[str, str]]:
    return [(pair.source.path.stem, pair.target.path.stem) for pair in pairs]


def names(pairs: list[Pair]) -> set[str]:
    return {picture.path.name for pair in pairs for picture in pair}


def test_the_pictures_below_the_fraction_are_held_out_with_all_that_they_hang_with() -> None:
    chained = [pair(80, 60), pair(60, 40), pair(40, 5)]  # 5 takes 40 along, that 60, and that 80
    pairs = [pair(70, 50), pair(30, 90), pair(9, 99), pair(11, 98), *chained]
    for shuffled in itertools.islice(itertools.permutations(pairs), 0, None, 97):
        training, held_out = hold_out(shuffled, 0.1)
        assert numbers(training) == [("11", "98"), ("30", "90"), ("70", "50")]
        assert numbers(held_out) == [("40", "5"), ("60", "40"), ("80", "60"), ("9", "99")]


def test_pictures_of_one_origin_are_held_out_together_and_by_its_place_alone() -> None:
    """1 and 2 are low, and of an origin that is not; 82 to 85 are of one below the fraction, and 86 shows what 85 does
    but is of another."""
    alone = [picture(1, 50), picture(2, 50), *(picture(number, 5) for number in (82, 83, 84, 85))]
    pairs = [Pair(one, one) for one in (*alone, picture(95, 60))] + [Pair(picture(85, 5), picture(86, 70))]
    for shuffled in itertools.islice(itertools.permutations(pairs), 0, None, 997):
        training, held_out = hold_out(shuffled, 0.1)
        assert {source for source, _ in numbers(training)} == {"1", "2", "95"}
        assert set(numbers(held_out)) == {(n, n) for n in ("82", "83", "84", "85")} | {("85", "86")}


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


def test_frames_of_one_recording_stand_on_one_side(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path, 40)
    for place in range(40):
        (folder / f"p{place}.png").rename(folder / f"clip{place // 5}_{place}.png")
    sides = [
        {name.partition("_")[0] for name in names(side)}
        for side in hold_out(pairs_of_one(folder, seed=0, pattern=r"clip\d+"), 0.3)
    ]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {f"clip{number}" for number in range(8)}
    assert 1 <= len(sides[1]) <= 5  # 2.4 of 8 in the mean; by the lowest of five pictures it would be 6.7


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
        pair_folders(tmp_path)
    (tmp_path / "sources").mkdir()
    (tmp_path / "target").mkdir()
    with pytest.raises(InputError, match="does not hold the folders"):
        pair_folders(tmp_path)
    (tmp_path / "targets").mkdir()
    assert pair_folders(tmp_path) == (tmp_path / "sources", tmp_path / "targets")


def test_hidden_files_and_folders_are_no_pictures(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "a", 1)
    (folder / "._p0.png").write_text("what macOS leaves on foreign disks")
    (folder / "b.png").mkdir()
    assert images_in(folder) == [folder / "p0.png"]
    for place, words in ((tmp_path / "nowhere", "does not exist"), (folder / "p0.png", "is no folder")):
        with pytest.raises(InputError, match=f"{place.name} {words}: give a folder"):
            images_in(place)
    with pytest.raises(InputError, match=r"b\.png holds no pictures: give"):
        images_in(folder / "b.png")


def test_names_find_each_other_however_their_accents_are_spelt(tmp_path: Path) -> None:
    for folder, name in (("a", "caf\u00e9"), ("b", "cafe\u0301")):
        write_pictures(tmp_path / folder, 1)
        (tmp_path / folder / "p0.png").rename(tmp_path / folder / f"{name}.png")
    ((first, second),) = match_by_name(tmp_path / "a", tmp_path / "b")
    assert (first.parent.name, second.parent.name) == ("a", "b")


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
    with pytest.raises(InputError, match=r"p1\.jpg and .*p1\.png have one name, endings aside"):
        pairs_of_two(sources, targets, seed=0)
