"""Checkpoints on disk, also after kills and damage."""

import json
import logging
import os
import shutil
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
    """Write the files of a checkpoint without publishing it."""
    partial_path(path).mkdir(parents=True)
    for name in FILES:
        (partial_path(path) / name).write_text(f"{content}, {name}")


def average_file(path: Path) -> Path:
    return path / FILES[1]


def steps_in(run_dir: Path) -> list[int]:
    return sorted(int(path.stem[5:]) for path in (run_dir / "checkpoints").glob("step-*.ckpt"))


@pytest.fixture(autouse=True)
def skip_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing to disk is slow and has no effect that a test could observe."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


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


def test_the_last_checkpoint_is_found_after_the_run_folder_moved(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path / "run", step)
    (tmp_path / "run").rename(tmp_path / "moved")
    link = tmp_path / "moved/checkpoints" / LAST
    assert link.readlink() == Path("step-2.ckpt")
    assert last_checkpoint(tmp_path / "moved", verify=True) == link.with_name("step-2.ckpt")


def test_a_copy_of_a_checkpoint_in_the_place_of_the_link_is_replaced(tmp_path: Path) -> None:
    """As of a run folder that was copied with links replaced by what they refer to."""
    link = tmp_path / "checkpoints" / LAST
    copied = save(tmp_path, 1)
    link.unlink()
    shutil.copytree(copied, link)
    assert last_checkpoint(tmp_path) == copied
    save(tmp_path, 2)
    assert link.readlink() == Path("step-2.ckpt")


def test_a_run_resumes_from_the_target_of_the_link(tmp_path: Path) -> None:
    """Later checkpoints are replaced as the run passes their steps."""
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
    average_file(path).write_text("st")


def flip(path: Path) -> None:
    content = bytearray(average_file(path).read_bytes())
    content[-1] ^= 1
    average_file(path).write_bytes(content)


def lose_a_file(path: Path) -> None:
    average_file(path).unlink()


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


@pytest.mark.parametrize(("damage", "message", "verify"), DAMAGE)
def test_a_damaged_checkpoint_is_skipped(
    tmp_path: Path, damage: Callable[[Path], None], message: str, verify: bool, caplog: Any
) -> None:
    for step in (8, 9, 10):  # sorted by number, not by name
        save(tmp_path, step)
    damage(checkpoint_path(tmp_path, 10))
    assert last_checkpoint(tmp_path, verify) == checkpoint_path(tmp_path, 9)
    assert len(caplog.messages) == 1
    assert f"{checkpoint_path(tmp_path, 10)} is not complete" in caplog.text
    assert message in caplog.text
    assert f"using {checkpoint_path(tmp_path, 9)}" in caplog.text


def test_a_flipped_bit_is_detected_by_hashing_only(tmp_path: Path) -> None:
    save(tmp_path, 1)
    flip(save(tmp_path, 2))
    assert last_checkpoint(tmp_path) == checkpoint_path(tmp_path, 2)
    assert last_checkpoint(tmp_path, verify=True) == checkpoint_path(tmp_path, 1)


@pytest.mark.parametrize(("damage", "message", "verify"), DAMAGE)
def test_damage_of_the_only_checkpoint_is_an_error(
    tmp_path: Path, damage: Callable[[Path], None], message: str, verify: bool
) -> None:
    """A silent restart would lose a run that could be resumed from a copy of the checkpoint."""
    damage(save(tmp_path, 3))
    with pytest.raises(InputError, match=message) as caught:
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


# Kills at any moment


class Kill:
    """Ends the process before the n-th call that changes the disk."""

    def __init__(self, after: int) -> None:
        self.remaining = after

    def install(self) -> None:
        for name in ("fsync", "replace", "unlink", "symlink", "rmdir"):
            setattr(os, name, self.wrap(getattr(os, name)))

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if self.remaining == 0:
                os._exit(9)
            self.remaining -= 1
            return call(*arguments, **options)

        return wrapped


def killed_while(work: Callable[[], Any], after: int) -> bool:
    """Run `work` in a forked process; return whether it was killed."""
    child = os.fork()
    if child == 0:
        Kill(after).install()
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_complete_checkpoint_exists_after_a_kill_at_any_moment(tmp_path: Path) -> None:
    """While the third is saved and the first removed, `last_checkpoint` is the second or the third."""

    def work() -> None:
        prune(save(tmp_path / str(after), 3), keep_last=2, keep_every_steps=0)

    last_steps = []
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
        last_steps.append(int(last.stem[5:]))
        remove_leftovers(run_dir / "checkpoints")
        assert last_checkpoint(run_dir, verify=True) == last
        unmarked = [path for path in (run_dir / "checkpoints").glob("step-*.ckpt") if not mark_path(path).exists()]
        assert {path.stem for path in unmarked} <= {"step-3"}, after  # the resumed run saves it again
        assert not list((run_dir / "checkpoints").glob("*.partial"))
        work()
        assert (steps_in(run_dir), last_checkpoint(run_dir, verify=True)) == ([2, 3], checkpoint_path(run_dir, 3))
        after += 1
    assert len(last_steps) > 10
    assert last_steps == sorted(last_steps)
    assert {2, 3} == set(last_steps)


