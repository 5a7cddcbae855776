"""`estimate`: compute parameters, memory, FLOPs and duration of a training recipe without running it."""

from collections.abc import Sequence
from dataclasses import replace

from gpdit_lightning.cli.estimated_recipe import EstimatedRecipe, read_recipe
from gpdit_lightning.cli.measured_cluster import measured_cluster
from gpdit_lightning.errors import InputError
from gpdit_lightning.estimation.gpus import GPU, GPUS, find_gpu
from gpdit_lightning.estimation.loading import loaded_bytes, shared_memory_bytes
from gpdit_lightning.estimation.memory import STRATEGIES, ShardingStrategy, parameter_count
from gpdit_lightning.estimation.requirements import (
    ALLOWANCE,
    RunSettings,
    least_gpus_that_fit,
    memory,
    nearest_that_fits,
    overrides,
    source_flops,
    step_flops,
)
from gpdit_lightning.estimation.saving import SavingSpeeds, saving_costs
from gpdit_lightning.estimation.time import Cluster, StepTime, scaled, step_time
from gpdit_lightning.estimation.units import GIB, MIB, duration, flops, in_unit
from gpdit_lightning.options.estimate import EstimateOptions, HardwareOptions

OTHER_ACCELERATORS = ("cpu", "mps")  # whose peak FLOP/s are unknown
MEMORY_PARTS = ("weights", "gradients", "optimizer", "average", "buffers", "step")  # columns of the table


def estimate(options: EstimateOptions) -> None:
    """Print the estimate.

    Raises:
        InputError: the recipe or an option cannot be used.
    """
    sizes = {"images": options.image_sizes, "videos": options.video_sizes, "sequences": options.sequence_sizes}
    recipe = read_recipe(options.fit_arguments, options.gpus, sizes, options.codec)
    if options.measure:
        cluster = measured_cluster(options.fit_arguments, recipe.run, options.gpus_per_node, options.network * 1e9)
    else:
        cluster = described_cluster(options)
    speed = f"{cluster.flops_per_s / 1e12:.3g} TFLOP/s"
    if not (options.measure or options.tflops):
        gpu = known_gpu(options.gpu)
        peak = f"{gpu.flops / 1e12:.0f} TFLOP/s ({gpu.name} in dense bf16; --measure uses this machine's speed)"
        speed = f"{options.mfu:.0%} of {peak}"
        if recipe.accelerator in OTHER_ACCELERATORS:
            print(
                f"trainer.accelerator is {recipe.accelerator}, but this estimate is for GPUs of the model {gpu.name} "
                "(--gpu): --measure computes it for this machine.\n"
            )
    print(report(recipe, options.gpu_memory * GIB, cluster, speed))
    if options.scaling:
        print(f"\n{scaling_table(recipe.run, cluster, options.scaling)}")


def described_cluster(options: HardwareOptions) -> Cluster:
    """Return the cluster that the options describe.

    Raises:
        InputError: the model of GPU is unknown, and no speed is given.
    """
    gpu = find_gpu(options.gpu) if options.tflops else known_gpu(options.gpu)
    speed = options.tflops * 1e12 if options.tflops else known_gpu(options.gpu).flops * options.mfu
    network, includes_update = options.network * 1e9, options.tflops is not None
    return Cluster.of_gpus(gpu, speed, network, options.gpus_per_node, includes_update)


def known_gpu(name: str) -> GPU:
    """Return the figures of a model of GPU.

    Raises:
        InputError: it is unknown.
    """
    gpu = find_gpu(name)
    if gpu is None:
        known = ", ".join(gpu.name for gpu in GPUS)
        raise InputError(f"--gpu is {name}, whose peak FLOP/s are unknown: give one of {known}.")
    return gpu


