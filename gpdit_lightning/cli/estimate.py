"""`estimate`: what a recipe needs, without running it: parameters, memory on each GPU by part, FLOPs by part, days."""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import Namespace

from gpdit_lightning.cli import fit
from gpdit_lightning.data.datamodule import KINDS
from gpdit_lightning.data.manifest import FILE_NAME, Manifest
from gpdit_lightning.data.plan import Plan, PlannedSource
from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import parse_size
from gpdit_lightning.model import GPDiTConfig
from gpdit_lightning.training.flops import peak_bf16_flops, training_flops
from gpdit_lightning.training.memory import (
    AUTOCAST,
    BF16,
    FLOAT32,
    STRATEGIES,
    Precision,
    Strategy,
    activation_bytes,
    held_bytes,
    parameter_count,
    step_bytes,
)

GIB = 2**30

# Assumed where nothing is prepared yet: the paper's sizes (GPDiT, section 5.1) in equal parts, 17 frames of video,
# sequences of three pairs; a codec that makes one latent pixel of 8x8.
SIZES = {"images": ["256x256", "192x320", "320x192"], "videos": ["192x320"], "sequences": ["256x256"]}
FRAMES = {"images": 1, "videos": 5, "sequences": 6}
SPATIAL_FACTOR = 8

# CUDA's context, NCCL's and cuBLAS's workspaces, and what the allocator cannot use. Assumed, not measured.
ALLOWANCE = 2 * GIB

PRECISIONS = {"bf16-mixed": AUTOCAST, "32-true": FLOAT32, "32": FLOAT32}


class Shape(NamedTuple):
    """A latent shape (F, h, w) of a source, and the fraction of its micro-batches that have it."""

    frames: int
    height: int
    width: int
    fraction: float


@dataclass(frozen=True)
class Source:
    """One source of samples, as the recipe uses it."""

    name: str
    batch_size: int
    micro_batches: int
    shapes: tuple[Shape, ...]
    assumed: bool


@dataclass(frozen=True)
class Run:
    """What an estimate depends on."""

    backbone: GPDiTConfig
    precision: str
    strategy: Strategy
    gpus: int
    max_ranks: int
    context_dropout: float
    noise_draws: int
    max_steps: int
    sources: tuple[Source, ...]

    def __post_init__(self) -> None:
        planned = [PlannedSource(s.name, (s.batch_size,), s.batch_size, s.micro_batches) for s in self.sources]
        Plan(tuple(planned), 0, self.context_dropout, self.max_ranks)  # complains about batches that cannot be cut so
        if self.gpus < 1 or self.max_ranks % self.gpus:
            raise InputError(
                f"{self.gpus} GPUs do not divide data.max_ranks = {self.max_ranks}: choose --gpus that do, or set "
                "data.max_ranks to a multiple of them."
            )

    def numbers(self, strategy: Strategy) -> Precision:
        """Bytes of this run's values; DeepSpeed has bf16 weights where DDP has autocast."""
        numbers = PRECISIONS[self.precision]
        return BF16 if strategy.zero and numbers == AUTOCAST else numbers


