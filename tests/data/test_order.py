"""Streams of samples and turns of buckets, against slow references that walk from the start."""

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
COUNTS = [(7,), (1, 1, 1), (10, 4, 9), (37, 64, 1)]


def bucket_order(shards: Sequence[int], sizes: Sequence[int] = (1,), window: int = 10, seed: int = 0) -> BucketOrder:
    return BucketOrder(seed, 0, shards, sizes, window)


def source_order(counts: Sequence[int], sizes: Sequence[int]) -> SourceOrder:
    """Buckets of one shard each."""
    return SourceOrder(3, 1, [BucketOrder(3, word, (count,), sizes, 10**6) for word, count in enumerate(counts)])


def slow_windows(order: BucketOrder, shards: Sequence[int]) -> Iterator[list[int]]:
    """The shards of one window after another, by walking through each epoch's shards: each begins in its window."""
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


def slow_rounds(counts: Sequence[int], sizes: Sequence[int], rounds: int) -> Iterator[Counter[int]]:
    """How many micro-batches each bucket gives in each round, by walking: what does not fill one is kept for later."""
    kept = [Fraction()] * len(counts)
    mean = Fraction(sum(sizes), len(sizes))
    while True:
        given: Counter[int] = Counter()
        for bucket, count in enumerate(counts):
            number, kept[bucket] = divmod(kept[bucket] + Fraction(count, rounds), mean)
            given[bucket] = int(number)
        yield +given


# A bucket's stream


@pytest.mark.parametrize(("shards", "window"), [(SHARDS[1], 1), (SHARDS[2], 4), (SHARDS[3], 10), (SHARDS[4], 1000)])
def test_the_stream_goes_through_window_after_window(shards: tuple[int, ...], window: int) -> None:
    order, position = bucket_order(shards, window=window), 0
    for of_window in islice(slow_windows(order, shards), 50):
        expected = sorted(sample for shard in of_window for sample in samples_of(shard, shards))
        assert sorted(order.samples(position, len(expected))) == expected
        assert len(expected) < window + max(shards)
        position += len(expected)


@pytest.mark.parametrize(("shards", "window"), [(SHARDS[0], 4), (SHARDS[2], 10), (SHARDS[4], 4), (SHARDS[3], 1000)])
def test_an_epoch_has_every_sample_once(shards: tuple[int, ...], window: int) -> None:
    order, samples = bucket_order(shards, window=window), sum(shards)
    for epoch in range(4):
        assert sorted(order.samples(epoch * samples, samples)) == list(range(samples))


def test_any_stretch_is_a_part_of_the_whole() -> None:
    whole = bucket_order(SHARDS[2]).samples(0, 300)
    for position, size in ((0, 1), (7, 30), (27, 5), (55, 200), (299, 1), (20, 61)):
        assert bucket_order(SHARDS[2]).samples(position, size).tolist() == whole[position : position + size].tolist()


def test_a_bucket_that_fits_a_window_is_shuffled_whole_and_others_in_equal_parts() -> None:
    shards = (10,) * 10
    order = bucket_order(shards, window=100)
    assert len(order.epoch(0).windows) == 2
    neighbours = order.samples(0, 100) // 10
    assert (neighbours[1:] == neighbours[:-1]).mean() < 0.3
    for window, sizes in ((99, [50, 50]), (40, [40, 30, 30]), (10, [10] * 10), (1, [10] * 10)):
        assert np.diff(bucket_order(shards, window=window).epoch(0).window_starts).tolist() == sizes


def test_epochs_windows_and_buckets_have_orders_of_their_own() -> None:
    order = bucket_order((6,) * 8, window=12)
    assert len({tuple(order.epoch(epoch).shards) for epoch in range(20)}) == 20
    within = [order.permuted(epoch, window) - 12 * window for epoch in range(5) for window in range(4)]
    assert len({tuple(positions) for positions in within}) == 20
    others = [BucketOrder(seed, word, (20,), (1,), 50).samples(0, 20) for seed in (0, 1) for word in (0, 1)]
    assert len({tuple(samples) for samples in others}) == 4


