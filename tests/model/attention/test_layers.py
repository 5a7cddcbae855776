"""Backends that compute a layer in one call: masks, caches, padding, and FlexAttention itself, forward on a CPU."""

import importlib.util
import shutil
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention.flex_attention import flex_attention

from gpdit_lightning import InputError
from gpdit_lightning.model.attention import BlockSizes, PlannedAttention, backends, plan_attention
from gpdit_lightning.model.attention.flex import BLOCK, flex_tables
from gpdit_lightning.model.attention.gather import attention_calls, collect_outputs
from gpdit_lightning.model.attention.plan import AttentionPlan
from gpdit_lightning.model.attention.trial import Inputs, check_backend, measure, saved_bytes
from gpdit_lightning.model.attention.xformers_backends import block_diagonal_mask, block_lengths
from tests.model.attention.emulated import PLAN_BACKENDS, allowed_pairs, emulated_operators
from tests.model.attention.emulated import flex_attention as by_definition
from tests.model.toys import assert_near, toy_batch, toy_model

CPU = torch.device("cpu")
FRAMES = BlockSizes.of_frames(4, 6)
CAUSAL = BlockSizes((4, 4), (4, 4, 4), (0, 4, 8), causal_tokens=2)
PLANS: dict[str, AttentionPlan] = {
    "of2": plan_attention("of2", FRAMES, clips=2, rows=5, draws=2),
    "of, with labels": plan_attention("of", FRAMES, clips=2, rows=3, prefix_tokens=1),
    "last layer": plan_attention("of2", FRAMES, clips=2, rows=3, prefix_tokens=2, all_queries=False),
    "causal": plan_attention("of", CAUSAL, clips=1, rows=2),
    "unequal blocks": plan_attention("of2", BlockSizes((2, 6), (2, 6, 4), (0, 2, 8)), clips=2, rows=2),
    "one block": plan_attention("of2", BlockSizes((), (150,), (0,)), clips=0, rows=3),
    "a cache": plan_attention("of2", BlockSizes((6,), (6,), (18,)), clips=2, rows=4, draws=1, cached_tokens=12),
    "clean alone": plan_attention("of2", BlockSizes((6, 6)), clips=2, rows=0),
}
BY_PLAN = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


@pytest.fixture(autouse=True)
def _emulated() -> Iterator[None]:
    with emulated_operators():
        yield


def pairs_of_calls(plan: AttentionPlan) -> list[Tensor]:
    """How often each call lets a query attend to a key, (batch, M, 1, keys), from values that number the keys.

    The keys are those of the context, and then those of each part.
    """
    inputs = Inputs.random(plan, 1, 6, CPU, torch.float64, gradient=False)
    sources = [*([inputs.context] if inputs.context else []), *inputs.parts]
    counts = [x.value.shape[0] * x.value.shape[1] for x in sources]
    numbers = torch.eye(sum(counts), dtype=torch.float64)[:, None].split(counts)
    values = [one.unflatten(0, x.value.shape[:2]) for one, x in zip(numbers, sources, strict=True)]
    context = inputs.context._replace(value=values.pop(0)) if inputs.context else None
    parts = [part._replace(value=value) for part, value in zip(inputs.parts, values, strict=True)]
    calls = attention_calls(plan, context, parts)
    return [call.value.sum(1, keepdim=True).expand(-1, call.query.shape[1], -1, -1) for call in calls]


@BY_PLAN
@pytest.mark.parametrize("name", PLAN_BACKENDS)
def test_a_layer_equals_its_sliced_calls(plan: AttentionPlan, name: str) -> None:
    """Outputs and gradients; the trial itself finds a difference."""
    inputs = Inputs.random(plan, 2, 8, CPU, torch.float64, gradient=True)
    check_backend(backends.BACKENDS[name], plan, inputs, gradient=True)
    attention = PlannedAttention.of(backends.BACKENDS[name], plan, CPU)
    expected = PlannedAttention.of(backends.BACKENDS["sdpa"], plan, CPU)(inputs.context, inputs.parts)
    for out, right in zip(attention(inputs.context, inputs.parts), expected, strict=True):
        assert_near(out, right, 1e-12)


