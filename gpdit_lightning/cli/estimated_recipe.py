"""The part of a recipe that an estimate depends on: architecture, batches, strategy, and the shapes of the data."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import Namespace

from gpdit_lightning.cli.recipe_cli import parse_recipe
from gpdit_lightning.cli.trainer_settings import strategy_of
from gpdit_lightning.codecs import find_codec
from gpdit_lightning.data.manifest import FILE_NAME, Manifest
from gpdit_lightning.data.plan import PlannedSource
from gpdit_lightning.data.selection import no_source_error, select_from_recipe
from gpdit_lightning.data.source import KINDS, SourceConfig
from gpdit_lightning.errors import InputError
from gpdit_lightning.estimation.memory import STRATEGIES, ShardingStrategy
from gpdit_lightning.estimation.prepared import LatentShape, planned_source, prepared_samples
from gpdit_lightning.estimation.requirements import BYTES_OF_PRECISION, RunSettings
from gpdit_lightning.media.images import parse_size
from gpdit_lightning.model import GPDiTConfig
from gpdit_lightning.model.classifier import clean_stream_config
from gpdit_lightning.specs import LatentGrid

# Assumed where no data are prepared: the sizes of the paper in pixels (GPDiT, section 5.1) in equal shares and, unless
# the recipe sets `frames`, clips of 17 frames and sequences of three pairs.
ASSUMED_SIZES = {"images": ["256x256", "192x320", "320x192"], "videos": ["192x320"], "sequences": ["256x256"]}
ASSUMED_VIDEO_FRAMES, ASSUMED_SEQUENCE_FRAMES = 17, 6
NO_SIZES: Mapping[str, Sequence[str] | None] = {}


def grid_of(codec: str) -> LatentGrid:
    """Return how a codec maps pixels to latents, by its class, without loading it.

    Args:
        codec: name or import path.

    Raises:
        InputError: there is no such codec, or its class does not have the three numbers.
    """
    codec_class, grid = find_codec(codec), LatentGrid()
    for name in LatentGrid.__annotations__:
        if not isinstance(getattr(codec_class, name, None), int):
            raise InputError(
                f"the codec {codec} has no {name} before it is loaded: set it in its class, or prepare data and leave "
                "out --codec."
            )
        setattr(grid, name, getattr(codec_class, name))
    return grid


class EstimatedRecipe(NamedTuple):
    """The part of a recipe that an estimate depends on.

    Attributes:
        run: settings from which the estimate is computed.
        grid: how pixels map to latents.
        assumed: names of the sources whose data are not prepared.
        workers: loader processes per GPU.
        accelerator: `trainer.accelerator`.
    """

    run: RunSettings
    grid: LatentGrid
    assumed: frozenset[str]
    workers: int
    accelerator: str


def read_recipe(
    arguments: Sequence[str],
    gpus: int = 1,
    sizes: Mapping[str, Sequence[str] | None] | None = None,
    codec: str = "wan",
) -> EstimatedRecipe:
    """Read a recipe.

    Args:
        arguments: of `fit`.
        gpus: number of GPUs over which the batch is distributed.
        sizes: HEIGHTxWIDTH in pixels, by source; None for the sizes of its manifests, or else of the paper.
        codec: codec of sources that are not prepared.

    Raises:
        InputError: the recipe cannot be used, or `estimate` does not support its precision or strategy.
    """
    return estimated_recipe(parse_recipe("estimate", arguments), gpus, sizes or {}, codec)


def estimated_recipe(
    settings: Namespace, gpus: int = 1, sizes: Mapping[str, Sequence[str] | None] = NO_SIZES, codec: str = "wan"
) -> EstimatedRecipe:
    """Return the part of a parsed recipe that an estimate depends on; otherwise as :func:`read_recipe`."""
    data, precision = settings.data, str(settings.trainer.precision or "32-true")
    if precision not in BYTES_OF_PRECISION:
        raise InputError(f"trainer.precision is {precision}; estimate supports bf16-mixed and 32-true.")
    backbone = GPDiTConfig(**vars(settings.model.init_args.backbone))
    classifier = settings.model.init_args.get("classification")
    if classifier is not None:
        backbone = clean_stream_config(backbone, classifier.layer)
    sources, grid, assumed = read_sources(data, sizes, codec, backbone)
    run = RunSettings(
        backbone=backbone,
        precision=precision,
        strategy=sharding_strategy(settings.trainer.strategy),
        gpus=gpus,
        max_ranks=data.max_ranks,
        context_dropout=data.context_dropout,
        noise_draws=data.noise_draws,
        max_steps=settings.trainer.max_steps,
        sources=sources,
        sampling=data.sampling,
        clean_stream_only=classifier is not None,
        reduced_bytes=2 if settings.model.init_args.optimizer.gradient_reduction == "bf16" else 4,
    )
    return EstimatedRecipe(run, grid, assumed, data.workers, str(settings.trainer.accelerator))


def sharding_strategy(setting: Any) -> ShardingStrategy:
    """Return the strategy that `trainer.strategy` selects; raises `InputError` if estimates do not support it."""
    if isinstance(setting, Namespace) and setting.class_path.endswith(".ZeRO"):
        chosen = setting.init_args
        return next(s for s in STRATEGIES if s.deepspeed and (s.stage, s.offload) == (chosen.stage, chosen.offload))
    given = setting.class_path.rpartition(".")[2] if isinstance(setting, Namespace) else strategy_of(setting)
    name = given.lower()
    offered = {strategy.option: strategy for strategy in STRATEGIES}
    if name.startswith("ddp"):
        return offered["auto"]
    if name not in offered:
        raise InputError(f"trainer.strategy is {given}; estimate supports ddp, {', '.join(offered)}.")
    return offered[name]


def prepared_manifests(paths: Sequence[str]) -> list[Manifest]:
    """Load the manifests of a source; return none if one does not exist yet."""
    exist = all("://" in path or Path(path, FILE_NAME).is_file() or Path(path).is_file() for path in paths)
    return [Manifest.load(path) for path in paths] if exist else []


def assumed_samples(
    name: str, source: SourceConfig, sizes: Sequence[str] | None, grid: LatentGrid, patch_size: int
) -> Counter[LatentShape]:
    """Return the latent shapes assumed for a source without prepared data, in equal shares.

    Args:
        name: of the source.
        source: settings of the source in the recipe.
        sizes: HEIGHTxWIDTH in pixels; None for the sizes of the paper.
        grid: how pixels map to latents.
        patch_size: latent pixels along one side of a token.

    Raises:
        InputError: a size is not a multiple of the size of a token.
    """
    video_frames = grid.latent_frames(ASSUMED_VIDEO_FRAMES)
    frames = {"images": 1, "videos": video_frames, "sequences": ASSUMED_SEQUENCE_FRAMES}[name]
    multiple, samples = grid.spatial_factor * patch_size, Counter[LatentShape]()
    for height, width in map(parse_size, sizes or ASSUMED_SIZES[name]):
        if height % multiple or width % multiple:
            raise InputError(
                f"--{KINDS[name]}_sizes has {height}x{width}, which cannot be divided into patches: give multiples of "
                f"{multiple} pixels."
            )
        samples[source.frames or frames, height // grid.spatial_factor, width // grid.spatial_factor] += 1
    return samples


def read_sources(
    data: Namespace, sizes: Mapping[str, Sequence[str] | None], codec: str, backbone: GPDiTConfig
) -> tuple[tuple[PlannedSource, ...], LatentGrid, frozenset[str]]:
    """Return the sources of a recipe, how their pixels map to latents, and the names of those that are not prepared.

    Args:
        data: data settings of the recipe.
        sizes: by source, as for :func:`read_recipe`.
        codec: codec of sources that are not prepared.
        backbone: architecture of the recipe.

    Raises:
        InputError: an option is invalid, or samples are too short.
    """
    selection = select_from_recipe(data)
    if not selection.configs:
        raise no_source_error(selection)
    used = selection.configs
    if unused := [name for name in sizes if sizes[name] and name not in used]:
        raise InputError(
            f"--{KINDS[unused[0]]}_sizes has no effect, since the recipe uses no {unused[0]}: leave it out."
        )
    manifests = {name: [] if sizes.get(name) else prepared_manifests(s.manifests) for name, s in used.items()}
    grid = next((prepared[0].codec for prepared in manifests.values() if prepared), None) or grid_of(codec)
    sources = []
    for name, source in used.items():
        if manifests[name]:
            samples = prepared_samples(name, manifests[name])
        else:
            samples = assumed_samples(name, source, sizes.get(name), grid, backbone.patch_size)
        sources.append(planned_source(name, samples, source, backbone))
    return tuple(sources), grid, frozenset(name for name in used if not manifests[name])
