from collections import Counter
from collections.abc import Iterator
from itertools import count as counting
from itertools import islice

import numpy as np
import pytest

from gpdit_lightning.data import plan as plan_module
from gpdit_lightning.data.plan import MicroBatch, Plan, PlannedSource, generator
from gpdit_lightning.errors import InputError

BUCKETS = [(7,), (5, 3), (1,), (1, 1, 1), (10, 4, 9), (2, 0, 3), (64,), (37, 64, 1)]


def one_source(counts: tuple[int, ...], size: int, seed: int = 0, dropout: float = 0.0, max_ranks: int = 1) -> Plan:
    return Plan((PlannedSource("videos", counts, size),), seed, dropout, max_ranks)


def mixture(seed: int = 0, dropout: float = 0.25, max_ranks: int = 8) -> Plan:
    images = PlannedSource("images", (50, 21), batch_size=32, micro_batches=2)
    videos = PlannedSource("videos", (13, 30, 5), batch_size=24, micro_batches=3)
    return Plan((images, videos), seed, dropout, max_ranks)


def same(first: MicroBatch, second: MicroBatch) -> bool:
    arrays = ("samples", "places", "context")
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in arrays) and (
        (first.source, first.bucket, first.weight, first.frames)
        == (second.source, second.bucket, second.weight, second.frames)
    )


def forget_cached_epochs() -> None:
    plan_module._epoch.cache_clear()
    plan_module._permutation.cache_clear()


def slow_epochs(counts: tuple[int, ...], size: int) -> Iterator[Counter[int]]:
    """How many micro-batches each bucket gives in each epoch, by walking: what does not fill one is kept for later."""
    kept = [0] * len(counts)
    while True:
        given: Counter[int] = Counter()
        for bucket, count in enumerate(counts):
            given[bucket], kept[bucket] = divmod(kept[bucket] + count, size)
        yield +given


def test_a_micro_batch_depends_on_its_number_alone() -> None:
    forwards = [mixture().micro_batch(number) for number in range(60)]
    forget_cached_epochs()
    fresh = mixture()
    for number in np.random.default_rng(0).permutation(60):
        assert same(fresh.micro_batch(int(number)), forwards[number])


def test_the_order_is_pinned() -> None:
    """Runs resume on other machines and with other versions of numpy only while these numbers stay."""
    plan = mixture(seed=3)
    assert [(batch.source, batch.bucket) for batch in map(plan.micro_batch, range(5))] == [
        *[(0, 1), (0, 0)],
        *[(1, 0), (1, 1), (1, 1)],
    ]
    assert plan.micro_batch(2).samples.tolist() == [10, 3, 6, 0, 4, 1, 2, 5]
    assert plan.micro_batch(5 * 1000 + 2).samples.tolist() == [9, 7, 14, 24, 10, 27, 16, 17]


