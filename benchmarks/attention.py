"""`python -m benchmarks.attention`: time of frame-causal attention, compared with one call with a dense mask.

The inputs are the clean and noisy frames of one clip, with the heads of GPDiT-B; forward and backward passes are timed.
The result is the ratio of the median times, which grows with the share of query-key pairs that the mask excludes.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gpdit_lightning.model.attention import KV, QKV, BlockSizes, block_causal_attention, select_backend
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


def median_seconds(run: Callable[[], Tensor], inputs: list[Tensor], repeats: int) -> float:
    """Return the median time of a forward and a backward pass in seconds."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        torch.autograd.grad(run().sum(), inputs)
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first run is a warm-up


def time_both(variant: AttentionVariant, frames: int, device: str, repeats: int) -> tuple[float, float]:
    """Return the seconds that the sliced computation and the computation with a dense mask take."""
    clean, noisy = (frames - 1) * TOKENS, frames * TOKENS
    shape = (1, clean + noisy, HEADS, HEAD_WIDTH)
    inputs = [torch.randn(shape, device=device, requires_grad=True) for _ in range(3)]
    operator = select_backend("auto", device, torch.float32)
    mask = dense_mask(variant, frames).to(device)

    def sliced() -> Tensor:
        streams = [(x[:, :clean], x[:, clean:]) for x in inputs]
        outputs = block_causal_attention(
            operator,
            variant,
            BlockSizes.of_frames(frames, TOKENS),
            KV(streams[1][0], streams[2][0]),
            QKV(*(stream[0] for stream in streams)),
            QKV(*(stream[1] for stream in streams)),
        )
        return torch.cat([out for out in outputs if out is not None], dim=1)

    def dense() -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in inputs)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    torch.testing.assert_close(sliced(), dense(), rtol=1e-3, atol=1e-4)
    return median_seconds(sliced, inputs, repeats), median_seconds(dense, inputs, repeats)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each computation")
    parser.add_argument("--frames", type=int, nargs="+", default=[5, 12], help="numbers of latent frames of the clip")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(
        f"{device}, {torch.get_num_threads()} threads, float32, {HEADS} heads of width {HEAD_WIDTH}, "
        f"{TOKENS} tokens per frame"
    )
    print(f"{'variant':<9}{'frames':>7}{'sliced s':>10}{'dense s':>10}{'dense/sliced':>14}")
    for frames in options.frames:
        for variant in ("of2", "of"):
            sliced, dense = time_both(variant, frames, device, options.repeats)
            print(f"{variant:<9}{frames:>7}{sliced:>10.3f}{dense:>10.3f}{dense / sliced:>14.2f}")


if __name__ == "__main__":
    main()