def report(recipe: EstimatedRecipe, capacity: float, cluster: Cluster, speed: str) -> str:
    """Return the estimate as text.

    Args:
        recipe: to estimate.
        capacity: memory of a GPU in bytes.
        cluster: on which the recipe runs.
        speed: that of its devices, as text.
    """
    run = recipe.run
    sections = (
        model_and_data(recipe),
        memory_table(run, capacity),
        what_fits(run, capacity),
        compute(run, cluster, speed),
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
        steps = f", in {float(100 * share):.3g}% of the steps" if share < 1 else ""
        lines.append(
            f"{source.name}: {batch} per step{steps}, {clips} per micro-batch and GPU, latent frames {lengths}, "
            f"{', '.join(sorted(sizes))} ({'assumed' if source.name in recipe.assumed else 'as prepared'})"
        )
    return "\n".join([*lines, *loading(run, recipe.workers)])


def loading(run: RunSettings, workers: int) -> list[str]:
    """Return a line on the memory of the loader processes; none if there are none."""
    if not workers:
        return []
    needed, shared = (
        f"{in_unit(size, MIB)} MiB" for size in (loaded_bytes(run, workers), shared_memory_bytes(workers))
    )
    return [
        f"loading: {workers} processes per GPU hold {needed} of batches in host memory; they need {shared} of shared "
        "memory (/dev/shm)"
    ]


def saving(run: RunSettings) -> str:
    """Return sentences on the size of a checkpoint, and on how long it stalls the training."""
    costs, speeds = saving_costs(run.backbone, run.strategy, run.gpus), SavingSpeeds()
    size = f"A checkpoint has {in_unit(costs.bytes)} GiB"
    at = f"{speeds.copy / 1e9:g} GB/s to host memory, {speeds.digest / 1e9:g} GB/s of sha256"
    at += f" and {speeds.disk / 1e9:g} GB/s to disk (assumed)"
    if not costs.copied:
        return f"{size}. At {at} it stalls the training for {duration(costs.stall)}."
    return (
        f"{size}; each rank holds a copy of its part, {in_unit(costs.copied)} GiB of host memory.\n"
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
    row = "".join(in_unit(column).rjust(14) for column in columns)
    fits = [needed["total"] <= capacity for needed in (stored, recomputed)]
    verdict = "fits" if fits[0] else "fits checkpointed" if fits[1] else "does not fit"
    host_memory = f", {in_unit(stored['host_memory'])} GiB of host memory" if strategy.offload else ""
    return f"{'>' if strategy == run.strategy else ' '} {strategy.name:<17}{row}  {verdict}{host_memory}"


def what_fits(run: RunSettings, capacity: float) -> str:
    """Return sentences on whether the recipe fits, and if not, on the nearest settings that do."""
    total = memory(run)["total"]
    needed = f"needs {in_unit(total)} of {capacity / GIB:.0f} GiB"
    if total <= capacity:
        return f"The recipe fits: it {needed}, which leaves {in_unit(capacity - total)} GiB."
    nearest, more_gpus = nearest_that_fits(run, capacity), least_gpus_that_fit(run, capacity)
    lines = [f"The recipe does not fit: it {needed}."]
    if nearest is not None:
        parts = memory(nearest)
        host_memory = f" and {in_unit(parts['host_memory'])} GiB of host memory" if nearest.strategy.offload else ""
        lines.append(f"The nearest setting that fits, with {in_unit(parts['total'])} GiB{host_memory}:")
        lines.append(f"  {overrides(run, nearest)}")
    if more_gpus is not None and more_gpus != nearest:
        lines.append(
            f"Without offloading, with {in_unit(memory(more_gpus)['total'])} GiB on each of {more_gpus.gpus} GPUs:"
        )
        lines.append(f"  {overrides(run, more_gpus)}")
    if nearest is None:
        lines.append("No setting makes it fit: use a GPU with more memory or a smaller backbone.")
    return "\n".join(lines)


def compute(run: RunSettings, cluster: Cluster, speed: str) -> str:
    """Return sentences on the FLOPs of an optimizer step by part, and on the duration of a step and of the run.

    They are means over the steps if the sources alternate.
    """
    parts = step_flops(run)
    total = sum(parts.values())
    of_sources = [f"{source.name}: {flops(sum(source_flops(run, source).values()))}" for source in run.sources]
    average = f" on average ({', '.join(of_sources)})" if min(run.plan.step_shares) < 1 else ""
    step = step_time(run, cluster)
    recomputed = ", and a third more to recompute activations" if run.backbone.activation_checkpointing else ""
    shares = ", ".join(f"{name.replace('_', ' ')} {count / total:.1%}" for name, count in parts.items())
    run_time = f", and {run.max_steps:,} steps {duration(run.max_steps * step.total)}" if run.max_steps > 0 else ""
    return (
        f"An optimizer step takes {flops(total)}{average}, {flops(total / run.gpus)} per GPU{recomputed}:\n"
        f"  {shares}\n"
        f"At {speed} a step takes {duration(step.total)}{run_time}:\n"
        f"  {parts_of_step(run, step)}"
    )


def parts_of_step(run: RunSettings, step: StepTime) -> str:
    """Return the parts of the duration of a step as text."""
    parts = [f"computation {duration(step.computation)}"]
    if run.gpus > 1:
        parts.append(f"waiting for communication {duration(step.waiting)} (of {duration(step.communication)})")
    return ", ".join([*parts, f"update of the weights {duration(step.update)}"])


def scaling_table(run: RunSettings, cluster: Cluster, numbers: Sequence[int]) -> str:
    """Return a table of the duration of a step on some numbers of GPUs, with the same batch on each GPU.

    The efficiency is the speed of a GPU relative to one GPU that need not communicate.
    """
    lines = ["GPUs".rjust(8) + "".join(name.rjust(14) for name in ("step", "waiting", "efficiency", "all steps"))]
    for devices in numbers:
        of_run = scaled(run, devices)
        step = step_time(of_run, cluster)
        alone = step.computation + step.update
        columns = (
            duration(step.total),
            duration(step.waiting),
            f"{alone / step.total:.0%}",
            duration(run.max_steps * step.total) if run.max_steps > 0 else "",
        )
        lines.append(f"{devices:8,}" + "".join(column.rjust(14) for column in columns))
    return "\n".join(["With the batch of each GPU unchanged:", *lines])
