"""The command that trains on prepared data from random weights: a recipe, and the options that the data need."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.shard_entry import Kind
from gpdit_lightning.devices import Machine, this_machine
from gpdit_lightning.errors import InputError
from gpdit_lightning.estimation.memory import parameter_count
from gpdit_lightning.estimation.requirements import nearest_that_fits, overrides
from gpdit_lightning.model import GPDiTConfig
from gpdit_lightning.planning.rules import MEMORY_FRACTION, TOKENS_PER_PARAMETER
from gpdit_lightning.specs import CodecSpec

BACKBONE = "--model.init_args.backbone"
UCF101_CLASSES, IMAGENET_CLASSES = 101, 1000
SQUARE, LAPTOP_SQUARE = 16, 4  # sides of a block in tokens, in recipes/acdit/imagenet.yaml and laptop.yaml
VIDEO_BLOCK = 4  # latent frames of a block in recipes/acdit/ucf101.yaml
DEFAULT_CHANNELS, SD_CHANNELS = GPDiTConfig.latent_channels, 4


def first_training(manifest: Manifest, machine: Machine | None = None) -> str:
    """Return a command that trains on prepared images and videos from random weights.

    Without labels it is a stage of GPDiT. With labels, of which every sample is generated, it is ACDiT for images, and
    for videos of a codec without compression in time; and GPDiT with labels for other videos.

    Args:
        manifest: the data.
        machine: that trains; None for this one.
    """
    machine = machine or this_machine()
    kinds = {shard.kind for shard in manifest.shards}
    if not manifest.labels:
        recipe = "stage1_image_warmup" if kinds == {"image"} else "stage2_mixed"
        words = [*configs(recipe, size_overlay(manifest.codec, machine)), *codec_options(manifest.codec)]
        words += patch_options(manifest)
    elif kinds == {"image"}:
        words = acdit_for_images(manifest, machine)
    elif kinds == {"video"}:
        shortest = min(shard.shape[0] for shard in manifest.shards)
        acdit_fits = manifest.codec.temporal_factor == 1 and shortest >= VIDEO_BLOCK
        words = acdit_for_videos(manifest, machine) if acdit_fits else labelled_gpdit(manifest, machine)
    else:
        words = [*configs("stage2_mixed", size_overlay(manifest.codec, machine)), "--data.labels true"]
        words += [*class_options(manifest, 0), *codec_options(manifest.codec), *patch_options(manifest)]
    return fit_command(manifest, words)


def fit_command(manifest: Manifest, words: Sequence[str]) -> str:
    """Return the command of `fit` with some recipes and options, and the folder of the data."""
    recipes = [word for word in words if word.startswith("--config ")]
    options = [word for word in words if not word.startswith("--config ")]
    data_dir = f"--data_dir {shlex.quote(str(manifest.directory))}"
    return " ".join(["python -m gpdit_lightning fit", *recipes, data_dir, *options])


def configs(*recipes: str) -> list[str]:
    """Return the options that name shipped recipes."""
    return [f"--config gpdit:{recipe}" for recipe in recipes]


def acdit_for_images(manifest: Manifest, machine: Machine) -> list[str]:
    """Return the options of ACDiT for labelled images: its size B on GPUs, if the data suffice; else the overlay."""
    small = is_small(manifest, "image", machine, patch_size=1)
    recipe = configs("acdit/imagenet_xl", "acdit/laptop") if small else configs("acdit/imagenet_b")
    words = [*recipe, *class_options(manifest, IMAGENET_CLASSES)]
    square = LAPTOP_SQUARE if small else SQUARE
    block = [quarter_side(manifest, axis) for axis in (2, 3)]
    words += [f"{BACKBONE}.block_shape '[1,{block[0]},{block[1]}]'"] if block != [square, square] else []
    words += codec_options(manifest.codec, DEFAULT_CHANNELS if small else SD_CHANNELS)
    if small:
        return words
    words += missing_options(manifest, "posterior", "flips")
    return [*words, *memory_options(manifest, words, machine)]


def acdit_for_videos(manifest: Manifest, machine: Machine) -> list[str]:
    """Return the options of ACDiT for labelled videos of a codec without compression in time."""
    small = is_small(manifest, "video", machine, GPDiTConfig.patch_size)
    words = configs("acdit/ucf101_xl", *(["acdit/laptop_videos"] if small else []))
    words += class_options(manifest, UCF101_CLASSES)
    blocks = [f"{BACKBONE}.block_shape '[{VIDEO_BLOCK},0,0]'", f"{BACKBONE}.first_block_frames 0"]
    words += blocks if small else [f"{BACKBONE}.size B"]
    words += [*codec_options(manifest.codec, DEFAULT_CHANNELS if small else SD_CHANNELS), *patch_options(manifest)]
    if small:
        return words
    words += missing_options(manifest, "posterior")
    return [*words, *memory_options(manifest, words, machine)]


def labelled_gpdit(manifest: Manifest, machine: Machine) -> list[str]:
    """Return the options of GPDiT-B with labels, on GPUs if the data suffice; else of the overlay for a laptop."""
    small = is_small(manifest, "video", machine, GPDiTConfig.patch_size)
    words = configs("ucf101_b", "labels/ucf101", *(["size/tiny"] if small else []))
    words += [*class_options(manifest, UCF101_CLASSES), *codec_options(manifest.codec), *patch_options(manifest)]
    return words if small else [*words, *memory_options(manifest, words, machine)]


def is_small(manifest: Manifest, kind: Kind, machine: Machine, patch_size: int) -> bool:
    """Return whether a model for a laptop fits data and machine better than one of size B.

    That is so for the codec `pca`, without a GPU, and if size B has more parameters than the data have tokens.
    """
    shards = [shard for shard in manifest.of_split("train") if shard.kind == kind]
    values = sum(shard.count * math.prod(shard.shape) // shard.shape[1] for shard in shards)
    parameters = parameter_count(GPDiTConfig.preset("B"))
    too_few = parameters > values // patch_size**2 / TOKENS_PER_PARAMETER
    return manifest.codec.name == "pca" or machine.accelerator != "cuda" or too_few


def quarter_side(manifest: Manifest, axis: int) -> int:
    """Return half of the height or width of all latents in tokens of one latent pixel, 0 (all) if it is not whole.

    Args:
        manifest: the data.
        axis: of the shape of latents.
    """
    side = math.gcd(*(shard.shape[axis] for shard in manifest.shards))
    return 0 if side % 2 else side // 2


def class_options(manifest: Manifest, of_recipe: int) -> list[str]:
    """Return the option for the number of classes, if that of the recipe is another."""
    classes = len(manifest.labels)
    return [f"{BACKBONE}.classes {classes}"] if classes != of_recipe else []


def missing_options(manifest: Manifest, *required: Literal["posterior", "flips"]) -> list[str]:
    """Return the options that remove those requirements of a recipe which the data do not fulfil."""
    train = manifest.of_split("train")
    return [f"--data.{name} null" for name in required if not all(getattr(shard, f"has_{name}") for shard in train)]


def memory_options(manifest: Manifest, words: Sequence[str], machine: Machine) -> list[str]:
    """Return the options with which a recipe fits into the memory of the GPUs of a machine, as `estimate` does.

    They are none if the recipe refuses the data: `fit` then states the reason.

    Args:
        manifest: the data.
        words: recipes and options.
        machine: has GPUs.
    """
    from gpdit_lightning.cli.estimated_recipe import read_recipe  # with Lightning, whose import takes seconds

    arguments = shlex.split(fit_command(manifest, words))[4:]
    try:
        run = read_recipe(arguments).run
    except InputError:
        return []
    gpus = max(count for count in range(1, machine.devices + 1) if run.max_ranks % count == 0)
    run = replace(run, gpus=gpus)
    fitting = nearest_that_fits(run, MEMORY_FRACTION[machine.accelerator] * machine.memory)
    found = overrides(run, fitting).split() if fitting else []
    return [*([f"--trainer.devices {gpus}"] if gpus != machine.devices else []), *found]


def size_overlay(codec: CodecSpec, machine: Machine) -> str:
    """Return the overlay of GPDiT's stages: that of a laptop without a GPU, or for the codec `pca`; or of one GPU."""
    return "tiny" if codec.name == "pca" or machine.accelerator != "cuda" else "b"


def patch_options(manifest: Manifest) -> list[str]:
    """Return the option of `fit` for latent frames that do not divide into patches of the default size."""
    sides = {side for shard in manifest.shards for side in shard.shape[2:]}
    divides = not any(side % GPDiTConfig.patch_size for side in sides)
    return [] if divides else [f"{BACKBONE}.patch_size 1"]


def codec_options(codec: CodecSpec, channels_of_recipe: int = DEFAULT_CHANNELS) -> list[str]:
    """Return the options of `fit` that latents of this codec need."""
    channels = codec.latent_channels
    words = [f"{BACKBONE}.latent_channels {channels}"] if channels != channels_of_recipe else []
    return [*words, f"--preview.codec {codec.name}"] if codec.is_custom else words
