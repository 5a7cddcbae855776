"""Preparation of image pairs as sequences for few-shot training (GPDiT, sections 5.1 and 5.4)."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpdit_lightning.codecs import Codec, load_codec
from gpdit_lightning.data.manifest import FILE_NAME, Manifest
from gpdit_lightning.data.shard_entry import ShardEntry, Split
from gpdit_lightning.data.shard_writer import ShardSetWriter
from gpdit_lightning.devices import available_device
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import check_writable, folder_lock
from gpdit_lightning.imports import did_you_mean
from gpdit_lightning.media.image_tasks import EXISTING_PAIRS, TASKS, ImageTask, make_pair
from gpdit_lightning.media.images import Size, parse_size, read_image, resize_and_crop
from gpdit_lightning.names import as_text
from gpdit_lightning.options.prepare_pairs import PreparePairsOptions
from gpdit_lightning.preparation.pairs import Pair, pair_folders, pairs_from_folder, pairs_from_folders, split_pairs
from gpdit_lightning.preparation.records import USE_ANOTHER_FOLDER
from gpdit_lightning.progress import progress_bar
from gpdit_lightning.retries import explain_write_errors
from gpdit_lightning.schema import differences
from gpdit_lightning.specs import CodecSpec

INPUT_OPTIONS = ("sources", "targets", "pairs_in")
# Options that determine the sequences, in the order in which they are hashed.
SEQUENCE_OPTIONS = (
    *("task", "sources", "targets", "pairs_in", "pairs", "sequences", "pairs_per_sequence", "validation_fraction"),
    *("source_pattern", "held_out_pairs", "size", "codec", "codec_source", "seed"),
)
# Files of an interrupted run in the output folder.
LEFTOVER = re.compile(r"(train|validation)-sequence-\d+x\d+x\d+-\d{5}\.(tar|index\.npy)(\.partial)?")


class SplitPairs(NamedTuple):
    """Training and held-out pairs."""

    training: list[Pair]
    """Pairs of training sequences, and the example pairs of validation sequences."""
    held_out: list[Pair]
    """Last pairs of the validation sequences."""
    all_held_out: list[Pair]
    """All held-out pairs, including those in no sequence."""


def prepare_pairs(options: PreparePairsOptions) -> Manifest:
    """Encode every image alone (T = 1), stack pairs to sequences (source, target, source, target, ...), and shard them.

    If the output folder already contains the result of the same options and images, it is left unchanged.

    Raises:
        InputError: options exclude each other; there are too few pairs; an image of two folders is unreadable, has no
            counterpart or differs from it in size; OpenCV is not installed and the task needs it; or the output folder
            contains other data or is not writable.
    """
    check_options(options)
    with explain_write_errors(options.out):
        return _prepare_pairs(options)


def _prepare_pairs(options: PreparePairsOptions) -> Manifest:
    task, size = find_task(options.task), parse_size(options.size)
    codec = load_codec(options.codec, options.codec_source, available_device(options.device))
    codec.check_frame_size(*size)
    all_pairs = find_pairs(options)
    pairs = _split_and_limit(all_pairs, options)
    preparation = _describe_preparation(options, task, [*pairs.training, *pairs.held_out])
    if (options.out / FILE_NAME).exists():
        return _existing_manifest(options.out, preparation, codec.spec())
    with folder_lock(options.out):
        if (options.out / FILE_NAME).exists():  # another process has completed it meanwhile
            return _existing_manifest(options.out, preparation, codec.spec())
        latents = _encode(pairs, task, size, codec)
        training, validation = _draw_sequences(pairs, options)
        shards = _write_shards(options.out, {"train": training, "validation": validation}, latents, task, size)
        held_out_hashes = {hash for pair in pairs.all_held_out for hash in pair.content_hashes}
        manifest = Manifest(
            directory=options.out,
            codec=codec.spec(),
            shards=shards,
            preparation=preparation,
            validation={
                "held_out_by": _hold_out_rule(options),
                "held_out": _shortest_distinct_paths(
                    image.path for pair in all_pairs for image in pair if image.content_hash in held_out_hashes
                ),
                "train_sources": len({pair for sequence in training for pair in sequence}),
                "validation_sources": len(pairs.held_out),
            },
        )
        manifest.save()
    return manifest


def check_options(options: PreparePairsOptions) -> None:
    """Check the options before an image is read or the codec is loaded.

    Raises:
        InputError: options exclude each other, the size cannot be parsed, OpenCV is not installed and the task needs
            it, or the output folder is not writable.
    """
    parse_size(options.size)
    check_writable(options.out, is_folder=True)
    task = find_task(options.task)
    make_pair(task, torch.zeros(1, 3, 16, 16, dtype=torch.uint8))  # raises if OpenCV is needed and missing
    given = [name for name in INPUT_OPTIONS if getattr(options, name) is not None]
    if task is not EXISTING_PAIRS:
        if given != ["sources"]:
            raise InputError(
                f"the task {task.name} makes both images of a pair from one image: give --sources only, or --task "
                f"{EXISTING_PAIRS.name} for existing pairs."
            )
    elif given not in (["sources", "targets"], ["pairs_in"]):
        raise InputError(
            f"the task {task.name} needs either --sources and --targets, or --pairs_in, but got "
            f"{' and '.join(f'--{name}' for name in given) or 'none of them'}: correct these options, or give a --task "
            f"that makes pairs ({', '.join(TASKS)})."
        )


def find_task(name: str) -> ImageTask:
    """Return the task of this name; raises InputError if there is none."""
    tasks = {EXISTING_PAIRS.name: EXISTING_PAIRS} | TASKS
    if name not in tasks:
        raise InputError(f"there is no task {name!r}{did_you_mean(name, tasks)}: give one of {', '.join(tasks)}.")
    return tasks[name]


def find_pairs(options: PreparePairsOptions) -> list[Pair]:
    """Find all pairs that the options specify.

    Raises:
        InputError: a folder is missing, an image of two folders is unreadable or has no counterpart, or the images of
            a pair differ in size.
    """
    if options.pairs_in is not None:
        return pairs_from_folders(*pair_folders(options.pairs_in), options.seed, options.source_pattern)
    assert options.sources is not None
    if options.targets is not None:
        return pairs_from_folders(options.sources, options.targets, options.seed, options.source_pattern)
    return pairs_from_folder(options.sources, options.seed, options.source_pattern)


def _split_and_limit(all_pairs: Sequence[Pair], options: PreparePairsOptions) -> SplitPairs:
    """Split the pairs, and limit each split to its maximum size; raises InputError if there are too few pairs."""
    training, held_out = split_pairs(all_pairs, options.validation_fraction)
    if len(training) < options.pairs_per_sequence:
        raise _too_few_pairs(options, len(training), held_out)
    if len(training) < options.pairs:
        print(f"training sequences are drawn from {len(training)} pairs; --pairs allows {options.pairs}")
    return SplitPairs(training[: options.pairs], held_out[: options.held_out_pairs], held_out)


def _too_few_pairs(options: PreparePairsOptions, training: int, held_out: Sequence[Pair]) -> InputError:
    """Return the error for fewer training pairs than a sequence has."""
    needed, total = options.pairs_per_sequence, training + len(held_out)
    inputs = " and ".join(str(getattr(options, name)) for name in INPUT_OPTIONS if getattr(options, name) is not None)
    if total < needed:
        return InputError(
            f"a sequence has {needed} different pairs, but {inputs} contain only {total}: add images, or lower "
            "--pairs_per_sequence."
        )
    contents = [hash for pair in held_out for hash in set(pair.content_hashes)]
    recordings = [hash for pair in held_out for hash in {image.recording_hash for image in pair}]
    if len(set(contents)) < len(contents) or len(set(recordings)) < len(recordings):
        reason = ", with all pairs that share an image or a recording with them,"
        cure = "add pairs that share none, or give --validation_fraction 0"
    else:
        reason, cure = "", "add images, or lower --validation_fraction (0 holds out none)"
    return InputError(
        f"holding out {len(held_out)} of the {total} different pairs in {inputs}{reason} leaves {training} for "
        f"training, but a sequence has {needed}: {cure}."
    )


def _describe_preparation(options: PreparePairsOptions, task: ImageTask, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return the options that determine the sequences, and a sha256 of them and of all image names and pixels."""
    values = {name: getattr(options, name) for name in SEQUENCE_OPTIONS}
    values |= {name: as_text(Path(values[name]).name) for name in INPUT_OPTIONS if values[name] is not None}
    if not options.source_pattern:
        del values["source_pattern"]
    values["task_parameters"] = dict(task.parameters)
    identity = [values, [[image.name, image.content_hash] for pair in pairs for image in pair]]
    return values | {"inputs_sha256": hashlib.sha256(json.dumps(identity).encode()).hexdigest()}


