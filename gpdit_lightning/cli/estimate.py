"""`estimate`: what a recipe needs, without running it: parameters, memory on each GPU by part, FLOPs by part, days."""

import argparse
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from gpdit_lightning.cli import fit
from gpdit_lightning.data.batches import noisy_frames
from gpdit_lightning.data.datamodule import KINDS
from gpdit_lightning.data.manifest import FILE_NAME, Manifest
from gpdit_lightning.data.plan import PlannedSource
from gpdit_lightning.errors import InputError
from gpdit_lightning.estimation.flops import peak_bf16_flops
from gpdit_lightning.estimation.memory import STRATEGIES, Strategy, parameter_count
from gpdit_lightning.estimation.requirements import (
    ALLOWANCE,
    PRECISIONS,
    Run,
    Shape,
    Source,
    least_gpus_that_fit,
    memory,
    nearest_that_fits,
    overrides,
    step_flops,
)
from gpdit_lightning.media.images import parse_size
from gpdit_lightning.model import GPDiTConfig
from gpdit_lightning.training.strategies import OF_LIGHTNING

GIB = 2**30

# Assumed where nothing is prepared yet: the paper's sizes (GPDiT, section 5.1) in equal parts, 17 frames of video,
# sequences of three pairs; a codec that makes one latent pixel of 8x8.
SIZES = {"images": ["256x256", "192x320", "320x192"], "videos": ["192x320"], "sequences": ["256x256"]}
FRAMES = {"images": 1, "videos": 5, "sequences": 6}
SPATIAL_FACTOR = 8


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
            read_source(name, source, data.max_ranks, sizes.get(name), SPATIAL_FACTOR * backbone.patch_size)
            for name, source in used.items()
            if source.manifests and max(source.batch_size, source.tokens) > 0
        ),
    )


def strategy_of(setting: Any) -> Strategy:
    """The strategy that `trainer.strategy` means; raises `InputError` if it is not counted here."""
    if isinstance(setting, Namespace) and setting.class_path.endswith(".ZeRO"):
        chosen = setting.init_args
        return next(s for s in STRATEGIES if s.deepspeed and (s.stage, s.offload) == (chosen.stage, chosen.offload))
    given = setting.class_path.rpartition(".")[2] if isinstance(setting, Namespace) else setting
    name = OF_LIGHTNING.get(given, given.lower())
    offered = {strategy.option: strategy for strategy in STRATEGIES if strategy.option}
    if name.startswith("ddp"):
        return offered["auto"]
    if name not in offered:
        raise InputError(f"trainer.strategy is {given}: estimate knows ddp, {', '.join(offered)}.")
    return offered[name]


def read_source(name: str, settings: Namespace, max_ranks: int, sizes: list[str] | None, multiple: int) -> Source:
    """A source with its latent shapes: those of its manifests if all are there, else of `sizes` or the paper.

    Raises:
        InputError: manifests without samples or with too short ones, a size that is no multiple of `multiple`, or a
            batch that cannot be cut into micro-batches, or a loss on targets where there are none.
    """
    prepared = not sizes and all(
        "://" in path or Path(path, FILE_NAME).is_file() or Path(path).is_file() for path in settings.manifests
    )
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
    planned = PlannedSource(name, (), settings.batch_size, settings.tokens, settings.micro_batches)
    micro_batches: defaultdict[tuple[int, int, int], float] = defaultdict(float)  # of each shape in an epoch
    for (available, height, width), count in samples.items():
        most = settings.frames or available
        lengths = range(settings.least_frames or most, min(most, available) + 1)
        if not lengths:
            raise InputError(
                f"data.{name} asks for {lengths.start} latent frames, but some samples have {available}: prepare "
                "longer clips or ask for fewer frames."
            )
        noisy_frames(name, settings.loss_frames, lengths.start)  # complains if there are none
        cycle = sum(planned.micro_batch_size(frames, height, width, max_ranks) for frames in lengths)
        for frames in lengths:
            micro_batches[frames, height, width] += count / cycle
    shapes = tuple(Shape(*shape, amount / sum(micro_batches.values())) for shape, amount in micro_batches.items())
    return Source(
        name,
        settings.batch_size,
        settings.micro_batches,
        shapes,
        not prepared,
        settings.tokens,
        settings.loss_frames,
    )


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
        sizes = {f"{s.height * SPATIAL_FACTOR}x{s.width * SPATIAL_FACTOR}" for s in source.shapes}
        lengths = between([shape.frames for shape in source.shapes])
        lengths += ", loss on targets alone" if source.loss_frames == "targets" else ""
        batch = f"{source.tokens:,} tokens" if source.tokens else f"{source.batch_size}"
        clips = between([source.micro_batch_size(shape, run.max_ranks) // run.gpus for shape in source.shapes])
        lines.append(
            f"{source.name}: {batch} a step, {clips} at a time on a GPU, latent frames {lengths}, "
            f"{', '.join(sorted(sizes))} ({'assumed' if source.assumed else 'as prepared'})"
        )
    return "\n".join(lines)


def between(numbers: Sequence[int]) -> str:
    """The range of some numbers, or the only one."""
    least, most = min(numbers), max(numbers)
    return f"{least}" if least == most else f"{least} to {most}"


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
