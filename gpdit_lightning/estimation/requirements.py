"""What a run needs before any of it has run: FLOPs of a step, memory on each GPU, and the nearest settings that fit."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from gpdit_lightning.data.batches import LossFrames, noisy_frames
from gpdit_lightning.data.plan import Plan, PlannedBucket, PlannedSource
from gpdit_lightning.errors import InputError
from gpdit_lightning.estimation.flops import PassShape, training_flops
from gpdit_lightning.estimation.memory import (
    AUTOCAST,
    BF16,
    FLOAT32,
    STRATEGIES,
    Precision,
    Strategy,
    activation_bytes,
    held_bytes,
    step_bytes,
)
from gpdit_lightning.model import GPDiTConfig

# CUDA's context, NCCL's and cuBLAS's workspaces, and what the allocator cannot use, in bytes. Assumed, not measured.
ALLOWANCE = 2 * 2**30

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
    tokens: int = 0
    loss_frames: LossFrames = "all"

    @property
    def planned(self) -> PlannedSource:
        """The same for the batch plan."""
        buckets = tuple(PlannedBucket((1,), (shape.frames,), shape.height, shape.width) for shape in self.shapes)
        return PlannedSource(self.name, buckets, self.batch_size, self.tokens, self.micro_batches)

    def micro_batch_size(self, shape: Shape, max_ranks: int) -> int:
        """Samples of a micro-batch over all ranks."""
        return self.planned.micro_batch_size(shape.frames, shape.height, shape.width, max_ranks)

    def noisy_frames(self, shape: Shape) -> tuple[int, ...] | None:
        """The positions of the frames that have noise and loss; None: all."""
        return noisy_frames(self.name, self.loss_frames, shape.frames)


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
        planned = tuple(source.planned for source in self.sources)
        Plan(planned, 0, self.context_dropout, self.max_ranks)  # complains about batches that cannot be cut so
        if self.gpus < 1 or self.max_ranks % self.gpus:
            raise InputError(
                f"{self.gpus} GPUs do not divide data.max_ranks = {self.max_ranks}: choose --gpus that do, or set "
                "data.max_ranks to a multiple of them."
            )

    @property
    def numbers(self) -> Precision:
        """Bytes of the values that it computes with: bf16 weights where they are spread, autocast elsewhere."""
        numbers = PRECISIONS[self.precision]
        return BF16 if self.strategy.stage and numbers == AUTOCAST else numbers


def step_flops(run: Run) -> dict[str, float]:
    """FLOPs of an optimizer step by part, over all GPUs: the mean over shapes and dropped contexts."""
    total: Counter[str] = Counter()
    for source in run.sources:
        for shape in source.shapes:
            clips = source.micro_batches * source.micro_batch_size(shape, run.max_ranks)
            for context, share in ((clips, 1 - run.context_dropout), (0, run.context_dropout)):
                flops = training_flops(run.backbone, pass_shape(run, source, shape, clips, context))
                total.update({part: shape.fraction * share * count for part, count in flops.items()})
    return dict(total)


def pass_shape(run: Run, source: Source, shape: Shape, clips: int, context_clips: int) -> PassShape:
    """The pass over clips of a source, some of which have context."""
    draws = run.noise_draws if shape.frames > 1 else 1
    return PassShape(clips, context_clips, *shape[:3], draws, source.noisy_frames(shape))


def activations(run: Run, source: Source) -> int:
    """Bytes of the activations of a source's largest micro-batch on one GPU."""
    needed, parts = [], run.max_ranks // run.gpus
    for shape in source.shapes:
        part = source.micro_batch_size(shape, run.max_ranks) // run.max_ranks
        clips, without_context = part * parts, parts * int(run.context_dropout * part)
        largest = pass_shape(run, source, shape, clips, clips - without_context)
        needed.append(activation_bytes(run.backbone, largest, run.numbers))
    return max(needed)


def memory(run: Run) -> dict[str, int]:
    """Bytes on each GPU by part, their `total`, and a rank's `main_memory` beside them.

    The activations are gone when the optimizer takes its step: only the larger of the two counts.
    """
    held = held_bytes(run.backbone, run.strategy, run.numbers, run.gpus)
    step = step_bytes(run.backbone, run.strategy, run.gpus)
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
        whole = replace(largest, micro_batches=1)
        samples = min(whole.micro_batch_size(shape, run.max_ranks) for shape in whole.shapes) // run.max_ranks
        counts = range(largest.micro_batches + 1, samples + 1)
        finer = [count for count in counts if largest.tokens or samples % count == 0]
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
    ZeRO-2 and ZeRO-3 (communication), their offloading (much slower). FSDP2 is kept where it is the run's own.
    """
    spread = sorted((s for s in STRATEGIES if s.option and s.deepspeed), key=lambda s: (s.offload, s.stage))
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
