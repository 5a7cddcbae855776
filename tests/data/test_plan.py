import doctest
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from typing import Any

import numpy as np
import pytest

from gpdit_lightning.data import held_out as held_out_module
from gpdit_lightning.data import order as order_module
from gpdit_lightning.data import plan as plan_module
from gpdit_lightning.data.held_out import HeldOutPass
from gpdit_lightning.data.order import BucketOrder
from gpdit_lightning.data.plan import MicroBatch, Plan, PlannedBucket, PlannedSource, Sampling
from gpdit_lightning.data.source import SourceConfig
from gpdit_lightning.errors import InputError

BUCKETS = [(7,), (1, 1, 1), (10, 4, 9), (37, 64, 1)]


def bucket(*counts: int, lengths: tuple[int, ...] = (1,), height: int = 4) -> PlannedBucket:
    return PlannedBucket(counts, lengths, height, 4)


def one_source(counts: tuple[int, ...], size: int, seed: int = 0, dropout: float = 0.0, max_ranks: int = 1) -> Plan:
    return Plan(
        (PlannedSource("videos", tuple(map(bucket, counts)), SourceConfig(batch_size=size)),), seed, dropout, max_ranks
    )


def mixture(seed: int = 0, dropout: float = 0.25, max_ranks: int = 8, window: int = 65_536) -> Plan:
    images = PlannedSource(
        "images",
        (bucket(20, 20, 10), bucket(21)),
        SourceConfig(batch_size=32, micro_batches=2, shuffle_window=window),
    )
    videos = PlannedSource(
        "videos",
        (bucket(13), bucket(9, 9, 9, 3), bucket(5)),
        SourceConfig(batch_size=24, micro_batches=3, shuffle_window=window),
    )
    return Plan((images, videos), seed, dropout, max_ranks)


def budget(max_ranks: int = 8, window: int = 12) -> Plan:
    """640 tokens of images and 768 of videos per step; at 8 ranks a micro-batch has 32 clips of 1 frame or 8 of 3."""
    images = PlannedSource(
        "images", (bucket(50), bucket(9, 12, height=8)), SourceConfig(tokens=640, shuffle_window=window)
    )
    short, long = (bucket(5, 8, 8, lengths=(1, 2)), bucket(7, 7, 7, 7, lengths=(1, 2, 3)))
    videos = PlannedSource(
        "videos", (short, long), SourceConfig(tokens=768, micro_batches=6, weight=2.0, shuffle_window=window)
    )
    return Plan((images, videos), seed=1, context_dropout=0.25, max_ranks=max_ranks)


def alternating(max_ranks: int = 8, window: int = 12) -> Plan:
    """Two micro-batches in every step: of images in two of five steps, else of clips within a budget of tokens."""
    images, videos = budget(max_ranks, window).sources
    configs = (
        replace(images.config, tokens=0, batch_size=32, micro_batches=2, weight=0.2),
        replace(videos.config, micro_batches=2, weight=0.3),
    )
    sources = tuple(replace(s, config=config) for s, config in zip((images, videos), configs, strict=True))
    return Plan(sources, seed=1, context_dropout=0.25, max_ranks=max_ranks, sampling="alternate")


PLANS = pytest.mark.parametrize("make", [mixture, budget, alternating])


def same(first: MicroBatch, second: MicroBatch) -> bool:
    arrays = ("samples", "positions", "context")
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in arrays) and (
        (first.source, first.bucket, first.weight, first.frames)
        == (second.source, second.bucket, second.weight, second.frames)
    )


@PLANS
def test_a_micro_batch_depends_on_its_number_alone(make: Callable[..., Plan]) -> None:
    forwards = [make(window=5).micro_batch(number) for number in range(60)]
    jumping = make(window=5)
    for number in np.random.default_rng(0).permutation(60):
        assert same(jumping.micro_batch(int(number)), forwards[number])


@PLANS
def test_a_pickled_plan_has_no_caches(make: Callable[..., Plan]) -> None:
    plan = make()
    pickled = pickle.dumps(plan)
    expected = plan.micro_batch(33)
    assert pickle.dumps(plan) == pickled
    assert same(pickle.loads(pickled).micro_batch(33), expected)


