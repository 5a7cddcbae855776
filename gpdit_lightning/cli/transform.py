"""`transform`: do to pictures what examples show, with a model trained on sequences of pairs (GPDiT, section 5.4)."""

import argparse
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from gpdit_lightning.checkpoints.reading import TrainedModel
from gpdit_lightning.cli.generating import add_generation, config_of, opened, parser_of, trained_sizes
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import check_place, written_whole
from gpdit_lightning.generation import cast_linear_weights, transform
from gpdit_lightning.media.image_tasks import EXISTING_PAIRS, TASKS, ImageTask, make_pair
from gpdit_lightning.media.images import IMAGE_EXTENSIONS, Size, closest_size, resize_and_crop, write_sheet
from gpdit_lightning.media.video import natural_sort_key
from gpdit_lightning.preparation.pairs import (
    counterparts,
    folders_in,
    pictures_in,
    read_alike,
    ready_folders,
    with_counterparts,
)

log = logging.getLogger(__name__)

SHEET_ROWS = 64  # of 256 pixels each: what viewers still open
LABEL_SHOWN = 40  # characters


def parser() -> argparse.ArgumentParser:
    """The verb's options."""
    options = parser_of(
        "transform",
        "Do to pictures what was done to a few others: the model sees pairs of a source and its target, then each of "
        "the given sources, and generates its target. Train it for the task by recipes/stage4_few_shot.yaml.",
    )

    what = options.add_argument_group("what to transform, and how it is shown")
    add = what.add_argument
    add(
        "--examples",
        required=True,
        type=Path,
        metavar="DIR",
        help="a folder with two folders, source and target, of pictures with the same names; with --task a folder of "
        "plain pictures",
    )
    add("--source", nargs="+", required=True, help="pictures, and folders of pictures")
    add("--task", choices=list(TASKS), help="make sources and targets of plain pictures, those of --source too")
    add(
        "--examples_task",
        choices=[EXISTING_PAIRS.name, *TASKS],
        help="the task of the examples alone; another than that of --source shows what the examples are worth to the "
        f"model ({EXISTING_PAIRS.name}: a folder of ready pairs; default: --task, or {EXISTING_PAIRS.name} without it)",
    )
    add("--pairs", type=int, help="examples shown, the first by name (default: one less than in a training sequence)")
    add("--truth", type=Path, help="the true target, or a folder of those of all sources, with the same names")
    add("--size", help="HEIGHTxWIDTH in pixels, one that was trained on (default: the closest in aspect)")

    add_generation(options.add_argument_group("how to generate").add_argument)

    result = options.add_argument_group("what to write")
    add = result.add_argument
    add(
        "--out",
        type=Path,
        default=Path("transformed.png"),
        help="a .png file for one source, a folder for several: each result is named like its source",
    )
    add(
        "--sheet",
        type=Path,
        metavar="FILE.png",
        help="examples, sources, results and truths side by side, a row for each source, at most "
        f"{SHEET_ROWS} (default: beside --out, as OUT_sheet.png)",
    )
    return options


def run(verb: str, arguments: Sequence[str]) -> None:
    """Generate, write, and compare with the truth where it is known."""
    options = parser().parse_args(arguments)
    if options.batch_size < 1:
        raise InputError(f"--batch_size is {options.batch_size}: give at least 1.")
    if options.seed < 0:
        raise InputError(f"--seed is {options.seed}: give a number from 0 on.")
    trained, codec = opened(options)
    check_training(trained, options.checkpoint)
    config = config_of(options, trained)
    task = TASKS[options.task] if options.task else None
    examples_task = TASKS.get(options.examples_task or options.task)
    examples = example_paths(options, pairs_shown(options.pairs, trained), examples_task)
    jobs, sheet = what_to_do(options, trained_sizes(options.size, trained), task, examples)
    shown = examples_at({job.size for job in jobs}, examples, examples_task)
    if config.autocast_dtype is not None:
        cast_linear_weights(trained.backbone, config.autocast_dtype)

    results: dict[Path, Tensor] = {}
    with (
        tqdm(total=len(jobs), unit=" pictures", desc="generating") as bar,
        logging_redirect_tqdm([logging.getLogger("gpdit_lightning")]),
    ):
        for batch in batches(jobs, options.batch_size):
            sources = torch.stack([job.pictures[0] for job in batch])
            pairs = shown[batch[0].size]
            made = transform(trained.backbone, codec, pairs, sources, config, seeds=options.seed)
            for job, picture in zip(batch, made, strict=True):
                with refusals_told(job.out, "--out"), written_whole(job.out) as path:
                    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path, format="PNG")
                results[job.out] = picture
            bar.update(len(batch))
    with refusals_told(sheet, "--sheet"):
        draw_sheet(sheet, jobs[:SHEET_ROWS], results, shown)
    print(f"{options.out if len(jobs) > 1 else jobs[0].out}; beside their examples: {sheet}")
    if len(jobs[0].pictures) > 1:
        print(comparison(jobs, results))


