"""The plan covers exactly what the mask allows, and nothing more is computed."""

from collections import Counter

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gpdit_lightning.model.attention import Segment, attention_plan
from tests.model import oracle
from tests.model.toys import toy_batch, toy_config, toy_model

VARIANTS = ("of2", "of")


def pairs(plan: tuple[Segment, ...], cached: int) -> Counter[tuple[oracle.Block, oracle.Block]]:
    """How often each (query frame, key frame) is computed; `cached` frames were cached before the clean queries."""
    computed: Counter[tuple[oracle.Block, oracle.Block]] = Counter()
    for segment in plan:
        for frame in range(segment.start, segment.stop):
            query = (segment.stream, cached + frame)
            computed.update((query, ("clean", j)) for j in range(segment.context_frames))
            computed.update([(query, query)] if segment.own_keys else [])
    return computed


def allowed(variant: str, queries: list[oracle.Block], keys: list[oracle.Block]) -> Counter:
    """The dense rule over frames."""
    return Counter((query, key) for query in queries for key in keys if oracle.attends(variant, query, key))


def stream(name: str, start: int, stop: int) -> list[oracle.Block]:
    return [(name, frame) for frame in range(start, stop)]


def assert_each_query_once(plan: tuple[Segment, ...], clean: int, noisy: int) -> None:
    """And in order: the outputs are concatenated in the order of the plan."""
    queries = [(segment.stream, frame) for segment in plan for frame in range(segment.start, segment.stop)]
    assert queries == stream("clean", 0, clean) + stream("noisy", 0, noisy)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_forward(variant: str, frames: int) -> None:
    context = frames - 1
    plan = attention_plan(variant, context, clean_queries=context, context_lengths=range(frames))
    queries = stream("clean", 0, context) + stream("noisy", 0, frames)
    assert pairs(plan, cached=0) == allowed(variant, queries, queries)
    assert_each_query_once(plan, context, frames)
    noisy_pairs = frames * (frames + 1) // 2
    clean_pairs = {"of2": frames * (frames - 1) // 2, "of": frames - 1}[variant]
    assert pairs(plan, cached=0).total() == noisy_pairs + clean_pairs


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_last_block_has_queries_of_noisy_frames_only(variant: str) -> None:
    frames = 5
    plan = attention_plan(variant, frames - 1, clean_queries=0, context_lengths=range(frames))
    queries = stream("noisy", 0, frames)
    assert pairs(plan, cached=0) == allowed(variant, queries, stream("clean", 0, frames - 1) + queries)
    assert_each_query_once(plan, 0, frames)
    assert pairs(plan, cached=0).total() == frames * (frames + 1) // 2


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("cached", "new"), [(0, 4), (3, 1), (3, 5)])
def test_extend(variant: str, cached: int, new: int) -> None:
    plan = attention_plan(variant, cached + new, clean_queries=new, context_lengths=())
    queries = stream("clean", cached, cached + new)
    assert pairs(plan, cached) == allowed(variant, queries, stream("clean", 0, cached + new))
    assert_each_query_once(plan, new, 0)
    expected = {"of2": new * cached + new * (new + 1) // 2, "of": new}[variant]
    assert pairs(plan, cached).total() == expected


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cached", [0, 7])
def test_denoise(variant: str, cached: int) -> None:
    plan = attention_plan(variant, cached, clean_queries=0, context_lengths=[cached])
    queries = [("noisy", cached)]
    assert pairs(plan, cached) == allowed(variant, queries, stream("clean", 0, cached) + queries)
    assert_each_query_once(plan, 0, 1)
    assert pairs(plan, cached).total() == cached + 1


def test_no_clip_with_context_means_no_segments() -> None:
    assert attention_plan("of2", 0, clean_queries=0, context_lengths=()) == ()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("clips", "context_clips", "frames"), [(3, 1, 5), (2, 2, 2), (2, 2, 1), (2, 0, 5)])
def test_masked_scores_are_not_computed(variant: str, clips: int, context_clips: int, frames: int) -> None:
    """FLOPs of the products as they run, against the pairs of tokens in the dense mask."""
    layers, tokens, patch_values = 3, 6, 12
    config = toy_config(attention=variant, layers=layers)
    model = toy_model(config)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(*toy_batch(clips, context_clips, frames))
    counts = counter.get_flop_counts()["Global"]

    clean = stream("clean", 0, frames - 1) if context_clips else []
    noisy = stream("noisy", 0, frames)
    per_context_clip = {
        name: int(oracle.dense_mask(clean + noisy, variant, [tokens] * len(clean + noisy))[rows].sum())
        for name, rows in (("clean", slice(0, len(clean) * tokens)), ("noisy", slice(len(clean) * tokens, None)))
    }
    alone = (clips - context_clips) * frames * tokens**2
    token_pairs = (layers - 1) * context_clips * per_context_clip["clean"]
    token_pairs += layers * (context_clips * per_context_clip["noisy"] + alone)
    assert counts[torch.ops.aten.bmm] == 4 * token_pairs * config.width  # scores and weighted values: 2 each, all heads

    noisy_tokens = clips * frames * tokens
    clean_tokens = context_clips * (frames - 1) * tokens
    all_tokens = noisy_tokens + clean_tokens
    per_query = config.width * (2 * config.width + 2 * config.mlp_width)  # weights of query, attention output, MLP
    per_key = config.width * 2 * config.width  # of keys and values
    weights = all_tokens * (layers * per_key + (layers - 1) * per_query) + noisy_tokens * per_query
    assert counts[torch.ops.aten.mm] == 2 * weights
    assert counts[torch.ops.aten.addmm] == 2 * patch_values * config.width * (all_tokens + noisy_tokens)
    assert set(counts) == {torch.ops.aten.bmm, torch.ops.aten.mm, torch.ops.aten.addmm}


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_steps_compute_only_the_new_frame(variant: str) -> None:
    model = toy_model(attention=variant, layers=3)
    noisy, theta, clean = toy_batch(2, frames=4)
    cache = model.new_cache(2, 4, 4, 6)
    model.extend(cache, clean[:, :2])
    attention = {}
    for name, step in (
        ("extend", lambda: model.extend(cache, clean[:, 2:3])),
        ("denoise", lambda: model.denoise(noisy[:, 3], theta[:, 3], cache)),
    ):
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            step()
        attention[name] = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    rolling = model.new_cache(2, 3, 4, 6, sinks=1)
    model.extend(rolling, clean[:, :3])
    counter = FlopCounterMode(display=False)
    guided = torch.cat((noisy, noisy))[:, 3]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model.denoise(guided, torch.cat((theta, theta))[:, 3], rolling, clean=clean[:, 3:])
    attention["both"] = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]

    pair = 2 * 4 * 6 * 6 * model.config.width  # one pair of frames, two clips
    assert attention["extend"] == 2 * pair * {"of2": 3, "of": 1}[variant]  # the last layer only gives keys and values
    assert attention["denoise"] == 3 * pair * 4
    # The clean frame, the noisy one after a full window of 3, and its copy that attends to itself alone.
    assert attention["both"] == pair * (2 * {"of2": 3, "of": 1}[variant] + 3 * (4 + 1))
