"""Cases: which file is damaged how, which command reads it, and what came of it."""

import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from benchmarks.fuzz.damage import Damage, damage_bytes, exchange_files, replace_path
from benchmarks.fuzz.events import damage_events
from benchmarks.fuzz.headers import (
    damage_media,
    damage_npy,
    damage_part,
    damage_pickle,
    damage_safetensors,
    damage_tar,
)
from benchmarks.fuzz.processes import HARNESS_ERROR, Ended, Job, Limits, run_jobs
from benchmarks.fuzz.targets import KINDS, TARGETS, Target, uses_marked_frames
from benchmarks.fuzz.texts import damage_text
from benchmarks.fuzz.values import DamagedField, damage_every_field, damage_values
from gpdit_lightning.checkpoints import exported
from gpdit_lightning.files import sha256_of
from gpdit_lightning.probing import features
from gpdit_lightning.schema import CONTENT_HASH

Outcome = Literal["named", "refused", "harmless", "accepted", "silent", "crashed", "hung"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
FAILURES: tuple[Outcome, ...] = ("silent", "crashed", "hung")
CONSISTENT = 0.3  # fraction of the cases in which recorded hashes are replaced by those of the damaged files
LIMITS_OF_RECIPES = 4  # times those of other files: a valid recipe may name a larger model, by default size B
OUT_OF_MEMORY = ("memory ran out", "MemoryError")
UNEXPECTED = "this is a fault of"  # in the message of an exception that no part of the library expects
TRACEBACK = "Traceback (most recent call last)"
MIN_HEADER_BYTES = 8  # of a file with a header that can be damaged
CHECKSUM_LISTS = (exported.CHECKSUMS, features.CHECKSUMS)
JSON_SUFFIXES = (".json", ".jsonl", ".complete")
STATUS_OF_FAULTS = 1  # of `inspect --verify`


@dataclass
class CaseReport:
    """A case and its outcome, as they are written to the report.

    Attributes:
        number: determines the case; `--case NUMBER` repeats it.
        kind: kind of the damaged files.
        target: name of the command.
        command: the command line.
        damage: what was damaged.
        outcome: see docs/reliability.md.
        reason: the message of a refusal, or why the outcome is a failure.
        seconds: wall time.
        mebibytes: largest growth of the resident memory.
    """

    number: int
    kind: str
    target: str
    command: str
    damage: str
    outcome: Outcome
    reason: str
    seconds: float
    mebibytes: float
    output: str = field(default="", repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object; the output of the command is left out unless the outcome is a failure."""
        content = asdict(self) | {"seconds": round(self.seconds, 2), "mebibytes": round(self.mebibytes)}
        return content if self.outcome in FAILURES else {k: v for k, v in content.items() if k != "output"}


class Case:
    """A command that reads a damaged file.

    Args:
        number: repeats the case.
        corpus: folder of the undamaged files.
        kind: kind of the damaged file.
        target: the command.
        file: the damaged file, relative to the corpus.
    """

    def __init__(self, number: int, corpus: Path, kind: str, target: Target, file: Path) -> None:
        self.number, self.corpus, self.kind, self.target, self.file = number, corpus, kind, target, file
        self.damage = Damage("nothing", ())
        self.is_changed = self.is_consistent = False

    @property
    def arguments(self) -> list[str]:
        """The command line."""
        shard = str(self.file).replace(".index.npy", ".tar")
        return [word.replace("{file}", str(self.file)).replace("{shard}", shard) for word in self.target.arguments]

    def job(self, is_damaged: bool) -> Job:
        """Return the job that runs the command on undamaged or damaged files."""
        read = self.target.result

        def result() -> dict[str, Any]:
            is_video = is_damaged and self.kind == "media" and "videos" in self.file.parts and self.file.is_file()
            marked = is_video and uses_marked_frames(self.file)
            return {"value": read() if read else None, "uses_marked_frames": marked}

        prepare = self._make_damaged_files if is_damaged else self._copy_files
        factor = LIMITS_OF_RECIPES if self.kind == "recipes" else 1
        return Job((self, is_damaged), prepare, self.arguments, result, self.target.command, factor)

    def _copy_files(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in self.target.needs:
            source = self.corpus / name
            if source.is_dir():
                shutil.copytree(source, folder / name, symlinks=True)
            else:
                shutil.copyfile(source, folder / name)

    def _make_damaged_files(self, folder: Path) -> None:
        self._copy_files(folder)
        path = folder / self.file
        siblings = self._siblings(folder)
        hashes = {file: sha256_of(file) for file in (path, *siblings)}
        self.damage, with_hashes = self._damage(path, siblings)
        changed = {old: file for file, old in hashes.items() if not _is_regular(file) or sha256_of(file) != old}
        self.is_changed = bool(changed)
        if with_hashes and self.kind not in ("recipes", "media"):
            self.is_consistent = replace_hashes(
                folder, {old: file for old, file in changed.items() if _is_regular(file)}
            )
        description = self.damage.description + ", with matching hashes" * self.is_consistent
        self.damage = self.damage._replace(description=description)

    def _siblings(self, folder: Path) -> Sequence[Path]:
        """Return the files that may be damaged too."""
        return ()

    def _damage(self, path: Path, siblings: Sequence[Path]) -> tuple[Damage, bool]:
        """Damage the file; return what was damaged, and whether recorded hashes are replaced by matching ones."""
        raise NotImplementedError


class RandomCase(Case):
    """A case of which everything follows from its number.

    Args:
        number: the number, at least 0.
        corpus: folder of the undamaged files.
        targets: the commands of every kind.
    """

    def __init__(self, number: int, corpus: Path, targets: Mapping[str, Sequence[Target]] = TARGETS) -> None:
        self._numbers = random.Random(number)
        target = self._numbers.choice(targets[kind_of(number)])
        files = files_of(target, corpus)
        super().__init__(number, corpus, kind_of(number), target, self._numbers.choice(files))
        self._similar = [path for path in files if path.suffix == self.file.suffix]

    def _siblings(self, folder: Path) -> Sequence[Path]:
        return [folder / other for other in self._similar if other != self.file]

    def _damage(self, path: Path, siblings: Sequence[Path]) -> tuple[Damage, bool]:
        replace = damage_bytes if self.target.is_uploaded else replace_path
        operators = [damage_bytes, damage_bytes, exchange_files, replace, *[special_damage(path)] * 4]
        damage = self._numbers.choice(operators)(path, siblings, self._numbers)
        return damage, self._numbers.random() < CONSISTENT


class FieldCase(Case):
    """A case in which one field of a JSON file has another value, or is missing, and recorded hashes match."""

    def __init__(self, number: int, corpus: Path, kind: str, target: Target, file: Path, damaged: DamagedField) -> None:
        super().__init__(number, corpus, kind, target, file)
        self._damaged = damaged

    def _damage(self, path: Path, siblings: Sequence[Path]) -> tuple[Damage, bool]:
        path.write_bytes(self._damaged.content)
        return Damage(f"{self._damaged.description}: {path.name}", (path,)), True


def field_cases(
    corpus: Path, kinds: Sequence[str], targets: Mapping[str, Sequence[Target]] = TARGETS
) -> Iterator[FieldCase]:
    """Yield the cases of every field of every JSON file of some kinds, for each command that reads it.

    Args:
        corpus: folder of the undamaged files.
        kinds: of the files; the numbers of the cases do not depend on them.
        targets: the commands of every kind.
    """
    readers = ((kind, target, file) for kind in KINDS for target in targets[kind] for file in files_of(target, corpus))
    number = 0
    for kind, target, file in readers:
        if file.suffix in JSON_SUFFIXES:
            for damaged in damage_every_field((corpus / file).read_bytes()):
                if kind in kinds:
                    yield FieldCase(number, corpus, kind, target, file, damaged)
                number += 1


def files_of(target: Target, corpus: Path) -> list[Path]:
    """Return the files that a command reads and a case may damage, relative to the corpus."""
    found = {path for pattern in target.files for path in corpus.glob(pattern) if path.is_file()}
    return [path.relative_to(corpus) for path in sorted(found)]


def kind_of(number: int) -> str:
    """Return the kind of files that a case damages."""
    return KINDS[number % len(KINDS)]


def _is_regular(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def special_damage(path: Path) -> Callable[[Path, Sequence[Path], random.Random], Damage]:
    """Return the operator that knows the format of a file, by its name."""
    if path.name == "training.ckpt":
        return damage_pickle
    if path.name.startswith("part-") and path.suffix == ".safetensors":  # not a record of a preparation
        return damage_part
    if path.suffix in (".json", ".complete", ".yaml"):
        return _damage_tree
    if path.name.startswith("events."):
        return damage_events
    operators = {".npy": damage_npy, ".tar": damage_tar, ".safetensors": damage_safetensors, ".jsonl": _damage_lines}
    operators |= dict.fromkeys((".txt", ".csv", ".tsv", ".md"), damage_text)
    return operators.get(path.suffix, damage_media if path.stat().st_size > MIN_HEADER_BYTES else damage_bytes)


def _damage_tree(path: Path, siblings: Sequence[Path], numbers: random.Random) -> Damage:
    content, description = damage_values(path.read_bytes(), numbers, is_yaml=path.suffix == ".yaml")
    path.write_bytes(content)
    return Damage(f"{description}: {path.name}", (path,))


def _damage_lines(path: Path, siblings: Sequence[Path], numbers: random.Random) -> Damage:
    """Damage a file with one JSON object per line."""
    lines = path.read_bytes().splitlines(keepends=True)
    if not lines:
        return damage_bytes(path, siblings, numbers)
    place = numbers.randrange(len(lines))
    description = numbers.choice(("values", "repeated", "removed", "reordered"))
    if description == "values":
        text, description = damage_values(lines[place], numbers, is_yaml=False)
        lines[place] = b" ".join(text.split()) + b"\n"
    elif description == "repeated":
        lines.insert(place, lines[place])
    elif description == "removed":
        del lines[place]
    else:
        numbers.shuffle(lines)
    path.write_bytes(b"".join(lines))
    return Damage(f"{description}: lines of {path.name}", (path,))


def replace_hashes(folder: Path, changed: Mapping[str, Path]) -> bool:
    """Replace the recorded sha256 and size of changed files in JSON files and lists of `sha256sum`.

    A hash that a file contains of its other content is removed, as in files of earlier versions.

    Args:
        folder: folder of the files that record hashes.
        changed: recorded sha256 -> changed file.

    Returns:
        Whether there were any.
    """

    def visit(value: Any) -> bool:
        is_new = isinstance(value, dict) and value.pop(CONTENT_HASH, None) is not None
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in list(items):
            if isinstance(item, str) and item in changed:
                value[key], is_new = sha256_of(changed[item]), True
                if key == "sha256" and "bytes" in value:
                    value["bytes"] = changed[item].stat().st_size
            else:
                is_new |= visit(item)
        return is_new

    replaced = False
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".complete") and _is_regular(path):
            with suppress(ValueError, RecursionError):  # a damaged file
                tree = json.loads(path.read_bytes())
                if visit(tree):
                    replaced = True
                    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in (path for name in CHECKSUM_LISTS for path in folder.rglob(name) if _is_regular(path)):
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
        for old in changed:
            text = text.replace(old, sha256_of(changed[old]))
        if text.encode(errors="surrogateescape") != path.read_bytes():
            replaced = True
            path.write_text(text, encoding="utf-8", errors="surrogateescape")
    return replaced


def judge(case: Case, ended: Ended, intact: Ended) -> CaseReport:
    """Compare how a command ended on damaged files with how it ended on undamaged ones."""
    outcome, reason = _outcome(case, ended, intact)
    return CaseReport(
        case.number,
        case.kind,
        case.target.name,
        " ".join(case.arguments),
        case.damage.description,
        outcome,
        reason,
        ended.seconds,
        ended.mebibytes,
        ended.output[-5000:],
    )


def _outcome(case: Case, ended: Ended, intact: Ended) -> tuple[Outcome, str]:
    lines = [line for line in ended.output.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if ended.exceeded == "seconds":
        return "hung", f"no end after {ended.seconds:.0f} s"
    if ended.exceeded == "mebibytes":
        return "crashed", f"the memory grew by {ended.mebibytes:.0f} MiB"
    if ended.status == HARNESS_ERROR:
        return "silent", f"the result cannot be used ({last})"
    if ended.status < 0:
        return "crashed", f"signal {-ended.status}"
    if TRACEBACK in ended.output or UNEXPECTED in last:
        return "crashed", last
    if any(sign in ended.output for sign in OUT_OF_MEMORY) and case.kind != "recipes":
        return "crashed", f"memory was requested before its amount was checked ({last})"
    known = set(intact.output.splitlines())
    new = [line for line in lines if line not in known]
    is_named = any(name in line for line in new for name in names_of(case))
    if ended.status:
        if not last.startswith("error: ") and not (ended.status == STATUS_OF_FAULTS and "--verify" in case.arguments):
            return "crashed", f"status {ended.status} without a message ({last})"
        return ("named" if is_named else "refused"), last
    if case.target.result:
        is_equal = ended.result["value"] == intact.result["value"]
    else:
        is_equal = not new and not (case.target.detects and _is_detectable(case))
    if ended.result["uses_marked_frames"]:
        return "silent", "a frame that FFmpeg marks as corrupt was used"
    if is_equal:
        return "harmless", ""
    if is_named:
        return "named", next(line for line in new for name in names_of(case) if name in line)
    if _is_detectable(case):
        return "silent", "the result differs, and no message names the file"
    return "accepted", "the result differs, and no hash covers the damaged bytes"


def _is_detectable(case: Case) -> bool:
    """Return whether a recorded hash covers changed bytes."""
    return case.target.covered and case.is_changed and not case.is_consistent


def names_of(case: Case) -> set[str]:
    """Return the names by which a message may refer to the damaged files: their paths, and the folder of a model."""
    names = {path.name for path in case.damage.paths} | {case.file.name}
    names |= {name.removesuffix(".index.npy") + ".tar" for name in names if name.endswith(".index.npy")}
    names |= {part for part in case.file.parts[:-1] if part.endswith(".ckpt")}
    if case.kind == "exports":
        names.add("model")
    if case.kind in ("checkpoints", "parts"):
        names |= {f"{case.file.parts[0]}/checkpoints", "step-2.ckpt"}
    return names


def run_cases(
    cases: Sequence[Case],
    folder: Path,
    limits: Limits,
    processes: int,
) -> Iterator[CaseReport]:
    """Run cases in forked processes, and yield their reports as they end.

    Args:
        cases: the cases.
        folder: working folder.
        limits: limits of every process.
        processes: number of processes at the same time.

    Raises:
        RuntimeError: a command fails on undamaged files.
    """
    firsts: dict[tuple[str, ...], Case] = {}
    for case in cases:
        firsts.setdefault(tuple(case.arguments), case)
    intact: dict[tuple[str, ...], Ended] = {}
    for ended in run_jobs((case.job(is_damaged=False) for case in firsts.values()), folder, limits, processes):
        if ended.status or ended.exceeded:
            command = " ".join(ended.key[0].arguments)
            raise RuntimeError(f"{command} fails on undamaged files (status {ended.status}): {ended.output}")
        intact[tuple(ended.key[0].arguments)] = ended
    for ended in run_jobs((case.job(is_damaged=True) for case in cases), folder, limits, processes):
        case = ended.key[0]
        yield judge(case, ended, intact[tuple(case.arguments)])