@BY_PLAN
def test_the_mask_of_xformers_has_the_pairs_of_the_plan(plan: AttentionPlan) -> None:
    if importlib.util.find_spec("xformers") is None:
        pytest.skip("xformers is not installed")
    lengths = block_lengths(plan)
    queries, keys = (sum(counts) for counts in zip(*lengths, strict=True))
    mask = block_diagonal_mask(lengths, CPU).materialize((queries, keys)) == 0
    # The gathered keys are those of the sliced calls, in the same order.
    calls = pairs_of_calls(plan)
    assert mask.sum(1).tolist() == torch.cat([call.flatten(0, 1).sum((1, 2)) for call in calls]).tolist()
    assert torch.equal(mask, torch.block_diag(*(torch.ones(length, dtype=torch.bool) for length in lengths)))


def unmasked(plan: AttentionPlan) -> list[int]:
    """The numbers of keys of the context and of each part."""
    return [plan.clips * plan.context_tokens, *(rows.rows * sum(rows.key_lengths) for rows in plan.parts)]


@BY_PLAN
def test_the_block_mask_has_the_pairs_of_the_plan(plan: AttentionPlan) -> None:
    """No pair twice and none that is masked; padding is a key for no query."""
    tables = flex_tables(plan, CPU)
    allowed = allowed_pairs(tables.mask)
    assert tables.mask.seq_lengths == tuple(allowed.shape)
    assert not any(length % BLOCK for length in allowed.shape)
    pairs = torch.cat([out.flatten(0, 2) for out in collect_outputs(plan, pairs_of_calls(plan))])
    of_context, *of_parts = pairs.split(unmasked(plan), dim=1)
    assert [rows.has_own_keys for rows in plan.parts] == [bool(of_part.any()) for of_part in of_parts]
    attended = torch.cat([of_context, *(of_part for of_part in of_parts if of_part.any())], dim=1)
    assert torch.equal(allowed[tables.queries][:, tables.keys].double(), attended)
    assert torch.equal(allowed.sum(1)[tables.queries], attended.sum(1).long())
    assert allowed.any(1).all()  # also for padded queries, so that no softmax is over nothing


def test_frames_of_240_tokens_are_padded_to_whole_blocks() -> None:
    """The blocks of a training pass at 192x320 are those of the frames, and no pair of blocks is visited in vain."""
    plan = plan_attention("of2", BlockSizes.of_frames(5, 240), clips=1, rows=1)
    tables = flex_tables(plan, CPU)
    assert (tables.padded_queries, tables.padded_keys) == (9 * 256, 9 * 256)  # clean keys are those of the context
    visited = (tables.mask.kv_num_blocks + tables.mask.full_kv_num_blocks)[0, 0].view(9, 2)
    assert visited.tolist() == [[2 * frames] * 2 for frames in (1, 2, 3, 4, 1, 2, 3, 4, 5)]
    assert (tables.mask.full_kv_num_blocks * 2 == tables.mask.full_kv_num_blocks + tables.mask.kv_num_blocks).all()


@pytest.mark.parametrize("name", PLAN_BACKENDS)
@pytest.mark.parametrize("variant", ["of2", "of"])
def test_generation_with_a_window_and_sinks(name: str, variant: str) -> None:
    """A rolling cache in bf16, guidance rows without context, and a frame that is appended in the same pass."""
    made = []
    for backend in ("sdpa", name):
        model = toy_model(attention=variant, attention_backend=backend, classes=2)
        noisy, theta, clean = toy_batch(2, 2, frames=6)
        with torch.no_grad():
            cache = model.new_cache(2, 3, 4, 6, sinks=1)
            outputs = []
            for frame in range(1, 6):
                rows, angles = noisy[:, frame].repeat(2, 1, 1, 1), theta[:, frame].repeat(2)
                appended = clean[:, frame - 1 : frame]
                labels = torch.tensor([0, 1, -1, -1])
                outputs.append(model.denoise(rows, angles, cache, labels, clean=appended))
                outputs.append(model.denoise(rows, angles, cache, labels))
        made.append(torch.stack(outputs))
    assert_near(made[1], made[0], 1e-12)


