"""Hashes of large files: of all bytes, computed once on each machine and remembered until the file changes; or of both
ends.

A record is a small file in `FOLDER`, named by machine and path, with a hash of its content. It is valid as long as
size, modification time, change time, inode and device of the file are those of the record. Changes of the bytes always
set the change time, which programs cannot set back. While one process reads a file, the others of the machine wait for
its record, so that 64 ranks read a checkpoint once.
"""

import hashlib
import json
import logging
import os
import platform
import time
from contextlib import suppress
from pathlib import Path

from gpdit_lightning.errors import InputError, TransientError
from gpdit_lightning.files import partial_path, process_lock
from gpdit_lightning.regular_files import Identity, identity_of, open_regular, read_bounded
from gpdit_lightning.retries import retried, transient_error
from gpdit_lightning.schema import CONTENT_HASH, content_hash

FOLDER = Path("~/.cache/gpdit_lightning/hashes")
CHUNK = 2**22  # bytes that are read at a time
BLOCK = 2**15  # bytes at each end of a file that `content_identity` reads
LARGE = 2**30  # bytes of a file whose reading is logged
MAX_RECORD_BYTES = 2**16
MAX_RECORDS = 10_000  # the oldest half is removed at more
# Seconds. File systems update times in steps of up to 2 s, so that a file which changed less than this ago could change
# once more without another time.
TIME_RESOLUTION = 3.0
POLL_INTERVAL = 0.1  # seconds
ABANDONED_AFTER = 60.0  # seconds without progress after which a process that reads a file is no longer waited for

log = logging.getLogger(__name__)


def remembered_sha256(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal digits; it is read only if it changed since it was last read.

    Without a home folder that can be written, it is read every time.

    Raises:
        InputError: it is not a regular file.
        TransientError: it changed while it was read.
        OSError: it cannot be read.
    """
    identity = identity_of(path.stat())
    try:
        key = hashlib.sha256(f"{platform.node()}\n{path.resolve()}".encode("utf-8", "surrogateescape")).hexdigest()
        record = FOLDER.expanduser() / f"{key}.json"
        # Lock files are never removed: a process that has opened one before could hold a lock that no other sees.
        lock = record.parent / "locks" / key[:2]
        record.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock.parent.mkdir(exist_ok=True)
        open_regular(lock, os.O_RDWR | os.O_CREAT).close()
    except (OSError, RuntimeError):  # no home folder, or none that can be written, such as that of a compute node
        return _compute(path)[0]
    last_progress, last_change = 0, time.monotonic()
    while True:
        known = _recall(record, identity)
        if known is not None:
            return known
        with suppress(BlockingIOError), process_lock(lock):
            known = _recall(record, identity)
            if known is None:
                known, identity = _compute(path, lock)
                _remember(record, path, identity, known)
            return known
        progress = lock.stat().st_mtime_ns
        if progress != last_progress:
            last_progress, last_change = progress, time.monotonic()
        if time.monotonic() - last_change > ABANDONED_AFTER:
            return _compute(path)[0]
        time.sleep(POLL_INTERVAL)


@retried
def content_identity(path: Path) -> str:
    """Return a hash of the size of a file and its first and last 32 KiB, 16 hexadecimal digits.

    It is the same for every copy, and cheap for videos: most changes, as by another encoder, change the size or an end
    of the file. It does not detect damage in between.

    Raises:
        InputError: it does not exist, or is not a regular file.
        TransientError: it could not be read for a reason other than its content.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(f"{size}\n".encode() + file.read(BLOCK))
            file.seek(max(0, size - BLOCK))
            digest.update(file.read(BLOCK))
    except OSError as error:
        missing = InputError(f"{path} cannot be read ({error.strerror}): restore it, or leave it out.")
        raise transient_error(error, path) or missing from None
    return digest.hexdigest()[:16]


def _compute(path: Path, lock: Path | None = None) -> tuple[str, Identity]:
    """Read a file; return its sha256 and the identity of what was read.

    Args:
        path: the file.
        lock: a file whose modification time shows other processes that this one is reading.

    Raises:
        TransientError: the file changed while it was read.
    """
    digest, block, size = hashlib.sha256(), bytearray(CHUNK), 0
    before = identity_of(path.stat())
    if before[0] >= LARGE:
        log.info("reading %s (%.1f GiB) to verify it, once on this machine", path, before[0] / 2**30)
    with open_regular(path) as file:
        while size <= before[0] and (count := file.readinto(block)):  # it may grow without end
            digest.update(memoryview(block)[:count])
            size += count
            if lock is not None and size % (16 * CHUNK) < count:
                os.utime(lock)
    after = identity_of(path.stat())
    if before != after or size != after[0]:
        raise TransientError(
            f"{path} changed while it was read: wait until the program that writes it has finished, and run the same "
            "command again."
        )
    return digest.hexdigest(), after


def _recall(record: Path, identity: Identity) -> str | None:
    """Return the sha256 in a record; None if there is none for this state of the file."""
    try:
        content = json.loads(read_bounded(record, MAX_RECORD_BYTES))
        # With a damaged record an intact file would be called damaged.
        is_intact = content[CONTENT_HASH] == content_hash(content)
        return str(content["sha256"]) if is_intact and tuple(content["identity"]) == identity else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _remember(record: Path, path: Path, identity: Identity, digest: str) -> None:
    """Write a record, unless the file changed just now, or the folder cannot be written."""
    _, modified, changed, *_ = identity
    if abs(time.time_ns() - max(modified, changed)) < TIME_RESOLUTION * 1e9:
        return
    content = {"path": os.fsencode(path.resolve()).decode(errors="replace"), "identity": identity, "sha256": digest}
    with suppress(OSError):
        temporary = partial_path(record)
        temporary.write_text(json.dumps(content | {CONTENT_HASH: content_hash(content)}), encoding="utf-8")
        temporary.replace(record)
        records = list(record.parent.glob("*.json"))
        if len(records) > MAX_RECORDS:
            for old in sorted(records, key=lambda found: found.stat().st_mtime_ns)[: MAX_RECORDS // 2]:
                old.unlink()
