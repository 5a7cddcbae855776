"""`python -m benchmarks.noise_draws`: cost of training with K noisy copies of each clip (`data.noise_draws`).

Forward and backward passes of the backbone are timed; all clips have context. Times and FLOPs are per supervised frame
and relative to K = 1. The clean stream is computed once per clip, for any number of copies.
"""

import argparse
import math
import statistics
import time

import torch
import torch.nn.functional as F

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.estimation.flops import PassShape, training_flops
from gpdit_lightning.model.config import AttentionVariant

DRAWS = (1, 2, 4)


def seconds_of_pass(model: GPDiT, clips: int, frames: int, height: int, width: int, draws: int) -> float:
    """Return the time of a forward and backward pass in seconds; a GPU computes under bf16 autocast."""
    device = model.output.weight.device
    noisy, velocity = torch.randn(2, draws * clips, frames, model.config.latent_channels, height, width, device=device)
    theta = torch.rand(draws * clips, frames, device=device) * math.pi / 2
    clean = torch.randn_like(noisy[:clips])
    start = time.perf_counter()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        loss = F.mse_loss(model(noisy, theta, clean, draws=draws), velocity)
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("--size", default="B", help="size of the backbone: tiny, B or H")
    parser.add_argument("--layers", type=int, default=0, help="number of blocks; 0: as in the preset of the size")
    parser.add_argument("--clips", type=int, default=1, help="clips per batch, without noisy copies")
    parser.add_argument("--frames", type=int, default=5, help="latent frames per clip")
    parser.add_argument("--height", type=int, default=24, help="height of a latent frame, in latent pixels")
    parser.add_argument("--width", type=int, default=40, help="width of a latent frame, in latent pixels")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each computation")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (options.clips, options.frames, options.height, options.width)
    print(f"{device}, {torch.get_num_threads()} threads, {options.size}, (clips, frames, height, width) = {shape}")
    print(f"{'variant':<9}{'K':>3}{'seconds':>10}{'relative time':>18}{'relative FLOPs':>16}")
    variants: tuple[AttentionVariant, ...] = ("of2", "of")
    for variant in variants:
        with torch.device(device):
            model = GPDiT(GPDiTConfig.preset(options.size, attention=variant, layers=options.layers))
        # The values of K alternate, so that other load on the machine affects all alike; the first round is a warm-up.
        rounds = [[seconds_of_pass(model, *shape, draws) for draws in DRAWS] for _ in range(options.repeats + 1)]
        seconds = [statistics.median(times) for times in zip(*rounds[1:], strict=True)]
        flops = [sum(training_flops(model.config, PassShape(options.clips, *shape, draws)).values()) for draws in DRAWS]
        for draws, time_taken, work in zip(DRAWS, seconds, flops, strict=True):
            relative_time, relative_flops = time_taken / draws / seconds[0], work / draws / flops[0]
            print(f"{variant:<9}{draws:>3}{time_taken:>10.3f}{relative_time:>18.3f}{relative_flops:>16.3f}")


if __name__ == "__main__":
    main()