def test_every_length_comes_equally_often_and_belongs_to_the_micro_batch() -> None:
    lengths = ((5, 6, 7, 8, 9, 10, 11, 12), (5, 6))
    plan = Plan((PlannedSource("videos", (40, 24), 4, lengths=lengths),), seed=1, max_ranks=2)
    batches = [plan.micro_batch(number) for number in range(1600)]
    for bucket in (0, 1):
        found = [batch.frames for batch in batches if batch.bucket == bucket]
        for cycle in range(len(found) // len(lengths[bucket])):
            part = found[cycle * len(lengths[bucket]) : (cycle + 1) * len(lengths[bucket])]
            assert sorted(part) == list(lengths[bucket])  # type: ignore[type-var]
        assert found[:8] != found[8:16]
    assert all(same(plan.micro_batch(number), batches[number]) for number in (1500, 3, 77))
    assert {batches[3].share(rank, 2).frames for rank in (0, 1)} == {batches[3].frames}
    whole = Plan((PlannedSource("videos", (40, 24), 4),), seed=1, max_ranks=2)
    assert whole.micro_batch(9).frames is None
    assert whole.micro_batch(9).samples.tolist() == batches[9].samples.tolist()


def test_the_seed_changes_the_order() -> None:
    orders = {tuple(one_source((100,), 10, seed).micro_batch(0).samples) for seed in range(5)}
    assert len(orders) == 5


@pytest.mark.parametrize("counts", BUCKETS)
@pytest.mark.parametrize("size", [1, 3, 4])
def test_every_sample_is_used_once_before_any_is_used_again(counts: tuple[int, ...], size: int) -> None:
    plan = one_source(counts, size)
    used: dict[int, list[int]] = {bucket: [] for bucket in range(len(counts))}
    for number in range(4 * sum(counts)):
        batch = plan.micro_batch(number)
        used[batch.bucket] += batch.samples.tolist()
    for bucket, count in enumerate(counts):
        whole_epochs = len(used[bucket]) // max(count, 1)
        assert whole_epochs > 1 or count == 0
        for epoch in range(whole_epochs):
            assert sorted(used[bucket][epoch * count : (epoch + 1) * count]) == list(range(count))
        assert set(used[bucket]) <= set(range(count))


def test_every_epoch_has_an_order_of_its_own() -> None:
    plan = one_source((20,), 20)
    orders = {tuple(plan.micro_batch(epoch).samples) for epoch in range(10)}
    assert len(orders) == 10


@pytest.mark.parametrize("counts", BUCKETS)
@pytest.mark.parametrize("size", [1, 3, 4, 16])
def test_buckets_take_turns_as_walking_through_the_epochs_gives(counts: tuple[int, ...], size: int) -> None:
    located = (plan_module._locate(3, 1, counts, size, number) for number in counting())
    turns: Counter[int] = Counter()
    for given in islice(slow_epochs(counts, size), 40):
        epoch = list(islice(located, given.total()))
        assert Counter(bucket for bucket, _ in epoch) == given
        for bucket, turn in epoch:
            assert turn == turns[bucket]
            turns[bucket] += 1


def test_buckets_are_mixed_within_an_epoch() -> None:
    plan = one_source((100, 100), 2)
    first_half = Counter(plan.micro_batch(number).bucket for number in range(50))
    assert min(first_half[0], first_half[1]) > 10


def test_far_steps_are_found_without_walking() -> None:
    counts, size = (123_456, 7, 1), 8
    bucket, turn = plan_module._locate(0, 0, counts, size, 10**9)
    assert counts[bucket] * (10**9 * size // sum(counts) - 2) < (turn + 1) * size
    assert one_source(counts, size).micro_batch(10**9).samples.shape == (size,)


def test_sources_mix_exactly_as_their_batch_sizes_say() -> None:
    plan = mixture()
    assert plan.micro_batches_per_step == 5
    for step in range(20):
        batches = [plan.micro_batch(5 * step + within) for within in range(5)]
        assert [batch.source for batch in batches] == [0, 0, 1, 1, 1]
        assert [len(batch.samples) for batch in batches] == [16, 16, 8, 8, 8]


def test_a_source_keeps_its_order_whatever_it_is_mixed_with() -> None:
    images, _ = mixture().sources
    alone = Plan((images,), context_dropout=0.25, max_ranks=8)
    mixed = mixture()
    assert [mixed.micro_batch(n).samples.tolist() for n in (0, 1, 5, 6)] == [
        alone.micro_batch(n).samples.tolist() for n in range(4)
    ]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 0.5)])
def test_weights_of_a_step_sum_to_one_in_the_proportion_asked(weights: tuple[float, float]) -> None:
    images = PlannedSource("images", (9,), batch_size=8, micro_batches=4, weight=weights[0])
    videos = PlannedSource("videos", (9,), batch_size=6, micro_batches=2, weight=weights[1])
    plan = Plan((images, videos))
    for step in range(3):
        batches = [plan.micro_batch(6 * step + within) for within in range(6)]
        assert sum(batch.weight for batch in batches) == pytest.approx(1)
        of_images = sum(batch.weight for batch in batches if batch.source == 0)
        assert of_images == pytest.approx(weights[0] / sum(weights))
        assert len({batch.weight for batch in batches if batch.source == 1}) == 1


