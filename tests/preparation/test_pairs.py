"""Finding and splitting of image pairs."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gpdit_lightning.errors import InputError
from gpdit_lightning.preparation.pairs import (
    Pair,
    PairImage,
    images_in,
    match_by_name,
    pair_folders,
    pairs_from_folder,
    pairs_from_folders,
    split_pairs,
)


def write_images(folder: Path, count: int, first: int = 0, size: tuple[int, int] = (6, 4)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"p{i}.png")
    return folder


def pair(source: int, target: int) -> Pair:
    """Return a pair of images whose hashes, as fractions of 1, are these hundredths."""
    return Pair(*(image(number, number) for number in (source, target)))


def image(number: int, recording: int) -> PairImage:
    return PairImage(Path(f"{number}.png"), *(f"{i * 16**64 // 100:064x}" for i in (number, recording)), "")


def numbers(pairs: list[Pair]) -> list[tuple[str, str]]:
    return [(pair.source.path.stem, pair.target.path.stem) for pair in pairs]


def names(pairs: list[Pair]) -> set[str]:
    return {image.path.name for pair in pairs for image in pair}


def test_images_below_the_fraction_are_held_out_with_all_connected_pairs() -> None:
    connected = [pair(80, 60), pair(60, 40), pair(40, 5)]  # image 5 is held out, and so are the others
    pairs = [pair(70, 50), pair(30, 90), pair(9, 99), pair(11, 98), *connected]
    for shuffled in itertools.islice(itertools.permutations(pairs), 0, None, 97):
        training, held_out = split_pairs(shuffled, 0.1)
        assert numbers(training) == [("11", "98"), ("30", "90"), ("70", "50")]
        assert numbers(held_out) == [("40", "5"), ("60", "40"), ("80", "60"), ("9", "99")]


def test_images_are_held_out_by_the_hash_of_their_recording() -> None:
    """Images 1 and 2 have low content hashes, but their recording has not. The recording of 82 to 85 is below the
    fraction. Image 86 has another recording and is paired with 85."""
    alone = [image(1, 50), image(2, 50), *(image(number, 5) for number in (82, 83, 84, 85))]
    pairs = [Pair(one, one) for one in (*alone, image(95, 60))] + [Pair(image(85, 5), image(86, 70))]
    for shuffled in itertools.islice(itertools.permutations(pairs), 0, None, 997):
        training, held_out = split_pairs(shuffled, 0.1)
        assert {source for source, _ in numbers(training)} == {"1", "2", "95"}
        assert set(numbers(held_out)) == {(n, n) for n in ("82", "83", "84", "85")} | {("85", "86")}


def test_at_least_one_pair_is_held_out_unless_the_fraction_is_0() -> None:
    pairs = [pair(30, 30), pair(20, 20), pair(40, 40)]
    assert numbers(split_pairs(pairs, 0.01)[1]) == [("20", "20")]
    assert split_pairs(pairs, 0.0)[1] == []
    assert split_pairs([], 0.1) == ([], [])


def test_duplicates_by_pixels_are_dropped(tmp_path: Path) -> None:
    folder = write_images(tmp_path, 12)
    before = split_pairs(pairs_from_folder(folder, seed=0), 0.3)
    for i in range(12):
        shutil.copy(folder / f"p{i}.png", folder / f"q{i}.png")
        with Image.open(folder / f"p{i}.png") as file:
            file.save(folder / f"r{i}.bmp")
    assert split_pairs(pairs_from_folder(folder, seed=0), 0.3) == before


def test_frames_of_a_recording_are_in_the_same_split(tmp_path: Path) -> None:
    folder = write_images(tmp_path, 40)
    for i in range(40):
        (folder / f"p{i}.png").rename(folder / f"clip{i // 5}_{i}.png")
    splits = [
        {name.partition("_")[0] for name in names(split)}
        for split in split_pairs(pairs_from_folder(folder, seed=0, pattern=r"clip\d+"), 0.3)
    ]
    assert not splits[0] & splits[1]
    assert splits[0] | splits[1] == {f"clip{number}" for number in range(8)}
    assert 1 <= len(splits[1]) <= 5  # 2.4 of 8 on average; with the lowest content hash of five frames it would be 6.7


def test_splits_are_stable_when_images_are_added_or_renamed(tmp_path: Path) -> None:
    training, held_out = split_pairs(pairs_from_folder(write_images(tmp_path / "few", 20), seed=0), 0.3)
    assert len(held_out) > 1
    more = write_images(tmp_path / "more", 60)
    splits_of_more = split_pairs(pairs_from_folder(more, seed=0), 0.3)
    assert names(training) <= names(splits_of_more[0])
    assert names(held_out) <= names(splits_of_more[1])
    assert names(split_pairs(pairs_from_folder(more, seed=1), 0.3)[1]) != names(splits_of_more[1])
    for i in range(20):
        (tmp_path / "few" / f"p{i}.png").rename(tmp_path / "few" / f"{99 - i}.png")
    renamed = {
        int(name.removesuffix(".png")) for name in names(split_pairs(pairs_from_folder(tmp_path / "few", 0), 0.3)[1])
    }
    assert {f"p{99 - number}.png" for number in renamed} == names(held_out)


def test_the_split_is_independent_of_direction_and_task(tmp_path: Path) -> None:
    sources, targets = write_images(tmp_path / "source", 20), write_images(tmp_path / "raw", 20, first=50)
    for i in range(20):
        (targets / f"p{i + 50}.png").rename(targets / f"p{i}.png")
    _, held_out = split_pairs(pairs_from_folders(sources, targets, seed=0), 0.2)
    _, back = split_pairs(pairs_from_folders(targets, sources, seed=0), 0.2)
    assert held_out == [Pair(target, source) for source, target in back]
    alone = names(split_pairs(pairs_from_folder(sources, seed=0), 0.2)[1])
    assert alone
    assert alone <= {pair.source.path.name for pair in held_out}


def test_pair_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not contain the folders source and target"):
        pair_folders(tmp_path)
    (tmp_path / "sources").mkdir()
    (tmp_path / "target").mkdir()
    with pytest.raises(InputError, match="does not contain the folders"):
        pair_folders(tmp_path)
    (tmp_path / "targets").mkdir()
    assert pair_folders(tmp_path) == (tmp_path / "sources", tmp_path / "targets")


def test_hidden_files_and_folders_are_ignored(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "a", 1)
    (folder / "._p0.png").write_text("metadata file of macOS")
    (folder / "b.png").mkdir()
    assert images_in(folder) == [(folder / "p0.png", "p0.png")]
    for path, reason in ((tmp_path / "missing", "does not exist"), (folder / "p0.png", "is not a folder")):
        with pytest.raises(InputError, match=f"{path.name} {reason}: give a folder"):
            images_in(path)
    with pytest.raises(InputError, match=r"b\.png has no images: give"):
        images_in(folder / "b.png")


def test_subfolders_are_searched_and_matched_by_relative_path(tmp_path: Path) -> None:
    for folder in ("source", "target"):
        write_images(tmp_path / folder / "a", 2)
        write_images(tmp_path / folder / "b" / "deep", 1)
    (tmp_path / "target" / "a" / "p1.png").rename(tmp_path / "target" / "a" / "p1.bmp")
    pairs = pairs_from_folders(*pair_folders(tmp_path), seed=0)
    assert [(pair.source.name, pair.target.name) for pair in pairs] == [
        ("a/p0.png", "a/p0.png"),
        ("a/p1.png", "a/p1.bmp"),
        ("b/deep/p0.png", "b/deep/p0.png"),
    ]
    assert [pair.source.name for pair in pairs_from_folder(tmp_path / "source", seed=0)] == [
        pair.source.name for pair in pairs
    ]
    (tmp_path / "target" / "b" / "deep" / "p0.png").rename(tmp_path / "target" / "b" / "p0.png")
    with pytest.raises(InputError, match=r"target/b/p0\.png has no counterpart named b/p0 in .*source"):
        pairs_from_folders(*pair_folders(tmp_path), seed=0)


def test_names_in_two_normal_forms_are_two_images(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        for number, name in enumerate(("caf\u00e9", "cafe\u0301")):
            write_images(tmp_path / folder, 1, first=number)
            (tmp_path / folder / f"p{number}.png").rename(tmp_path / folder / f"{name}.png")
    matched = match_by_name(tmp_path / "a", tmp_path / "b")
    assert [(source.name, target.name) for source, target in matched] == [
        ("cafe\u0301.png", "cafe\u0301.png"),
        ("caf\u00e9.png", "caf\u00e9.png"),
    ]


def test_names_match_in_different_unicode_normal_forms(tmp_path: Path) -> None:
    for folder, name in (("a", "caf\u00e9"), ("b", "cafe\u0301")):
        write_images(tmp_path / folder, 1)
        (tmp_path / folder / "p0.png").rename(tmp_path / folder / f"{name}.png")
    ((first, second),) = match_by_name(tmp_path / "a", tmp_path / "b")
    assert (first.path.parent.name, second.path.parent.name) == ("a", "b")


def test_errors_of_unmatched_and_unreadable_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sources, targets = write_images(tmp_path / "a", 5), write_images(tmp_path / "b", 5)
    write_images(targets, 1, size=(5, 4))
    with pytest.raises(InputError, match=r"a/p0\.png is 4x6 .*counterpart .*b/p0\.png is 4x5: give both the same"):
        pairs_from_folders(sources, targets, seed=0)
    (targets / "p0.png").write_text("not an image")
    with pytest.raises(InputError, match=r"b/p0\.png is not a readable image"):
        pairs_from_folders(sources, targets, seed=0)
    assert [pair.source.name for pair in pairs_from_folder(targets, seed=0)] == [f"p{i}.png" for i in range(1, 5)]
    assert "skipped: " in caplog.text
    assert "b/p0.png is not a readable image" in caplog.text
    (targets / "p3.png").unlink()
    with pytest.raises(InputError, match=r"p3\.png has no counterpart named p3 in .*b: add it"):
        pairs_from_folders(sources, targets, seed=0)
    (sources / "p3.png").unlink()
    (sources / "p4.png").unlink()
    with pytest.raises(InputError, match=r"p4\.png has no counterpart named p4 in .*a: add it"):
        pairs_from_folders(sources, targets, seed=0)
    shutil.copy(sources / "p1.png", sources / "p1.jpg")
    with pytest.raises(InputError, match=r"p1\.jpg and .*p1\.png differ only in their extensions"):
        pairs_from_folders(sources, targets, seed=0)