@pytest.mark.parametrize("name", ["of, with labels", "causal", "a cache"])
def test_flex_attention_of_torch_equals_its_definition(name: str) -> None:
    """Without compilation it follows the mask of single tokens; the list of blocks is tested above."""
    tables = flex_tables(PLANS[name], CPU)
    query, key, value = (
        torch.randn(1, 1, length, 16, dtype=torch.float64)
        for length in (tables.padded_queries, tables.padded_keys, tables.padded_keys)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the missing compilation
        out = flex_attention(query, key, value, block_mask=tables.mask)
    assert_near(out, by_definition(query, key, value, tables.mask), 1e-12)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_flex_attention_follows_the_blocks() -> None:
    plan = plan_attention("of2", BlockSizes.of_frames(3, 240), clips=1, rows=2)
    tables = flex_tables(plan, CPU)
    query, key, value = (
        torch.randn(1, 2, length, 64) for length in (tables.padded_queries, tables.padded_keys, tables.padded_keys)
    )
    with torch.no_grad():
        out = torch.compile(flex_attention)(query, key, value, block_mask=tables.mask)
    expected = by_definition(query, key, value, tables.mask)
    assert_near(out[:, :, tables.queries], expected[:, :, tables.queries], 1e-5)


class Faulty(type(backends.BACKENDS["sdpa"])):  # type: ignore[misc]
    """A backend of a layer that ignores the plan."""

    def attend(self, plan: Any, prepared: Any, context: Any, parts: Any) -> list[Tensor]:
        return [part.query for part in parts]


def test_a_custom_backend_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A subclass is used as it is; one that is wrong is refused by the trial."""
    monkeypatch.setattr(backends, "BACKENDS", dict(backends.BACKENDS))
    backends.register_attention_backend("layers", backends.Flex)
    batch = toy_batch(3, 2)
    assert_near(toy_model(attention_backend="layers")(*batch), toy_model()(*batch))
    backends.register_attention_backend("faulty", Faulty)
    with pytest.raises(InputError, match="'faulty' cannot be used, since a trial failed"):
        toy_model(attention_backend="faulty")(*batch)


def test_counting_saved_bytes_frees_what_was_saved() -> None:
    x, outputs = torch.ones(4, requires_grad=True), []

    def run() -> Tensor:
        y = x.exp()  # saves its output
        outputs.append(StorageWeakRef(y.untyped_storage()))
        return y * x

    assert saved_bytes(run, [x]) == 4 * 4  # of y
    assert outputs[0].expired()


def test_a_backend_is_measured_at_given_plans() -> None:
    """Times are added up as often as plans occur; gathered keys are saved; a failure is a result."""
    plans = {PLANS["of2"]: 3.0, PLANS["last layer"]: 1.0}
    results = {
        name: measure(backends.BACKENDS[name], plans, 2, 8, CPU, torch.float32)
        for name in ("sdpa", "xformers_block_diagonal", "sdpa_fa3")
    }
    assert results["sdpa"].milliseconds > 0
    assert "flash_attention_for_cpu" in results["sdpa"].kernel
    assert results["xformers_block_diagonal"].saved_bytes > results["sdpa"].saved_bytes
    assert results["sdpa_fa3"].reason == "FA3 has no kernels for cpu"
    wrong = measure(Faulty(), plans, 2, 8, CPU, torch.float32)
    assert wrong.milliseconds is None
    assert "differs from SDPA's by" in wrong.reason or "no gradient" in wrong.reason
