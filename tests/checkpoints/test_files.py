"""A checkpoint is whole or not there, whatever happens while it is written."""

import json
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gpdit_lightning.checkpoints.files import (
    LAST,
    checkpoint_path,
    fault_of,
    last_checkpoint,
    mark_path,
    prune,
    publish_checkpoint,
    remove_leftovers,
)
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import partial_path

KINDS = ("file", "folder")


def save(run_dir: Path, step: int, kind: str = "file") -> Path:
    """A checkpoint of one file, or of a folder with a part from each of two ranks."""
    path = checkpoint_path(run_dir, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    build(path, f"step {step}", kind)
    publish_checkpoint(path)
    return path


def build(path: Path, content: str, kind: str) -> None:
    unfinished = partial_path(path)
    if kind == "file":
        unfinished.write_text(content)
    else:
        for part in ("meta", "parts/rank-0", "parts/rank-1"):
            (unfinished / part).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / part).write_text(f"{content} of {part}")


def a_file_of(path: Path) -> Path:
    return path if path.is_file() else path / "parts/rank-1"


def steps_in(run_dir: Path) -> list[int]:
    return sorted(int(path.stem[5:]) for path in (run_dir / "checkpoints").glob("step-*.ckpt"))


@pytest.fixture(autouse=True)
def no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk changes nothing that a test could see, and takes long."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def show_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line, if a test before used it, keeps the messages from pytest's `caplog`."""
    monkeypatch.setattr(logging.getLogger("gpdit_lightning"), "propagate", True)


# Whole ones


@pytest.mark.parametrize("kind", KINDS)
def test_the_mark_tells_sizes_and_hashes(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path, 7, kind)
    mark = json.loads(mark_path(path).read_text())
    assert mark["step"] == 7
    names = (
        {"step-7.ckpt"} if kind == "file" else {f"step-7.ckpt/{n}" for n in ("meta", "parts/rank-0", "parts/rank-1")}
    )
    assert mark["files"].keys() == names
    for name, entry in mark["files"].items():
        assert entry["bytes"] == (path.parent / name).stat().st_size
        assert len(entry["sha256"]) == 64
    assert fault_of(path, verify=True) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_one_is_found_through_a_relative_link(tmp_path: Path, kind: str) -> None:
    for step in (1, 2):
        save(tmp_path / "run", step, kind)
    (tmp_path / "run").rename(tmp_path / "moved")
    link = tmp_path / "moved/checkpoints" / LAST
    assert link.readlink() == Path("step-2.ckpt")
    assert last_checkpoint(tmp_path / "moved", verify=True) == link.with_name("step-2.ckpt")


def test_a_run_can_be_set_back_by_the_link(tmp_path: Path) -> None:
    """It goes on from there, and writes the later ones again as it passes them."""
    for step in (2, 4, 6):
        save(tmp_path, step)
    link = tmp_path / "checkpoints" / LAST
    link.unlink()
    link.symlink_to("step-2.ckpt")
    assert last_checkpoint(tmp_path) == checkpoint_path(tmp_path, 2)
    prune(save(tmp_path, 3), keep_last=2, keep_every_steps=0)
    assert (steps_in(tmp_path), last_checkpoint(tmp_path)) == ([2, 3, 4, 6], checkpoint_path(tmp_path, 3))
    prune(save(tmp_path, 4), keep_last=2, keep_every_steps=0)
    assert (steps_in(tmp_path), last_checkpoint(tmp_path)) == ([3, 4, 6], checkpoint_path(tmp_path, 4))


# Torn ones


def truncate(path: Path) -> None:
    a_file_of(path).write_text("st")


def flip(path: Path) -> None:
    content = bytearray(a_file_of(path).read_bytes())
    content[-1] ^= 1
    a_file_of(path).write_bytes(content)


def lose_a_file(path: Path) -> None:
    a_file_of(path).unlink()


def lose_the_mark(path: Path) -> None:
    mark_path(path).unlink()


def cut_the_mark(path: Path) -> None:
    mark_path(path).write_text(mark_path(path).read_text()[:30])


SPOILED: list[tuple[Callable[[Path], None], str, bool]] = [
    (truncate, "has 2 bytes instead of", False),
    (flip, "is not what was written", True),
    (lose_a_file, "is missing", False),
    (lose_the_mark, "it has no completion mark", False),
    (cut_the_mark, "its completion mark cannot be read", False),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("spoil", "words", "verify"), SPOILED)
def test_a_torn_one_is_passed_over(
    tmp_path: Path, kind: str, spoil: Callable[[Path], None], words: str, verify: bool, caplog: Any
) -> None:
    for step in (8, 9, 10):  # in this order by number, not by name
        save(tmp_path, step, kind)
    spoil(checkpoint_path(tmp_path, 10))
    assert last_checkpoint(tmp_path, verify) == checkpoint_path(tmp_path, 9)
    assert len(caplog.messages) == 1
    assert f"{checkpoint_path(tmp_path, 10)} is not whole" in caplog.text
    assert words in caplog.text
    assert f"going on from {checkpoint_path(tmp_path, 9)}" in caplog.text


def test_only_hashing_notices_a_flipped_bit(tmp_path: Path) -> None:
    save(tmp_path, 1)
    flip(save(tmp_path, 2))
    assert last_checkpoint(tmp_path) == checkpoint_path(tmp_path, 2)
    assert last_checkpoint(tmp_path, verify=True) == checkpoint_path(tmp_path, 1)