def _existing_manifest(out: Path, preparation: dict[str, Any], codec: CodecSpec) -> Manifest:
    """Return the manifest of the output folder; raises InputError if it was prepared differently."""
    manifest = Manifest.load(out)
    if manifest.preparation == preparation:
        manifest.codec.check_same(codec, str(manifest.path), "this preparation", USE_ANOTHER_FOLDER)
        print(f"{manifest.path} already contains the result of these options.")
        return manifest
    different = [
        f"--{name} was {before} and is {now}"
        for name, before, now in differences(manifest.preparation, preparation)
        if name in SEQUENCE_OPTIONS
    ]
    reason = next(iter(different), "the names or the content of the images")  # without an option: inputs_sha256
    raise InputError(f"{out} contains shards of other options ({reason}): {USE_ANOTHER_FOLDER}.")


def _encode(pairs: SplitPairs, task: ImageTask, size: Size, codec: Codec) -> dict[Pair, np.ndarray]:
    """Encode each pair that is used as latents (2, C, h, w), source first."""
    used = progress_bar([*pairs.training, *pairs.held_out], desc="encoding", unit=" pairs", disable=None)
    return {pair: codec.encode(_pixels_of(pair, task, size)).cpu().numpy()[:, 0] for pair in used}


def _pixels_of(pair: Pair, task: ImageTask, size: Size) -> Tensor:
    """Read a pair, scale it and apply the task: uint8 (2, 1, 3, H, W), source first."""
    source, target = (resize_and_crop(read_image(image.path), size) for image in pair)
    return torch.stack((task.source(source), task.target(target)))