def test_the_order_is_that_of_earlier_versions() -> None:
    """Recorded numbers: a run resumes exactly on another machine or numpy version only if they are reproduced."""
    plan = mixture(seed=3, window=10)
    assert [(batch.source, batch.bucket) for batch in map(plan.micro_batch, range(5))] == [
        *[(0, 1), (0, 0)],
        *[(1, 0), (1, 1), (1, 1)],
    ]
    assert plan.micro_batch(2).samples.tolist() == [7, 12, 11, 6, 1, 3, 4, 0]
    assert plan.micro_batch(5 * 1000 + 2).samples.tolist() == [27, 10, 28, 14, 11, 16, 12, 15]
    lengths = [(batch.bucket, batch.frames) for batch in map(budget().micro_batch, range(1, 7))]
    assert lengths == [(1, 2), (0, 1), (1, 1), (1, 3), (1, 1), (0, 2)]


def test_every_length_is_used_equally_often() -> None:
    buckets = (bucket(40, lengths=(5, 6, 7, 8, 9, 10, 11, 12)), bucket(24, lengths=(5, 6)))
    plan = Plan((PlannedSource("videos", buckets, SourceConfig(batch_size=4)),), seed=1, max_ranks=2)
    batches = [plan.micro_batch(number) for number in range(1600)]
    for number, planned in enumerate(buckets):
        found, cycle = [batch.frames for batch in batches if batch.bucket == number], len(planned.lengths)
        for first in range(0, len(found) - cycle, cycle):
            assert sorted(found[first : first + cycle]) == list(planned.lengths)
        assert found[:8] != found[8:16]
    assert all(same(plan.micro_batch(number), batches[number]) for number in (1500, 3, 77))
    assert {batches[3].share(rank, 2).frames for rank in (0, 1)} == {batches[3].frames}
    whole = Plan((PlannedSource("videos", (bucket(40), bucket(24)), SourceConfig(batch_size=4)),), seed=1, max_ranks=2)
    assert whole.micro_batch(9).samples.tolist() == batches[9].samples.tolist()


def test_the_seed_changes_the_order() -> None:
    orders = {tuple(one_source((100,), 10, seed).micro_batch(0).samples) for seed in range(5)}
    assert len(orders) == 5


def used_by_bucket(plan: Plan, source: int, micro_batches: int) -> dict[int, list[int]]:
    """Return the samples of each bucket of a source in the order of their use."""
    used: dict[int, list[int]] = {bucket: [] for bucket in range(len(plan.sources[source].buckets))}
    for number in range(micro_batches):
        batch = plan.micro_batch(number)
        if batch.source == source:
            used[batch.bucket] += batch.samples.tolist()
    return used


