"""Durations of collectives and of optimizer steps, against numbers by hand."""

from dataclasses import replace

import pytest

from gpdit_lightning.data.source import SourceConfig
from gpdit_lightning.estimation.memory import STRATEGIES, ShardingStrategy, parameter_count
from gpdit_lightning.estimation.requirements import step_flops
from gpdit_lightning.estimation.time import UPDATE_BYTES, Cluster, Collective, Link, scaled, step_time, traffic
from tests.estimation.test_requirements import H

CLUSTER = Cluster(1e15, 1e12, node=Link(100e9, 1e-6), network=Link(10e9, 10e-6), node_devices=4)


@pytest.mark.parametrize(
    ("collective", "devices", "messages", "sent", "bandwidth"),
    [
        ("gather", 1, 0, 0, 1),
        ("gather", 4, 3e-6, 3 / 4, 100e9),
        ("scatter", 8, 6e-6 + 10e-6, 7 / 8, 40e9),  # two nodes: a message between them, and four ports at a time
        ("reduce", 2, 2e-6, 1, 100e9),
        ("reduce", 64, 2 * (3e-6 + 4 * 10e-6), 2 * 63 / 64, 40e9),  # a tree over sixteen nodes
    ],
)
def test_duration_of_a_collective(
    collective: Collective, devices: int, messages: float, sent: float, bandwidth: float
) -> None:
    assert CLUSTER.seconds(collective, 1e9, devices) == pytest.approx(messages + sent * 1e9 / bandwidth, rel=1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.option)
def test_a_step_is_computation_communication_and_update(strategy: ShardingStrategy) -> None:
    run = replace(H, strategy=strategy, gpus=16)
    compute = sum(step_flops(run).values()) / (16 * 1e15)
    in_turn = step_time(run, replace(CLUSTER, overlaps=False))
    expected = sum(part.seconds(CLUSTER, 16) for part in traffic(run))  # one micro-batch
    assert in_turn.waiting == in_turn.communication == pytest.approx(expected)
    assert in_turn.computation == pytest.approx(compute)
    beside = step_time(run, CLUSTER)
    assert max(0.0, expected - compute) <= beside.waiting * (1 + 1e-9) <= expected * (1 + 2e-9)
    in_bf16 = {part: part.size for part in traffic(replace(run, reduced_bytes=2)) if part.collective != "gather"}
    gradients = {part: part.size for part in traffic(run) if part.collective != "gather"}
    assert 2 * sum(in_bf16.values()) == sum(gradients.values())
    alone = step_time(replace(run, gpus=1), CLUSTER)
    assert alone.communication == alone.waiting == 0
    if not run.strategy.stage:
        assert beside.update == pytest.approx(UPDATE_BYTES * parameter_count(run.backbone) / 1e12)
    elif not run.strategy.offload:
        assert beside.update == pytest.approx(alone.update / 16)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.option)
def test_accumulation_repeats_the_communication_of_sharded_runs(strategy: ShardingStrategy) -> None:
    """DDP reduces the gradients of all micro-batches at once, and ZeRO-2 gathers the weights once."""
    run = replace(H, strategy=strategy, gpus=16, max_ranks=16)
    sources = tuple(replace(source, config=replace(source.config, micro_batches=4)) for source in run.sources)
    once, four_times = (step_time(r, CLUSTER).communication for r in (run, replace(run, sources=sources)))
    repeated = sum(part.seconds(CLUSTER, 16) for part in traffic(run) if part.every_micro_batch)
    assert four_times - once == pytest.approx(3 * repeated, abs=1e-9)
    assert bool(repeated) == bool(strategy.stage)


def test_the_batch_of_each_gpu_is_kept_when_a_run_is_scaled() -> None:
    run = replace(H, gpus=8, max_ranks=8)
    large = scaled(run, 1024)
    assert (large.gpus, large.sources[0].config.batch_size) == (1024, 64 * 128)
    assert sum(step_flops(large).values()) == pytest.approx(128 * sum(step_flops(run).values()))
    steps = [step_time(scaled(run, devices), CLUSTER).total for devices in (8, 64, 512, 1024)]
    assert steps == sorted(steps)
    of_tokens = replace(run, sources=(replace(run.sources[0], config=SourceConfig(tokens=8 * 1200)),))
    assert scaled(of_tokens, 16).sources[0].config.tokens == 16 * 1200