@pytest.mark.parametrize("shards", SHARDS[1:4])
def test_windows_from_any_position_on(shards: tuple[int, ...]) -> None:
    """By the place of each sample in the stream, over three epochs."""
    order = bucket_order(shards)
    begins, position = [], 0
    for window in islice(slow_windows(order, shards), 200):
        begins.append((position, window))
        position += sum(shards[shard] for shard in window)
    for place in range(3 * sum(shards)):
        current = max(number for number, (begin, _) in enumerate(begins) if begin <= place)
        assert list(islice(order.windows_from(place), 4)) == begins[current : current + 4]


@pytest.mark.parametrize("sizes", [(3,), (1, 5, 5, 3, 2)])
def test_micro_batches_follow_one_another_and_sizes_take_turns(sizes: tuple[int, ...]) -> None:
    order, position, found = bucket_order((9,), sizes), 0, []
    for turn in range(20 * len(sizes)):
        place, begins = order.cut(turn)
        assert begins == position
        position += sizes[place]
        found.append(place)
    cycles = [tuple(found[first : first + len(sizes)]) for first in range(0, len(found), len(sizes))]
    assert all(sorted(cycle) == list(range(len(sizes))) for cycle in cycles)
    assert len(set(cycles)) > 1 or len(sizes) == 1


def test_far_positions_are_found_without_walking() -> None:
    order = bucket_order((10_000,) * 500, (8, 4), window=65_536)
    place, position = order.cut(10**12 + 1)
    assert position - 6 * 10**12 == (8, 4)[1 - place]
    samples = order.samples(position, 8)
    (_, now), (_, later) = islice(order.windows_from(position), 2)
    assert set(samples // 10_000) <= {*now, *later}


# The turns of a source's buckets


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("sizes", "largest_round"), [((3,), 10**6), ((4, 4), 5), ((8, 4, 2), 1)])
def test_buckets_take_turns_as_walking_through_the_rounds_gives(
    counts: tuple[int, ...], sizes: tuple[int, ...], largest_round: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order_module, "LARGEST_ROUND", largest_round)
    rounds, numbers = 1, counting()
    while Fraction(sum(counts) * len(sizes), sum(sizes) * rounds) > largest_round:
        rounds += 1
    order, turns = source_order(counts, sizes), [0] * len(counts)
    for given in islice(slow_rounds(counts, sizes, rounds), 40):
        found: Counter[int] = Counter()
        for number in islice(numbers, given.total()):
            bucket, before = order.at(number)
            assert before == turns
            found[bucket] += 1
            turns[bucket] += 1
        assert found == given


def test_buckets_are_mixed_within_a_round() -> None:
    order = source_order((100, 100), (2,))
    first_half = Counter(order.at(number)[0] for number in range(50))
    assert min(first_half[0], first_half[1]) > 10


def test_rounds_are_as_long_as_they_may_be_and_end_with_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "LARGEST_ROUND", 30)
    order = source_order((120, 80), (2,))  # 100 micro-batches: four rounds
    assert [order.shuffled(number).tolist().count(0) for number in range(5)] == [15] * 5
    assert [len(order.shuffled(number)) for number in range(5)] == [25] * 5
    assert order.at(100) == (order.at(100)[0], [60, 40])
    assert len({tuple(order.shuffled(number)) for number in range(8)}) == 8


def test_far_micro_batches_are_found_without_walking() -> None:
    counts, size = (123_456, 7, 1), 8
    bucket, turns = source_order(counts, (size,)).at(10**12)
    assert sum(turns) == 10**12
    for count, given in zip(counts, turns, strict=True):
        assert abs(given - 10**12 * count // sum(counts)) < 65_536
    assert 0 <= bucket < 3