def assert_epochs(used: list[int], count: int) -> None:
    """Assert that every sample is used once before any is repeated."""
    assert len(used) // count > 1
    for epoch in range(len(used) // count):
        assert sorted(used[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert set(used) <= set(range(count))


@pytest.mark.parametrize(("counts", "size"), zip(BUCKETS, (3, 4, 1, 4), strict=True))
def test_every_sample_is_used_once_before_any_is_repeated(counts: tuple[int, ...], size: int) -> None:
    used = used_by_bucket(one_source(counts, size), 0, 4 * sum(counts))
    for number, count in enumerate(counts):
        assert_epochs(used[number], count)


@PLANS
@pytest.mark.parametrize(("window", "max_round"), [(1, 65_536), (10, 2), (1000, 65_536)])
def test_every_sample_is_used_once_with_windows_rounds_and_token_budgets(
    make: Callable[..., Plan], window: int, max_round: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order_module, "MAX_ROUND", max_round)
    for source in (0, 1):
        plan = make(window=window)
        used = used_by_bucket(plan, source, 150)
        for number, planned in enumerate(plan.sources[source].buckets):
            assert_epochs(used[number], sum(planned.counts))


@PLANS
def test_buckets_are_used_in_proportion_to_their_samples(
    make: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the samples of a round and the remainders of the buckets."""
    monkeypatch.setattr(order_module, "MAX_ROUND", 2)
    plan = make()
    for source, planned in enumerate(plan.sources):
        counts = [sum(bucket.counts) for bucket in planned.buckets]
        for micro_batches in (100, 1000):
            used = used_by_bucket(plan, source, micro_batches)
            total = sum(map(len, used.values()))
            for number, count in enumerate(counts):
                assert abs(len(used[number]) - total * count / sum(counts)) < 150


def test_orders_of_epochs_differ() -> None:
    plan = one_source((20,), 20)
    orders = {tuple(plan.micro_batch(epoch).samples) for epoch in range(10)}
    assert len(orders) == 10


def test_every_step_has_the_configured_mixture() -> None:
    plan = mixture()
    assert plan.micro_batches_per_step == 5
    for step in range(20):
        batches = [plan.micro_batch(5 * step + within) for within in range(5)]
        assert [batch.source for batch in batches] == [0, 0, 1, 1, 1]
        assert [len(batch.samples) for batch in batches] == [16, 16, 8, 8, 8]


def test_the_order_of_a_source_is_independent_of_other_sources() -> None:
    images, _ = mixture().sources
    alone = Plan((images,), context_dropout=0.25, max_ranks=8)
    mixed = mixture()
    assert [mixed.micro_batch(n).samples.tolist() for n in (0, 1, 5, 6)] == [
        alone.micro_batch(n).samples.tolist() for n in range(4)
    ]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 0.5)])
def test_weights_of_a_step_are_proportional_and_sum_to_one(weights: tuple[float, float]) -> None:
    images = PlannedSource("images", (bucket(9),), SourceConfig(batch_size=8, micro_batches=4, weight=weights[0]))
    videos = PlannedSource("videos", (bucket(9),), SourceConfig(batch_size=6, micro_batches=2, weight=weights[1]))
    plan = Plan((images, videos))
    for step in range(3):
        batches = [plan.micro_batch(6 * step + within) for within in range(6)]
        assert sum(batch.weight for batch in batches) == pytest.approx(1)
        image_weight = sum(batch.weight for batch in batches if batch.source == 0)
        assert image_weight == pytest.approx(weights[0] / sum(weights))
        assert len({batch.weight for batch in batches if batch.source == 1}) == 1


def weighted(*weights: float, sampling: Sampling = "alternate") -> Plan:
    """A plan of several sources with 12 samples and micro-batches of 2, one in each step."""
    sources = [
        PlannedSource(str(number), (bucket(7), bucket(5)), SourceConfig(batch_size=2, weight=weight))
        for number, weight in enumerate(weights)
    ]
    return Plan(tuple(sources), seed=2, context_dropout=0.25, sampling=sampling)


@pytest.mark.parametrize(
    ("weights", "steps"),
    [((1.0, 1.0), (1, 1)), ((2.0, 1.0), (2, 1)), ((0.3, 0.7), (3, 7)), ((1.0, 2.0, 4.0), (1, 2, 4)), ((5.0,), (1,))],
)
def test_alternating_sources_have_their_exact_share_of_every_cycle(
    weights: tuple[float, ...], steps: tuple[int, ...]
) -> None:
    """Also from any step that is not the first of a cycle, and with no long run of one source."""
    plan, cycle = weighted(*weights), sum(steps)
    assert plan.step_shares == tuple(Fraction(count, cycle) for count in steps)
    found = [plan.micro_batch(number).source for number in range(4 * cycle)]
    for first in range(3 * cycle):
        assert Counter(found[first : first + cycle]) == Counter({n: count for n, count in enumerate(steps) if count})
    for number in range(4 * cycle):  # the first source is never a whole step away from its share
        assert abs(found[:number].count(0) - Fraction(number * steps[0], cycle)) < 1
    assert [plan.micro_batch(10**9 * cycle + number).source for number in range(cycle)] == found[:cycle]


def test_a_step_of_alternating_sources_has_one_source_and_the_weight_one() -> None:
    plan = alternating()
    assert plan.micro_batches_per_step == 2
    found = []
    for step in range(10):
        batches = [plan.micro_batch(2 * step + within) for within in range(2)]
        assert [batch.weight for batch in batches] == [0.5, 0.5]
        assert len({batch.source for batch in batches}) == 1
        positions = np.concatenate([batch.positions for batch in batches])
        assert len(set(positions.tolist())) == len(positions)
        found.append(batches[0].source)
    assert found == [0, 1, 0, 1, 1] * 2


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 3.0, 2.0)])
def test_the_samples_of_a_source_are_those_of_joint_sampling_in_the_same_order(weights: tuple[float, ...]) -> None:
    joint, alternate = weighted(*weights, sampling="joint"), weighted(*weights)
    for source in range(len(weights)):
        in_joint, in_alternate = (
            [batch for batch in map(plan.micro_batch, range(60)) if batch.source == source]
            for plan in (joint, alternate)
        )
        assert min(len(in_joint), len(in_alternate)) >= 10
        for one, other in zip(in_joint, in_alternate, strict=False):
            assert same(replace(one, weight=1.0), other)


def test_positions_of_a_step_are_unique() -> None:
    plan = mixture()
    for step in range(3):
        positions = np.concatenate([plan.micro_batch(5 * step + within).positions for within in range(5)])
        assert np.array_equal(positions, np.arange(32 + 24))


def test_positions_under_a_token_budget_reserve_the_largest_micro_batches() -> None:
    """160 positions for images, then six times 32 for clips; smaller micro-batches leave positions unused."""
    plan = budget()
    for step in range(20):
        batches = [plan.micro_batch(7 * step + within) for within in range(7)]
        firsts = [0, *(160 + 32 * within for within in range(6))]
        for batch, first in zip(batches, firsts, strict=True):
            assert np.array_equal(batch.positions, first + np.arange(len(batch.samples)))
        positions = np.concatenate([batch.positions for batch in batches])
        assert len(set(positions.tolist())) == len(positions)


@PLANS
@pytest.mark.parametrize("world_size", [1, 4, 8])
def test_shares_of_all_ranks_are_the_whole_micro_batch(make: Callable[..., Plan], world_size: int) -> None:
    plan = make()
    for number in range(35):
        whole = plan.micro_batch(number)
        shares = [whole.share(rank, world_size) for rank in range(world_size)]
        size = len(whole.samples) // world_size
        found = [
            (int(place), int(sample), bool(context))
            for share in shares
            for place, sample, context in sorted(zip(share.positions, share.samples, share.context, strict=True))
        ]
        assert found == list(zip(whole.positions, whole.samples, whole.context, strict=True))
        for share in shares:
            assert len(share.samples) == size
            assert share.context.sum() == shares[0].context.sum()
            assert (np.diff(share.context.astype(int)) <= 0).all()  # clips with context come first
            assert (share.source, share.bucket, share.weight, share.frames) == (
                *(whole.source, whole.bucket, whole.weight, whole.frames),
            )


@pytest.mark.parametrize(
    ("dropout", "max_ranks", "batch"),
    [
        (0.0, 1, {"tokens": 240}),
        (0.1, 4, {"batch_size": 20}),
        (1 / 3, 1, {"tokens": 240}),
        (0.9, 4, {"tokens": 240}),
        (1.0, 1, {"batch_size": 20}),
    ],
)
def test_context_dropout_is_exact_over_any_interval(dropout: float, max_ranks: int, batch: dict[str, int]) -> None:
    buckets = (bucket(50, lengths=(1, 2, 3)), bucket(31, lengths=(1, 2)))
    plan = Plan((PlannedSource("videos", buckets, SourceConfig(**batch)),), 0, dropout, max_ranks)  # type: ignore[arg-type]
    contexts = [plan.micro_batch(number).context for number in range(200)]
    dropped = np.cumsum([0, *(int((~context).sum()) for context in contexts)])
    total = np.cumsum([0, *(len(context) for context in contexts)])
    assert len({len(context) for context in contexts}) == (3 if "tokens" in batch else 1)
    for start in (0, 1, 7, 100):
        for stop in (start + 1, start + 10, 200):
            assert abs(dropped[stop] - dropped[start] - dropout * (total[stop] - total[start])) < max_ranks + 1e-9


def test_context_dropout_reaches_every_sample() -> None:
    plan = one_source((12,), 4, dropout=0.25)
    without = {int(s) for b in map(plan.micro_batch, range(150)) for s in b.samples[~b.context]}
    assert without == set(range(12))


def test_a_bucket_smaller_than_a_micro_batch_repeats_its_samples() -> None:
    assert one_source((1,), 4).micro_batch(3).samples.tolist() == [0, 0, 0, 0]
    plan = one_source((3,), 4)
    used = [sample for number in range(3) for sample in plan.micro_batch(number).samples.tolist()]
    assert Counter(used) == {0: 4, 1: 4, 2: 4}


def test_samples_of_a_small_bucket_accumulate_over_epochs() -> None:
    buckets = [one_source((8, 1), 4).micro_batch(number).bucket for number in range(9)]
    assert buckets[:6] == [0] * 6
    assert sorted(buckets[6:]) == [0, 0, 1]


# Token budgets


@pytest.mark.parametrize(("max_ranks", "micro_batches"), [(1, 1), (2, 3), (8, 2)])
def test_each_length_has_the_most_samples_within_the_token_budget(max_ranks: int, micro_batches: int) -> None:
    lengths, tokens = (1, 2, 3, 7), 1000
    buckets = (bucket(30, lengths=lengths), bucket(50, lengths=lengths, height=6))
    source = PlannedSource("videos", buckets, SourceConfig(tokens=tokens, micro_batches=micro_batches))
    plan, found = Plan((source,), max_ranks=max_ranks), set()
    for batch in map(plan.micro_batch, range(200)):
        tokens_of_sample = Fraction(batch.frames * buckets[batch.bucket].height * buckets[batch.bucket].width, 4)
        assert len(batch.samples) % max_ranks == 0
        assert len(batch.samples) * tokens_of_sample <= Fraction(tokens, micro_batches)
        assert (len(batch.samples) + max_ranks) * tokens_of_sample > Fraction(tokens, micro_batches)
        found.add((batch.bucket, batch.frames))
    assert found == {(number, frames) for number in (0, 1) for frames in lengths}


def test_a_token_budget_with_one_length_equals_a_batch_size() -> None:
    fields = {"counts": (9, 9), "lengths": (2,), "height": 4, "width": 4}
    by_tokens, by_size = (
        Plan(
            (PlannedSource("videos", (PlannedBucket(**fields),), SourceConfig(micro_batches=3, **batch)),), max_ranks=2
        )  # type: ignore[arg-type]
        for batch in ({"tokens": 103}, {"batch_size": 12})
    )
    assert all(same(by_tokens.micro_batch(number), by_size.micro_batch(number)) for number in range(40))


@pytest.mark.parametrize(("frames", "targets"), [(2, (1,)), (5, (1, 3)), (6, (1, 3, 5))])
def test_every_second_frame_is_a_target(frames: int, targets: tuple[int, ...]) -> None:
    assert SourceConfig(loss_frames="targets").noisy_frames(frames) == targets
    assert SourceConfig().noisy_frames(frames) is None


def test_first_frames_can_be_context_only() -> None:
    assert SourceConfig(frames_without_loss=2).noisy_frames(5) == (2, 3, 4)


def test_larger_patches_make_fewer_tokens() -> None:
    small, large = (PlannedSource("videos", (bucket(9),), SourceConfig(tokens=64), size) for size in (2, 4))
    assert [source.micro_batch_size(1, 8, 8, max_ranks=2) for source in (small, large)] == [4, 16]


def test_the_example_in_the_docstring() -> None:
    names = {"PlannedBucket": PlannedBucket, "SourceConfig": SourceConfig}
    for module in (plan_module, held_out_module):
        results = doctest.testmod(module, extraglobs=names)
        assert results.attempted > 4
        assert results.failed == 0


@pytest.mark.parametrize("ranks", [1, 2, 6])
@pytest.mark.parametrize("counts", [((1,),), ((5, 8),), ((6, 6), (7,), (1, 2, 1))])
def test_a_pass_over_held_out_samples_has_each_of_them_once(ranks: int, counts: tuple[tuple[int, ...], ...]) -> None:
    """For any number of ranks, which all have equally many batches; the samples of a batch have one place each."""
    buckets = tuple(PlannedBucket(shards, (1, 2), 4, 4 + number) for number, shards in enumerate(counts))
    source = PlannedSource("videos", buckets, SourceConfig(batch_size=12, micro_batches=2))
    whole = HeldOutPass(Plan((source,), context_dropout=0, max_ranks=6))
    seen = []
    for number in range(len(whole)):
        shares = [whole.micro_batch(number).share(rank, ranks) for rank in range(ranks)]
        assert all(len(share.samples) > 0 and share.frames == 2 for share in shares)
        counted = [share for share in shares if share.counts]
        assert len({int(place) for share in counted for place in share.positions}) == sum(
            len(share.samples) for share in counted
        )
        seen += [(share.bucket, int(sample)) for share in counted for sample in share.samples]
    assert sorted(seen) == [(number, sample) for number, shards in enumerate(counts) for sample in range(sum(shards))]
    assert sum(whole.micro_batch(number).weight for number in range(len(whole))) == pytest.approx(1)


# Prefetching


@PLANS
@pytest.mark.parametrize(("window", "number"), [(1, 6), (10, 0), (10, 33), (25, 92), (1000, 1)])
def test_shards_ahead_are_those_of_the_current_and_next_windows(
    make: Callable[..., Plan], window: int, number: int
) -> None:
    plan = make(window=window)
    ahead = plan.shards_ahead(number)
    assert len(set(ahead)) == len(ahead)
    for source, planned in enumerate(plan.sources):
        before, later = (used_by_bucket(plan, source, end) for end in (number, number + 250))
        for place, counts in enumerate(bucket.counts for bucket in planned.buckets):
            position, listed = len(before[place]), [shard for s, b, shard in ahead if (s, b) == (source, place)]
            stream = plan._orders[source].buckets[place]
            (_, current), (_, following), (after_next, _) = islice(stream.windows_from(position), 3)
            assert listed == list(dict.fromkeys(current + following))
            assert after_next <= len(later[place])
            samples = later[place][position:after_next]
            assert set(np.repeat(np.arange(len(counts)), counts)[samples]) <= set(listed)


def test_shards_ahead_are_in_the_order_of_their_use() -> None:
    """First the current shards; then, with windows of one shard, the next window that starts soonest."""
    plan = Plan(
        (PlannedSource("images", (bucket(*[10] * 6), bucket(*[30] * 2)), SourceConfig(batch_size=1, shuffle_window=1)),)
    )
    small, large = plan._orders[0].buckets
    first_buckets = Counter[int]()
    for number in range(400):
        first, second, *others = plan.shards_ahead(number)
        _, counts = plan._orders[0].locate(number)
        current = [next(stream.windows_from(count))[1] for stream, count in zip((small, large), counts, strict=True)]
        assert [first, second] == [(0, 0, *current[0]), (0, 1, *current[1])]
        left = [10 - counts[0] % 10, 30 - counts[1] % 30]
        if len(others) == 2 and left[0] != left[1]:  # otherwise the next window of a bucket is its current one
            assert [bucket for _, bucket, _ in others] == ([0, 1] if left[0] < left[1] else [1, 0])
            first_buckets[others[0][1]] += 1
    assert min(first_buckets[0], first_buckets[1]) > 5


def test_shards_ahead_need_no_permutation_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("samples are permuted")

    monkeypatch.setattr(BucketOrder, "_window_order", fail)
    with pytest.raises(AssertionError, match="samples are permuted"):
        mixture().micro_batch(7)
    assert mixture(window=10).shards_ahead(7)


# Invalid settings


def videos(buckets: tuple[PlannedBucket, ...] = (bucket(5),), batch_size: int = 4, **settings: Any) -> PlannedSource:
    return PlannedSource("videos", buckets, SourceConfig(batch_size=batch_size, **settings))


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        (videos(()), {}, "the source 'videos' holds no samples"),
        (
            videos(micro_batches=3),
            {},
            "batch_size is 4, which is no multiple of micro_batches x data.max_ranks = 3 x 1: make it",
        ),
        (videos(micro_batches=0), {}, r"data\.videos\.micro_batches is 0; it must be at least 1"),
        (videos(), {"max_ranks": 8}, "= 1 x 8: make it a multiple, or lower one of these"),
        (videos(weight=0.0), {}, r"data\.videos\.weight is 0\.0; it must be positive"),
        (videos(weight=float("inf")), {}, r"data\.videos\.weight is inf; it must be positive and finite"),
        (videos(), {"sampling": "random"}, "data.sampling is random: choose one of joint, alternate"),
        (videos(shuffle_window=0), {}, r"data\.videos\.shuffle_window is 0; it must be at least 1"),
        (videos(tokens=100), {}, r"data\.videos has batch_size = 4 and tokens = 100: give one of them"),
        (videos(batch_size=0), {}, r"data\.videos has batch_size = 0 and tokens = 0: give one of them"),
        (
            videos((bucket(5, lengths=(2, 3)),), batch_size=0, tokens=95, micro_batches=2),
            {"max_ranks": 4},
            r"data\.videos\.tokens is 95, too few for one sample of 3x4x4 latent pixels in each of 2 micro-batches on "
            r"each of 4 ranks: give at least 96, or lower micro_batches or max_ranks",
        ),
        (videos(), {"context_dropout": 1.1}, "context_dropout is 1.1"),
        (videos(), {"context_dropout": -0.1}, "context_dropout is -0.1"),
        (None, {}, "no source of data is in use"),
    ],
)
def test_invalid_settings_are_rejected(source: PlannedSource | None, settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Plan((source,) if source else (), **settings)  # type: ignore[arg-type]


def test_alternating_sources_with_different_numbers_of_micro_batches_are_refused() -> None:
    sources = mixture().sources
    with pytest.raises(
        InputError,
        match=r"data\.images\.micro_batches = 2 and data\.videos\.micro_batches = 3: give all sources the same number",
    ):
        Plan(sources, max_ranks=8, sampling="alternate")