@dataclass(frozen=True)
class Job:
    """One picture to transform.

    Attributes:
        name: what a sheet calls it.
        pictures: the source and, where it is known, its true target: uint8 (3, H, W), of a size that was trained on.
        out: where the result goes.
    """

    name: str
    pictures: list[Tensor]
    out: Path

    @property
    def size(self) -> Size:
        """Height and width."""
        height, width = self.pictures[0].shape[1:]
        return height, width


def check_training(trained: TrainedModel, where: str) -> None:
    """Raise `InputError` where the training data are known, and hold no sequences."""
    order = trained.backbone.facts.get("data", {})
    sources = [name.split(".")[1] for name in order if name.endswith(".manifests")]
    if sources and "sequences" not in sources:
        raise InputError(
            f"{where} was trained on {' and '.join(sources)}, not on sequences of pairs: train it on some first "
            "(recipes/stage4_few_shot.yaml)."
        )


def pairs_shown(wanted: int | None, trained: TrainedModel) -> int:
    """How many examples to show: by default as many as in training came before the last pair of a sequence."""
    most = max(1, trained.geometry["frames"] // 2 - 1)
    if wanted is None:
        return most
    if wanted < 1:
        raise InputError(f"--pairs is {wanted}: show at least 1.")
    if wanted > most:
        log.warning("warning: --pairs is %d, but in training at most %d came before: more may do harm", wanted, most)
    return wanted


def example_paths(options: argparse.Namespace, count: int, task: ImageTask | None) -> Sequence[Sequence[Path]]:
    """The first `count` sources with their targets; with a task, the pictures that it makes both of.

    Raises:
        InputError: too few, one without its counterpart, or another kind of folder.
    """
    folder = options.examples
    found: Sequence[Sequence[Path]]
    if task is None:
        other = "another" if options.examples_task else "--task or"
        pairs = counterparts(*folders_in(folder, f"give {other} --examples_task for plain pictures"))
        found = sorted(pairs, key=lambda pair: natural_sort_key(pair[0]))
    elif ready_folders(folder):
        raise InputError(
            f"{folder} holds ready pairs, and the task {task.name} makes its own of plain pictures: give "
            f"--examples_task {EXISTING_PAIRS.name}, or a folder of plain pictures."
        )
    else:
        found = [(path,) for path in pictures_at(str(folder))]
    if len(found) < count:
        raise InputError(f"{folder} holds {len(found)} examples for --pairs {count}: add some, or show fewer.")
    return found[:count]


def pictures_at(place: str) -> list[Path]:
    """A picture, or those of a folder in natural order.

    Raises:
        InputError: nothing is there, or a folder without pictures.
    """
    path = Path(place)
    if not path.exists():
        raise InputError(f"{place} does not exist on this machine: give a picture or a folder of pictures.")
    return sorted(pictures_in(path), key=natural_sort_key) if path.is_dir() else [path]


def what_to_do(
    options: argparse.Namespace, sizes: Sequence[Size], task: ImageTask | None, examples: Sequence[Sequence[Path]]
) -> tuple[list[Job], Path]:
    """All sources and where their results go, and the file of the sheet; what can be wrong with them is found here."""
    sources = [path for place in options.source for path in pictures_at(place)]
    together = with_truths(sources, options.truth, task)
    results, sheet = result_paths(options.out, options.sheet, sources)
    read = {path.resolve() for paths in (*examples, *together) for path in paths}
    for path in (*results, sheet):
        if path.resolve() in read:
            raise InputError(f"{path} is read, and would be overwritten by a result: give another --out or --sheet.")
    of_one_task = options.examples_task in (None, options.task or EXISTING_PAIRS.name)
    seen = {path.resolve() for paths in examples for path in paths[:1]}
    for path in sources:
        if of_one_task and path.resolve() in seen:
            log.warning("warning: %s is an example too: the model is shown what to make of it", path)
    jobs = []
    for paths, out in zip(together, results, strict=True):
        pictures = read_alike(paths)
        height, width = pictures[0].shape[-2:]
        jobs.append(Job(paths[0].stem[:LABEL_SHOWN], at_size(pictures, closest_size(height, width, sizes), task), out))
    return jobs, sheet


def with_truths(sources: Sequence[Path], truth: Path | None, task: ImageTask | None) -> Sequence[Sequence[Path]]:
    """Each source, and the picture of its true target where one is given.

    Raises:
        InputError: a source without, two of one name, or a truth beside that of a task.
    """
    if truth is None:
        return [(path,) for path in sources]
    if task:
        raise InputError(f"--task {task.name} makes the truth itself: leave --truth {truth} out.")
    if truth.is_dir():
        return with_counterparts(sources, truth)
    if len(sources) > 1:
        raise InputError(f"--truth {truth} is one picture for {len(sources)} sources: give a folder of pictures.")
    return [(sources[0], *pictures_at(str(truth)))]


def result_paths(out: Path, sheet: Path | None, sources: Sequence[Path]) -> tuple[list[Path], Path]:
    """Where the results and the sheet go, all of them different.

    Raises:
        InputError: one file for several, another ending than .png, or a place where no file can be written.
    """
    for option, path, endings in (("--out", out, (*IMAGE_EXTENSIONS, ".gif")), ("--sheet", sheet, None)):
        if path and path.suffix != ".png" and (endings is None or path.suffix.lower() in endings):
            raise InputError(f"{option} is {path}, but pictures are written as PNG: name it {path.stem}.png.")
    if out.suffix == ".png" and len(sources) > 1:
        raise InputError(f"--out {out} is one file for {len(sources)} sources: give a folder.")
    if out.suffix == ".png":
        results = [out]
    else:
        names: Counter[str] = Counter()
        results = []
        for path in sources:
            names[path.stem] += 1
            name = path.stem if names[path.stem] == 1 else f"{path.stem}-{names[path.stem]}"
            results.append(out / f"{name}.png")
    own_name = os.path.basename(os.path.abspath(out)).removesuffix(".png")  # of `.` too
    sheet = sheet or out.parent / f"{own_name}_sheet.png"
    if len({*results, sheet}) <= len(results):
        raise InputError(f"Two pictures would be written to one file in {out}: rename a source or the --sheet.")
    for path in results:
        check_place(path)
    check_place(sheet, "--sheet")
    return results, sheet


@contextmanager
def refusals_told(path: Path, option: str) -> Iterator[None]:
    """Say of a file that cannot be written which option would place it elsewhere: `InputError` instead of `OSError`."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}): mend that, or give another {option}."
        ) from None


def at_size(pictures: Sequence[Tensor], size: Size, task: ImageTask | None) -> list[Tensor]:
    """A source, with its target where there is one or a task makes it, scaled and cropped: uint8 (3, H, W) each."""
    scaled = [resize_and_crop(picture, size) for picture in pictures]
    return [picture[0] for picture in (make_pair(task, scaled[0]) if task else scaled)]


def examples_at(
    sizes: Iterable[Size], examples: Sequence[Sequence[Path]], task: ImageTask | None
) -> dict[Size, list[tuple[Tensor, Tensor]]]:
    """The examples as pairs of uint8 (3, H, W), for each size."""
    read = [read_alike(paths) for paths in examples]
    found: dict[Size, list[tuple[Tensor, Tensor]]] = {}
    for size in sizes:
        pairs = (at_size(pictures, size, task) for pictures in read)
        found[size] = [(source, target) for source, target in pairs]
    return found


def batches(jobs: Sequence[Job], batch_size: int) -> list[list[Job]]:
    """Batches of at most `batch_size` pictures of one size, otherwise in their order."""
    alike: dict[Size, list[Job]] = defaultdict(list)
    for job in jobs:
        alike[job.size].append(job)
    return [group[first : first + batch_size] for group in alike.values() for first in range(0, len(group), batch_size)]


def draw_sheet(
    path: Path,
    jobs: Sequence[Job],
    results: dict[Path, Tensor],
    examples: dict[Size, list[tuple[Tensor, Tensor]]],
) -> None:
    """Write the sheet: a row for each source, as the model sees it."""
    pairs = next(iter(examples.values()))
    titles = [f"{name} {number}" for number in range(1, 1 + len(pairs)) for name in ("source", "target")]
    rows = []
    for job in jobs:
        source, *truth = job.pictures
        shown = [picture for pair in examples[job.size] for picture in pair]
        rows.append((job.name, [*shown, source, results[job.out], *truth]))
    truths = ["truth"] * (len(jobs[0].pictures) - 1)
    write_sheet(path, [*titles, "source", "result", *truths], rows, given=len(titles))


def comparison(jobs: Sequence[Job], results: dict[Path, Tensor]) -> str:
    """How far results are from the truth, and how far their sources are."""
    errors = []
    for job in jobs:
        source, truth = (picture.float() for picture in job.pictures)
        errors.append([(guess - truth).square().mean() for guess in (results[job.out].float(), source)])
    ours, copied = torch.tensor(errors).mean(dim=0).tolist()
    pictures = f"{len(jobs)} picture{'s' * (len(jobs) > 1)}"
    return f"mean squared error (8-bit levels) on {pictures}: {ours:.1f}; of copying the source: {copied:.1f}"
