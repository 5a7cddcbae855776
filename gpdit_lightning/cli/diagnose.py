"""`diagnose`: compare the curves of a run with those of healthy runs."""

from collections.abc import Sequence
from pathlib import Path

from gpdit_lightning.cli.recipe_files import read_yaml
from gpdit_lightning.diagnosis.comparison import compare
from gpdit_lightning.diagnosis.curves import RunCurves, read_curves
from gpdit_lightning.diagnosis.facts import DATA, OWN_SETTINGS, Facts, facts_of
from gpdit_lightning.diagnosis.references import (
    HealthyRun,
    Reference,
    differences,
    fitting_reference,
    read_reference,
    recorded,
    shipped_reference,
)
from gpdit_lightning.diagnosis.report import draw, report, setting_texts
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import announce_replaced, check_writable
from gpdit_lightning.options.diagnose import DiagnoseOptions
from gpdit_lightning.path_kinds import RECIPE


def diagnose(options: DiagnoseOptions) -> None:
    """Print how a run differs from healthy runs, and draw its curves over theirs.

    Raises:
        InputError: the run folder has no curves or no recipe, or the reference cannot be used.
    """
    check_writable(options.out, extension=".png")
    run, facts = read_run(options.run)
    reference = chosen_reference(options.reference) if options.reference else fitting_reference(facts)
    comparison = compare(run, facts, reference)
    print(report(str(options.run), run, comparison))
    announce_replaced([options.out])
    draw(options.run.name, run, comparison, options.out)
    print(f"wrote {options.out}")


def read_run(folder: Path) -> tuple[RunCurves, Facts]:
    """Return the curves of a run, and the settings that they depend on.

    Raises:
        InputError: the folder has no curves or no recipe.
    """
    run = read_curves(folder)
    path = folder / RECIPE
    recipe = read_yaml(path)
    return run, facts_of(recipe, run.curves, str(path))


def chosen_reference(names: Sequence[str]) -> Reference:
    """Return the reference of an option: by its name, from a file, or from run folders.

    Raises:
        InputError: it cannot be read, or several of these are given that are not all run folders.
    """
    paths = [Path(name) for name in names]
    if all(path.is_dir() for path in paths):
        return reference_of_runs(paths)
    if len(names) > 1:
        missing = next(name for name, path in zip(names, paths, strict=True) if not path.is_dir())
        raise InputError(
            f"--reference has {missing} beside others, which is no run folder: give run folders, or one name."
        )
    return read_reference(paths[0]) if paths[0].is_file() else shipped_reference(names[0])


def reference_of_runs(folders: Sequence[Path]) -> Reference:
    """Return a reference of the runs in some folders.

    Raises:
        InputError: a folder has no curves or no recipe, or its run has other settings than the first one.
    """
    runs, found = list[HealthyRun](), list[Facts]()
    for folder in folders:
        curves, facts = read_run(folder)
        seed = read_yaml(folder / RECIPE).get("seed_everything")
        found.append(facts)
        runs.append(HealthyRun(seed if type(seed) is int else 0, "", curves.begun, "", recorded(curves)))
        other = differences(facts, found[0], [group for group in facts if group != DATA])
        if other:
            raise InputError(
                f"{folder} and {folders[0]} have other settings ({setting_texts(other)}): give runs of one recipe that "
                "differ in their seeds."
            )
    for group in OWN_SETTINGS.values():  # some runs may have no such curve
        found[0][group] = next((facts[group] for facts in found if facts[group]), {})
    return Reference(", ".join(map(str, folders)), "runs on this machine", found[0], runs)