def _draw_sequences(pairs: SplitPairs, options: PreparePairsOptions) -> tuple[list[list[Pair]], list[list[Pair]]]:
    """Draw training sequences, and validation sequences that end with a held-out pair, each of distinct pairs."""
    generator = np.random.default_rng([options.seed, 1])

    def draw(count: int) -> list[Pair]:
        return [pairs.training[i] for i in generator.choice(len(pairs.training), count, replace=False)]

    training = [draw(options.pairs_per_sequence) for _ in range(options.sequences)]
    validation = [[*draw(options.pairs_per_sequence - 1), pair] for pair in pairs.held_out]
    return training, validation


def _write_shards(
    out: Path,
    sequences: Mapping[Split, Sequence[Sequence[Pair]]],
    latents: Mapping[Pair, np.ndarray],
    task: ImageTask,
    size: Size,
) -> tuple[ShardEntry, ...]:
    _remove_leftovers(out)
    with ShardSetWriter(out) as writer:
        for split, pairs_of_sequence in ((split, pairs) for split, of_split in sequences.items() for pairs in of_split):
            names = " ".join(pair.source.name for pair in pairs_of_sequence)
            metadata = {"source": names, "task": task.name, "pixel_size": list(size)}
            stacked = np.concatenate([latents[pair] for pair in pairs_of_sequence])
            writer.write(split, "sequence", stacked, metadata)
        return writer.close()


def _remove_leftovers(folder: Path) -> None:
    """Delete the files that an interrupted run left in its output folder."""
    if folder.is_dir():
        for path in folder.iterdir():
            if LEFTOVER.fullmatch(path.name):
                path.unlink()


def _hold_out_rule(options: PreparePairsOptions) -> str:
    """Describe for the manifest how pairs were held out."""
    hashed = "the match of source_pattern in an image's name" if options.source_pattern else "an image's pixels"
    return (
        f"a hash of the seed and {hashed}, with every pair that contains the image; a validation sequence consists of "
        "training pairs and a last, held-out pair"
    )


def _shortest_distinct_paths(paths: Iterable[Path]) -> list[str]:
    """Shorten each path to its last components, at least two and as many as keep all paths distinct; sort them."""
    files = {path.absolute() for path in paths}
    length = 2
    while len({path.parts[-length:] for path in files}) < len(files):
        length += 1
    return sorted(as_text("/".join(path.parts[-length:])) for path in files)
