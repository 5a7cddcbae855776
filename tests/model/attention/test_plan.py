"""The plan covers exactly what the mask allows, and nothing more is computed."""

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gpdit_lightning.model.attention import Segment
from gpdit_lightning.model.attention.plan import plan_segments
from gpdit_lightning.model.config import AttentionVariant
from tests.model import oracle
from tests.model.toys import toy_batch, toy_config, toy_model

VARIANTS = ("of2", "of")


FRAME = 2  # tokens
SIZES = ((2, 2, 2, 2), (2,), (4, 4, 4), (2, 4, 4, 6), (6, 2, 2))  # tokens of the blocks of a clip, which are frames


def pairs(plan: tuple[Segment, ...], first_clean: int) -> Counter[tuple[tuple[str, int], tuple[str, int]]]:
    """How often each pair of tokens, a query and a key, is computed.

    Args:
        plan: its queries follow each other.
        first_clean: number of cached tokens before the first clean query.
    """
    computed: Counter[tuple[tuple[str, int], tuple[str, int]]] = Counter()
    position = {"clean": first_clean, "noisy": 0}
    segments_of: dict[str, list[range]] = {"clean": [], "noisy": []}
    for segment in plan:
        for _ in range(segment.blocks):
            start = position[segment.stream]
            segments_of[segment.stream].append(range(start, start + segment.tokens))
            position[segment.stream] += segment.tokens
            own = segments_of[segment.stream][len(segments_of[segment.stream]) - segment.own_segments :]
            keys = [("clean", k) for k in range(segment.context_tokens)]
            keys += [(segment.stream, k) for tokens in own for k in tokens]
            computed.update(((segment.stream, q), key) for q in segments_of[segment.stream][-1] for key in keys)
    return computed


def allowed(
    variant: str, sizes: Sequence[int], causal: bool, queries: dict[str, range]
) -> Counter[tuple[tuple[str, int], tuple[str, int]]]:
    """The dense rule over tokens: from (block, frame, stream) of the query and of the key."""
    block_of = [block for block, size in enumerate(sizes) for _ in range(size)]

    def attends(query: tuple[str, int], key: tuple[str, int]) -> bool:
        own, other = block_of[query[1]], block_of[key[1]]
        if own == other and query[0] == key[0]:
            return not causal or key[1] // FRAME <= query[1] // FRAME
        return key[0] == "clean" and other < own and (query[0] == "noisy" or variant == "of2")

    tokens = [(stream, token) for stream, of_stream in queries.items() for token in of_stream]
    keys = [(stream, token) for stream in ("clean", "noisy") for token in range(len(block_of))]
    return Counter((query, key) for query in tokens for key in keys if attends(query, key))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sizes", SIZES)
def test_a_pass_computes_allowed_pairs_once(sizes: tuple[int, ...], variant: AttentionVariant, causal: bool) -> None:
    """Training; its last layer, which has no clean queries; extending a cache; and denoising the last block."""
    total, context = sum(sizes), sum(sizes[:-1])
    contexts = tuple(sum(sizes[:block]) for block in range(len(sizes)))
    tokens, last = FRAME if causal else None, sizes[-1]

    def check(plan: tuple[Segment, ...], clean: range, noisy: range) -> None:
        shifted = pairs(plan, clean.start)
        moved = noisy.start  # the noisy tokens of a plan are counted from its first noisy block
        computed = Counter(
            {
                tuple((name, token + moved * (name == "noisy")) for name, token in pair): count
                for pair, count in shifted.items()
            }
        )
        assert computed == allowed(variant, sizes, causal, {"clean": clean, "noisy": noisy})

    check(plan_segments(variant, context, sizes[:-1], sizes, contexts, tokens), range(context), range(total))
    check(plan_segments(variant, context, (), sizes, contexts, tokens), range(0), range(total))
    check(plan_segments(variant, total, (last,), (), (), tokens), range(context, total), range(0))
    check(plan_segments(variant, context, (), (last,), (context,), tokens), range(0), range(context, total))


def test_equal_neighbours_that_attend_to_themselves_are_one_call() -> None:
    assert plan_segments("of", 8, (2, 2, 4), (2, 2), (0, 0)) == (
        Segment("clean", 2, 2, 0, 1),
        Segment("clean", 1, 4, 0, 1),
        Segment("noisy", 2, 2, 0, 1),
    )
    assert plan_segments("of2", 0, (), (), ()) == ()


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

    clean = [("clean", frame) for frame in range(frames - 1 if context_clips else 0)]
    noisy = [("noisy", frame) for frame in range(frames)]
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
