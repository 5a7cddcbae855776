"""Requirements of a run: FLOPs per step, memory on each GPU, and the nearest settings that fit."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from gpdit_lightning.data.plan import Plan, PlannedSource, Sampling
from gpdit_lightning.errors import InputError
from gpdit_lightning.estimation.flops import PassShape, training_flops
from gpdit_lightning.estimation.memory import (
    AUTOCAST,
    BF16,
    FLOAT32,
    STRATEGIES,
    BytesPerValue,
    ShardingStrategy,
    activation_bytes,
    held_bytes,
    step_bytes,
)
from gpdit_lightning.model import GPDiTConfig
from gpdit_lightning.model.layout import count_blocks

# Bytes of CUDA's context, the workspaces of NCCL and cuBLAS, and fragmentation. Assumed, not measured.
ALLOWANCE = 2 * 2**30

BYTES_OF_PRECISION = {"bf16-mixed": AUTOCAST, "32-true": FLOAT32, "32": FLOAT32}


class MicroBatchShape(NamedTuple):
    """A shape of micro-batches of a source.

    Attributes:
        frames: F, latent frames.
        height: height of a latent frame.
        width: width of a latent frame.
        samples: samples of a micro-batch over all ranks.
        fraction: fraction of the source's micro-batches with this shape.
    """

    frames: int
    height: int
    width: int
    samples: int
    fraction: float


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run on which its memory and FLOPs depend.

    Raises:
        InputError: batches cannot be divided into micro-batches, or ranks among the GPUs.
    """

    backbone: GPDiTConfig
    precision: str
    """Value of `trainer.precision`, one of `BYTES_OF_PRECISION`."""
    strategy: ShardingStrategy
    gpus: int
    max_ranks: int
    context_dropout: float
    noise_draws: int
    max_steps: int
    sources: tuple[PlannedSource, ...]
    sampling: Sampling = "joint"
    clean_stream_only: bool = False
    """Whether the clips pass through the clean stream alone, as in classification."""
    reduced_bytes: int = 4
    """Bytes of each gradient when ranks add them up (`optimizer.gradient_reduction`)."""

    def __post_init__(self) -> None:
        _ = self.plan  # raises if batches cannot be divided
        if self.gpus < 1 or self.max_ranks % self.gpus:
            raise InputError(
                f"{self.gpus} GPUs do not divide data.max_ranks = {self.max_ranks}: choose --gpus that do, or set "
                f"data.max_ranks to a multiple of them (--data.max_ranks {max(1, self.gpus)})."
            )

    @property
    def plan(self) -> Plan:
        """The batch plan of the run."""
        return Plan(self.sources, 0, self.context_dropout, self.max_ranks, self.sampling)

    @property
    def bytes_per_value(self) -> BytesPerValue:
        """The bytes per value: `bf16-mixed` means bf16 weights if they are sharded, autocast otherwise."""
        precision = BYTES_OF_PRECISION[self.precision]
        return BF16 if self.strategy.stage and precision == AUTOCAST else precision

    def micro_batch_shapes(self, source: PlannedSource) -> tuple[MicroBatchShape, ...]:
        """Return the shapes of a source's micro-batches, one for each bucket and clip length."""
        shapes = []
        for bucket in source.buckets:
            h, w = bucket.height, bucket.width
            sizes = [source.micro_batch_size(frames, h, w, self.max_ranks) for frames in bucket.lengths]
            per_epoch = sum(bucket.counts) / sum(sizes)  # micro-batches of each length in an epoch
            for frames, size in zip(bucket.lengths, sizes, strict=True):
                shapes.append(MicroBatchShape(frames, h, w, size, per_epoch))
        total = sum(shape.fraction for shape in shapes)
        return tuple(shape._replace(fraction=shape.fraction / total) for shape in shapes)


def step_flops(run: RunSettings) -> dict[str, float]:
    """Return the FLOPs of an optimizer step by part, over all GPUs: the mean over the steps of alternating sources."""
    total: Counter[str] = Counter()
    for source, share in zip(run.sources, run.plan.step_shares, strict=True):
        total.update({part: float(share) * count for part, count in source_flops(run, source).items()})
    return dict(total)


def source_flops(run: RunSettings, source: PlannedSource) -> dict[str, float]:
    """Return the FLOPs of a source in an optimizer step that uses it, by part, over all GPUs.

    They are averaged over shapes and context dropout.
    """
    total: Counter[str] = Counter()
    for shape in run.micro_batch_shapes(source):
        clips = source.config.micro_batches * shape.samples
        for context, fraction in ((clips, 1 - run.context_dropout), (0, run.context_dropout)):
            flops = training_flops(run.backbone, pass_shape(run, source, shape, clips, context))
            total.update({part: shape.fraction * fraction * count for part, count in flops.items()})
    return dict(total)