def parser() -> argparse.ArgumentParser:
    """The verb's options."""
    options = argparse.ArgumentParser(
        prog="python -m gpdit_lightning estimate",
        description="What a recipe needs, without running it: parameters, memory on each GPU by part, FLOPs of an "
        "optimizer step by part, days, and the nearest setting that fits. Latent shapes are those of the prepared data "
        "or, where there are none, the paper's. All other options are those of `fit`.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    options.add_argument("--config", action="append", required=True, help="a recipe; then overlays")
    options.add_argument("--gpus", type=int, default=1, help="GPUs that share the batch")
    options.add_argument("--gpu", default="H100", help="their kind, which sets the peak FLOP/s")
    options.add_argument("--gpu_memory", type=float, default=80, help="GiB of each")
    options.add_argument("--mfu", type=float, default=0.4, help="assumed share of the peak FLOP/s")
    for name in SIZES:
        options.add_argument(f"--{name[:-1]}_sizes", nargs="+", help=f"HEIGHTxWIDTH of {name} in pixels, equal parts")
    return options


def read(arguments: Sequence[str], gpus: int, sizes: dict[str, list[str] | None]) -> Run:
    """A recipe as far as an estimate depends on it.

    Args:
        arguments: of `fit`.
        gpus: GPUs that share the batch.
        sizes: for each source pixel sizes like 192x320, or None for those of its manifests or else of the paper.

    Raises:
        InputError: a recipe that cannot be used, or that trains in a way that is not counted here.
    """
    settings = fit.parse("fit", arguments)
    data, precision = settings.data, str(settings.trainer.precision or "32-true")
    if precision not in PRECISIONS:
        raise InputError(f"trainer.precision is {precision}: estimate knows bf16-mixed and 32-true.")
    backbone = GPDiTConfig(**vars(settings.model.init_args.backbone))
    used = {name: getattr(data, name) for name in KINDS}
    return Run(
        backbone=backbone,
        precision=precision,
        strategy=strategy_of(settings.trainer.strategy),
        gpus=gpus,
        max_ranks=data.max_ranks,
        context_dropout=data.context_dropout,
        noise_draws=data.noise_draws,
        max_steps=settings.trainer.max_steps,
        sources=tuple(
            read_source(name, source, sizes.get(name), SPATIAL_FACTOR * backbone.patch_size)
            for name, source in used.items()
            if source.manifests and source.batch_size > 0
        ),
    )


def strategy_of(setting: Any) -> Strategy:
    """The strategy that `trainer.strategy` means; raises `InputError` if it is not counted here."""
    if isinstance(setting, Namespace) and setting.class_path.endswith(".ZeRO"):
        chosen = setting.init_args
        return next(s for s in STRATEGIES if (s.zero, s.offload) == (chosen.stage, chosen.offload))
    name = setting.class_path.rpartition(".")[2] if isinstance(setting, Namespace) else setting
    offered = {strategy.option: strategy for strategy in STRATEGIES if strategy.option}
    if name.lower().startswith("ddp"):
        return offered["auto"]
    if name not in offered:
        raise InputError(f"trainer.strategy is {name}: estimate knows ddp, {', '.join(offered)}.")
    return offered[name]


def read_source(name: str, settings: Namespace, sizes: list[str] | None, multiple: int) -> Source:
    """A source with its latent shapes: those of its manifests if all are there, else of `sizes` or the paper.

    Raises:
        InputError: manifests without samples or with too short ones, or a size that is no multiple of `multiple`.
    """
    prepared = not sizes and all(Path(path, FILE_NAME).is_file() or Path(path).is_file() for path in settings.manifests)
    samples: Counter[tuple[int, int, int]] = Counter()
    if prepared:
        for path in settings.manifests:
            for entry in Manifest.load(path).of_split("train"):
                if entry.kind == KINDS[name]:
                    samples[entry.shape[0], entry.shape[2], entry.shape[3]] += entry.count
    else:
        for height, width in map(parse_size, sizes or SIZES[name]):
            if height % multiple or width % multiple:
                raise InputError(
                    f"{name} of {height}x{width} have no whole patches: take multiples of {multiple} pixels."
                )
            samples[settings.frames or FRAMES[name], height // SPATIAL_FACTOR, width // SPATIAL_FACTOR] += 1
    if not samples:
        raise InputError(f"{settings.manifests[0]} holds no {name} to train on: prepare some.")
    shapes = []
    for (available, height, width), count in samples.items():
        most = settings.frames or available
        lengths = range(settings.least_frames or most, min(most, available) + 1)
        if not lengths:
            raise InputError(
                f"data.{name} asks for {lengths.start} latent frames, but some samples have {available}: prepare "
                "longer clips or ask for fewer frames."
            )
        shapes += [Shape(frames, height, width, count / samples.total() / len(lengths)) for frames in lengths]
    return Source(name, settings.batch_size, settings.micro_batches, tuple(shapes), not prepared)


def step_flops(run: Run) -> dict[str, float]:
    """FLOPs of an optimizer step by part, over all GPUs: the mean over shapes and dropped contexts."""
    total: Counter[str] = Counter()
    for source in run.sources:
        for frames, height, width, fraction in source.shapes:
            draws = run.noise_draws if frames > 1 else 1
            for context, share in ((source.batch_size, 1 - run.context_dropout), (0, run.context_dropout)):
                flops = training_flops(run.backbone, source.batch_size, context, frames, height, width, draws)
                total.update({part: fraction * share * count for part, count in flops.items()})
    return dict(total)


def activations(run: Run, source: Source) -> int:
    """Bytes of the activations of a source's largest micro-batch on one GPU."""
    part = source.batch_size // source.micro_batches // run.max_ranks
    clips, parts = part * run.max_ranks // run.gpus, run.max_ranks // run.gpus
    context = clips - parts * int(run.context_dropout * part)
    return max(
        activation_bytes(
            run.backbone,
            clips,
            context,
            frames,
            height,
            width,
            run.noise_draws if frames > 1 else 1,
            run.numbers(run.strategy),
        )
        for frames, height, width, _ in source.shapes
    )


def memory(run: Run) -> dict[str, int]:
    """Bytes on each GPU by part, their `total`, and a rank's `main_memory` beside them.

    The activations are gone when the optimizer takes its step: only the larger of the two counts.
    """
    parameters, numbers = parameter_count(run.backbone), run.numbers(run.strategy)
    held = held_bytes(parameters, run.strategy, numbers, run.gpus)
    step = step_bytes(parameters, run.strategy, numbers, run.gpus)
    largest = max(activations(run, source) for source in run.sources)
    total = sum(held.values()) - held["main_memory"] + max(step, largest) + ALLOWANCE
    return held | {"step": step, "activations": largest, "total": total}


def with_smaller_micro_batches(run: Run) -> Iterator[Run]:
    """The run itself, then the same with one source after another cut finer, the one with most activations first.

    Where the part of each of `max_ranks` ranks is one sample, `max_ranks` falls to the number of GPUs.
    """
    yield run
    while True:
        largest = max(run.sources, key=lambda source: activations(run, source))
        samples = largest.batch_size // run.max_ranks
        finer = [count for count in range(largest.micro_batches + 1, samples + 1) if samples % count == 0]
        if finer:
            sources = tuple(replace(s, micro_batches=finer[0]) if s is largest else s for s in run.sources)
            run = replace(run, sources=sources)
            yield run
        elif run.max_ranks > run.gpus:
            run = replace(run, max_ranks=run.gpus)
        else:
            return


def nearest_that_fits(run: Run, capacity: float) -> Run | None:
    """The least change of settings after which each GPU needs at most `capacity` bytes; None if nothing helps.

    In the order of what they cost: more micro-batches (smaller products), activation checkpointing (a third more time),
    ZeRO-2 and ZeRO-3 (communication), their offloading (much slower).
    """
    spread = sorted((s for s in STRATEGIES if s.option and s.zero), key=lambda s: (s.offload, s.zero))
    for strategy in dict.fromkeys((run.strategy, *spread)):
        for checkpointing in sorted({run.backbone.activation_checkpointing, True}):
            backbone = run.backbone.replaced(activation_checkpointing=checkpointing)
            for candidate in with_smaller_micro_batches(replace(run, strategy=strategy, backbone=backbone)):
                if memory(candidate)["total"] <= capacity:
                    return candidate
    return None


def least_gpus_that_fit(run: Run, capacity: float) -> Run | None:
    """The same on the least number of GPUs, at least the run's, on which nothing is offloaded."""
    for gpus in range(run.gpus, run.max_ranks + 1):
        if run.max_ranks % gpus == 0:
            wanted = nearest_that_fits(replace(run, gpus=gpus), capacity)
            if wanted is not None and not wanted.strategy.offload:
                return wanted
    return None


def overrides(run: Run, wanted: Run) -> str:
    """The options of `fit` that turn one run into another."""
    options = []
    for source, other in zip(run.sources, wanted.sources, strict=True):
        if source.micro_batches != other.micro_batches:
            options.append(f"--data.{source.name}.micro_batches={other.micro_batches}")
    if run.max_ranks != wanted.max_ranks:
        options.append(f"--data.max_ranks={wanted.max_ranks}")
    if run.backbone.activation_checkpointing != wanted.backbone.activation_checkpointing:
        options.append("--model.init_args.backbone.activation_checkpointing=true")
    if run.strategy != wanted.strategy:
        options.append(f"--trainer.strategy={wanted.strategy.option}")
    return " ".join(options)


def report(run: Run, capacity: float, peak: float, mfu: float) -> str:
    """All of it as text.

    Args:
        run: what to estimate.
        capacity: bytes of a GPU.
        peak: its FLOP/s.
        mfu: assumed share of them.
    """
    return "\n\n".join((head(run), table(run, capacity), verdict(run, capacity), work(run, peak, mfu)))


def head(run: Run) -> str:
    """What is estimated, and for which data."""
    lines = [
        f"{parameter_count(run.backbone):,} parameters ({run.backbone.size}, {run.backbone.attention}), "
        f"{run.precision}, GPUs: {run.gpus}"
    ]
    for source in run.sources:
        longest, shortest = (limit(shape.frames for shape in source.shapes) for limit in (max, min))
        sizes = {f"{s.height * SPATIAL_FACTOR}x{s.width * SPATIAL_FACTOR}" for s in source.shapes}
        lengths = f"{longest}" if longest == shortest else f"{shortest} to {longest}"
        clips = source.batch_size // source.micro_batches // run.gpus
        lines.append(
            f"{source.name}: {source.batch_size} a step, {clips} at a time on a GPU, latent frames {lengths}, "
            f"{', '.join(sorted(sizes))} ({'assumed' if source.assumed else 'as prepared'})"
        )
    return "\n".join(lines)


def table(run: Run, capacity: float) -> str:
    """Memory on each GPU, a row for each strategy: activations and totals without and with checkpointing."""
    held = ("weights", "gradients", "optimizer", "average", "buffers", "step")
    heads = (*held, "activations", "checkpointed", "total", "checkpointed")
    lines = ["GiB on each GPU".ljust(19) + "".join(name.rjust(14) for name in heads)]
    for strategy in STRATEGIES:
        kept, recomputed = (
            memory(
                replace(run, strategy=strategy, backbone=run.backbone.replaced(activation_checkpointing=checkpointing))
            )
            for checkpointing in (False, True)
        )
        columns = [kept[name] for name in held]
        columns += [needed[name] for name in ("activations", "total") for needed in (kept, recomputed)]
        row = "".join(f"{column / GIB:14.1f}" for column in columns)
        fits = [needed["total"] <= capacity for needed in (kept, recomputed)]
        words = "fits" if fits[0] else "fits checkpointed" if fits[1] else "does not fit"
        main_memory = f", {kept['main_memory'] / GIB:.1f} GiB of main memory" if strategy.offload else ""
        lines.append(f"{'>' if strategy == run.strategy else ' '} {strategy.name:<17}{row}  {words}{main_memory}")
    lines.append(
        f"In the total: the larger of step and activations, and {ALLOWANCE / GIB:.0f} GiB for CUDA, NCCL and what the "
        "allocator cannot use (assumed)."
    )
    return "\n".join(lines)


def verdict(run: Run, capacity: float) -> str:
    """Whether it fits, and what would."""
    total = memory(run)["total"]
    needed = f"needs {total / GIB:.1f} of {capacity / GIB:.0f} GiB"
    if total <= capacity:
        return f"The recipe fits: it {needed}, which leaves {(capacity - total) / GIB:.1f} GiB."
    wanted, more = nearest_that_fits(run, capacity), least_gpus_that_fit(run, capacity)
    lines = [f"The recipe does not fit: it {needed}."]
    if wanted is not None:
        parts = memory(wanted)
        main_memory = f" and {parts['main_memory'] / GIB:.1f} GiB of main memory" if wanted.strategy.offload else ""
        lines.append(f"The nearest setting that fits, with {parts['total'] / GIB:.1f} GiB{main_memory}:")
        lines.append(f"  {overrides(run, wanted)}")
    if more is not None and more != wanted:
        lines.append(f"Without offloading, with {memory(more)['total'] / GIB:.1f} GiB on each of {more.gpus} GPUs:")
        lines.append(f"  {overrides(run, more)}")
    if wanted is None:
        lines.append("No setting makes it fit: take a GPU with more memory or a smaller backbone.")
    return "\n".join(lines)


def work(run: Run, peak: float, mfu: float) -> str:
    """FLOPs of a step by part, and how long the run takes."""
    parts = step_flops(run)
    total = sum(parts.values())
    seconds = total / (run.gpus * peak * mfu)
    again = ", and a third as much again to recompute" if run.backbone.activation_checkpointing else ""
    shares = ", ".join(f"{name.replace('_', ' ')} {count / total:.1%}" for name, count in parts.items())
    days = f", {run.max_steps * seconds / 86400:.2g} days for {run.max_steps:,} steps" if run.max_steps > 0 else ""
    return (
        f"An optimizer step is {total / 1e15:.3g} PFLOP, {total / run.gpus / 1e15:.3g} on each GPU{again}:\n"
        f"  {shares}\n"
        f"At {mfu:.0%} of {peak / 1e12:.0f} TFLOP/s a step takes {seconds:.3g} s{days}."
    )


def run(verb: str, arguments: Sequence[str]) -> None:
    """Print the estimate.

    Raises:
        InputError: a recipe or an option that cannot be used.
    """
    options, others = parser().parse_known_args(arguments)
    peak = peak_bf16_flops(options.gpu)
    if peak is None:
        raise InputError(f"the GPU '{options.gpu}' is not known: give one like H100, H200 or A100.")
    if not 0 < options.mfu <= 1:
        raise InputError(f"--mfu is {options.mfu}; it must lie in (0, 1].")
    sizes = {name: getattr(options, f"{name[:-1]}_sizes") for name in SIZES}
    recipe = read([f"--config={path}" for path in options.config] + others, options.gpus, sizes)
    print(report(recipe, options.gpu_memory * GIB, peak, options.mfu))
