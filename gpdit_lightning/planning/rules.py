"""The rules that choose model, batch, strategy and steps of a recipe; docs/scaling.md lists them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from gpdit_lightning.data.plan import PlannedSource
from gpdit_lightning.data.source import SourceConfig
from gpdit_lightning.devices import Machine
from gpdit_lightning.errors import InputError
from gpdit_lightning.estimation.gpus import find_gpu, peak_bf16_flops
from gpdit_lightning.estimation.loading import loaded_bytes
from gpdit_lightning.estimation.memory import STRATEGIES, ShardingStrategy, held_bytes, parameter_count
from gpdit_lightning.estimation.prepared import planned_source
from gpdit_lightning.estimation.requirements import (
    BYTES_OF_PRECISION,
    RunSettings,
    memory,
    nearest_that_fits,
)
from gpdit_lightning.estimation.time import Cluster, step_time
from gpdit_lightning.estimation.units import GIB
from gpdit_lightning.model import GPDiTConfig
from gpdit_lightning.model.config import CUSTOM_SIZE, SIZES
from gpdit_lightning.options.estimate import HardwareOptions
from gpdit_lightning.planning.training_data import TrainingData

# Sizes from small to large. B and H are those of GPDiT (Table 1), S and L those of DiT (arXiv:2212.09748, Table 1);
# tiny, mini and XL are ours.
LADDER: dict[str, dict[str, int]] = {
    "tiny": SIZES["tiny"],
    "mini": {"layers": 8, "width": 256, "mlp_width": 1024, "heads": 8},
    "S": {"layers": 12, "width": 384, "mlp_width": 1536, "heads": 6},
    "B": SIZES["B"],
    "L": {"layers": 24, "width": 1024, "mlp_width": 4096, "heads": 16},
    "XL": {"layers": 24, "width": 1792, "mlp_width": 7168, "heads": 14},
    "H": SIZES["H"],
}
# Learning rates: 1e-4 is that of the paper for B and H (section 5.1), 1e-3 that of recipes/size/tiny.yaml; between them
# interpolated in the logarithms of width and rate.
LEARNING_RATES = {"tiny": 1e-3, "mini": 6e-4, "S": 3e-4}
LEARNING_RATE = 1e-4

# The 9,537 training videos of UCF-101 have about 1.7 million frames, or 100,000 clips of 17 frames: 1.5 tokens per
# parameter of GPDiT-B at 1,280 tokens per clip. The paper's 400,000 steps of 96 clips are about 400 epochs of them.
TOKENS_PER_PARAMETER, MAX_EPOCHS, MAX_STEPS = 1.0, 400, 400_000
# Tokens with a loss that a model is trained on, for each parameter: GPDiT-H has 23 in the stages 1 and 2 of the paper,
# and 20 are compute-optimal for language models (arXiv:2203.15556).
TRAINED_TOKENS_PER_PARAMETER = 20
# Samples per optimizer step: those of stage 2 in the paper.
BATCH_SIZES = {"images": 256, "videos": 64}
# Factors of these batch sizes, each with the least number of steps that a run with it must have; the largest factor
# whose run has them is used. Stages 1 and 2 of the paper have 200,000 steps.
WANTED_STEPS = {8: 200_000, 4: 200_000, 2: 200_000, 1: 10_000, 1 / 2: 10_000, 1 / 4: 10_000, 1 / 8: 0}
# Latent frames of the shortest clips in the paper's stage 3: 17 pixel frames.
SHORTEST_CLIP = 5
# The fraction of the hours in which steps are trained; the rest is for validation, previews and checkpoints.
TRAINING_FRACTION = 0.9
# A run of at most this duration uses one GPU.
SHORT_RUN_SECONDS = 3600
# The fraction of the memory that a recipe may use by the estimate, which agrees with measurements to 8 %. A CPU and MPS
# share their memory with other processes.
MEMORY_FRACTION = {"cuda": 0.9, "mps": 0.75, "cpu": 0.75}
# The fraction of the memory of a GPU that weights, gradients, optimizer state and average may take without sharding.
UNSHARDED_FRACTION = 0.5
MAX_WORKERS = 4  # loader processes per GPU, as in recipes/base.yaml
ASSUMED = HardwareOptions()  # of GPUs whose peak is known: their utilization, and the network between nodes
# Assumed FLOP/s of training where no peak is known: of each core of a CPU (recipes/size/tiny.yaml reaches 28 to 48
# GFLOP/s per core), of a GPU with bf16, and of a GPU without it.
CORE_FLOPS, BF16_FLOPS, FLOAT32_FLOPS = 40e9, 20e12, 4e12


class Goal(NamedTuple):
    """What a user requests of a plan.

    Attributes:
        hours: maximum duration of the training.
        size: name of the backbone's size in `LADDER`; None for the size that the rules choose.
    """

    hours: float
    size: str | None = None


class Speed(NamedTuple):
    """The speed of training.

    Attributes:
        cluster: the devices, with their FLOP/s in whole steps without communication.
        is_measured: whether these were measured; else they are expected.
        trial_failure: why a trial gave no measurement; empty if it gave one, or if there was no trial.
    """

    cluster: Cluster
    is_measured: bool
    trial_failure: str = ""


@dataclass(frozen=True)
class Choice:
    """The choices of a plan."""

    data: TrainingData
    machine: Machine
    goal: Goal
    size: str
    run: RunSettings
    """Backbone, batch, micro-batches, strategy, precision and steps."""
    speed: Speed
    is_bounded_by_time: bool
    """Whether the hours determine the number of steps; else the data do."""
    larger_size: str = ""
    """The next larger size and why it is not used; empty for the largest size and for a requested one."""

    @property
    def seconds_per_step(self) -> float:
        """The duration of an optimizer step, as the mean over the steps."""
        return step_time(self.run, self.speed.cluster).total

    @property
    def seconds(self) -> float:
        """The duration of all steps."""
        return self.run.max_steps * self.seconds_per_step

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return parameter_count(self.run.backbone)

    @property
    def memory(self) -> dict[str, int]:
        """The bytes on each device by part, and their total."""
        return memory(self.run)

    @property
    def epochs(self) -> dict[str, float]:
        """How often a sample of each source is used."""
        shares = zip(self.run.sources, self.run.plan.step_shares, strict=True)
        return {
            source.name: self.run.max_steps * float(share) * source.config.batch_size / samples_of(source)
            for source, share in shares
        }

    @property
    def trained_tokens(self) -> float:
        """The number of tokens with a loss over the whole run."""
        return self.run.max_steps * tokens_per_step(self.run)


def memory_limit(machine: Machine) -> float:
    """Return the bytes of each device that a recipe may use."""
    return MEMORY_FRACTION[machine.accelerator] * machine.memory


def expected_flops_per_s(machine: Machine) -> float:
    """Return the FLOP/s that training is expected to achieve on each device of a machine."""
    if machine.accelerator == "cpu":
        return CORE_FLOPS * machine.cores
    if (peak := known_peak(machine)) is not None:
        return ASSUMED.mfu * peak
    return BF16_FLOPS if machine.bf16 else FLOAT32_FLOPS


def cluster_of(machine: Machine, flops_per_s: float) -> Cluster:
    """Return the devices of a machine at a speed of whole steps, with the network that `estimate` assumes."""
    network, per_node = ASSUMED.network * 1e9, ASSUMED.gpus_per_node
    return Cluster.of_gpus(find_gpu(machine.name), flops_per_s, network, per_node, includes_update=True)


def known_peak(machine: Machine) -> float | None:
    """Return the peak FLOP/s of a device in bf16; None if it is unknown, or if the device does not train in bf16."""
    return peak_bf16_flops(machine.name) if machine.bf16 else None


def choose(data: TrainingData, machine: Machine, goal: Goal, flops_per_s: float | None = None) -> Choice:
    """Choose the recipe of a training.

    Args:
        data: the prepared data.
        machine: the devices.
        goal: what the user requests.
        flops_per_s: FLOP/s that training achieves on each device, if it was measured.

    Raises:
        InputError: the requested size, or the smallest one, does not fit.
    """
    speed = Speed(cluster_of(machine, flops_per_s or expected_flops_per_s(machine)), flops_per_s is not None)
    if goal.size:
        requested = settle(data, machine, goal, goal.size, speed)
        if requested is None:
            raise does_not_fit(machine, goal.size, "choose a smaller --size")
        return requested
    smallest, *larger = LADDER
    obstacle = ""
    for size in reversed(larger):
        parameters = parameter_count(backbone_of(data, size))
        if parameters > data.tokens / TOKENS_PER_PARAMETER:
            tokens = count_text(data.tokens)
            has = f"has {count_text(parameters)} parameters, more than the data have tokens ({tokens})"
            obstacle = f"{size_text(size)} {has}"
            continue
        choice = settle(data, machine, goal, size, speed)
        if choice is None:
            obstacle = f"{size_text(size)} does not fit into {memory_limit(machine) / GIB:.3g} GiB without offloading"
        elif choice.trained_tokens < (least := TRAINED_TOKENS_PER_PARAMETER) * parameters:
            trained = choice.trained_tokens / parameters
            obstacle = f"{size_text(size)} would have {trained:.2g} of them in {goal.hours:g} hours, fewer than {least}"
        else:
            return replace(choice, larger_size=obstacle)
    choice = settle(data, machine, goal, smallest, speed)
    if choice is None:
        raise does_not_fit(machine, smallest, "use a machine with more memory, or prepare smaller frames")
    return replace(choice, larger_size=obstacle)


def size_text(size: str) -> str:
    """Return the name of a size; for one that a recipe cannot name, also how to get it."""
    if size in SIZES:
        return size
    fields = ", ".join(f"{name} {value}" for name, value in LADDER[size].items())
    return f"{size} (`plan --size {size}`: {fields})"


def does_not_fit(machine: Machine, size: str, cure: str) -> InputError:
    """Return the error for a size of the backbone that does not fit."""
    limit = f"{memory_limit(machine) / GIB:.3g} GiB"
    return InputError(
        f"a backbone of size {size} does not fit into {limit}, the part of the memory of {machine.name} that a recipe "
        f"may use: {cure}."
    )


def backbone_of(data: TrainingData, size: str) -> GPDiTConfig:
    """Return the architecture of a size for the latents and labels of the data."""
    return GPDiTConfig.preset(
        size if size in SIZES else CUSTOM_SIZE,
        **LADDER[size],
        latent_channels=data.codec.latent_channels,
        patch_size=data.patch_size,
        classes=data.classes,
    )


def settle(data: TrainingData, machine: Machine, goal: Goal, size: str, speed: Speed) -> Choice | None:
    """Choose everything for a size of the backbone; return None if it does not fit.

    One GPU is used if that training takes at most an hour.
    """
    choice = None
    for devices in dict.fromkeys((1, machine.devices)):
        for factor, wanted_steps in WANTED_STEPS.items():
            run = fitting_run(data, machine, goal, size, devices, factor)
            if run is None:
                break
            run, is_bounded_by_time = with_steps(run, goal, speed.cluster)
            choice = Choice(data, machine, goal, size, run, speed, is_bounded_by_time)
            if run.max_steps >= wanted_steps:
                break
        if choice is not None and not choice.is_bounded_by_time and choice.seconds <= SHORT_RUN_SECONDS:
            return choice
    return choice


def fitting_run(
    data: TrainingData, machine: Machine, goal: Goal, size: str, devices: int, factor: float
) -> RunSettings | None:
    """Return the settings of a run that fits into the memory; None if there are none.

    Weights are offloaded to host memory only if the user requests the size, since that is much slower.
    """
    backbone = backbone_of(data, size)
    precision = "bf16-mixed" if machine.bf16 else "32-true"
    run = RunSettings(
        backbone=backbone,
        precision=precision,
        strategy=unsharded_or_zero(backbone, precision, devices, machine.memory),
        gpus=devices,
        max_ranks=devices,
        context_dropout=0.1,
        noise_draws=1,
        max_steps=1,
        sources=tuple(sources_of(data, backbone, devices, factor)),
        sampling="alternate" if len(data.samples) > 1 else "joint",
    )
    fitting = nearest_that_fits(run, memory_limit(machine))
    if fitting is None or (fitting.strategy.offload and not fits_offloaded(fitting, machine, goal)):
        return None
    return fitting


def fits_offloaded(run: RunSettings, machine: Machine, goal: Goal) -> bool:
    """Return whether a run with offloading is requested, and fits into half of the host memory."""
    if goal.size is None or machine.accelerator != "cuda":
        return False
    return memory(run)["host_memory"] * run.gpus <= machine.host_memory / 2


def unsharded_or_zero(backbone: GPDiTConfig, precision: str, devices: int, capacity: int) -> ShardingStrategy:
    """Return DDP if the persistent tensors take at most half of the memory of a GPU, or on one device; else ZeRO-2."""
    by_option = {strategy.option: strategy for strategy in STRATEGIES}
    held = held_bytes(backbone, by_option["auto"], BYTES_OF_PRECISION[precision], devices)
    is_small = sum(held.values()) <= UNSHARDED_FRACTION * capacity
    return by_option["auto" if devices == 1 or is_small else "zero2"]


def sources_of(data: TrainingData, backbone: GPDiTConfig, devices: int, factor: float) -> Iterator[PlannedSource]:
    """Yield the sources, with batches that can be divided among the devices.

    Args:
        data: the prepared data.
        backbone: architecture.
        devices: number of devices.
        factor: of the batch sizes.
    """
    least = min((SHORTEST_CLIP, *data.lengths))
    for name, samples in data.samples.items():
        config = SourceConfig(
            manifests=list(data.folders),
            batch_size=math.ceil(BATCH_SIZES[name] * factor / devices) * devices,
            frames=data.lengths[-1] if name == "videos" else 0,
            least_frames=least if name == "videos" and least < data.lengths[-1] else 0,
        )
        yield planned_source(name, samples, config, backbone)


def with_steps(run: RunSettings, goal: Goal, cluster: Cluster) -> tuple[RunSettings, bool]:
    """Return a run with its number of steps, and whether the hours bound it.

    Sources have equally many steps, unless the epochs of one are exhausted: the other then has the remaining time.
    """
    seconds = {source.name: step_time(replace(run, sources=(source,)), cluster).total for source in run.sources}
    limits = {s.name: MAX_EPOCHS * samples_of(s) / s.config.batch_size for s in run.sources}
    budget = TRAINING_FRACTION * goal.hours * 3600
    equal = min(budget / sum(seconds.values()), MAX_STEPS / len(seconds))
    steps = {name: min(equal, limit) for name, limit in limits.items()}
    for name, limit in limits.items():
        others = [other for other in steps if other != name]
        left = (budget - sum(steps[other] * seconds[other] for other in others)) / seconds[name]
        steps[name] = min(limit, left, MAX_STEPS - sum(steps[other] for other in others))
    total = max(1, rounded_down(sum(steps.values()), 2))
    largest = max(steps.values())
    sources = tuple(
        replace(source, config=replace(source.config, weight=float(f"{steps[source.name] / largest:.3g}")))
        for source in run.sources
    )
    is_bounded_by_time = any(steps[name] < limits[name] for name in steps) and sum(steps.values()) < MAX_STEPS
    return replace(run, sources=sources, max_steps=total), is_bounded_by_time


def tokens_per_step(run: RunSettings) -> float:
    """Return the number of tokens with a loss in an optimizer step, as the mean over the steps."""
    total = 0.0
    for source, share in zip(run.sources, run.plan.step_shares, strict=True):
        for shape in run.micro_batch_shapes(source):
            clips = shape.fraction * source.config.micro_batches * shape.samples
            total += float(share) * clips * shape.frames * shape.height * shape.width / source.patch_size**2
    return total


def samples_of(source: PlannedSource) -> int:
    """Return the number of training samples of a source."""
    return sum(sum(bucket.counts) for bucket in source.buckets)


def rounded_down(number: float, digits: int) -> int:
    """Return a number, rounded down to an integer of at most `digits` significant digits."""
    unit = 10 ** max(0, len(str(int(number))) - digits)
    return int(number) // unit * unit


def count_text(number: float) -> str:
    """Return a number with a unit: 1.8M."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"


def loader_workers(run: RunSettings, machine: Machine) -> int:
    """Return the number of loader processes per device: none on a CPU, which trains with all cores.

    On GPUs at most four, with a core left for the training process, and with batches in at most a quarter of the host
    memory.
    """
    if machine.accelerator == "cpu":
        return 0
    most = min(MAX_WORKERS, machine.cores // run.gpus - 1)
    held = machine.host_memory / 4 / run.gpus
    return next((number for number in range(most, 0, -1) if loaded_bytes(run, number) <= held), 0)
