"""A checkpoint is complete or absent, whatever happens while it is written."""

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
    damage_of,
    last_checkpoint,
    mark_path,
    prune,
    publish_checkpoint,
    remove_leftovers,
)
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import partial_path

FILES = ("training.ckpt", "ema.safetensors")


def save(run_dir: Path, step: int) -> Path:
    path = checkpoint_path(run_dir, step)
    build(path, f"step {step}")
    publish_checkpoint(path)
    return path


def build(path: Path, content: str) -> None:
    """The files of a checkpoint that is not published yet."""
    partial_path(path).mkdir(parents=True)
    for name in FILES:
        (partial_path(path) / name).write_text(f"{content}, {name}")


def a_file_of(path: Path) -> Path:
    return path / FILES[1]


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


# Complete checkpoints


def test_the_mark_records_sizes_and_hashes(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    mark = json.loads(mark_path(path).read_text())
    assert mark["step"] == 7
    assert mark["files"].keys() == {f"step-7.ckpt/{name}" for name in FILES}
    for name, entry in mark["files"].items():
        assert entry["bytes"] == (path.parent / name).stat().st_size
        assert len(entry["sha256"]) == 64
    assert damage_of(path, verify=True) == ""


def test_the_last_one_is_found_after_the_run_folder_moved(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path / "run", step)
    (tmp_path / "run").rename(tmp_path / "moved")
    link = tmp_path / "moved/checkpoints" / LAST
    assert link.readlink() == Path("step-2.ckpt")
    assert last_checkpoint(tmp_path / "moved", verify=True) == link.with_name("step-2.ckpt")


def test_a_run_resumes_from_the_checkpoint_that_the_link_names(tmp_path: Path) -> None:
    """It writes the later checkpoints again as it passes their steps."""
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


# Damaged checkpoints


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


DAMAGE: list[tuple[Callable[[Path], None], str, bool]] = [
    (truncate, "has 2 bytes instead of", False),
    (flip, "has another sha256", True),
    (lose_a_file, "is missing", False),
    (lose_the_mark, "it has no completion mark", False),
    (cut_the_mark, "its completion mark cannot be read", False),
]


@pytest.mark.parametrize(("damage", "words", "verify"), DAMAGE)
def test_a_damaged_checkpoint_is_skipped(
    tmp_path: Path, damage: Callable[[Path], None], words: str, verify: bool, caplog: Any
) -> None:
    for step in (8, 9, 10):  # in this order by number, not by name
        save(tmp_path, step)
    damage(checkpoint_path(tmp_path, 10))
    assert last_checkpoint(tmp_path, verify) == checkpoint_path(tmp_path, 9)
    assert len(caplog.messages) == 1
    assert f"{checkpoint_path(tmp_path, 10)} is not complete" in caplog.text
    assert words in caplog.text
    assert f"using {checkpoint_path(tmp_path, 9)}" in caplog.text


def test_only_hashing_notices_a_flipped_bit(tmp_path: Path) -> None:
    save(tmp_path, 1)
    flip(save(tmp_path, 2))
    assert last_checkpoint(tmp_path) == checkpoint_path(tmp_path, 2)
    assert last_checkpoint(tmp_path, verify=True) == checkpoint_path(tmp_path, 1)


@pytest.mark.parametrize(("damage", "words", "verify"), DAMAGE)
def test_without_a_complete_checkpoint_it_is_an_error(
    tmp_path: Path, damage: Callable[[Path], None], words: str, verify: bool
) -> None:
    """Starting again silently would discard a run that a copy of the checkpoint could restore."""
    damage(save(tmp_path, 3))
    with pytest.raises(InputError, match=words) as caught:
        last_checkpoint(tmp_path, verify)
    assert str(checkpoint_path(tmp_path, 3)) in str(caught.value)


def test_a_last_checkpoint_without_mark_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / LAST).write_text("copied")
    with pytest.raises(InputError, match=r"last\.ckpt is not complete \(it has no completion mark\)"):
        last_checkpoint(tmp_path)


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    build(checkpoint_path(tmp_path, 1), "half")
    checkpoint_path(tmp_path, 2).write_text("not marked yet")
    assert last_checkpoint(tmp_path) is None


