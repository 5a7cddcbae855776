"""Outcomes of cases: how a command ends on damaged files, compared with how it ends on undamaged ones."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from benchmarks.fuzz.cases import Case
from benchmarks.fuzz.processes import HARNESS_ERROR, Ended, Limits, run_jobs

Outcome = Literal["named", "refused", "harmless", "accepted", "silent", "crashed", "hung"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
FAILURES: tuple[Outcome, ...] = ("silent", "crashed", "hung")
OUT_OF_MEMORY = ("memory ran out", "MemoryError")
UNEXPECTED = "this is a fault of"  # in the message of an exception that no part of the library expects
TRACEBACK = "Traceback (most recent call last)"
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


def compare(case: Case, ended: Ended, intact: Ended) -> CaseReport:
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
        yield compare(case, ended, intact[tuple(case.arguments)])