def pass_shape(
    run: RunSettings, source: PlannedSource, shape: MicroBatchShape, clips: int, context_clips: int
) -> PassShape:
    """Return the shape of a forward pass over `clips` clips of a source, `context_clips` of them with context."""
    if run.clean_stream_only:
        return PassShape(clips, clips, shape.frames, shape.height, shape.width, noisy_frames=())
    one_block = count_blocks(run.backbone, range(shape.frames), shape.height, shape.width) == 1
    draws = 1 if one_block else run.noise_draws
    noisy_frames = source.config.noisy_frames(shape.frames)
    return PassShape(clips, context_clips, shape.frames, shape.height, shape.width, draws, noisy_frames)


def largest_activation_bytes(run: RunSettings, source: PlannedSource) -> int:
    """Return the bytes of the activations of a source's largest micro-batch on one GPU."""
    needed, parts = [], run.max_ranks // run.gpus
    for shape in run.micro_batch_shapes(source):
        samples = shape.samples // run.max_ranks
        clips, without_context = samples * parts, parts * int(run.context_dropout * samples)
        largest = pass_shape(run, source, shape, clips, clips - without_context)
        needed.append(activation_bytes(run.backbone, largest, run.bytes_per_value))
    return max(needed)


def memory(run: RunSettings) -> dict[str, int]:
    """Return the bytes on each GPU by part, their `total`, and the additional `host_memory` of a rank.

    The total includes the larger of `step` and `activations`: activations are freed before the optimizer step.
    """
    held = held_bytes(run.backbone, run.strategy, run.bytes_per_value, run.gpus)
    step = step_bytes(run.backbone, run.strategy, run.gpus)
    activations = max(largest_activation_bytes(run, source) for source in run.sources)
    total = sum(held.values()) - held["host_memory"] + max(step, activations) + ALLOWANCE
    return held | {"step": step, "activations": activations, "total": total}


def _with_micro_batches(source: PlannedSource, micro_batches: int) -> PlannedSource:
    return replace(source, config=replace(source.config, micro_batches=micro_batches))


def _samples(run: RunSettings, source: PlannedSource) -> int:
    """Return the least number of samples of a source in an optimizer step for each of `max_ranks` ranks."""
    return min(shape.samples for shape in run.micro_batch_shapes(_with_micro_batches(source, 1))) // run.max_ranks


def with_smaller_micro_batches(run: RunSettings) -> Iterator[RunSettings]:
    """Yield the run, then variants with more and smaller micro-batches of the source with the largest activations.

    Alternating sources all have the same number. When each of `max_ranks` ranks has one sample of a source, `max_ranks`
    is lowered to the number of GPUs.
    """
    yield run
    while True:
        largest = max(run.sources, key=lambda source: largest_activation_bytes(run, source))
        changed = run.sources if run.sampling == "alternate" else (largest,)
        counts = range(largest.config.micro_batches + 1, min(_samples(run, source) for source in changed) + 1)
        next_count = next(
            (n for n in counts if all(s.config.tokens or _samples(run, s) % n == 0 for s in changed)), None
        )
        if next_count:
            sources = tuple(_with_micro_batches(s, next_count) if s in changed else s for s in run.sources)
            run = replace(run, sources=sources)
            yield run
        elif run.max_ranks > run.gpus:
            run = replace(run, max_ranks=run.gpus)
        else:
            return


def nearest_that_fits(run: RunSettings, capacity: float) -> RunSettings | None:
    """Return the cheapest change of settings with which each GPU needs at most `capacity` bytes; None if none suffices.

    Changes in the order of their costs: more micro-batches (smaller products), activation checkpointing (a third more
    time), ZeRO-2 and ZeRO-3 (communication), offloading (much slower). FSDP2 is proposed only if the run uses it.
    """
    proposed = sorted((s for s in STRATEGIES if s.deepspeed), key=lambda s: (s.offload, s.stage))
    for strategy in dict.fromkeys((run.strategy, *proposed)):
        for checkpointing in sorted({run.backbone.activation_checkpointing, True}):
            backbone = run.backbone.replaced(activation_checkpointing=checkpointing)
            for candidate in with_smaller_micro_batches(replace(run, strategy=strategy, backbone=backbone)):
                if memory(candidate)["total"] <= capacity:
                    return candidate
    return None


def least_gpus_that_fit(run: RunSettings, capacity: float) -> RunSettings | None:
    """Return the run on the least number of GPUs, not fewer than it has, that suffices without offloading; or None."""
    for gpus in range(run.gpus, run.max_ranks + 1):
        if run.max_ranks % gpus == 0:
            fitting = nearest_that_fits(replace(run, gpus=gpus), capacity)
            if fitting is not None and not fitting.strategy.offload:
                return fitting
    return None


def overrides(run: RunSettings, other: RunSettings) -> str:
    """Return the options of `fit` that change one run into another."""
    options = []
    for source, changed in zip(run.sources, other.sources, strict=True):
        if source.config.micro_batches != changed.config.micro_batches:
            options.append(f"--data.{source.name}.micro_batches={changed.config.micro_batches}")
    if run.max_ranks != other.max_ranks:
        options.append(f"--data.max_ranks={other.max_ranks}")
    if run.backbone.activation_checkpointing != other.backbone.activation_checkpointing:
        options.append("--model.init_args.backbone.activation_checkpointing=true")
    if run.strategy != other.strategy:
        options.append(f"--trainer.strategy={other.strategy.option}")
    return " ".join(options)
