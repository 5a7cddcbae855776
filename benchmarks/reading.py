"""`python -m benchmarks.reading`: throughput of one loader process, compared with a raw read of the same files.

The script writes shards of clips (5 latent frames of 16x24x40, which are 17 frames of 192x320), reads the files into
the page cache, and then measures in one process and one thread:

- raw read: whole files into one buffer;
- samples: in the shuffled order of the plan, each located by the index and verified by its checksums;
- batches: whitened, with noise and noise levels, as training receives them;
- training: the clips that training of a backbone of the given size consumes on this machine.

The share is relative to the raw read. The last column is relative to training, which is the number of such training
runs that one loader process could supply.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.data.batches import LatentDataset
from gpdit_lightning.data.buckets import Bucket
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.plan import Plan, PlannedSource
from gpdit_lightning.data.shard_writer import ShardSetWriter
from gpdit_lightning.data.source import SourceConfig
from gpdit_lightning.randomness import TRAIN_NOISE
from gpdit_lightning.specs import CodecSpec

SHAPE = (5, 16, 24, 40)
CLIP_BYTES = 2 * math.prod(SHAPE)
BLOCK = 2**24  # bytes per raw read


def write_shards(folder: Path, clips: int, shape: Sequence[int] = SHAPE) -> Manifest:
    """Write clips of random latents, of shape (F, C, H, W), in shards of 1,000 clips."""
    numbers = np.random.default_rng(0)
    with ShardSetWriter(folder) as writer:
        for number in range(clips):
            writer.write("train", "video", numbers.standard_normal(shape, np.float32), {"source": f"{number}.mp4"})
        shards = writer.close()
    C = shape[1]
    codec = CodecSpec("pca", None, C, 8, 4, mean=(0.0,) * C, std=(1.0,) * C, fingerprint="0" * 16)
    return Manifest(folder, codec, shards)


def raw_read(manifest: Manifest) -> int:
    """Read all shards completely; return the number of bytes."""
    buffer, total = bytearray(BLOCK), 0
    for entry in manifest.shards:
        with open(str(manifest.directory / entry.path), "rb", buffering=0) as file:
            while size := file.readinto(buffer):
                total += size
    return total


def bytes_per_second(work: Callable[[], int], seconds: float) -> float:
    """Return the bytes per second of a function that returns the number of processed bytes, after a warm-up call."""
    work()
    processed, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not processed:
        processed += work()
    return processed / elapsed


def training_pass(size: str, batch_size: int) -> Callable[[], int]:
    """Return a function that runs a forward and backward pass on random clips and returns their bytes.

    A GPU computes under bf16 autocast.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = GPDiT(GPDiTConfig.preset(size))
        noisy, clean, velocity = torch.randn(3, batch_size, *SHAPE)
        theta = torch.rand(batch_size, SHAPE[0])

    def step() -> int:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = F.mse_loss(model(noisy, theta, clean), velocity)
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return batch_size * CLIP_BYTES

    return step


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Print the table; return the rates in bytes per second."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=8000, help="clips to write and read; 8000 take 1.2 GiB")
    parser.add_argument("--batch_size", type=int, default=8, help="clips per batch")
    parser.add_argument("--size", default="B", help="size of the trained backbone: tiny, B or H")
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds per measurement")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_shards(Path(folder), given.clips)
        bucket = Bucket([(manifest, entry) for entry in manifest.shards], [SHAPE[0]])
        plan = Plan((PlannedSource("videos", (bucket.planned,), SourceConfig(batch_size=given.batch_size)),))
        mean, std = manifest.codec.mean, manifest.codec.std
        dataset = LatentDataset(plan, [[bucket]], mean, std, "frame", TRAIN_NOISE)
        whole_batches = given.clips // given.batch_size
        order = np.concatenate([plan.micro_batch(number).samples for number in range(whole_batches)]).tolist()
        numbers = count()

        def samples() -> int:
            for sample in order:
                bucket.read(sample)
            return len(order) * CLIP_BYTES

        def batches() -> int:
            dataset[next(numbers)]
            return given.batch_size * CLIP_BYTES

        threads = torch.get_num_threads()
        trained = bytes_per_second(training_pass(given.size, given.batch_size), given.seconds)
        torch.set_num_threads(1)  # as in a loader process
        rates = {
            "raw read": bytes_per_second(lambda: raw_read(manifest), given.seconds),
            "samples": bytes_per_second(samples, given.seconds),
            "batches, with noise": bytes_per_second(batches, given.seconds),
            f"training of {given.size}": trained,
        }
        torch.set_num_threads(threads)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {threads} threads"
    print(f"{given.clips} clips of {SHAPE} in {len(manifest.shards)} shards; training on {device}")
    print(f"{'':<22}{'MB/s':>10}{'clips/s':>10}{'share':>8}{'x training':>12}")
    for name, speed in rates.items():
        figures = f"{speed / 1e6:>10.2f}{speed / CLIP_BYTES:>10.1f}{speed / rates['raw read']:>8.1%}"
        print(f"{name:<22}{figures}{speed / trained:>12.1f}")
    return rates


if __name__ == "__main__":
    main()
