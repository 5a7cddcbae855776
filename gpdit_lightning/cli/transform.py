"""`transform`: transform images as example pairs show, with a few-shot model (GPDiT, section 5.4)."""

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

from gpdit_lightning.checkpoints.reading import TrainedModel, load_trained_model
from gpdit_lightning.cli.generating import generation_config, load_codec_of, trained_sizes
from gpdit_lightning.devices import available_device
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import atomic_write, check_writable
from gpdit_lightning.generation import cast_linear_weights
from gpdit_lightning.generation import transform as generate_targets
from gpdit_lightning.media.image_tasks import EXISTING_PAIRS, TASKS, ImageTask, make_pair
from gpdit_lightning.media.images import IMAGE_EXTENSIONS, Size, closest_size, resize_and_crop, write_sheet
from gpdit_lightning.media.video import natural_sort_key
from gpdit_lightning.options.transform import TransformOptions
from gpdit_lightning.preparation.pairs import (
    find_pair_folders,
    images_in,
    match_by_name,
    match_in_folder,
    pair_folders,
    read_pair,
)

log = logging.getLogger(__name__)

SHEET_ROWS = 64  # of 256 pixels each: image viewers open no larger files
LABEL_SHOWN = 40  # characters


def transform(options: TransformOptions) -> None:
    """Generate a target for every source, write them, and compare them with the ground truth where it is given.

    Raises:
        InputError: an option, an image or the checkpoint cannot be used.
    """
    task, examples_task = (task_named(name) for name in (options.task, options.examples_task or options.task))
    trained = load_trained_model(options.checkpoint, available_device(options.device), options.weights)
    codec = load_codec_of(trained, options)
    check_training(trained, options.checkpoint)
    config = generation_config(options, trained)
    examples = example_paths(options, number_of_examples(options.pairs, trained), examples_task)
    jobs, sheet = plan_jobs(options, trained_sizes(options.size, trained), task, examples)
    shown = examples_at({job.size for job in jobs}, examples, examples_task)
    if config.autocast_dtype is not None:
        cast_linear_weights(trained.backbone, config.autocast_dtype)

    results: dict[Path, Tensor] = {}
    with (
        tqdm(total=len(jobs), unit=" images", desc="generating") as bar,
        logging_redirect_tqdm([logging.getLogger("gpdit_lightning")]),
    ):
        for batch in batches(jobs, options.batch_size):
            sources = torch.stack([job.images[0] for job in batch])
            pairs = shown[batch[0].size]
            generated = generate_targets(trained.backbone, codec, pairs, sources, config, seeds=options.seed)
            for job, image in zip(batch, generated, strict=True):
                with write_errors_explained(job.out, "--out"), atomic_write(job.out) as path:
                    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, format="PNG")
                results[job.out] = image
            bar.update(len(batch))
    with write_errors_explained(sheet, "--sheet"):
        draw_sheet(sheet, jobs[:SHEET_ROWS], results, shown)
    print(f"{options.out if len(jobs) > 1 else jobs[0].out}; beside their examples: {sheet}")
    if len(jobs[0].images) > 1:
        print(comparison(jobs, results))


def task_named(name: str | None) -> ImageTask | None:
    """The image task of a name; None for ready pairs.

    Raises:
        InputError: the name is unknown.
    """
    if name in (None, EXISTING_PAIRS.name):
        return None
    if name not in TASKS:
        raise InputError(f"the task {name!r} is unknown: choose one of {', '.join(TASKS)}.")
    return TASKS[name]


@dataclass(frozen=True)
class Job:
    """One image to transform.

    Attributes:
        name: its title in the sheet.
        images: the source and, where it is known, its true target: uint8 (3, H, W), of a size of training.
        out: the file of the result.
    """

    name: str
    images: list[Tensor]
    out: Path

    @property
    def size(self) -> Size:
        """Height and width."""
        height, width = self.images[0].shape[1:]
        return height, width


def check_training(trained: TrainedModel, where: str) -> None:
    """Raise `InputError` if the checkpoint records training data without sequences."""
    order = trained.backbone.facts.data
    sources = [name.split(".")[1] for name in order if name.endswith(".manifests")]
    if sources and "sequences" not in sources:
        raise InputError(
            f"{where} was trained on {' and '.join(sources)}, not on sequences of pairs: train it on some first "
            "(recipes/stage4_few_shot.yaml)."
        )


