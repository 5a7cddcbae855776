"""The attention backend of a training run: for `auto` on CUDA, the fastest at the shapes of the run.

Rank 0 times the built-in backends on random inputs before the model is built, all ranks use its choice, and the run
folder keeps it in `attention.json`, so that a resumed run computes by the same backend.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from lightning import Trainer

from gpdit_lightning.data.datamodule import LatentDataModule
from gpdit_lightning.estimation.flops import PassShape, attention_pairs
from gpdit_lightning.files import atomic_write
from gpdit_lightning.model import GPDiTConfig
from gpdit_lightning.model.attention import AttentionPlan
from gpdit_lightning.model.attention.backends import AUTO, BACKENDS, BUILT_IN, announce, built_in_failure
from gpdit_lightning.model.attention.sdpa import restore_flash
from gpdit_lightning.model.attention.trial import Measurement, measure
from gpdit_lightning.model.layout import count_blocks
from gpdit_lightning.regular_files import read_bounded
from gpdit_lightning.schema import TEXT, check, one_of, parse_json

RECORD = "attention.json"
CURE = "delete the file to time the backends again"
MAX_RECORD_BYTES = 2**20
FIRST_MICRO_BATCHES = 64
"""Number of micro-batches from whose shapes those of the trial are chosen."""
MAX_SHAPES = 3
"""Shapes of micro-batches, those with most work in attention, at which backends are timed."""
MAX_EXTRA_MEMORY = 0.1
"""Fraction of the device's memory that a backend may take beyond that which takes least."""


def choose_backend(
    trainer: Trainer, data: LatentDataModule, config: GPDiTConfig, dtype: torch.dtype, clean_stream_only: bool
) -> str:
    """Return the `attention_backend` of a run: that of its configuration, unless it is `auto` on CUDA.

    Args:
        trainer: the trainer, in whose run folder the choice is kept.
        data: the data of the run, whose plan has the shapes of micro-batches.
        config: the architecture.
        dtype: precision of attention.
        clean_stream_only: whether the clips pass through the clean stream alone.

    Raises:
        InputError: the record in the run folder is not one.
    """
    device = trainer.strategy.root_device
    if config.attention_backend != AUTO or device.type != "cuda":
        return config.attention_backend
    choice = ""
    if trainer.is_global_zero:
        shapes = first_shapes(data, config, trainer.world_size, clean_stream_only)
        memory = torch.cuda.get_device_properties(device).total_memory
        record = Path(trainer.default_root_dir) / RECORD
        choice = recorded_or_fastest(record, config, shapes, device, dtype, memory)
    return trainer.strategy.broadcast(choice)


def first_shapes(
    data: LatentDataModule, config: GPDiTConfig, world_size: int, clean_stream_only: bool
) -> Counter[PassShape]:
    """Return how often each shape occurs in the first micro-batches of the first rank."""
    shapes: Counter[PassShape] = Counter()
    for number in range(FIRST_MICRO_BATCHES):
        micro_batch = data.plan.micro_batch(number).share(0, world_size)
        source = data.plan.sources[micro_batch.source]
        bucket, frames, clips = source.buckets[micro_batch.bucket], micro_batch.frames, len(micro_batch.samples)
        size = frames, bucket.height, bucket.width
        if clean_stream_only:
            shapes[PassShape(clips, clips, *size, noisy_frames=())] += 1
            continue
        one_block = count_blocks(config, range(frames), *size[1:]) == 1
        draws, context = 1 if one_block else data.noise_draws, int(micro_batch.context.sum())
        shapes[PassShape(clips, context, *size, draws, source.config.noisy_frames(frames))] += 1
    return shapes


