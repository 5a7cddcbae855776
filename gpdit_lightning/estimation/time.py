"""Duration of an optimizer step on a cluster: computation, communication, and the update of the weights.

The communication of each strategy is a list of collectives (`traffic`). The duration of a collective is that of NCCL's
cost model (its src/graph/tuning.cc): the latencies of the messages that follow one another, and the bytes that pass the
slowest link. On GPUs communication runs beside computation, so that only the remainder is waited for (`step_time`).
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

from gpdit_lightning.errors import InputError
from gpdit_lightning.estimation.gpus import GPU, PCIE
from gpdit_lightning.estimation.memory import LIVE_PARAMETERS, REDUCE_BUCKET, parameter_count, parameters_of_block
from gpdit_lightning.estimation.requirements import RunSettings, step_flops

Collective = Literal["gather", "scatter", "reduce"]
"""`all_gather`, `reduce_scatter` or `all_reduce`."""
Phase = Literal["forward", "backward", "update"]
"""When a collective runs: with the forward or backward pass of each micro-batch, or with the update of the weights."""

DDP_BUCKET = 25 * 2**20  # bytes of gradients that DDP reduces at a time (torch's default of bucket_cap_mb)
# Bytes of float32 that an update moves per parameter: Adam reads weight, gradient and two moment estimates and writes
# all but the gradient; clipping reads the gradient for its norm, then reads and writes it; the average is read with the
# weight, and written.
UPDATE_BYTES = 28 + 12 + 12
MATRICES_OF_BLOCK = 6  # query, key and value, output, and two of the MLP, which ZeRO-3 gathers one after another
# Assumed: the share of the nominal bandwidth that is reached. Latencies of NCCL's cost model for large messages (its
# protocol Simple, in a ring).
EFFICIENCY, NODE_LATENCY, NETWORK_LATENCY = 0.8, 3.4e-6, 14e-6


class Link(NamedTuple):
    """A link of a device to others.

    Attributes:
        bytes_per_s: bandwidth in one direction.
        latency: seconds from sending a message to its arrival.
    """

    bytes_per_s: float
    latency: float


@dataclass(frozen=True)
class Cluster:
    """Nodes of several devices each."""

    flops_per_s: float
    """FLOP/s of the forward and backward passes on each device, recomputation not counted."""
    memory_bytes_per_s: float
    """Bytes per second that the update of the weights moves in the memory of a device."""
    node: Link
    """Link of each device to the others of its node."""
    network: Link
    """Link of each device to the network between the nodes."""
    node_devices: int = 8
    host_bytes_per_s: float = 32e9
    """Bytes per second between a device and host memory, and of updates in host memory, for offloading."""
    overlaps: bool = True
    """Whether communication runs beside computation, as on GPUs; CPU ranks compute and communicate in turn."""

    @classmethod
    def of_gpus(
        cls,
        gpu: GPU | None,
        flops_per_s: float,
        network_bytes_per_s: float,
        node_devices: int,
        includes_update: bool = False,
    ) -> Self:
        """Return a cluster of GPUs, whose links and memory have the assumed share of their nominal bandwidth.

        Args:
            gpu: figures of the GPUs; None if they are unknown: their link is then PCIe 4.0.
            flops_per_s: as the field.
            network_bytes_per_s: nominal bandwidth of the network of each GPU.
            node_devices: as the field.
            includes_update: whether `flops_per_s` is that of whole steps, so that the update takes no further time.
        """
        return cls(
            flops_per_s=flops_per_s,
            memory_bytes_per_s=math.inf if includes_update or gpu is None else EFFICIENCY * gpu.memory,
            node=Link(EFFICIENCY * (gpu.link if gpu else PCIE), NODE_LATENCY),
            network=Link(EFFICIENCY * network_bytes_per_s, NETWORK_LATENCY),
            node_devices=node_devices,
        )

    def seconds(self, collective: Collective, size: float, devices: int) -> float:
        """Return the duration of a collective.

        An all-gather or reduce-scatter of n devices in a ring has n - 1 messages in sequence, of which those between
        nodes take longest. An all-reduce is both, or a tree if that has less latency. Each device sends (n - 1) / n of
        the tensor, an all-reduce twice as much; a node sends over the links of all its devices at a time.

        Args:
            collective: its kind.
            size: bytes of the whole tensor.
            devices: n.
        """
        if devices == 1:
            return 0.0
        nodes = math.ceil(devices / self.node_devices)
        latency = (devices - nodes) * self.node.latency + (nodes - 1) * self.network.latency
        bandwidth = self.node.bytes_per_s
        if nodes > 1:
            bandwidth = min(bandwidth, self.node_devices * self.network.bytes_per_s)
        passes = 1
        if collective == "reduce":
            passes, within = 2, min(devices, self.node_devices) - 1
            tree = within * self.node.latency + math.ceil(math.log2(nodes)) * self.network.latency
            latency = 2 * min(latency, tree)
        return latency + passes * (devices - 1) / devices * size / bandwidth


class Traffic(NamedTuple):
    """Collectives of a phase.

    Attributes:
        phase: when they run.
        collective: their kind.
        size: bytes of the whole tensors together.
        calls: number of collectives.
        every_micro_batch: whether they run in each micro-batch, or in the last one of an optimizer step.
    """

    phase: Phase
    collective: Collective
    size: float
    calls: int
    every_micro_batch: bool = True

    def seconds(self, cluster: Cluster, devices: int) -> float:
        """Return the duration of the collectives, one after another."""
        return self.calls * cluster.seconds(self.collective, self.size / self.calls, devices)


def traffic(run: RunSettings) -> tuple[Traffic, ...]:
    """Return the communication of a run on several devices; norms and the meters of a run are too small to count."""
    if run.gpus == 1:
        return ()
    parameters, precision, layers = parameter_count(run.backbone), run.bytes_per_value.weight, run.backbone.layers
    gradients = float(run.reduced_bytes * parameters)
    if not run.strategy.stage:
        calls = math.ceil(4 * parameters / DDP_BUCKET)
        return (Traffic("backward", "reduce", gradients, calls, every_micro_batch=False),)
    if run.strategy.stage == 2:
        # DeepSpeed reduces whole buckets to all ranks, each of which keeps its part.
        calls = math.ceil(parameters / REDUCE_BUCKET)
        weights = Traffic("update", "gather", float(precision * parameters), calls, every_micro_batch=False)
        return Traffic("backward", "reduce", gradients, calls), weights
    gathered = float((2 if run.precision == "bf16-mixed" else 4) * parameters)
    if run.strategy.deepspeed:
        # Weights are not released if they are used again within as many parameters: those of the last blocks.
        again = max(0.0, 1 - LIVE_PARAMETERS / (2 * parameters))
        calls = layers * MATRICES_OF_BLOCK
        reduces = math.ceil(parameters / REDUCE_BUCKET)
    else:
        # The modules around the blocks stay gathered between the passes.
        again = layers * parameters_of_block(run.backbone) / parameters
        calls = reduces = layers + 1
    passes = [Traffic("forward", "gather", gathered, calls)]
    if again:
        passes.append(Traffic("backward", "gather", again * gathered, math.ceil(again * calls)))
    return (*passes, Traffic("backward", "scatter", gradients, reduces))


class StepTime(NamedTuple):
    """Seconds of an optimizer step, as the mean over the steps of alternating sources.

    Attributes:
        computation: seconds of the forward and backward passes.
        communication: seconds of all collectives.
        waiting: seconds of them that do not run beside computation.
        update: seconds of the update of the weights and of their average.
    """

    computation: float
    communication: float
    waiting: float
    update: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.computation + self.waiting + self.update


def step_time(run: RunSettings, cluster: Cluster) -> StepTime:
    """Return the duration of an optimizer step.

    With overlap, the collectives of a phase wait for what exceeds its computation, but at least for the first or last
    one of them: weights that the first block needs, or gradients that the last one computes.
    """
    computation = sum(step_flops(run).values()) / (run.gpus * cluster.flops_per_s)
    micro_batches = run.plan.micro_batches_per_step
    forward = (1 / 4 if run.backbone.activation_checkpointing else 1 / 3) * computation / micro_batches
    of_phase = {"forward": forward, "backward": computation / micro_batches - forward, "update": 0.0}
    communication = waiting = 0.0
    collectives = traffic(run)
    for phase, beside in of_phase.items():
        for every_micro_batch in (True, False):
            parts = [t for t in collectives if (t.phase, t.every_micro_batch) == (phase, every_micro_batch)]
            if not parts:
                continue
            seconds = [part.seconds(cluster, run.gpus) for part in parts]
            least = max(of_part / part.calls for of_part, part in zip(seconds, parts, strict=True))
            waited = max(least, sum(seconds) - beside) if cluster.overlaps else sum(seconds)
            repeated = micro_batches if every_micro_batch else 1
            communication += repeated * sum(seconds)
            waiting += repeated * waited
    return StepTime(computation, communication, waiting, _update_seconds(run, cluster))


def _update_seconds(run: RunSettings, cluster: Cluster) -> float:
    parameters = parameter_count(run.backbone) / (run.gpus if run.strategy.stage else 1)
    if not run.strategy.offload:
        return UPDATE_BYTES * parameters / cluster.memory_bytes_per_s
    transferred = (4 + run.bytes_per_value.weight) * parameters  # gradients to the host, weights back
    return (UPDATE_BYTES * parameters + transferred) / cluster.host_bytes_per_s


def scaled(run: RunSettings, devices: int) -> RunSettings:
    """Return the run on another number of devices with the same batch on each of them.

    Raises:
        InputError: the batches of the run cannot be divided among its devices.
    """
    sources = []
    for source in run.sources:
        config = source.config
        if config.tokens:
            changed = replace(config, tokens=config.tokens * devices // run.gpus)
        elif config.batch_size % run.gpus:
            raise InputError(f"{source.name}: a batch of {config.batch_size} cannot be divided among {run.gpus} GPUs.")
        else:
            changed = replace(config, batch_size=config.batch_size // run.gpus * devices)
        sources.append(replace(source, config=changed))
    return replace(run, gpus=devices, max_ranks=devices, sources=tuple(sources))