def test_the_first_checkpoint_can_be_saved_again_after_a_kill(tmp_path: Path) -> None:
    killed, after, last_paths = True, 0, []
    while killed:
        run_dir = tmp_path / str(after)
        killed = killed_while(partial(save, run_dir, 1), after)
        last_paths.append(last_checkpoint(run_dir, verify=True))
        if (run_dir / "checkpoints").exists():
            remove_leftovers(run_dir / "checkpoints")
        assert save(run_dir, 1) == last_checkpoint(run_dir, verify=True)
        after += 1
    assert last_paths[0] is None
    assert last_paths[-1] == checkpoint_path(run_dir, 1)


# Removing checkpoints


@pytest.mark.parametrize(
    ("keep_last", "milestones", "kept"),
    [(1, 0, [10]), (2, 0, [9, 10]), (3, 4, [4, 8, 9, 10]), (1, 5, [5, 10]), (20, 0, list(range(1, 11)))],
)
def test_pruning_keeps_the_last_checkpoints_and_milestones(
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
    notes.write_text("notes")
    remove_leftovers(tmp_path / "checkpoints")
    copied = checkpoint_path(tmp_path, 3)  # possibly by a user
    assert set(whole.parent.iterdir()) == {whole, mark_path(whole), whole.with_name(LAST), notes, copied}
    assert "step-2.ckpt.partial is incomplete" in caplog.text
    assert last_checkpoint(tmp_path, verify=True) == whole


# Marks and links of other checkpoints


def edit_mark(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(mark_path(path).read_text())
    change(content)
    mark_path(path).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mark: mark.update(files={}), "lists no files"),
        (lambda mark: mark["files"].pop("step-3.ckpt/training.ckpt"), "training.ckpt is not part of it"),
        (lambda mark: mark["files"].update({"../../secret": {"bytes": 1, "sha256": "0" * 64}}), "is the mark of"),
        (lambda mark: mark["files"].update({"step-3.ckpt/more": {"bytes": 1, "sha256": "0" * 64}}), "more is missing"),
        (lambda mark: mark["files"]["step-3.ckpt/training.ckpt"].update(bytes=-1), "must be a non-negative integer"),
        (lambda mark: mark["files"]["step-3.ckpt/training.ckpt"].update(sha256=None), "must be a sha256"),
        (lambda mark: mark.update(step=2), "is the mark of step 2"),
        (lambda mark: mark.pop("step"), "lacks the field step"),
    ],
)
def test_the_content_of_a_mark_is_checked(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    path = save(tmp_path, 3)
    edit_mark(path, change)
    assert message in damage_of(path)


@pytest.mark.parametrize("content", [b"[" * 200_000, b"\xff", b"1" * 10_000, b"{" + b" " * 2**21])
def test_a_mark_of_any_content_is_refused(tmp_path: Path, content: bytes) -> None:
    path = save(tmp_path, 3)
    mark_path(path).write_bytes(content)
    assert "its completion mark cannot be read" in damage_of(path)
    mark_path(path).unlink()
    os.mkfifo(mark_path(path))
    assert "is not a regular file" in damage_of(path)


def test_a_mark_of_another_checkpoint_and_surplus_files_are_named(tmp_path: Path) -> None:
    one, other = save(tmp_path, 1), save(tmp_path, 2)
    (other / ".nfs0001").write_text("of the file system")
    assert damage_of(other, verify=True) == ""
    (other / "notes.txt").write_text("notes")
    assert damage_of(other) == "step-2.ckpt/notes.txt is not part of it"
    mark_path(other).write_bytes(mark_path(one).read_bytes())
    assert "is the mark of 'step-1.ckpt'" in damage_of(other)


@pytest.mark.parametrize("target", ["../../other/checkpoints/step-2.ckpt", "last.ckpt", "elsewhere"])
def test_a_link_to_something_else_than_a_checkpoint_of_the_run_is_not_followed(
    tmp_path: Path, target: str, caplog: Any
) -> None:
    save(tmp_path / "other", 2)
    last = save(tmp_path / "run", 1)
    (last.parent / LAST).unlink()
    (last.parent / LAST).symlink_to(target)
    assert last_checkpoint(tmp_path / "run") == last
    assert f"points to {target}, which is not a checkpoint of this run" in caplog.text


def test_what_a_kill_during_pruning_leaves_is_removed(tmp_path: Path) -> None:
    kept, removed, emptied = (save(tmp_path, step) for step in (3, 1, 2))
    removed.rename(partial_path(removed.with_name(f"{removed.name}.discarded")))  # its mark remains
    for name in FILES:
        (emptied / name).unlink()
    mark_path(emptied).unlink()
    remove_leftovers(kept.parent)
    assert {path.name for path in kept.parent.iterdir()} == {kept.name, mark_path(kept).name, LAST}