# Killed at any moment


class Kill:
    """Ends the process before the n-th call that changes what is on disk."""

    def __init__(self, after: int) -> None:
        self.left = after

    def installed(self) -> None:
        for name in ("fsync", "replace", "unlink", "symlink", "rmdir"):
            setattr(os, name, self.before(getattr(os, name)))

    def before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def killing(*arguments: Any, **options: Any) -> Any:
            if self.left == 0:
                os._exit(9)
            self.left -= 1
            return call(*arguments, **options)

        return killing


def killed_while(work: Callable[[], Any], after: int) -> bool:
    """Run `work` in a copy of this process; whether it was killed."""
    child = os.fork()
    if child == 0:
        Kill(after).installed()
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_after_a_kill_at_any_moment_there_is_a_complete_checkpoint(tmp_path: Path) -> None:
    """While the third is saved and the first removed, the link and the marks name the second or the third."""

    def work() -> None:
        prune(save(tmp_path / str(after), 3), keep_last=2, keep_every_steps=0)

    found = []
    killed, after = True, 0
    while killed:
        run_dir = tmp_path / str(after)
        for step in (1, 2):
            save(run_dir, step)
        killed = killed_while(work, after)
        link = run_dir / "checkpoints" / LAST
        assert damage_of(link.resolve(), verify=True) == "", after
        last = last_checkpoint(run_dir, verify=True)
        assert last == link.with_name(str(link.readlink()))
        found.append(int(last.stem[5:]))
        remove_leftovers(run_dir / "checkpoints")
        assert last_checkpoint(run_dir, verify=True) == last
        unmarked = [path for path in (run_dir / "checkpoints").glob("step-*.ckpt") if not mark_path(path).exists()]
        assert {path.stem for path in unmarked} <= {"step-3"}, after  # which the run writes again
        assert not list((run_dir / "checkpoints").glob("*.partial"))
        work()
        assert (steps_in(run_dir), last_checkpoint(run_dir, verify=True)) == ([2, 3], checkpoint_path(run_dir, 3))
        after += 1
    assert len(found) > 10
    assert found == sorted(found)
    assert {2, 3} == set(found)


def test_after_a_kill_during_the_first_save_the_run_can_save_again(tmp_path: Path) -> None:
    killed, after, found = True, 0, []
    while killed:
        run_dir = tmp_path / str(after)
        killed = killed_while(partial(save, run_dir, 1), after)
        found.append(last_checkpoint(run_dir, verify=True))
        if (run_dir / "checkpoints").exists():
            remove_leftovers(run_dir / "checkpoints")
        assert save(run_dir, 1) == last_checkpoint(run_dir, verify=True)
        after += 1
    assert found[0] is None
    assert found[-1] == checkpoint_path(run_dir, 1)


# Removing old ones


@pytest.mark.parametrize(
    ("keep_last", "milestones", "kept"),
    [(1, 0, [10]), (2, 0, [9, 10]), (3, 4, [4, 8, 9, 10]), (1, 5, [5, 10]), (20, 0, list(range(1, 11)))],
)
def test_the_last_ones_and_milestones_are_kept(
    tmp_path: Path, keep_last: int, milestones: int, kept: list[int]
) -> None:
    for step in range(1, 11):
        prune(save(tmp_path, step), keep_last, milestones)
    assert steps_in(tmp_path) == kept
    assert len(list((tmp_path / "checkpoints").glob("*.complete"))) == len(kept)


def test_leftovers_of_a_killed_run_are_removed_and_logged(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "gpdit_lightning")
    whole = save(tmp_path, 1)
    build(checkpoint_path(tmp_path, 2), "half")
    checkpoint_path(tmp_path, 3).write_text("not marked")
    notes = tmp_path / "checkpoints/notes.txt"
    notes.write_text("mine")
    remove_leftovers(tmp_path / "checkpoints")
    copied = checkpoint_path(tmp_path, 3)  # perhaps a user put it there
    assert set(whole.parent.iterdir()) == {whole, mark_path(whole), whole.with_name(LAST), notes, copied}
    assert "step-2.ckpt.partial is incomplete" in caplog.text
    assert last_checkpoint(tmp_path, verify=True) == whole