def recorded_or_fastest(
    record: Path,
    config: GPDiTConfig,
    shapes: Mapping[PassShape, int],
    device: torch.device,
    dtype: torch.dtype,
    memory_bytes: int,
) -> str:
    """Return the recorded backend, if it can be used; else time the backends and record the fastest.

    Args:
        record: path of the record.
        config, dtype: as for :func:`choose_backend`.
        shapes: how often each shape of a micro-batch occurs.
        device: the device.
        memory_bytes: its memory.

    Raises:
        InputError: the record is not one.
    """
    failed = ""
    if record.exists():
        content = parse_json(read_bounded(record, MAX_RECORD_BYTES), str(record), CURE)
        check(content, {"backend": one_of(*BUILT_IN), "kernel": TEXT}, "", str(record), CURE)
        name = content["backend"]
        reason = built_in_failure(name, device.type, dtype, config.head_width, gradient=True)
        if reason is None:
            announce(name, f"as before in this run; {content['kernel']}")
            return name
        failed = f"; {name}, as before in this run, cannot be used: {reason}"
    shapes = most_work(config, shapes)
    plans = layer_plans(config, shapes)
    measured = {
        name: measure(BACKENDS[name], plans, config.heads, config.head_width, device, dtype) for name in BUILT_IN
    }
    restore_flash()
    layers = 1 if config.activation_checkpointing else config.layers  # whose saved tensors exist at a time
    measured = without_large(measured, MAX_EXTRA_MEMORY * memory_bytes / layers)
    times = {name: result.milliseconds for name, result in measured.items() if result.milliseconds is not None}
    fastest = min(times, key=lambda name: times[name], default="sdpa")
    with atomic_write(record) as path:
        results = {name: asdict(result) for name, result in measured.items()}
        content = {"backend": fastest, "kernel": measured[fastest].kernel, "measured": results}
        path.write_text(json.dumps(content, indent=2) + "\n")
    micro_batches = sum(shapes.values())
    compared = ", ".join(
        f"{name} {time / micro_batches:.2f} ms" for name, time in sorted(times.items(), key=lambda x: x[1])
    )
    skipped = "; ".join(f"{name}: {result.reason}" for name, result in measured.items() if result.reason)
    announce(
        fastest,
        f"the fastest at the shapes of this run; {measured[fastest].kernel}; attention of a micro-batch: {compared}"
        + (f"; not used: {skipped}" if skipped else "")
        + failed,
    )
    return fastest


def most_work(config: GPDiTConfig, shapes: Mapping[PassShape, int]) -> dict[PassShape, int]:
    """Return the few shapes with most work in attention, and how often each occurs."""
    work = {shape: count * sum(attention_pairs(config, shape)) for shape, count in shapes.items()}
    return {shape: shapes[shape] for shape in sorted(work, key=lambda shape: work[shape], reverse=True)[:MAX_SHAPES]}


def layer_plans(config: GPDiTConfig, shapes: Mapping[PassShape, int]) -> dict[AttentionPlan, float]:
    """Return how often each plan is computed in passes of the given shapes, each of which occurs so often."""
    plans: dict[AttentionPlan, float] = {}
    for shape, count in shapes.items():
        planned = shape.plans(config)
        last = planned.noisy_queries if shape.noisy else planned.all_queries
        counts = [(planned.all_queries, config.layers - 1), (last, 1), (planned.within_frames, config.layers)]
        for plan, layers in counts:
            if plan is not None and layers:
                plans[plan] = plans.get(plan, 0.0) + layers * count
    return plans


def without_large(measured: Mapping[str, Measurement], most_extra: float) -> dict[str, Measurement]:
    """Return the measurements; those of backends that save too much for the backward pass become failures.

    Args:
        measured: measurements by backend.
        most_extra: bytes per layer that a backend may save beyond the one that saves least.
    """
    least = min((result.saved_bytes for result in measured.values() if not result.reason), default=0)
    kept = {}
    for name, result in measured.items():
        extra = result.saved_bytes - least
        too_large = not result.reason and extra > most_extra
        reason = f"it saves {extra / 2**20:.0f} MiB more per layer than the others"
        kept[name] = Measurement(reason=reason) if too_large else result
    return kept
