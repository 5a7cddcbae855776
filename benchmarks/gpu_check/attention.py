"""Attention: each backend against a dense float64 reference, with its kernel and its times."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from benchmarks.generation import median_seconds
from benchmarks.gpu_check.cases import Case, NotRunError, Part, Row, Setup
from benchmarks.gpu_check.fitting import STAGE2, STAGE3
from gpdit_lightning.model import GPDiTConfig
from gpdit_lightning.model.attention import KV, QKV, BlockSizes, PlannedAttention, plan_attention
from gpdit_lightning.model.attention.backends import BACKENDS, BUILT_IN
from gpdit_lightning.model.attention.trial import Inputs, kernel_of
from gpdit_lightning.model.config import AttentionVariant

# Largest allowed error, relative to the largest reference value: a few roundings, far below the effect of a wrong mask.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


class Shape(NamedTuple):
    """The shape of attention in a layer.

    Attributes:
        size: size of the backbone.
        heads: number of heads.
        head_width: width of a head.
        clips: clips of a micro-batch.
        frames: latent frames of a clip.
        tokens: tokens of a frame.
    """

    size: str
    heads: int
    head_width: int
    clips: int
    frames: int
    tokens: int


def shapes(setup: Setup) -> list[Shape]:
    """Return the shapes of a GPU's share of the recipes of stages 2 and 3, at 192x320."""
    if setup.smoke_test:
        return [Shape("tiny", 2, 16, 1, 3, 6)]
    models = [GPDiTConfig.preset(size) for size in ("H", "B")]
    return [
        Shape(model.size, model.heads, model.head_width, setup.clips or share.clips, share.frames, tokens=12 * 20)
        for share in (STAGE2, STAGE3)
        for model in models
    ]


