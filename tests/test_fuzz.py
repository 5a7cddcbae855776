"""The fuzz suite: a small part of its cases, and the outcomes that it assigns to readers with known faults."""

import ctypes
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.fuzz.__main__ import case_numbers, main, table
from benchmarks.fuzz.cases import RandomCase, field_cases, kind_of, replace_hashes
from benchmarks.fuzz.corpus import make_corpus
from benchmarks.fuzz.outcomes import OUTCOMES, run_cases
from benchmarks.fuzz.processes import Limits
from benchmarks.fuzz.targets import KINDS, Target, uses_marked_frames
from gpdit_lightning.media import decoding
from gpdit_lightning.regular_files import sha256_of

MadeOnce = Callable[[str, Callable[[Path], object]], Path]
INTACT = random.Random(0).randbytes(1000)


@pytest.fixture(scope="session")
def corpus(made_once: MadeOnce) -> Path:
    return made_once("fuzz_corpus", make_corpus)


def test_damaged_files_of_every_kind_are_refused_or_harmless() -> None:
    """In a process of its own: a fork of this one would have locks that threads of earlier tests hold."""
    command = [sys.executable, "-m", "benchmarks.fuzz", f"--count={len(KINDS)}", "--seed=50", "--seconds=60"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stdout + run.stderr
    assert [line.split()[:2] for line in run.stdout.splitlines()[1 : len(KINDS) + 1]] == [[kind, "1"] for kind in KINDS]


def state_of(path: Path) -> object:
    if path.is_symlink() or not path.is_file():
        return str(path.readlink()) if path.is_symlink() else path.exists()
    return path.read_bytes()


def test_a_case_is_determined_by_its_number(corpus: Path, tmp_path: Path) -> None:
    descriptions, changed = set(), 0
    for number in range(len(KINDS) * 8):
        made = []
        for attempt in ("first", "second"):
            case = RandomCase(number, corpus)
            case.job(is_damaged=True).prepare(tmp_path / attempt)
            made.append((case.arguments, case.damage.description, state_of(tmp_path / attempt / case.file)))
        assert made[0] == made[1]
        descriptions.add(made[0][1])
        changed += made[0][2] != (corpus / case.file).read_bytes()
    assert len(descriptions) > 50
    assert changed > 50


def is_damaged() -> bool:
    """Whether the file that a case damages is damaged, without reading pipes and devices."""
    path = Path("data.bin")
    return path.is_symlink() or not path.is_file() or path.read_bytes() != INTACT


def crash(*_: object) -> int:
    raise IndexError("list index out of range")


def fail(message: str, status: int = 2) -> int:
    print(message)
    return status


FAULTS: dict[str, tuple[str, Callable[[], int]]] = {
    "does not compare the hash": ("silent", lambda: Path("out").write_text("other") * 0),
    "has no check": ("crashed", crash),
    "reads beyond its memory": ("crashed", lambda: ctypes.string_at(0) and 0),
    "allocates what the header states": ("crashed", lambda: len(bytearray(b"x") * 2**30) * 0),
    "catches the lack of memory": ("crashed", lambda: fail("error: data.bin: memory ran out.")),
    "has another exit status": ("crashed", lambda: fail("", 3)),
    "waits": ("hung", lambda: time.sleep(100) or 0),
    "names the file": ("named", lambda: fail("error: data.bin is damaged: copy it again.")),
    "names no file": ("refused", lambda: fail("error: something is damaged.")),
    "skips the file": ("named", lambda: fail("skipped: data.bin", Path("out").write_text("other") * 0)),
    "does not need the file": ("harmless", lambda: Path("out").write_text("result") * 0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_outcome_of_a_reader(tmp_path: Path, fault: str) -> None:
    expected, misbehave = FAULTS[fault]

    def read(_: Sequence[str]) -> int:
        if is_damaged():
            return misbehave()
        Path("out").write_text("result")
        return 0

    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "data.bin").write_bytes(INTACT)
    result: Callable[[], str] = Path("out").read_text
    target = Target("reader", ("*.bin",), ("data.bin",), ("read",), result, command=read)
    limits = Limits(1.0 if expected == "hung" else 60.0, 256)

    def outcome(target: Target) -> str:
        targets = {kind: [target] for kind in KINDS}
        case = RandomCase(len(KINDS), tmp_path / "corpus", targets)
        (report,) = run_cases([case], tmp_path, limits, 1)
        row = table([report]).splitlines()[-1].split()
        assert row[1] == row[2 + OUTCOMES.index(report.outcome)] == "1"
        return report.outcome

    assert outcome(target) == expected
    if expected == "silent":
        assert outcome(replace(target, covered=False)) == "accepted"


def test_every_field_of_a_json_file_is_damaged_with_matching_hashes(corpus: Path, tmp_path: Path) -> None:
    """A reader that looks at one field without a check is found by the cases of that field alone."""
    names = {case.file.name for case in field_cases(corpus, KINDS)}
    assert {"manifest.json", "config.json", "results.json", "notes.jsonl", "step-2.ckpt.complete"} <= names
    (tmp_path / "corpus").mkdir()
    record = tmp_path / "corpus" / "record.json"
    record.write_text(json.dumps({"name": "a", "inner": {"counts": [1, 2]}}, indent=2))
    (tmp_path / "corpus" / "hashes.json").write_text(json.dumps({"sha256": sha256_of(record), "bytes": 1}))

    def read(_: Sequence[str]) -> int:
        assert json.loads(Path("hashes.json").read_text())["sha256"] == sha256_of(Path("record.json"))
        content = json.loads(Path("record.json").read_text())
        if not isinstance(content.get("inner"), dict) or not isinstance(content.get("name"), str):
            return fail("error: record.json is damaged.")
        Path("out").write_text(str(content["inner"].get("counts", [0])[0]))
        return 0

    result: Callable[[], str] = Path("out").read_text
    target = Target("reader", ("record.json",), ("record.json", "hashes.json"), ("read",), result, command=read)
    cases = list(field_cases(tmp_path / "corpus", KINDS[:1], {kind: [target] for kind in KINDS}))
    reports = list(run_cases(cases, tmp_path, Limits(60.0, 256), 1))
    found = {report.damage.partition(" ")[0] for report in reports if report.outcome == "crashed"}
    assert found == {"inner.counts"}
    outcomes = {report.damage: report.outcome for report in reports}
    assert outcomes["name is None: record.json, with matching hashes"] == "named"
    assert outcomes["inner.counts.0 is -1: record.json, with matching hashes"] == "accepted"
    assert outcomes["inner was removed: record.json, with matching hashes"] == "named"


def test_frames_that_ffmpeg_marks_as_corrupt_are_found_if_the_reader_uses_them(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, content = tmp_path / "b.mov", bytearray((corpus / "videos" / "b.mov").read_bytes())
    assert not uses_marked_frames(corpus / "videos" / "b.mov")
    middle = len(content) // 2
    content[middle : middle + 60] = random.Random(0).randbytes(60)
    path.write_bytes(content)
    assert not uses_marked_frames(path)
    monkeypatch.setattr(decoding._Damage, "record", lambda *_: None)
    assert uses_marked_frames(path)


def test_recorded_hashes_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"new content")
    old = "0" * 64
    (tmp_path / "manifest.json").write_text(
        json.dumps({"shards": [{"sha256": old, "bytes": 1}, {"index_sha256": "1"}]})
    )
    assert replace_hashes(tmp_path, {old: tmp_path / "a.tar"})
    shards = json.loads((tmp_path / "manifest.json").read_text())["shards"]
    assert shards == [{"sha256": sha256_of(tmp_path / "a.tar"), "bytes": 11}, {"index_sha256": "1"}]


def test_kinds_alternate_and_unknown_ones_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = case_numbers(3, ["media", "recipes"])
    assert [kind_of(next(numbers)) for _ in range(4)] in (["recipes", "media"] * 2, ["media", "recipes"] * 2)
    assert main(["--kinds=media,films"]) == 2
    assert "films" in capsys.readouterr().err
