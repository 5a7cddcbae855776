"""Streams of samples and sequences of buckets, against sequential reference implementations."""

from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import count as counting
from itertools import islice

import numpy as np
import pytest

from gpdit_lightning.data import order as order_module
from gpdit_lightning.data.order import BucketOrder, SourceOrder

SHARDS = [(7,), (1, 1, 1), (5, 3, 8, 2, 6, 4), (3,) * 40, (50, 1, 1, 20)]


def bucket_order(shards: Sequence[int], sizes: Sequence[int] = (1,), window: int = 10, seed: int = 0) -> BucketOrder:
    return BucketOrder(seed, 0, shards, sizes, window)


def source_order(counts: Sequence[int], sizes: Sequence[int]) -> SourceOrder:
    """Return the order of a source whose buckets have one shard each."""
    buckets = [BucketOrder(3, bucket_id, (count,), sizes, 10**6) for bucket_id, count in enumerate(counts)]
    return SourceOrder(3, 1, buckets)


def reference_windows(order: BucketOrder, shards: Sequence[int]) -> Iterator[list[int]]:
    """Yield the shards of each window: a shard belongs to the window in which it starts."""
    samples, number = sum(shards), 1
    while samples > number * order.window:
        number += 1
    ends = [Fraction(samples * end, number) for end in range(1, number + 1)]
    for epoch in counting():
        windows: list[list[int]] = [[] for _ in ends]
        before = 0
        for shard in order.epoch(epoch).shards.tolist():
            windows[next(window for window, end in enumerate(ends) if before < end)].append(shard)
            before += shards[shard]
        yield from filter(None, windows)


def samples_of(shard: int, shards: Sequence[int]) -> range:
    first = sum(shards[:shard])
    return range(first, first + shards[shard])


def reference_rounds(counts: Sequence[int], sizes: Sequence[int], rounds: int) -> Iterator[Counter[int]]:
    """Yield the micro-batches of each bucket in each round; a remainder carries over to the next round."""
    remainder = [Fraction()] * len(counts)
    mean = Fraction(sum(sizes), len(sizes))
    while True:
        counts_of_round: Counter[int] = Counter()
        for bucket, count in enumerate(counts):
            number, remainder[bucket] = divmod(remainder[bucket] + Fraction(count, rounds), mean)
            counts_of_round[bucket] = int(number)
        yield +counts_of_round


# The stream of a bucket


@pytest.mark.parametrize(("shards", "window"), [(SHARDS[1], 1), (SHARDS[2], 4), (SHARDS[3], 10), (SHARDS[4], 1000)])
def test_the_stream_contains_one_window_after_another(shards: tuple[int, ...], window: int) -> None:
    order, position = bucket_order(shards, window=window), 0
    for window_shards in islice(reference_windows(order, shards), 50):
        expected = sorted(sample for shard in window_shards for sample in samples_of(shard, shards))
        assert sorted(order.samples(position, len(expected))) == expected
        assert len(expected) < window + max(shards)
        position += len(expected)


@pytest.mark.parametrize(("shards", "window"), [(SHARDS[0], 4), (SHARDS[2], 10), (SHARDS[4], 4), (SHARDS[3], 1000)])
def test_an_epoch_has_every_sample_once(shards: tuple[int, ...], window: int) -> None:
    order, samples = bucket_order(shards, window=window), sum(shards)
    for epoch in range(4):
        assert sorted(order.samples(epoch * samples, samples)) == list(range(samples))


def test_samples_from_any_position_are_a_slice_of_the_stream() -> None:
    whole = bucket_order(SHARDS[2]).samples(0, 300)
    for position, size in ((0, 1), (7, 30), (27, 5), (55, 200), (299, 1), (20, 61)):
        assert bucket_order(SHARDS[2]).samples(position, size).tolist() == whole[position : position + size].tolist()


def test_windows_have_equal_sizes_and_a_small_bucket_is_one_window() -> None:
    shards = (10,) * 10
    order = bucket_order(shards, window=100)
    assert len(order.epoch(0).windows) == 2
    neighbours = order.samples(0, 100) // 10
    assert (neighbours[1:] == neighbours[:-1]).mean() < 0.3
    for window, sizes in ((99, [50, 50]), (40, [40, 30, 30]), (10, [10] * 10), (1, [10] * 10)):
        assert np.diff(bucket_order(shards, window=window).epoch(0).window_starts).tolist() == sizes


