"""`transform`: transform images as example pairs show, with a few-shot model (GPDiT, section 5.4)."""

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from gpdit_lightning.checkpoints.reading import TrainedModel
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import announce_replaced, atomic_write, check_keeps_inputs, check_writable
from gpdit_lightning.generation import transform as generate_targets
from gpdit_lightning.generation.pipeline import load_pipeline
from gpdit_lightning.generation.settings import batches_by_shape, trained_sizes
from gpdit_lightning.media.finding import FoundFile
from gpdit_lightning.media.image_tasks import EXISTING_PAIRS, ImageTask, make_pair
from gpdit_lightning.media.images import Size, closest_size, resize_and_crop, write_sheet
from gpdit_lightning.media.video import natural_sort_key
from gpdit_lightning.names import MAX_NAME_BYTES, as_text, counted
from gpdit_lightning.options.transform import TransformOptions
from gpdit_lightning.path_kinds import IMAGE_EXTENSIONS, does_not_exist
from gpdit_lightning.preparation.few_shot import find_task
from gpdit_lightning.preparation.pairs import (
    find_pair_folders,
    images_in,
    match_by_name,
    match_in_folder,
    pair_folders,
    read_pair,
)
from gpdit_lightning.progress import progress_bar
from gpdit_lightning.regular_files import sha256_of

log = logging.getLogger(__name__)

MAX_SHEET_ROWS = 64  # of up to 256 pixels each, since many viewers cannot open larger images
MAX_TITLE_LENGTH = 40  # characters

ExamplePaths = tuple[Path, ...]
"""Source and target of an example, or the image from which a task makes both."""
Examples = Mapping[tuple[ExamplePaths, Size], tuple[Tensor, Tensor]]
"""Source and target of each example at each size, uint8 (3, H, W)."""


def transform(options: TransformOptions) -> None:
    """Generate a target for every source, write the results and a sheet, and compare them with the ground truth.

    Raises:
        InputError: an option, an image or the checkpoint cannot be used.
    """
    task = find_task(options.task or EXISTING_PAIRS.name)
    examples_task = find_task(options.examples_task or task.name)
    pipeline = load_pipeline(options)
    trained = pipeline.trained
    check_trained_on_sequences(trained, options.checkpoint)
    config = pipeline.generation_config(options)
    candidates = example_paths(options.examples, options.examples_task, examples_task)
    count = number_of_examples(options.pairs, trained)
    jobs, sheet = plan_jobs(options, trained_sizes(options.size, trained), task, candidates, count)
    announce_replaced([*(job.out for job in jobs), sheet])
    examples = read_examples(jobs, examples_task)

    results: dict[Path, Tensor] = {}
    with progress_bar(total=len(jobs), unit=" images", desc="generating") as bar:
        for batch in batches_by_shape(jobs, options.batch_size, lambda job: (job.images[0].shape, job.examples)):
            sources = torch.stack([job.images[0] for job in batch])
            pairs = [examples[paths, batch[0].size] for paths in batch[0].examples]
            targets = generate_targets(pipeline.model, pipeline.codec, pairs, sources, config, seeds=options.seed)
            for job, image in zip(batch, targets, strict=True):
                with explain_write_errors(job.out, "--out"), atomic_write(job.out) as path:
                    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, format="PNG")
                results[job.out] = image
            bar.update(len(batch))
    with explain_write_errors(sheet, "--sheet"):
        draw_sheet(sheet, jobs[:MAX_SHEET_ROWS], results, examples)
    print(f"results: {options.out if len(jobs) > 1 else jobs[0].out}; with their examples: {sheet}")
    if len(jobs[0].images) > 1:
        print(comparison(jobs, results))


@dataclass(frozen=True)
class Job:
    """One image to transform.

    Attributes:
        name: its title in the sheet.
        images: the source and, if it is known, the true target: uint8 (3, H, W), of a size of training.
        out: the file of the result.
        examples: paths of the examples.
    """

    name: str
    images: list[Tensor]
    out: Path
    examples: tuple[ExamplePaths, ...]

    @property
    def size(self) -> Size:
        """Height and width."""
        height, width = self.images[0].shape[1:]
        return height, width


def check_trained_on_sequences(trained: TrainedModel, checkpoint: str) -> None:
    """Raise `InputError` if the checkpoint records that it was trained on other data only."""
    data = trained.backbone.facts.data
    kinds = [name.split(".")[1] for name in data if name.endswith(".manifests")]
    if kinds and "sequences" not in kinds:
        raise InputError(
            f"{checkpoint} was trained on {' and '.join(kinds)}, not on sequences of pairs: train it on some first "
            "(--config gpdit:stage4_few_shot)."
        )