def test_places_of_a_step_are_all_different() -> None:
    plan = mixture()
    for step in range(3):
        places = np.concatenate([plan.micro_batch(5 * step + within).places for within in range(5)])
        assert np.array_equal(places, np.arange(32 + 24))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_the_shares_of_all_ranks_are_the_global_batch_in_its_order(world_size: int) -> None:
    plan = mixture()
    for number in range(30):
        whole = plan.micro_batch(number)
        shares = [whole.share(rank, world_size) for rank in range(world_size)]
        size = len(whole.samples) // world_size
        found = [
            (int(place), int(sample), bool(context))
            for share in shares
            for place, sample, context in sorted(zip(share.places, share.samples, share.context, strict=True))
        ]
        assert found == list(zip(whole.places, whole.samples, whole.context, strict=True))
        for share in shares:
            assert len(share.samples) == size
            assert share.context.sum() == shares[0].context.sum()
            assert (np.diff(share.context.astype(int)) <= 0).all()  # clips with context come first
            assert (share.source, share.bucket, share.weight) == (whole.source, whole.bucket, whole.weight)


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.25, 1 / 3, 0.9, 1.0])
@pytest.mark.parametrize("max_ranks", [1, 4])
def test_context_dropout_is_exact_over_any_window(dropout: float, max_ranks: int) -> None:
    size, micro_batches = 20, 200
    plan = one_source((50, 31), size, dropout=dropout, max_ranks=max_ranks)
    dropped = np.cumsum([0] + [int((~plan.micro_batch(number).context).sum()) for number in range(micro_batches)])
    for start in (0, 1, 7, 100):
        for stop in (start + 1, start + 10, micro_batches):
            assert abs(dropped[stop] - dropped[start] - dropout * size * (stop - start)) < max_ranks + 1e-9


def test_every_sample_loses_its_context_now_and_then() -> None:
    plan = one_source((12,), 4, dropout=0.25)
    without = {int(s) for b in map(plan.micro_batch, range(150)) for s in b.samples[~b.context]}
    assert without == set(range(12))


def test_a_bucket_smaller_than_a_micro_batch_repeats_its_samples() -> None:
    assert one_source((1,), 4).micro_batch(3).samples.tolist() == [0, 0, 0, 0]
    plan = one_source((3,), 4)
    used = [sample for number in range(3) for sample in plan.micro_batch(number).samples.tolist()]
    assert Counter(used) == {0: 4, 1: 4, 2: 4}


def test_a_small_bucket_waits_until_it_fills_a_micro_batch() -> None:
    buckets = [one_source((8, 1), 4).micro_batch(number).bucket for number in range(9)]
    assert buckets[:6] == [0] * 6
    assert sorted(buckets[6:]) == [0, 0, 1]


def test_generators_are_counter_based_and_apart() -> None:
    words = [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0)]
    draws = {tuple(generator(*word).integers(0, 2**62, 4)) for word in words}
    assert len(draws) == len(words)
    assert generator(5, 2, 7).random() == generator(5, 2, 7, 0, 0).random()


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        (PlannedSource("videos", (), 4), {}, "the source 'videos' holds no samples"),
        (PlannedSource("videos", (0, 0), 4), {}, "the source 'videos' holds no samples"),
        (PlannedSource("videos", (5,), 4, micro_batches=3), {}, "batch of 4 videos cannot be cut into 3 micro-batches"),
        (PlannedSource("videos", (5,), 4, micro_batches=0), {}, "cannot be cut into 0 micro-batches"),
        (PlannedSource("videos", (5,), 4), {"max_ranks": 8}, "for 8 ranks: make it a multiple"),
        (PlannedSource("videos", (5,), 4, weight=0.0), {}, "the weight of 'videos' is 0.0; it must be positive"),
        (PlannedSource("videos", (5,), 4), {"context_dropout": 1.1}, "context_dropout is 1.1"),
        (PlannedSource("videos", (5,), 4), {"context_dropout": -0.1}, "context_dropout is -0.1"),
        (None, {}, "no source of data is in use"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    source: PlannedSource | None, settings: dict[str, float], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Plan((source,) if source else (), **settings)  # type: ignore[arg-type]
