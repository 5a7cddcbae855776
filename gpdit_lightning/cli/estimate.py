"""`estimate`: compute parameters, memory, FLOPs and duration of a training recipe without running it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from gpdit_lightning.estimation.flops import PEAK_BF16_FLOPS, peak_bf16_flops
from gpdit_lightning.estimation.loading import loaded_bytes, shared_memory_bytes
from gpdit_lightning.estimation.memory import STRATEGIES, ShardingStrategy, parameter_count
from gpdit_lightning.estimation.prepared import LatentShape, planned_source, prepared_samples
from gpdit_lightning.estimation.requirements import (
    ALLOWANCE,
    BYTES_OF_PRECISION,
    RunSettings,
    least_gpus_that_fit,
    memory,
    nearest_that_fits,
    overrides,
    source_flops,
    step_flops,
    step_seconds,
)
from gpdit_lightning.estimation.saving import SavingSpeeds, saving_costs
from gpdit_lightning.estimation.units import GIB, MIB, duration, flops
from gpdit_lightning.media.images import parse_size
from gpdit_lightning.model import GPDiTConfig
from gpdit_lightning.model.classifier import clean_stream_config
from gpdit_lightning.options.estimate import EstimateOptions
from gpdit_lightning.specs import LatentGrid

MEMORY_PARTS = ("weights", "gradients", "optimizer", "average", "buffers", "step")  # columns of the table

# Assumed where no data are prepared: the sizes of the paper in pixels (GPDiT, section 5.1) in equal shares and, unless
# the recipe sets `frames`, clips of 17 frames and sequences of three pairs.
ASSUMED_SIZES = {"images": ["256x256", "192x320", "320x192"], "videos": ["192x320"], "sequences": ["256x256"]}
ASSUMED_VIDEO_FRAMES, ASSUMED_SEQUENCE_FRAMES = 17, 6
NO_SIZES: Mapping[str, Sequence[str] | None] = {}


def estimate(options: EstimateOptions) -> None:
    """Print the estimate.

    Raises:
        InputError: the recipe or an option cannot be used.
    """
    speed = Speed.given(options.tflops) if options.tflops else Speed.at_mfu(peak_of_gpu(options.gpu), options.mfu)
    sizes = {"images": options.image_sizes, "videos": options.video_sizes, "sequences": options.sequence_sizes}
    recipe = read_recipe(options.fit_arguments, options.gpus, sizes, options.codec)
    print(report(recipe, options.gpu_memory * GIB, speed))


def peak_of_gpu(gpu: str) -> float:
    """Return the peak FLOP/s of a model of GPU in bf16.

    Raises:
        InputError: it is unknown.
    """
    peak = peak_bf16_flops(gpu)
    if peak is None:
        known = ", ".join(name for name, _ in PEAK_BF16_FLOPS)
        raise InputError(f"--gpu is {gpu}, whose peak FLOP/s are unknown: give one of {known}.")
    return peak


class Speed(NamedTuple):
    """The speed of training on each GPU.

    Attributes:
        flops_per_s: FLOP/s that training achieves.
        text: how it is known, for the report.
    """

    flops_per_s: float
    text: str

    @classmethod
    def at_mfu(cls, peak: float, mfu: float) -> "Speed":
        """Return the speed at a fraction `mfu` of the peak FLOP/s."""
        return cls(peak * mfu, f"{mfu:.0%} of {peak / 1e12:.0f} TFLOP/s (dense bf16)")

    @classmethod
    def given(cls, tflops: float) -> "Speed":
        """Return a speed in TFLOP/s."""
        return cls(tflops * 1e12, f"{tflops:g} TFLOP/s")


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
    """

    run: RunSettings
    grid: LatentGrid
    assumed: frozenset[str]
    workers: int


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
    )
    return EstimatedRecipe(run, grid, assumed, data.workers)


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


def report(recipe: EstimatedRecipe, capacity: float, speed: Speed) -> str:
    """Return the estimate as text.

    Args:
        recipe: to estimate.
        capacity: memory of a GPU in bytes.
        speed: of a GPU.
    """
    run = recipe.run
    sections = (
        model_and_data(recipe),
        memory_table(run, capacity),
        what_fits(run, capacity),
        compute(run, speed),
        saving(run),
    )
    return "\n\n".join(sections)