def number_of_examples(requested: int | None, trained: TrainedModel) -> int:
    """Return the number of examples, by default as many as precede the last pair of a training sequence."""
    trained_on = max(1, trained.geometry.frames // 2 - 1)
    if requested is None:
        return trained_on
    if requested > trained_on:
        log.warning(
            "warning: --pairs is %d, but training gave at most %d: the result may be worse", requested, trained_on
        )
    return requested


def example_paths(folder: Path, given_task: str | None, task: ImageTask) -> list[ExamplePaths]:
    """Return all examples of a folder in natural order.

    Args:
        folder: a folder of images, or of the folders `source` and `target`.
        given_task: the option --examples_task.
        task: the task of the examples.

    Raises:
        InputError: an image without counterpart, or pairs where images are needed and vice versa.
    """
    if task is EXISTING_PAIRS:
        other = "another" if given_task else "--task or"
        folders = pair_folders(folder, f"give {other} --examples_task for single images")
        pairs = [(source.path, target.path) for source, target in match_by_name(*folders, recursive=False)]
        return sorted(pairs, key=lambda pair: natural_sort_key(pair[0]))
    if find_pair_folders(folder):
        raise InputError(
            f"{folder} contains pairs, but the task {task.name} makes its pairs from single images: give "
            f"--examples_task {EXISTING_PAIRS.name}, or a folder of images."
        )
    return [(path,) for path in image_paths(str(folder))]


def choose_examples(
    candidates: Sequence[ExamplePaths], source: Path, count: int, folder: Path, hash_of: Callable[[Path], str]
) -> tuple[ExamplePaths, ...]:
    """Return the first `count` examples that do not contain the image to transform, or a copy of it.

    Args:
        candidates: all examples.
        source: the image to transform.
        count: number of examples.
        folder: the folder of the examples, for the message.
        hash_of: returns a hash of the content of a file.

    Raises:
        InputError: there are too few.
    """
    content = hash_of(source)
    others = (paths for paths in candidates if content not in map(hash_of, paths))
    chosen = tuple(islice(others, count))
    if len(chosen) < count:
        other = f" other than {source}" if len(chosen) < len(candidates) else ""
        raise InputError(
            f"{folder} contains {len(chosen)} examples{other} for --pairs {count}: add some, or lower --pairs."
        )
    return chosen


def hash_content(path: Path) -> str:
    """Return the sha256 of a file; raises `InputError` if it cannot be read."""
    try:
        return sha256_of(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): correct that, or leave it out.") from None


def image_paths(source: str) -> list[Path]:
    """Return the path of an image, or those of the images in a folder in natural order.

    Raises:
        InputError: the path does not exist, or the folder contains no images.
    """
    path = Path(source)
    if not path.exists():
        raise InputError(f"{source} {does_not_exist(source)}: give an image or a folder of images.")
    if not path.is_dir():
        return [path]
    return sorted((image.path for image in images_in(path, recursive=False)), key=natural_sort_key)


def plan_jobs(
    options: TransformOptions, sizes: Sequence[Size], task: ImageTask, candidates: Sequence[ExamplePaths], count: int
) -> tuple[list[Job], Path]:
    """Read the sources; return a job for each, and the path of the sheet.

    Args:
        options: give the sources, true targets and outputs.
        sizes: sizes of training.
        task: the task of the sources.
        candidates: all examples.
        count: number of examples of each source.

    Raises:
        InputError: a source, a true target or an output cannot be used, or there are too few examples.
    """
    sources = [path for source in options.source for path in image_paths(source)]
    inputs = with_ground_truth(sources, options.truth, task)
    results, sheet = result_paths(options.out, options.sheet, sources)
    hash_of = cache(hash_content)
    chosen = [choose_examples(candidates, path, count, options.examples, hash_of) for path in sources]
    read = (path for paths in (*inputs, *(paths for examples in chosen for paths in examples)) for path in paths)
    check_keeps_inputs((*results, sheet), read, "give another --out or --sheet")
    jobs = []
    for paths, out, examples in zip(inputs, results, chosen, strict=True):
        images = read_pair(paths)
        height, width = images[0].shape[-2:]
        scaled = scaled_pair(images, closest_size(height, width, sizes), task)
        jobs.append(Job(paths[0].stem[:MAX_TITLE_LENGTH], scaled, out, examples))
    return jobs, sheet


def with_ground_truth(sources: Sequence[Path], ground_truth: Path | None, task: ImageTask) -> Sequence[Sequence[Path]]:
    """Return each source, with the image of its true target if there is one.

    Raises:
        InputError: no true target for a source, several of one name, or true targets in addition to those of a task.
    """
    if ground_truth is None:
        return [(path,) for path in sources]
    if task is not EXISTING_PAIRS:
        raise InputError(f"--task {task.name} makes the ground truth itself: leave --truth {ground_truth} out.")
    if ground_truth.is_dir():
        files = [FoundFile(path, as_text(path.name)) for path in sources]
        return [(source.path, target.path) for source, target in match_in_folder(files, ground_truth)]
    if len(sources) > 1:
        raise InputError(f"--truth {ground_truth} is one image for {len(sources)} sources: give a folder of images.")
    return [(sources[0], *image_paths(str(ground_truth)))]


def result_paths(out: Path, sheet: Path | None, sources: Sequence[Path]) -> tuple[list[Path], Path]:
    """Return the paths of the results and of the sheet, all of them different.

    Raises:
        InputError: one file for several results, another extension than .png, or a file that cannot be written.
    """
    for option, path, extensions in (("--out", out, (*IMAGE_EXTENSIONS, ".gif")), ("--sheet", sheet, None)):
        if path and path.suffix != ".png" and (extensions is None or path.suffix.lower() in extensions):
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
    out_name = os.path.basename(os.path.abspath(out)).removesuffix(".png")  # abspath, since --out may be "."
    while len(os.fsencode(f"{out_name}_sheet.png")) > MAX_NAME_BYTES:
        out_name = out_name[:-1]
    sheet = sheet or out.parent / f"{out_name}_sheet.png"
    if len({*results, sheet}) <= len(results):
        raise InputError(f"two images would be written to one file in {out}: rename a source or the --sheet.")
    for path in results:
        check_writable(path)
    check_writable(sheet, "--sheet", extension=".png")
    return results, sheet


@contextmanager
def explain_write_errors(path: Path, option: str) -> Iterator[None]:
    """Turn an `OSError` of the block into an `InputError` that names the option for another path."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}): correct that, or give another {option}."
        ) from None


def scaled_pair(images: Sequence[Tensor], size: Size, task: ImageTask) -> list[Tensor]:
    """Scale and crop a source and its true target, or apply a task to the scaled image.

    Args:
        images: uint8 (1, 3, H, W); one or two for existing pairs, and one for any other task.
        size: height and width of the results.
        task: the task.

    Returns:
        The source and, if it is known, the target, uint8 (3, H, W).
    """
    scaled = [resize_and_crop(image, size) for image in images]
    return [image[0] for image in (scaled if task is EXISTING_PAIRS else make_pair(task, scaled[0]))]


def read_examples(jobs: Sequence[Job], task: ImageTask) -> Examples:
    """Read the examples of all jobs, and scale them to each size at which they are used."""
    sizes: dict[ExamplePaths, set[Size]] = defaultdict(set)
    for job in jobs:
        for paths in job.examples:
            sizes[paths].add(job.size)
    examples: dict[tuple[ExamplePaths, Size], tuple[Tensor, Tensor]] = {}
    for paths in sizes:
        images = read_pair(paths)
        for size in sizes[paths]:
            source, target = scaled_pair(images, size, task)
            examples[paths, size] = source, target
    return examples


def draw_sheet(path: Path, jobs: Sequence[Job], results: Mapping[Path, Tensor], examples: Examples) -> None:
    """Write a PNG with a row per source: examples, source, result, and ground truth if it is known."""
    num_examples = len(jobs[0].examples)
    titles = [f"{name} {number}" for number in range(1, 1 + num_examples) for name in ("source", "target")]
    rows = []
    for job in jobs:
        source, *ground_truth = job.images
        example_images = [image for paths in job.examples for image in examples[paths, job.size]]
        rows.append((job.name, [*example_images, source, results[job.out], *ground_truth]))
    ground_truth_titles = ["ground truth"] * (len(jobs[0].images) - 1)
    write_sheet(path, [*titles, "source", "result", *ground_truth_titles], rows, context_columns=len(titles))


def comparison(jobs: Sequence[Job], results: Mapping[Path, Tensor]) -> str:
    """Return one line with the mean squared errors of the results and of copying the sources."""
    errors = []
    for job in jobs:
        source, target = (image.float() for image in job.images)
        errors.append([(image - target).square().mean() for image in (results[job.out].float(), source)])
    result_error, copy_error = torch.tensor(errors).mean(dim=0).tolist()
    images = counted(len(jobs), "image")
    return f"mean squared error (8-bit levels) on {images}: {result_error:.1f}; of copying the source: {copy_error:.1f}"
