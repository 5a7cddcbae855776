"""`python -m benchmarks.healthy_runs RUN [RUN ...] --title TITLE --out FILE`: curves of healthy runs, as data.

The runs have one recipe and differ in their seeds. Their curves are read from TensorBoard's event files, the settings
that these depend on from the recipes in the run folders, and both are written to a JSON file. Those that ship with the
package, which `python -m gpdit_lightning diagnose` compares a user's run with, are in
gpdit_lightning/diagnosis/references; `diagnose --reference FILE` takes any other. Run it in the directory in which the
runs were trained, so that relative paths of the data are found.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gpdit_lightning.cli.diagnose import reference_of_runs
from gpdit_lightning.diagnosis.references import write_reference


def option_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m benchmarks.healthy_runs",
        description=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folders of one recipe with several seeds")
    add("--title", required=True, help="recipe and data in one line")
    add("--hardware", required=True, help="on which the runs were trained, in words")
    add("--commits", nargs="+", required=True, help="commit of the package, for all runs or for each of them")
    add("--out", required=True, type=Path, help="JSON file; its name without .json is the name of the reference")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the file, and print what it has."""
    parser = option_parser()
    options = parser.parse_args(arguments)
    commits = options.commits * (len(options.runs) if len(options.commits) == 1 else 1)
    if len(commits) != len(options.runs):
        parser.error(f"--commits are {len(commits)} for {len(options.runs)} runs: give one, or one for each run")
    reference = reference_of_runs(options.runs)
    runs = [
        replace(run, commit=commit, hardware=options.hardware)
        for run, commit in zip(reference.runs, commits, strict=True)
    ]
    reference = replace(reference, title=options.title, runs=runs)
    write_reference(reference, options.out)
    for run in reference.runs:
        last = max(curve.steps[-1] for curve in run.curves.values())
        print(f"{options.out}: seed {run.seed}, {len(run.curves)} curves to step {last}")


if __name__ == "__main__":
    main()