def model_and_data(recipe: EstimatedRecipe) -> str:
    """Return a line on the backbone and a line for each source of data."""
    run, spatial_factor = recipe.run, recipe.grid.spatial_factor
    lines = [
        f"{parameter_count(run.backbone):,} parameters ({run.backbone.size}, {run.backbone.attention}), "
        f"{run.precision}, GPUs: {run.gpus}"
    ]
    for source, share in zip(run.sources, run.plan.step_shares, strict=True):
        shapes = run.micro_batch_shapes(source)
        sizes = {f"{shape.height * spatial_factor}x{shape.width * spatial_factor}" for shape in shapes}
        lengths = value_range([shape.frames for shape in shapes])
        lengths += ", loss on targets only" if source.config.loss_frames == "targets" else ""
        if source.config.frames_without_loss:
            lengths += f", no loss on the first {source.config.frames_without_loss}"
        batch = f"{source.config.tokens:,} tokens" if source.config.tokens else f"{source.config.batch_size}"
        clips = value_range([shape.samples // run.gpus for shape in shapes])
        steps = f", in {share} of the steps" if share < 1 else ""
        lines.append(
            f"{source.name}: {batch} per step{steps}, {clips} per micro-batch and GPU, latent frames {lengths}, "
            f"{', '.join(sorted(sizes))} ({'assumed' if source.name in recipe.assumed else 'as prepared'})"
        )
    return "\n".join([*lines, *loading(run, recipe.workers)])


def loading(run: RunSettings, workers: int) -> list[str]:
    """Return a line on the memory of the loader processes; none if there are none."""
    if not workers:
        return []
    needed, shared = (f"{size / MIB:.1f} MiB" for size in (loaded_bytes(run, workers), shared_memory_bytes(workers)))
    return [
        f"loading: {workers} processes per GPU hold {needed} of batches in host memory; they need {shared} of shared "
        "memory (/dev/shm)"
    ]


def saving(run: RunSettings) -> str:
    """Return sentences on the size of a checkpoint, and on how long it stalls the training."""
    costs, speeds = saving_costs(run.backbone, run.strategy, run.gpus), SavingSpeeds()
    size = f"A checkpoint has {costs.bytes / GIB:.1f} GiB"
    at = f"{speeds.copy / 1e9:g} GB/s to host memory, {speeds.digest / 1e9:g} GB/s of sha256"
    at += f" and {speeds.disk / 1e9:g} GB/s to disk (assumed)"
    if not costs.copied:
        return f"{size}. At {at} it stalls the training for {duration(costs.stall)}."
    return (
        f"{size}; each rank holds a copy of its part, {costs.copied / GIB:.1f} GiB of host memory.\n"
        f"At {at}\nit stalls the training for {duration(costs.stall)}, "
        f"and is complete {duration(costs.background)} later."
    )


def value_range(numbers: Sequence[int]) -> str:
    """Return the range of numbers as text, or their only value."""
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def memory_table(run: RunSettings, capacity: float) -> str:
    """Return a table of the memory per GPU, a row for each strategy.

    Activations and totals are given without and with activation checkpointing.
    """
    headings = (*MEMORY_PARTS, "activations", "checkpointed", "total", "checkpointed")
    lines = ["GiB per GPU".ljust(19) + "".join(name.rjust(14) for name in headings)]
    lines += [memory_row(run, strategy, capacity) for strategy in STRATEGIES]
    lines.append(
        f"The total includes the larger of step and activations, and {ALLOWANCE / GIB:.0f} GiB for CUDA, NCCL and "
        "fragmentation (assumed). It does not include the codec and the networks of previews and scores."
    )
    return "\n".join(lines)


def memory_row(run: RunSettings, strategy: ShardingStrategy, capacity: float) -> str:
    """Return the row of a strategy; `>` marks the strategy of the run."""
    stored, recomputed = (
        memory(replace(run, strategy=strategy, backbone=run.backbone.replaced(activation_checkpointing=checkpointing)))
        for checkpointing in (False, True)
    )
    columns = [stored[name] for name in MEMORY_PARTS]
    columns += [needed[name] for name in ("activations", "total") for needed in (stored, recomputed)]
    row = "".join(f"{column / GIB:14.1f}" for column in columns)
    fits = [needed["total"] <= capacity for needed in (stored, recomputed)]
    verdict = "fits" if fits[0] else "fits checkpointed" if fits[1] else "does not fit"
    host_memory = f", {stored['host_memory'] / GIB:.1f} GiB of host memory" if strategy.offload else ""
    return f"{'>' if strategy == run.strategy else ' '} {strategy.name:<17}{row}  {verdict}{host_memory}"


def what_fits(run: RunSettings, capacity: float) -> str:
    """Return sentences on whether the recipe fits, and if not, on the nearest settings that do."""
    total = memory(run)["total"]
    needed = f"needs {total / GIB:.1f} of {capacity / GIB:.0f} GiB"
    if total <= capacity:
        return f"The recipe fits: it {needed}, which leaves {(capacity - total) / GIB:.1f} GiB."
    nearest, more_gpus = nearest_that_fits(run, capacity), least_gpus_that_fit(run, capacity)
    lines = [f"The recipe does not fit: it {needed}."]
    if nearest is not None:
        parts = memory(nearest)
        host_memory = f" and {parts['host_memory'] / GIB:.1f} GiB of host memory" if nearest.strategy.offload else ""
        lines.append(f"The nearest setting that fits, with {parts['total'] / GIB:.1f} GiB{host_memory}:")
        lines.append(f"  {overrides(run, nearest)}")
    if more_gpus is not None and more_gpus != nearest:
        lines.append(
            f"Without offloading, with {memory(more_gpus)['total'] / GIB:.1f} GiB on each of {more_gpus.gpus} GPUs:"
        )
        lines.append(f"  {overrides(run, more_gpus)}")
    if nearest is None:
        lines.append("No setting makes it fit: use a GPU with more memory or a smaller backbone.")
    return "\n".join(lines)


def compute(run: RunSettings, speed: Speed) -> str:
    """Return sentences on the FLOPs of an optimizer step by part, and on the duration of a step and of the run.

    They are means over the steps if the sources alternate.
    """
    parts = step_flops(run)
    total = sum(parts.values())
    of_sources = [f"{source.name}: {flops(sum(source_flops(run, source).values()))}" for source in run.sources]
    average = f" on average ({', '.join(of_sources)})" if min(run.plan.step_shares) < 1 else ""
    seconds = step_seconds(run, speed.flops_per_s)
    recomputed = ", and a third more to recompute activations" if run.backbone.activation_checkpointing else ""
    shares = ", ".join(f"{name.replace('_', ' ')} {count / total:.1%}" for name, count in parts.items())
    run_time = f", and {run.max_steps:,} steps {duration(run.max_steps * seconds)}" if run.max_steps > 0 else ""
    return (
        f"An optimizer step takes {flops(total)}{average}, {flops(total / run.gpus)} per GPU{recomputed}:\n"
        f"  {shares}\n"
        f"At {speed.text} a step takes {duration(seconds)}{run_time}."
    )
