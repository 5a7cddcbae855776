"""Which input files are held out for validation: by folders, annotations, or a hash of the recording."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gpdit_lightning.data.shard_entry import Split
from gpdit_lightning.names import as_text
from gpdit_lightning.preparation.annotations import Annotations

MIN_HELD_OUT = 4
"""Minimum number of held-out recordings, if they are at most a quarter of all. Otherwise it is a quarter, at least one,
since a validation loss over one or two recordings says little about others."""


class SplitChoice(NamedTuple):
    """Split of a file, None if it is excluded, and the reason."""

    split: Split | None
    reason: str


IN_HELD_OUT_FOLDER = SplitChoice("validation", "it is in a held-out folder")
IN_HELD_OUT_TAR = SplitChoice("validation", "its tar is held out")
IN_NO_HELD_OUT_FOLDER = SplitChoice("train", "it is in no held-out folder")
SAME_RECORDING = "files of the same recording were prepared before"


def is_held_out(hashed: str, fraction: float) -> bool:
    """Return whether a recording is held out, by a hash of its name or content: new files change no earlier choice."""
    return _unit_hash(hashed) < fraction


def choose_split_by_hash(hashed: str, fraction: float, description: str | None = None) -> SplitChoice:
    """Choose the split of a recording by a hash.

    Args:
        hashed: what is hashed: the name of the recording, or another value that identifies it.
        fraction: fraction of recordings to hold out.
        description: what the value is, for the reason; None for the value itself.
    """
    held_out = is_held_out(hashed, fraction)
    relation = "below" if held_out else "not below"
    reason = f"the hash of {description or hashed} is {_unit_hash(hashed):.4f}, {relation} the fraction {fraction:g}"
    return SplitChoice("validation" if held_out else "train", reason)


def recording_of(name: str, pattern: str | None) -> str:
    """Return the first match of the pattern in a file name; the whole name if there is none."""
    match = re.search(pattern, name) if pattern else None
    return match.group() if match else name


def choose_splits(
    names: Sequence[str],
    fraction: float | None,
    pattern: str | None,
    annotations: Annotations,
    recorded: Mapping[str, Split | None],
) -> dict[str, SplitChoice]:
    """Choose the split of each file: by the annotations if they contain any of the files, else by a hash.

    Recorded files keep their split, and new files of the same recording get that split.

    Args:
        names: names of the files.
        fraction: fraction of recordings to hold out; None if there are held-out folders, so that all files are for
            training.
        pattern: regular expression for the recording in a name.
        annotations: annotations of the files.
        recorded: splits by file name that an earlier run chose.
    """
    annotated = {name: annotations.get(name).split for name in names}
    if any(annotated.values()):
        return _split_by_annotations(annotated, recorded)
    recordings = {name: recording_of(name, pattern) for name in names}
    chosen = {
        recording_of(name, pattern): SplitChoice(split, SAME_RECORDING) for name, split in recorded.items() if split
    }
    new = sorted(set(recordings.values()) - chosen.keys(), key=_unit_hash)
    if fraction is None:
        chosen |= dict.fromkeys(new, IN_NO_HELD_OUT_FOLDER)
    else:
        before = [chosen[recording].split for recording in set(recordings.values()) & chosen.keys()]
        chosen |= _split_recordings(new, fraction, before.count("train"), before.count("validation"))
    return {name: chosen[recordings[name]] for name in names}


def _split_by_annotations(
    annotated: Mapping[str, Split | None], recorded: Mapping[str, Split | None]
) -> dict[str, SplitChoice]:
    unlisted = SplitChoice("train", "the annotation files list held-out files only, and not this one")
    if "train" in annotated.values():
        unlisted = SplitChoice(None, "the annotation files list other files for training, and not this one")
    chosen = {
        name: SplitChoice(split, "an annotation file assigns it to this split") if split else unlisted
        for name, split in annotated.items()
    }
    return {name: choice._replace(split=recorded.get(name) or choice.split) for name, choice in chosen.items()}


def _split_recordings(
    recordings: Sequence[str], fraction: float, training_before: int, held_out_before: int
) -> dict[str, SplitChoice]:
    """Choose the splits of new recordings, in the order of their hashes.

    At least `MIN_HELD_OUT` of all recordings are held out, or as many as a quarter if that is less, unless the fraction
    is 0. At least one recording is for training.

    Args:
        recordings: names of the new recordings, sorted by hash.
        fraction: fraction of recordings to hold out.
        training_before, held_out_before: numbers of recordings whose split an earlier run chose.
    """
    total = len(recordings) + training_before + held_out_before
    minimum = min(MIN_HELD_OUT, max(1, total // 4)) if fraction > 0 and total > 1 else 0
    count = max(sum(is_held_out(recording, fraction) for recording in recordings), minimum - held_out_before)
    if not training_before:
        count = max(0, min(count, len(recordings) - 1))
    chosen = {}
    for i, recording in enumerate(recordings):
        choice = choose_split_by_hash(recording, fraction)
        split: Split = "validation" if i < count else "train"
        if split != choice.split:
            rule = f"at least {minimum} of {total} recordings are held out"
            rule = rule if split == "validation" else "at least one recording is for training"
            choice = SplitChoice(split, f"{choice.reason}, but {rule}")
        chosen[recording] = choice
    return chosen


def _unit_hash(text: str) -> float:
    """Return a number in [0, 1) that depends on the text only."""
    return int.from_bytes(hashlib.sha256(as_text(text).encode()).digest()[:8]) / 2**64
