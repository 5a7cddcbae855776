"""The command `python -m benchmarks.fuzz`."""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path

import torch

from benchmarks.fuzz.cases import Case, RandomCase, field_cases, kind_of
from benchmarks.fuzz.corpus import make_corpus
from benchmarks.fuzz.outcomes import FAILURES, OUTCOMES, CaseReport, run_cases
from benchmarks.fuzz.processes import Limits
from benchmarks.fuzz.targets import KINDS
from gpdit_lightning.devices import available_cores
from gpdit_lightning.progress import progress_bar

CASES_PER_SEED = 10**6


def case_numbers(seed: int, kinds: Sequence[str]) -> Iterator[int]:
    """Yield the numbers of the cases of a seed that damage files of some kinds, which alternate."""
    return (number for number in count(seed * CASES_PER_SEED) if kind_of(number) in kinds)


def table(reports: Sequence[CaseReport]) -> str:
    """Return the number of cases with each outcome, for every kind and in total."""
    lines = [f"{'kind':<14}{'tried':>8}" + "".join(f"{name:>10}" for name in OUTCOMES) + f"{'seconds':>10}"]
    for kind in (*KINDS, "total"):
        chosen = [report for report in reports if kind in (report.kind, "total")]
        counts = Counter(report.outcome for report in chosen)
        cells = "".join(f"{counts[name]:>10}" for name in OUTCOMES)
        if chosen:
            lines.append(f"{kind:<14}{len(chosen):>8}{cells}{sum(report.seconds for report in chosen):>10.0f}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", allow_abbrev=False, description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="number of cases")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other cases")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)}; separated by commas")
    parser.add_argument(
        "--fields",
        action="store_true",
        help="damage every field of the JSON files in turn; --count and --seed are ignored",
    )
    parser.add_argument("--case", type=int, help="repeat the case of this number, and show the output of its command")
    parser.add_argument("--out", type=Path, help="file for the report in JSON")
    parser.add_argument(
        "--keep", type=Path, help="empty folder for the undamaged and the damaged files, which stay there"
    )
    parser.add_argument("--processes", type=int, default=available_cores(), help="cases at the same time")
    parser.add_argument("--seconds", type=float, default=30.0, help="limit of time for a case")
    parser.add_argument("--mebibytes", type=int, default=1024, help="limit on the growth of memory in a case")
    return parser


def _chosen_cases(given: argparse.Namespace, kinds: Sequence[str], corpus: Path) -> Sequence[Case]:
    """Return the cases that the options name."""
    if given.fields:
        return [case for case in field_cases(corpus, kinds) if given.case in (None, case.number)]
    numbers = [given.case] if given.case is not None else islice(case_numbers(given.seed, kinds), given.count)
    return [RandomCase(number, corpus) for number in numbers]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases and print the table; return 1 if a case was silent, crashed or hung, else 0."""
    given = _parser().parse_args(arguments)
    kinds = given.kinds.split(",")
    if unknown := set(kinds) - set(KINDS):
        print(
            f"error: --kinds contains {', '.join(sorted(unknown))}: give some of {', '.join(KINDS)}.", file=sys.stderr
        )
        return 2
    torch.set_num_threads(1)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        (folder / "corpus").mkdir(parents=True)
        make_corpus(folder / "corpus")
        cases = _chosen_cases(given, kinds, folder / "corpus")
        limits = Limits(given.seconds, given.mebibytes)
        reports = []
        with progress_bar(total=len(cases), desc="cases", unit="case") as bar:
            for report in run_cases(cases, folder, limits, given.processes):
                reports.append(report)
                bar.update()
                if report.outcome in FAILURES:
                    bar.write(
                        f"{report.outcome}: case {report.number}: {report.command}: {report.damage}: {report.reason}"
                    )
    seconds = time.perf_counter() - start
    reports.sort(key=lambda report: report.number)
    if given.out:
        given.out.write_text(json.dumps([report.to_json() for report in reports], indent=1, ensure_ascii=False))
    if given.case is not None and reports:
        print(reports[0].output, reports[0].to_json(), sep="\n")
    print(f"{table(reports)}\n{seconds:.0f} s with {given.processes} processes")
    return int(any(report.outcome in FAILURES for report in reports))


if __name__ == "__main__":
    sys.exit(main())
