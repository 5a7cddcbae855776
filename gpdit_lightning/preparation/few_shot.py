"""Pairs of pictures to sequences for few-shot training (GPDiT, sections 5.1 and 5.4)."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gpdit_lightning.codecs import load_codec
from gpdit_lightning.data.manifest import FILE_NAME, Manifest
from gpdit_lightning.data.shard_writer import ShardSetWriter
from gpdit_lightning.devices import available_device
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import check_place
from gpdit_lightning.media.image_tasks import EXISTING_PAIRS, TASKS, ImageTask, make_pair
from gpdit_lightning.media.images import Size, parse_size, read_image, resize_and_crop
from gpdit_lightning.preparation.options import PrepareOptions
from gpdit_lightning.preparation.options import check_options as check_shared_options
from gpdit_lightning.preparation.pairs import Pair, hold_out, pair_folders, pairs_of_one, pairs_of_two

PLACES = ("sources", "targets", "pairs_in")
SPEED_OPTIONS = ("out", "device")
# What a run that was killed leaves in the output folder.
OWN_FILES = re.compile(r"(train|validation)-sequence-\d+x\d+x\d+-\d{5}\.(tar|index\.npy)(\.partial)?")


@dataclass(frozen=True)
class PreparePairsOptions:
    """What sequences to build, from which pairs. Each field's `help` is the command line's."""

    out: Path = field(metadata={"help": "folder for the shards and manifest.json"})
    task: str = field(
        default=EXISTING_PAIRS.name,
        metadata={
            "help": "pairs: both pictures of each pair are given; or both are made from one, at --size: grayscale (a "
            "picture to its grayscale version), colourisation (the way back), edges (a picture to its Canny edges), "
            "edges_to_image (the way back), sketch (a picture to a pencil drawing), copy (the picture itself: a "
            "warm-up); edges and sketches need pip install -e '.[edges]'"
        },
    )
    sources: Path | None = field(
        default=None,
        metadata={
            "help": "folder of source pictures, or of those that a task makes both sides from; folders in it are not "
            "looked into"
        },
    )
    targets: Path | None = field(
        default=None,
        metadata={"help": "for --task pairs: folder of target pictures, of the names and the sizes of their sources"},
    )
    pairs_in: Path | None = field(
        default=None,
        metadata={"help": "for --task pairs, instead of both: a folder with the folders source and target in it"},
    )
    pairs: int = field(default=40, metadata={"help": "most pairs that training sequences are drawn from (paper: 40)"})
    sequences: int = field(default=20, metadata={"help": "training sequences (paper: 20)"})
    pairs_per_sequence: int = field(default=3, metadata={"help": "pairs in a sequence (paper: 3, so six frames)"})
    validation_fraction: float = field(
        default=0.1,
        metadata={
            "help": "share of the pictures that is held out, at least one, by a hash of their pixels and the seed: the "
            "same ones in every task and when others are added; a picture's counterpart goes with it; 0 for none"
        },
    )
    source_pattern: str | None = field(
        default=None,
        metadata={
            "help": "regular expression for the part of a file's name that names the recording, where pictures are "
            r"frames of videos: those of one are then held out together, by a hash of that part; as in clip\d+"
        },
    )
    held_out_pairs: int = field(
        default=4,
        metadata={
            "help": "most held-out pairs to use: each ends one validation sequence whose other pairs are training's"
        },
    )
    size: str = field(default="256x256", metadata={"help": "HEIGHTxWIDTH that every picture is scaled and cropped to"})
    codec: str = field(default="wan", metadata={"help": "wan (the WanVAE, as in the paper) or pca (no download)"})
    codec_source: str | None = field(
        default=None, metadata={"help": "the codec's weights: a folder or hub name (wan), a file (pca)"}
    )
    seed: int = field(default=0, metadata={"help": "of the choice of held-out pictures and of the drawing of pairs"})
    device: str = field(default="auto", metadata={"help": "where the codec computes: auto, cpu, cuda, cuda:1, ..."})


def prepare_pairs(options: PreparePairsOptions) -> Manifest:
    """Encode every picture alone (T = 1), stack pairs to sequences source, target, source, target, ..., and shard them.

    A folder that already holds what these options make is returned as it is.

    Raises:
        InputError: options that do not go together, too few pairs, a picture without counterpart, of another size than
            that or unreadable, OpenCV is missing for edges and sketches, or a folder that holds other data or cannot be
            written to.
    """
    check_options(options)
    task, size = task_named(options.task), parse_size(options.size)
    codec = load_codec(options.codec, options.codec_source, available_device(options.device))
    codec.check_frame_size(*size)
    pairs = find_pairs(options)
    found, reserved = hold_out(pairs, options.validation_fraction)
    check_enough(options, found, reserved)
    training, held_out = found[: options.pairs], reserved[: options.held_out_pairs]
    if len(training) < options.pairs:
        print(f"pairs to draw training sequences from: {len(training)}, where --pairs allows {options.pairs}")
    preparation = described(options, task, [*training, *held_out])
    if (options.out / FILE_NAME).exists():
        return reused(Manifest.load(options.out), preparation)
    frames = {pair: frames_of(pair, task, size) for pair in (*training, *held_out)}
    encoded = {
        pair: codec.encode(pixels).cpu().numpy()[:, 0]
        for pair, pixels in tqdm(frames.items(), desc="encoding", unit=" pairs", disable=None)
    }
    numbers = np.random.default_rng([options.seed, 1])

    def drawn(count: int) -> list[Pair]:
        return [training[place] for place in numbers.choice(len(training), count, replace=False)]

    sequences = [drawn(options.pairs_per_sequence) for _ in range(options.sequences)]
    remove_leftovers(options.out)
    with ShardSetWriter(options.out) as writer:

        def write(split: Any, pairs: Sequence[Pair]) -> None:
            names = " ".join(pair.source.path.name for pair in pairs)
            metadata = {"source": names, "task": task.name, "pixel_size": list(size)}
            writer.write(split, "sequence", np.concatenate([encoded[pair] for pair in pairs]), metadata)

        for sequence in sequences:
            write("train", sequence)
        for pair in held_out:
            write("validation", [*drawn(options.pairs_per_sequence - 1), pair])
        shards = writer.close()
    decisive = "what source_pattern finds in a picture's name" if options.source_pattern else "a picture's pixels"
    unseen = {digest for pair in reserved for digest in pair.digests}
    manifest = Manifest(
        directory=options.out,
        codec=codec.spec(),
        shards=shards,
        preparation=preparation,
        validation={
            "held_out_by": f"a hash of the seed and {decisive}, with every pair that the picture is in; a validation "
            "sequence ends with a held-out pair, after pairs of the training set",
            "held_out": tails(picture.path for pair in pairs for picture in pair if picture.digest in unseen),
            "train_sources": len({pair for sequence in sequences for pair in sequence}),
            "validation_sources": len(held_out),
        },
    )
    manifest.save()
    return manifest


def check_options(options: PreparePairsOptions) -> None:
    """Refuse what no pictures could be prepared with, before any is opened or the codec is loaded.

    Raises:
        InputError: options without sense or that do not go together, no OpenCV for a task that needs it, or an output
            folder that cannot be written to.
    """
    for name in ("pairs", "sequences", "pairs_per_sequence"):
        if getattr(options, name) < 1:
            raise InputError(f"{name} is {getattr(options, name)}: give at least 1.")
    if options.held_out_pairs < 0:
        raise InputError(f"held_out_pairs is {options.held_out_pairs}: give 0 for no validation, or more.")
    if options.pairs < options.pairs_per_sequence:
        raise InputError(
            f"pairs is {options.pairs} where a sequence takes {options.pairs_per_sequence}: give more --pairs or fewer "
            "--pairs_per_sequence."
        )
    if options.seed < 0:
        raise InputError(f"seed is {options.seed}: give a number from 0 on.")
    check_shared_options(
        PrepareOptions(
            options.out,
            image_sizes=(options.size,),
            validation_fraction=options.validation_fraction,
            source_pattern=options.source_pattern,
        )
    )
    check_place(options.out, is_folder=True)
    make_pair(task_named(options.task), torch.zeros(1, 3, 16, 16, dtype=torch.uint8))  # finds out what is not installed
    given = [name for name in PLACES if getattr(options, name) is not None]
    if task_named(options.task) is not EXISTING_PAIRS:
        if given != ["sources"]:
            raise InputError(
                f"The task {options.task} makes both sides of a pair from one picture: give --sources alone, or --task "
                f"{EXISTING_PAIRS.name} for pairs that are there already."
            )
    elif given not in (["sources", "targets"], ["pairs_in"]):
        raise InputError(
            f"The task {EXISTING_PAIRS.name} takes --sources and --targets, or --pairs_in instead, and was given "
            f"{' and '.join(f'--{name}' for name in given) or 'none of them'}: give one or the other, or a --task that "
            f"makes pairs ({', '.join(TASKS)})."
        )


def check_enough(options: PreparePairsOptions, found: Sequence[Pair], reserved: Sequence[Pair]) -> None:
    """Raise `InputError` where pairs for training, `found`, are fewer than a sequence takes."""
    wanted, total = options.pairs_per_sequence, len(found) + len(reserved)
    if len(found) >= wanted:
        return
    places = " and ".join(str(getattr(options, name)) for name in PLACES if getattr(options, name) is not None)
    if total < wanted:
        raise InputError(
            f"A sequence takes {wanted} different pairs, more than the {total} of {places}: add pictures, or lower "
            "--pairs_per_sequence."
        )
    digests = [digest for pair in reserved for digest in set(pair.digests)]
    origins = [origin for pair in reserved for origin in {picture.origin for picture in pair}]
    if len(set(digests)) < len(digests) or len(set(origins)) < len(origins):
        reason = ", with all that share a picture (or what --source_pattern finds) with them,"
        cure = "add pairs that share none, or give --validation_fraction 0"
    else:
        reason, cure = "", "add pictures, or lower --validation_fraction (0 holds out none)"
    raise InputError(
        f"Holding out {len(reserved)} of the {total} different pairs in {places}{reason} leaves {len(found)} for "
        f"training, where a sequence takes {wanted}: {cure}."
    )


def task_named(name: str) -> ImageTask:
    """A task by its name; raises `InputError` for one that is not known."""
    known = {EXISTING_PAIRS.name: EXISTING_PAIRS} | TASKS
    if name not in known:
        raise InputError(f"There is no task {name!r}: give one of {', '.join(known)}.")
    return known[name]


def find_pairs(options: PreparePairsOptions) -> list[Pair]:
    """All pairs that the options name; raises as the functions of `pairs.py` do."""
    if options.pairs_in is not None:
        return pairs_of_two(*pair_folders(options.pairs_in), options.seed, options.source_pattern)
    assert options.sources is not None
    if options.targets is not None:
        return pairs_of_two(options.sources, options.targets, options.seed, options.source_pattern)
    return pairs_of_one(options.sources, options.seed, options.source_pattern)


def tails(paths: Iterable[Path]) -> list[str]:
    """The last parts of each path, two or as many as tell them all apart, sorted."""
    files = {path.absolute() for path in paths}
    parts = 2
    while len({path.parts[-parts:] for path in files}) < len(files):
        parts += 1
    return sorted("/".join(path.parts[-parts:]) for path in files)


def frames_of(pair: Pair, task: ImageTask, size: Size) -> Tensor:
    """What a task makes of a pair, at the size to encode: uint8 (2, 1, 3, H, W), the source first."""
    source, target = (resize_and_crop(read_image(picture.path), size) for picture in pair)
    return torch.stack((task.source(source), task.target(target)))


def described(options: PreparePairsOptions, task: ImageTask, pairs: Sequence[Pair]) -> dict[str, Any]:
    """The options that decide what the shards hold, and a sha256 over them and every picture's name and pixels."""
    values = {name: value for name, value in asdict(options).items() if name not in SPEED_OPTIONS}
    values |= {name: Path(values[name]).name for name in PLACES if values[name] is not None}
    if not options.source_pattern:
        del values["source_pattern"]  # so that folders from before there was this option are recognised
    values["task_parameters"] = dict(task.parameters)
    identity = [values, [[picture.path.name, picture.digest] for pair in pairs for picture in pair]]
    return values | {"inputs_sha256": hashlib.sha256(json.dumps(identity).encode()).hexdigest()}


def reused(manifest: Manifest, preparation: dict[str, Any]) -> Manifest:
    """The manifest that is already there, if it was made by the same preparation; else an `InputError`."""
    if manifest.preparation == preparation:
        print(f"{manifest.path} already holds what these options make: nothing to do.")
        return manifest
    names = [name for name in preparation if manifest.preparation.get(name) != preparation[name]]
    differing = next((name for name in names if name != "inputs_sha256"), "the source files")
    raise InputError(
        f"{manifest.directory} holds shards made differently ({differing}): give another --out or delete that folder."
    )


def remove_leftovers(folder: Path) -> None:
    """Remove what a preparation that was killed left in its output folder, and nothing else."""
    if folder.is_dir():
        for path in folder.iterdir():
            if OWN_FILES.fullmatch(path.name):
                path.unlink()
