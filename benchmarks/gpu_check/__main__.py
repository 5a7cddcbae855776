"""The command of the check."""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import attention, float8, generation, offload, steps, waits
from benchmarks.gpu_check.cases import Part, Row, Setup
from benchmarks.gpu_check.fitting import latent_shape
from benchmarks.gpu_check.isolation import isolated, received, run_part
from benchmarks.gpu_check.report import Report, environment, markdown_table
from benchmarks.reading import write_shards
from gpdit_lightning import InputError

PARTS = {
    part.name: part for part in (attention.PART, steps.PART, generation.PART, offload.PART, float8.PART, waits.PART)
}
MINUTES = 9.0
START_SECONDS = 120.0  # time limit of a process that starts CUDA
CLIPS = 64  # prepared videos, at least


def option_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    summary, _, details = (gpu_check.__doc__ or "").partition(": ")[2].partition("\n\n")
    options = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m benchmarks.gpu_check",
        description=f"{summary[:1].upper()}{summary[1:]}\n\n{details}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="write the figures to this file, tables to FILE.md and the output of all parts to FILE.log",
    )
    options.add_argument(
        "--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), metavar="PART", help="parts to run"
    )
    options.add_argument("--minutes", type=float, default=MINUTES, help="limit of the whole check (default: 9)")
    options.add_argument("--clips", type=int, help="clips per training step (default: 8 of stage 2 and 5 of stage 3)")
    options.add_argument(
        "--smoke_test", action="store_true", help="run all parts at a tiny size on the CPU; the figures are meaningless"
    )
    return options


def check_options(options: argparse.Namespace) -> None:
    """Raise InputError for options that cannot be used."""
    if options.clips is not None and options.clips < 1:
        raise InputError(f"--clips is {options.clips}: give at least 1.")
    if not 0 < options.minutes < float("inf"):
        raise InputError(f"--minutes is {options.minutes}: give a positive number.")
    if options.out is not None and options.out.is_dir():
        raise InputError(f"--out is {options.out}, a folder: give the path of a file.")
    if options.out is not None and options.out.suffix in (".md", ".log"):
        raise InputError(f"--out is {options.out}: give a name that ends in .json; tables and log are put beside it.")


def send_environment(sender: Connection, device: torch.device) -> None:
    """Send the environment; the error in words if the device cannot be used."""
    if device.type == "cuda" and not torch.cuda.is_available():
        sender.send("this check needs a CUDA GPU; --smoke_test runs the script without one.")
    else:
        sender.send(environment(device))


def run(parts: Sequence[Part], setup: Setup, report: Report, seconds: float, out: Path | None, log: Path) -> None:
    """Run parts, print each row and write the report after it.

    Args:
        parts: in order.
        setup: what they share.
        report: to which their rows are added.
        seconds: time limit of all parts. Each has a share of what those before it have left.
        out: JSON file of the report.
        log: file to which the output of the parts is appended.
    """
    deadline = time.monotonic() + seconds
    for number, part in enumerate(parts):
        print(f"\n## {part.title}\n", flush=True)
        rows = report.rows.setdefault(part.name, [])

        def add(row: Row, part: Part = part, rows: list[Row] = rows) -> None:
            rows.append(row)
            lines = markdown_table([row], part.columns)
            print("\n".join(lines if len(rows) == 1 else lines[-1:]), flush=True)
            if out is not None:
                report.write(out, parts)

        share = part.share / sum(each.share for each in parts[number:])
        run_part(part, setup, share * (deadline - time.monotonic()), log, add)
        if part.note:
            print(f"\n{part.note}", flush=True)


def check(options: argparse.Namespace) -> int:
    """Run the check; return its exit status."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        setup = Setup(Path(name, "latents"), options.clips, options.smoke_test)
        log = options.out.with_suffix(".log") if options.out else Path(name, "log")
        with isolated(send_environment, Path(name, "start.log"), setup.device) as (process, receiver):
            facts = received(process, receiver, START_SECONDS)
        if not isinstance(facts, dict):
            print(f"error: {facts or 'the GPU does not respond.'}", file=sys.stderr)
            return 3
        if options.smoke_test:
            print("Smoke test at a tiny size on the CPU: the figures below are meaningless.")
        print(", ".join(f"{fact} {value}" for fact, value in facts.items()))
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")
        write_shards(setup.latents, max(CLIPS, options.clips or 0), latent_shape(setup.smoke_test)).save()
        report = Report(facts, setup.smoke_test)
        parts = [part for part in PARTS.values() if part.name in options.parts]
        run(parts, setup, report, 60 * options.minutes - (time.monotonic() - began), options.out, log)
    print(f"\n{report.failed} measurements failed: see FAILED above." if report.failed else "\nNo measurement failed.")
    if report.not_run:
        print(f"{report.not_run} were not run.")
    if options.out is not None:
        print(f"written to {options.out} and {options.out.with_suffix('.md')}")
    return 1 if report.failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = option_parser().parse_args(arguments)
    try:
        check_options(options)
        return check(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
