"""Pairs of pictures to sequences for few-shot training (GPDiT, sections 5.1 and 5.4)."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from gpdit_lightning.codecs import load_codec
from gpdit_lightning.data.manifest import FILE_NAME, Manifest
from gpdit_lightning.data.shard_writer import ShardSetWriter
from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import IMAGE_ENDINGS, parse_size, read_image, resize_and_crop
from gpdit_lightning.preparation.prepare import available_device

SPEED_OPTIONS = ("out", "device")
# What a run that was killed leaves in the output folder.
OWN_FILES = re.compile(r"(train|validation)-sequence-\d+x\d+x\d+-\d{5}\.(tar|index\.npy)(\.partial)?")


@dataclass(frozen=True)
class FewShotOptions:
    """What sequences to build, from which pairs. Each field's `help` is the command line's."""

    out: Path = field(metadata={"help": "folder for the shards and manifest.json"})
    sources: Path = field(metadata={"help": "folder of source pictures"})
    targets: Path = field(metadata={"help": "folder of target pictures, named like their sources"})
    pairs: int = field(default=40, metadata={"help": "most pairs that training sequences are drawn from (paper: 40)"})
    sequences: int = field(default=20, metadata={"help": "training sequences (paper: 20)"})
    pairs_per_sequence: int = field(default=3, metadata={"help": "pairs in a sequence (paper: 3, so six frames)"})
    held_out_pairs: int = field(
        default=4,
        metadata={"help": "pairs kept for validation: each ends one sequence whose other pairs are training's"},
    )
    size: str = field(default="256x256", metadata={"help": "HEIGHTxWIDTH that every picture is scaled and cropped to"})
    codec: str = field(default="wan", metadata={"help": "wan (the WanVAE, as in the paper) or pca (no download)"})
    codec_source: str | None = field(default=None, metadata={"help": "the codec's weights, as for shard_latents.py"})
    seed: int = field(default=0, metadata={"help": "of the drawing of pairs"})
    device: str = field(default="auto", metadata={"help": "where the codec computes: auto, cpu, cuda, cuda:1, ..."})


class Pair(NamedTuple):
    """A source picture and what it shall become."""

    source: Path
    target: Path


def prepare_sequences(options: FewShotOptions) -> Manifest:
    """Encode every picture alone (T = 1), stack pairs to sequences source, target, source, target, ..., and shard them.

    A folder that already holds what these options make is returned as it is.

    Raises:
        InputError: too few pairs, a picture without counterpart or unreadable, or a folder that holds other data.
    """
    for name in ("pairs", "sequences", "pairs_per_sequence"):
        if getattr(options, name) < 1:
            raise InputError(f"{name} is {getattr(options, name)}: give at least 1.")
    found = find_pairs(options.sources, options.targets)
    order = np.random.default_rng([options.seed, 0]).permutation(len(found))
    shuffled = [found[place] for place in order]
    held_out = shuffled[: options.held_out_pairs]
    training = shuffled[options.held_out_pairs :][: options.pairs]
    if len(training) < options.pairs_per_sequence:
        raise InputError(
            f"{options.sources} and {options.targets} have {len(found)} pairs, {len(held_out)} of them held out, and a "
            f"sequence takes {options.pairs_per_sequence}: give more pairs or hold out fewer."
        )
    preparation = described(options, [*training, *held_out])
    if (options.out / FILE_NAME).exists():
        return reused(Manifest.load(options.out), preparation)
    codec = load_codec(options.codec, options.codec_source, available_device(options.device))
    size = parse_size(options.size)
    codec.check_frame_size(*size)

    def latents_of(pair: Pair) -> np.ndarray:
        pixels = torch.stack([resize_and_crop(read_image(path), size) for path in pair])  # (2, 1, 3, H, W)
        return codec.encode(pixels).cpu().numpy()[:, 0]

    encoded = {pair: latents_of(pair) for pair in tqdm([*training, *held_out], unit=" pairs", disable=None)}
    numbers = np.random.default_rng([options.seed, 1])

    def drawn(count: int) -> list[Pair]:
        return [training[place] for place in numbers.choice(len(training), count, replace=False)]

    remove_leftovers(options.out)
    with ShardSetWriter(options.out) as writer:

        def write(split: Any, pairs: Sequence[Pair]) -> None:
            metadata = {"source": " ".join(pair.source.name for pair in pairs), "pixel_size": list(size)}
            writer.write(split, "sequence", np.concatenate([encoded[pair] for pair in pairs]), metadata)

        for _ in range(options.sequences):
            write("train", drawn(options.pairs_per_sequence))
        for pair in held_out:
            write("validation", [*drawn(options.pairs_per_sequence - 1), pair])
        shards = writer.close()
    manifest = Manifest(
        directory=options.out,
        codec=codec.spec(),
        shards=shards,
        preparation=preparation,
        validation={
            "held_out_by": "pair; a validation sequence ends with one, after pairs of the training set",
            "train_sources": len(training),
            "validation_sources": len(held_out),
        },
    )
    manifest.save()
    return manifest


def find_pairs(sources: Path, targets: Path) -> list[Pair]:
    """The pictures of two folders, paired by their names without ending.

    Raises:
        InputError: no pictures, or one without its counterpart.
    """
    by_stem: list[dict[str, Path]] = []
    for folder in (sources, targets):
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
        by_stem.append({path.stem: path for path in paths if path.suffix.lower() in IMAGE_ENDINGS})
        if not by_stem[-1]:
            raise InputError(f"{folder} holds no pictures: give a folder of {', '.join(IMAGE_ENDINGS)} files.")
    first, second = by_stem
    for here, there, folder in ((first, second, targets), (second, first, sources)):
        for stem, path in here.items():
            if stem not in there:
                raise InputError(f"{path} has no counterpart named {stem} in {folder}: add it or remove the picture.")
    return [Pair(path, second[stem]) for stem, path in first.items()]


def described(options: FewShotOptions, pairs: Sequence[Pair]) -> dict[str, Any]:
    """The options that decide what the shards hold, and a sha256 over them and every picture's name and size."""
    values = {name: value for name, value in asdict(options).items() if name not in SPEED_OPTIONS}
    values |= {name: Path(values[name]).name for name in ("sources", "targets")}
    identity = [values, [[path.name, path.stat().st_size] for pair in pairs for path in pair]]
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
