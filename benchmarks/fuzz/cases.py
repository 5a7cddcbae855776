"""Cases: which file is damaged how, and which command reads it."""

import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

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
from benchmarks.fuzz.processes import Job
from benchmarks.fuzz.targets import KINDS, TARGETS, Target, uses_marked_frames
from benchmarks.fuzz.texts import damage_text
from benchmarks.fuzz.values import DamagedField, damage_every_field, damage_values
from gpdit_lightning.checkpoints import exported
from gpdit_lightning.probing import features
from gpdit_lightning.regular_files import sha256_of
from gpdit_lightning.schema import CONTENT_HASH

CONSISTENT = 0.3  # fraction of the cases in which recorded hashes are replaced by those of the damaged files
LIMITS_OF_RECIPES = 4  # times those of other files: a valid recipe may name a larger model, by default size B
MIN_HEADER_BYTES = 8  # of a file with a header that can be damaged
CHECKSUM_LISTS = (exported.CHECKSUMS, features.CHECKSUMS)
JSON_SUFFIXES = (".json", ".jsonl", ".complete")


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