def number_of_examples(wanted: int | None, trained: TrainedModel) -> int:
    """How many examples to give: by default as many as precede the last pair of a training sequence."""
    most = max(1, trained.geometry.frames // 2 - 1)
    if wanted is None:
        return most
    if wanted > most:
        log.warning("warning: --pairs is %d, but training gave at most %d: the result may be worse", wanted, most)
    return wanted


def example_paths(options: TransformOptions, count: int, task: ImageTask | None) -> Sequence[Sequence[Path]]:
    """The first `count` sources with their targets; with a task, the images that it makes both of.

    Raises:
        InputError: too few, one without its counterpart, or another kind of folder.
    """
    folder = options.examples
    found: Sequence[Sequence[Path]]
    if task is None:
        other = "another" if options.examples_task else "--task or"
        pairs = match_by_name(*pair_folders(folder, f"give {other} --examples_task for plain images"))
        found = sorted(pairs, key=lambda pair: natural_sort_key(pair[0]))
    elif find_pair_folders(folder):
        raise InputError(
            f"{folder} holds ready pairs, and the task {task.name} makes its own of plain images: give "
            f"--examples_task {EXISTING_PAIRS.name}, or a folder of plain images."
        )
    else:
        found = [(path,) for path in images_at(str(folder))]
    if len(found) < count:
        raise InputError(f"{folder} holds {len(found)} examples for --pairs {count}: add some, or show fewer.")
    return found[:count]


def images_at(place: str) -> list[Path]:
    """A image, or those of a folder in natural order.

    Raises:
        InputError: nothing is there, or a folder without images.
    """
    path = Path(place)
    if not path.exists():
        raise InputError(f"{place} does not exist on this machine: give a image or a folder of images.")
    return sorted(images_in(path), key=natural_sort_key) if path.is_dir() else [path]


def plan_jobs(
    options: TransformOptions, sizes: Sequence[Size], task: ImageTask | None, examples: Sequence[Sequence[Path]]
) -> tuple[list[Job], Path]:
    """A job for every source, and the file of the sheet; errors in any of them are found here."""
    sources = [path for place in options.source for path in images_at(place)]
    together = with_ground_truth(sources, options.truth, task)
    results, sheet = result_paths(options.out, options.sheet, sources)
    read = {path.resolve() for paths in (*examples, *together) for path in paths}
    for path in (*results, sheet):
        if path.resolve() in read:
            raise InputError(f"{path} is an input and would be overwritten by a result: give another --out or --sheet.")
    of_one_task = options.examples_task in (None, options.task or EXISTING_PAIRS.name)
    seen = {path.resolve() for paths in examples for path in paths[:1]}
    for path in sources:
        if of_one_task and path.resolve() in seen:
            log.warning("warning: %s is an example too: the model is given its target", path)
    jobs = []
    for paths, out in zip(together, results, strict=True):
        images = read_pair(paths)
        height, width = images[0].shape[-2:]
        jobs.append(Job(paths[0].stem[:LABEL_SHOWN], at_size(images, closest_size(height, width, sizes), task), out))
    return jobs, sheet


def with_ground_truth(sources: Sequence[Path], truth: Path | None, task: ImageTask | None) -> Sequence[Sequence[Path]]:
    """Each source, and the image of its true target where one is given.

    Raises:
        InputError: a source without, two of one name, or a truth beside that of a task.
    """
    if truth is None:
        return [(path,) for path in sources]
    if task:
        raise InputError(f"--task {task.name} makes the truth itself: leave --truth {truth} out.")
    if truth.is_dir():
        return match_in_folder(sources, truth)
    if len(sources) > 1:
        raise InputError(f"--truth {truth} is one image for {len(sources)} sources: give a folder of images.")
    return [(sources[0], *images_at(str(truth)))]


def result_paths(out: Path, sheet: Path | None, sources: Sequence[Path]) -> tuple[list[Path], Path]:
    """Where the results and the sheet go, all of them different.

    Raises:
        InputError: one file for several, another ending than .png, or a place where no file can be written.
    """
    for option, path, endings in (("--out", out, (*IMAGE_EXTENSIONS, ".gif")), ("--sheet", sheet, None)):
        if path and path.suffix != ".png" and (endings is None or path.suffix.lower() in endings):
            raise InputError(f"{option} is {path}, but images are written as PNG: name it {path.stem}.png.")
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
        raise InputError(f"Two images would be written to one file in {out}: rename a source or the --sheet.")
    for path in results:
        check_writable(path)
    check_writable(sheet, "--sheet")
    return results, sheet


@contextmanager
def write_errors_explained(path: Path, option: str) -> Iterator[None]:
    """Raise an `InputError` that names the option which would place the file elsewhere, instead of an `OSError`."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}): correct that, or give another {option}."
        ) from None


def at_size(images: Sequence[Tensor], size: Size, task: ImageTask | None) -> list[Tensor]:
    """A source, with its target where there is one or a task makes it, scaled and cropped: uint8 (3, H, W) each."""
    scaled = [resize_and_crop(image, size) for image in images]
    return [image[0] for image in (make_pair(task, scaled[0]) if task else scaled)]


def examples_at(
    sizes: Iterable[Size], examples: Sequence[Sequence[Path]], task: ImageTask | None
) -> dict[Size, list[tuple[Tensor, Tensor]]]:
    """The examples as pairs of uint8 (3, H, W), for each size."""
    read = [read_pair(paths) for paths in examples]
    found: dict[Size, list[tuple[Tensor, Tensor]]] = {}
    for size in sizes:
        pairs = (at_size(images, size, task) for images in read)
        found[size] = [(source, target) for source, target in pairs]
    return found


def batches(jobs: Sequence[Job], batch_size: int) -> list[list[Job]]:
    """Batches of at most `batch_size` images of one size, otherwise in their order."""
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
        source, *truth = job.images
        shown = [image for pair in examples[job.size] for image in pair]
        rows.append((job.name, [*shown, source, results[job.out], *truth]))
    truths = ["truth"] * (len(jobs[0].images) - 1)
    write_sheet(path, [*titles, "source", "result", *truths], rows, context_columns=len(titles))


def comparison(jobs: Sequence[Job], results: dict[Path, Tensor]) -> str:
    """The errors of the results, and those of copying the sources."""
    errors = []
    for job in jobs:
        source, truth = (image.float() for image in job.images)
        errors.append([(image - truth).square().mean() for image in (results[job.out].float(), source)])
    generated, copied = torch.tensor(errors).mean(dim=0).tolist()
    images = f"{len(jobs)} image{'s' * (len(jobs) > 1)}"
    return f"mean squared error (8-bit levels) on {images}: {generated:.1f}; of copying the source: {copied:.1f}"