def test_orders_differ_between_epochs_windows_and_buckets() -> None:
    order = bucket_order((6,) * 8, window=12)
    assert len({tuple(order.epoch(epoch).shards) for epoch in range(20)}) == 20
    within = [order.window_order(epoch, window) - 12 * window for epoch in range(5) for window in range(4)]
    assert len({tuple(positions) for positions in within}) == 20
    others = [BucketOrder(seed, bucket_id, (20,), (1,), 50).samples(0, 20) for seed in (0, 1) for bucket_id in (0, 1)]
    assert len({tuple(samples) for samples in others}) == 4


@pytest.mark.parametrize("shards", SHARDS[1:4])
def test_windows_from_any_position(shards: tuple[int, ...]) -> None:
    """Over all positions of three epochs."""
    order = bucket_order(shards)
    starts, position = [], 0
    for window in islice(reference_windows(order, shards), 200):
        starts.append((position, window))
        position += sum(shards[shard] for shard in window)
    for place in range(3 * sum(shards)):
        current = max(number for number, (start, _) in enumerate(starts) if start <= place)
        assert list(islice(order.windows_from(place), 4)) == starts[current : current + 4]


@pytest.mark.parametrize("sizes", [(3,), (1, 5, 5, 3, 2)])
def test_micro_batches_are_contiguous_and_use_every_size_equally_often(sizes: tuple[int, ...]) -> None:
    order, position, found = bucket_order((9,), sizes), 0, []
    for number in range(20 * len(sizes)):
        place, start = order.locate(number)
        assert start == position
        position += sizes[place]
        found.append(place)
    cycles = [tuple(found[first : first + len(sizes)]) for first in range(0, len(found), len(sizes))]
    assert all(sorted(cycle) == list(range(len(sizes))) for cycle in cycles)
    assert len(set(cycles)) > 1 or len(sizes) == 1


def test_distant_positions_are_found_directly() -> None:
    order = bucket_order((10_000,) * 500, (8, 4), window=65_536)
    place, position = order.locate(10**12 + 1)
    assert position - 6 * 10**12 == (8, 4)[1 - place]
    samples = order.samples(position, 8)
    (_, now), (_, later) = islice(order.windows_from(position), 2)
    assert set(samples // 10_000) <= {*now, *later}


# The sequence of the buckets of a source


@pytest.mark.parametrize(
    ("counts", "sizes", "max_round"),
    [
        ((7,), (3,), 10**6),
        ((1, 1, 1), (4, 4), 5),
        ((10, 4, 9), (8, 4, 2), 1),
        ((37, 64, 1), (8, 4, 2), 5),
        ((37, 64, 1), (3,), 1),
    ],
)
def test_buckets_of_micro_batches_match_the_reference(
    counts: tuple[int, ...], sizes: tuple[int, ...], max_round: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order_module, "MAX_ROUND", max_round)
    rounds, numbers = 1, counting()
    while Fraction(sum(counts) * len(sizes), sum(sizes) * rounds) > max_round:
        rounds += 1
    order, counts_before = source_order(counts, sizes), [0] * len(counts)
    for expected in islice(reference_rounds(counts, sizes, rounds), 40):
        found: Counter[int] = Counter()
        for number in islice(numbers, expected.total()):
            bucket, before = order.locate(number)
            assert before == counts_before
            found[bucket] += 1
            counts_before[bucket] += 1
        assert found == expected


def test_buckets_are_mixed_within_a_round() -> None:
    order = source_order((100, 100), (2,))
    first_half = Counter(order.locate(number)[0] for number in range(50))
    assert min(first_half[0], first_half[1]) > 10


def test_an_epoch_is_divided_into_equal_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "MAX_ROUND", 30)
    order = source_order((120, 80), (2,))  # 100 micro-batches: four rounds
    assert [order.round_order(number).tolist().count(0) for number in range(5)] == [15] * 5
    assert [len(order.round_order(number)) for number in range(5)] == [25] * 5
    assert order.locate(100) == (order.locate(100)[0], [60, 40])
    assert len({tuple(order.round_order(number)) for number in range(8)}) == 8


def test_distant_micro_batches_are_found_directly() -> None:
    counts, size = (123_456, 7, 1), 8
    bucket, before = source_order(counts, (size,)).locate(10**12)
    assert sum(before) == 10**12
    for count, number in zip(counts, before, strict=True):
        assert abs(number - 10**12 * count // sum(counts)) < 65_536
    assert 0 <= bucket < 3