def reference_attention(variant: AttentionVariant, tokens: int, clean: QKV, noisy: QKV) -> tuple[Tensor, Tensor]:
    """Compute frame-causal attention with a dense mask, one clip at a time, in the precision of the inputs."""

    def attend(qkv: QKV, allowed: Tensor) -> Tensor:
        scores = torch.einsum("qhk,mhk->hqm", qkv.query, qkv.key) / math.sqrt(qkv.query.shape[-1])
        weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
        return torch.einsum("hqm,mhk->qhk", weights, qkv.value)

    device, clean_count = noisy.query.device, clean.query.shape[1]
    clean_frames, noisy_frames = (torch.arange(x.query.shape[1], device=device) // tokens for x in (clean, noisy))
    frame = torch.cat((clean_frames, noisy_frames))
    is_clean = torch.arange(len(frame), device=device) < clean_count
    same_frame = (frame[:, None] == frame) & (is_clean[:, None] == is_clean)
    earlier_clean = is_clean & (frame < frame[:, None])
    allowed = same_frame | (earlier_clean if variant == "of2" else earlier_clean & ~is_clean[:, None])

    clean_out, noisy_out = [], []
    for clip in range(len(noisy.query)):
        if clip < len(clean.query):
            both = QKV(*(torch.cat((c[clip], n[clip])) for c, n in zip(clean, noisy, strict=True)))
            out = attend(both, allowed)
            clean_out.append(out[:clean_count])
            noisy_out.append(out[clean_count:])
        else:
            without_context = QKV(*(x[clip] for x in noisy))
            noisy_out.append(attend(without_context, same_frame[clean_count:, clean_count:]))
    return torch.stack(clean_out), torch.stack(noisy_out)


def attention_errors(
    backend: str, variant: AttentionVariant, dtype: torch.dtype, shape: Shape, device: torch.device
) -> tuple[float, float]:
    """Return the largest forward and backward errors on three clips with two heads; the last clip has no context."""
    tokens = shape.tokens
    generator = torch.Generator(device).manual_seed(0)

    def random_qkv(clips: int, frames: int) -> QKV:
        of_part = (clips, frames * tokens, 2, shape.head_width)
        tensors = (torch.randn(of_part, device=device, generator=generator).to(dtype) for _ in range(3))
        return QKV(*(x.requires_grad_() for x in tensors))

    clean, noisy = random_qkv(2, shape.frames - 1), random_qkv(3, shape.frames)
    plan = plan_attention(variant, BlockSizes.of_frames(shape.frames, tokens), clips=2, rows=3)
    parts = [clean, QKV(*(x[:2] for x in noisy)), QKV(*(x[2:] for x in noisy))]
    attention = PlannedAttention.of(BACKENDS[backend], plan, clean.key.device)
    clean_out, with_context, without = attention(KV(clean.key, clean.value), parts)
    outputs = (clean_out, torch.cat((with_context, without)))
    cotangents = [torch.randn(x.shape, device=x.device, generator=generator).to(dtype) for x in (clean[0], noisy[0])]
    gradients = torch.autograd.grad(outputs, (*clean, *noisy), cotangents)

    exact_clean, exact_noisy = (QKV(*(x.detach().double().requires_grad_() for x in q)) for q in (clean, noisy))
    exact = reference_attention(variant, tokens, exact_clean, exact_noisy)
    exact_gradients = torch.autograd.grad(exact, (*exact_clean, *exact_noisy), [x.double() for x in cotangents])

    def largest_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
        if not all(x.isfinite().all() for x in actual):
            raise ArithmeticError("the backend returned values that are not finite")
        return max(
            ((x.double() - y).abs().amax() / y.abs().amax()).item() for x, y in zip(actual, expected, strict=True)
        )

    return largest_error(outputs, exact), largest_error(gradients, exact_gradients)


def times(backend: str, variant: AttentionVariant, dtype: torch.dtype, shape: Shape, device: torch.device) -> Row:
    """Return the kernel that computes a layer in which every clip has context, and the times of its passes."""
    sizes = BlockSizes.of_frames(shape.frames, shape.tokens)
    plan = plan_attention(variant, sizes, clips=shape.clips, rows=shape.clips)
    inputs = Inputs.random(plan, shape.heads, shape.head_width, device, dtype, gradient=True)
    planned = PlannedAttention.of(BACKENDS[backend], plan, device)
    forward = median_seconds(lambda: planned(inputs.context, inputs.parts), device)
    both = median_seconds(lambda: inputs.backward(planned(inputs.context, inputs.parts)), device)
    return {
        "kernel": kernel_of(BACKENDS[backend], plan, inputs),
        "forward_ms": 1000 * forward,
        "backward_ms": 1000 * (both - forward),
    }


def compare(
    backend: str, variant: AttentionVariant, dtype: torch.dtype, shape: Shape, device: torch.device, timed: bool
) -> Row:
    """Compare a backend with the reference, and time it if `timed`.

    Raises:
        NotRunError: the backend cannot be used.
    """
    reason = BACKENDS[backend].obstacle(device.type, dtype, gradient=True)
    if reason:
        raise NotRunError(reason)
    forward, backward = attention_errors(backend, variant, dtype, shape, device)
    tolerance = TOLERANCES[dtype]
    row: Row = {"forward_error": forward, "backward_error": backward, "tolerance": tolerance}
    if not max(forward, backward) <= tolerance:
        row["failure"] = "an error exceeds the tolerance"
    return row | (times(backend, variant, dtype, shape, device) if timed else {})


def cases(setup: Setup) -> list[Case]:
    """Return the cases of all backends; one that cannot be used is one case."""
    return [case for backend in BUILT_IN for case in _cases_of(backend, setup)]


def _cases_of(backend: str, setup: Setup) -> Iterator[Case]:
    """Yield the cases of a backend: bf16, which is timed, then float32 at the first length of clips."""
    device, of_recipes = setup.device, shapes(setup)
    if BACKENDS[backend].obstacle(device.type, torch.bfloat16, gradient=True):
        yield Case({"backend": backend}, partial(compare, backend, "of2", torch.bfloat16, of_recipes[0], device, True))
        return
    in_float32 = [shape for shape in of_recipes if shape.frames == of_recipes[0].frames]
    for dtype, compared in ((torch.bfloat16, of_recipes), (torch.float32, in_float32)):
        for shape in compared:
            for variant in get_args(AttentionVariant):
                labels = {
                    "backend": backend,
                    "variant": variant,
                    "dtype": str(dtype).removeprefix("torch."),
                    "size": shape.size,
                    "head_width": shape.head_width,
                    "clips": shape.clips,
                    "frames": shape.frames,
                }
                timed = dtype == torch.bfloat16
                yield Case(labels, partial(compare, backend, variant, dtype, shape, device, timed))


PART = Part(
    name="attention",
    title="Attention of a layer, against a dense float64 reference, at 240 tokens per frame",
    share=130,
    columns={
        "backend": ("backend", ""),
        "kernel": ("kernel", ""),
        "variant": ("mask", ""),
        "dtype": ("precision", ""),
        "size": ("model", ""),
        "head_width": ("head width", "d"),
        "clips": ("clips", "d"),
        "frames": ("latent frames", "d"),
        "forward_error": ("forward error", ".1e"),
        "backward_error": ("backward error", ".1e"),
        "tolerance": ("tolerance", ".0e"),
        "forward_ms": ("forward ms", ".3f"),
        "backward_ms": ("backward ms", ".3f"),
    },
    cases=cases,
    note="Errors are relative to the largest reference value, of two heads and three clips, one without context. Times "
    "are of all heads and clips, each clip with context; medians of 10.",
)