@pytest.mark.parametrize(("spoil", "words", "verify"), SPOILED)
def test_no_whole_one_is_an_error(tmp_path: Path, spoil: Callable[[Path], None], words: str, verify: bool) -> None:
    """Beginning anew by itself would give up a run that a copy might save."""
    spoil(save(tmp_path, 3))
    with pytest.raises(InputError, match=words) as caught:
        last_checkpoint(tmp_path, verify)
    assert str(checkpoint_path(tmp_path, 3)) in str(caught.value)


def test_a_last_checkpoint_without_mark_is_an_error(tmp_path: Path) -> None:
    """As in run folders from before there were marks."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / LAST).write_text("of old")
    with pytest.raises(InputError, match=r"last\.ckpt is not whole \(it has no completion mark\)"):
        last_checkpoint(tmp_path)


def test_there_is_none_before_the_first(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    build(checkpoint_path(tmp_path, 1), "half", "folder")
    checkpoint_path(tmp_path, 2).write_text("not marked yet")
    assert last_checkpoint(tmp_path) is None


# Killed at any moment


class Death:
    """Ends the process before the n-th call that changes what is on disk."""

    def __init__(self, after: int) -> None:
        self.left = after

    def installed(self) -> None:
        for name in ("fsync", "replace", "unlink", "symlink", "rmdir"):
            setattr(os, name, self.before(getattr(os, name)))

    def before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def deadly(*arguments: Any, **options: Any) -> Any:
            if self.left == 0:
                os._exit(9)
            self.left -= 1
            return call(*arguments, **options)

        return deadly


def killed_while(work: Callable[[], Any], after: int) -> bool:
    """Run `work` in a copy of this process; whether it died."""
    child = os.fork()
    if child == 0:
        Death(after).installed()
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_moment_there_is_a_whole_one(tmp_path: Path, kind: str) -> None:
    """While the third is saved and the first pruned: the second or the third, by link and by mark, and never less."""

    def work() -> None:
        prune(save(tmp_path / str(after), 3, kind), keep_last=2, keep_every_steps=0)

    found = []
    died, after = True, 0
    while died:
        run_dir = tmp_path / str(after)
        for step in (1, 2):
            save(run_dir, step, kind)
        died = killed_while(work, after)
        link = run_dir / "checkpoints" / LAST
        assert fault_of(link.resolve(), verify=True) == "", after
        last = last_checkpoint(run_dir, verify=True)
        assert last == link.with_name(str(link.readlink()))
        found.append(int(last.stem[5:]))
        remove_leftovers(run_dir / "checkpoints")
        assert last_checkpoint(run_dir, verify=True) == last
        unmarked = [path for path in (run_dir / "checkpoints").glob("step-*.ckpt") if not mark_path(path).exists()]
        assert {path.stem for path in unmarked} <= {"step-3"}, after  # that is reached and written again
        assert not list((run_dir / "checkpoints").glob("*.partial"))
        work()
        assert (steps_in(run_dir), last_checkpoint(run_dir, verify=True)) == ([2, 3], checkpoint_path(run_dir, 3))
        after += 1
    assert len(found) > 10
    assert found == sorted(found)
    assert {2, 3} == set(found)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_moment_of_the_first_one(tmp_path: Path, kind: str) -> None:
    """The same command begins anew, or goes on from it."""
    died, after, found = True, 0, []
    while died:
        run_dir = tmp_path / str(after)
        died = killed_while(partial(save, run_dir, 1, kind), after)
        found.append(last_checkpoint(run_dir, verify=True))
        if (run_dir / "checkpoints").exists():
            remove_leftovers(run_dir / "checkpoints")
        assert save(run_dir, 1, kind) == last_checkpoint(run_dir, verify=True)
        after += 1
    assert found[0] is None
    assert found[-1] == checkpoint_path(run_dir, 1)


# Keeping


@pytest.mark.parametrize(
    ("keep_last", "milestones", "kept"),
    [(1, 0, [10]), (2, 0, [9, 10]), (3, 4, [4, 8, 9, 10]), (1, 5, [5, 10]), (20, 0, list(range(1, 11)))],
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_ones_and_milestones_are_kept(
    tmp_path: Path, kind: str, keep_last: int, milestones: int, kept: list[int]
) -> None:
    for step in range(1, 11):
        prune(save(tmp_path, step, kind), keep_last, milestones)
    assert steps_in(tmp_path) == kept
    assert len(list((tmp_path / "checkpoints").glob("*.complete"))) == len(kept)


def test_what_a_killed_run_left_is_removed_and_named(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "gpdit_lightning")
    whole = save(tmp_path, 1)
    build(checkpoint_path(tmp_path, 2), "half", "folder")
    checkpoint_path(tmp_path, 3).write_text("not marked")
    stranger = tmp_path / "checkpoints/notes.txt"
    stranger.write_text("mine")
    remove_leftovers(tmp_path / "checkpoints")
    copied = checkpoint_path(tmp_path, 3)  # perhaps a user put it there
    assert set(whole.parent.iterdir()) == {whole, mark_path(whole), whole.with_name(LAST), stranger, copied}
    assert "step-2.ckpt.partial was never completed" in caplog.text
    assert last_checkpoint(tmp_path, verify=True) == whole
