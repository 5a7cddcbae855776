"""`python -m benchmarks.attention`: time of frame-causal attention by each backend, and by one call with a dense mask.

The inputs are the clean and noisy frames of one clip, with the heads of GPDiT-B; forward and backward passes are timed.
The result is the ratio of the median times, which grows with the share of query-key pairs that the mask excludes.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from gpdit_lightning.model.attention import KV, QKV, BlockSizes, PlannedAttention, plan_attention
from gpdit_lightning.model.attention.backends import BACKENDS, BUILT_IN, built_in_failure
from gpdit_lightning.model.config import AttentionVariant

HEADS, HEAD_WIDTH, TOKENS = 12, 64, 240


def dense_mask(variant: AttentionVariant, frames: int) -> Tensor:
    """Return the attention mask of tokens [clean 0 .. F-2; noisy 0 .. F-1], (queries, keys), True where allowed."""
    clean = frames - 1
    allowed = torch.zeros(clean + frames, clean + frames, dtype=torch.bool)
    for i in range(clean):
        allowed[i, : i + 1] = True
        if variant == "of":
            allowed[i, :i] = False
    for i in range(frames):
        allowed[clean + i, :i] = True
        allowed[clean + i, clean + i] = True
    return allowed.repeat_interleave(TOKENS, 0).repeat_interleave(TOKENS, 1)


def median_seconds(run: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor], repeats: int) -> float:
    """Return the median time of a forward and a backward pass in seconds."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        outputs = run()
        torch.autograd.grad(outputs, inputs, [torch.ones_like(out) for out in outputs])
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first run is a warm-up


def time_all(
    variant: AttentionVariant, frames: int, device: torch.device, repeats: int
) -> tuple[float, dict[str, float | str]]:
    """Return the seconds that the dense mask takes, and those of each backend, or the reason why it is not timed."""
    sizes = BlockSizes.of_frames(frames, TOKENS)
    clean, noisy = sum(sizes.clean), sum(sizes.noisy)
    inputs = [torch.randn(1, clean + noisy, HEADS, HEAD_WIDTH, device=device, requires_grad=True) for _ in range(3)]
    mask = dense_mask(variant, frames).to(device)
    plan = plan_attention(variant, sizes, clips=1, rows=1)

    def dense() -> list[Tensor]:
        q, k, v = (x.transpose(1, 2) for x in inputs)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        return list(out.split((clean, noisy), dim=1))

    def planned(backend: str) -> list[Tensor]:
        parts = [QKV(*part) for part in zip(*(x.split((clean, noisy), dim=1) for x in inputs), strict=True)]
        return PlannedAttention.of(BACKENDS[backend], plan, device)(KV(parts[0].key, parts[0].value), parts)

    expected = dense()
    results: dict[str, float | str] = {}
    for backend in BUILT_IN:
        reason = built_in_failure(backend, device.type, torch.float32, HEAD_WIDTH, gradient=True)
        if reason is None:
            torch.testing.assert_close(planned(backend), expected, rtol=1e-3, atol=1e-4)
            results[backend] = median_seconds(partial(planned, backend), inputs, repeats)
        else:
            results[backend] = reason
    return median_seconds(dense, inputs, repeats), results


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each computation")
    parser.add_argument("--frames", type=int, nargs="+", default=[5, 12], help="numbers of latent frames of the clip")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(
        f"{device}, {torch.get_num_threads()} threads, float32, {HEADS} heads of width {HEAD_WIDTH}, "
        f"{TOKENS} tokens per frame"
    )
    print(f"{'variant':<9}{'frames':>7}  {'backend':<25}{'seconds':>10}{'dense/seconds':>15}")
    for frames in options.frames:
        for variant in get_args(AttentionVariant):
            dense_seconds, times = time_all(variant, frames, device, options.repeats)
            for backend, seconds in {**times, "dense mask": dense_seconds}.items():
                text = f"not run: {seconds}"
                if isinstance(seconds, float):
                    text = f"{seconds:>10.3f}{dense_seconds / seconds:>15.2f}"
                print(f"{variant:<9}{frames:>7}  {backend:<25}{text}")


if __name__ == "__main__":
    main()
