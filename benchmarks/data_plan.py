"""`python -m benchmarks.data_plan`: how soon a plan over 200 million images starts, and how well its windows shuffle.

The images are a manifest over sparse files: nothing of them is read. Each step is started at in a process of its own;
its memory is the most that it held less what it had after its imports (from /proc, so on Linux only).

The shuffle is judged by micro-batches spread evenly over an epoch of clips, ten of them from each recording, which lie
side by side in their shard as `prepare` writes them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np

from gpdit_lightning.data.datamodule import LatentDataModule, SourceConfig
from gpdit_lightning.data.manifest import Manifest, ShardEntry
from gpdit_lightning.data.order import BucketOrder
from gpdit_lightning.data.plan import Plan, PlannedBucket, PlannedSource
from gpdit_lightning.specs import CodecSpec

SHAPES = ((1, 16, 32, 32), (1, 16, 24, 40), (1, 16, 40, 24))  # the paper's sizes
CODEC = CodecSpec("none", None, 16, 8, 4, mean=(0.0,) * 16, std=(1.0,) * 16, fingerprint="0" * 16)
BATCH, MAX_RANKS = 960, 64  # the paper's first stage
STEPS = (0, 10_000_000)

CLIP_GIB = 5 * 16 * 24 * 40 * 2 / 2**30  # latents of 17 frames of 192x320
CLIPS_OF_A_RECORDING = 10
JUDGED_BATCH, JUDGED_BATCHES = 256, 500


def write_manifest(folder: Path, shards: int, samples: int) -> None:
    """A manifest of images of three shapes, and its files, which are as large as they should be and empty."""
    entries = []
    for number in range(shards):
        shape = SHAPES[number % len(SHAPES)]
        size = samples * (2 * int(np.prod(shape)) + 2048)  # with headers and metadata
        paths = f"train-{number:05d}.tar", f"train-{number:05d}.index.npy"
        for path in paths:
            with (folder / path).open("wb") as file:
                file.truncate(size if path.endswith(".tar") else 0)
        entries.append(ShardEntry(*paths, "train", "image", shape, samples, size, f"{number:064x}", "0" * 64))
    Manifest(folder, CODEC, tuple(entries)).save()


def memory(name: str) -> float:
    """MiB that this process holds (VmRSS) or has held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def measure(folder: str, step: int) -> dict[str, float]:
    """What it takes from a manifest to the first micro-batch of a step, and then for each of a thousand more."""
    before, start = memory("VmRSS"), time.perf_counter()
    data = LatentDataModule(images=SourceConfig([folder], batch_size=BATCH), max_ranks=MAX_RANKS)
    loaded = time.perf_counter()
    data.plan.micro_batch(step)
    first = time.perf_counter()
    data.plan.shards_ahead(step)
    ahead = time.perf_counter()
    for number in range(step + 1, step + 1001):
        data.plan.micro_batch(number)
    end = time.perf_counter()
    return {
        "manifest_seconds": loaded - start,
        "first_milliseconds": (first - loaded) * 1e3,
        "ahead_milliseconds": (ahead - first) * 1e3,
        "microseconds": (end - ahead) * 1e3,
        "mebibytes": memory("VmHWM") - before,
    }


def measured(folder: Path, step: int) -> dict[str, float]:
    """The same in a fresh process, with its seconds from its start to its end."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.data_plan", "--measure", str(folder), str(step)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output) | {"process_seconds": time.perf_counter() - start}


def quality(shards: int, samples: int, window: int) -> dict[str, float]:
    """How well micro-batches are mixed: means over micro-batches that are spread over an epoch."""
    bucket = PlannedBucket((samples,) * shards, (5,), 24, 40)
    plan = Plan((PlannedSource("videos", (bucket,), JUDGED_BATCH, shuffle_window=window),))
    windows = BucketOrder(plan.seed, 0, bucket.counts, (JUDGED_BATCH,), window).windows_from(0)
    batches = shards * samples // JUDGED_BATCH
    found = [plan.micro_batch(n).samples for n in range(0, batches, max(1, batches // JUDGED_BATCHES))]
    return {
        "gibibytes": float(np.mean([len(of_window) for _, of_window in islice(windows, 10)])) * samples * CLIP_GIB,
        "shards": float(np.mean([len(np.unique(batch // samples)) for batch in found])),
        "same_shard": float(np.mean([alike(batch // samples) for batch in found])),
        "same_recording": float(np.mean([alike(batch // CLIPS_OF_A_RECORDING) for batch in found])),
    }


def alike(values: np.ndarray) -> float:
    """The fraction of pairs that have one value."""
    _, counts = np.unique(values, return_counts=True)
    return float((counts * (counts - 1)).sum() / (len(values) * (len(values) - 1)))


def main(arguments: list[str] | None = None) -> None:
    """Print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=20_000, help="of the images")
    parser.add_argument("--samples", type=int, default=10_000, help="of each of them")
    parser.add_argument("--clip_shards", type=int, default=2_000, help="of the clips that are judged")
    parser.add_argument("--clip_samples", type=int, default=1_000, help="of each of them")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "STEP"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure(options.measure[0], int(options.measure[1]))))
        return

    print(f"{options.shards * options.samples:,} images in {options.shards:,} shards of {len(SHAPES)} shapes")
    heads = ["manifest, s", "first, ms", "ahead, ms", "each, us", "MiB", "process, s"]
    print(" " * 14 + "".join(head.rjust(13) for head in heads))
    with tempfile.TemporaryDirectory() as folder:
        write_manifest(Path(folder), options.shards, options.samples)
        for step in STEPS:
            figures = measured(Path(folder), step)
            names = ("manifest_seconds", "first_milliseconds", "ahead_milliseconds", "microseconds", "mebibytes")
            row = "".join(f"{figures[name]:>13.1f}" for name in (*names, "process_seconds"))
            print(f"step {step:<9}{row}")

    shards, samples = options.clip_shards, options.clip_samples
    print(f"\n{shards * samples:,} clips in {shards:,} shards, {JUDGED_BATCH} in a batch")
    heads = ["GiB at a time", "shards of a batch", "pairs of one shard", "of one recording"]
    print("window".ljust(18) + "".join(head.rjust(20) for head in heads))
    for name, window in (
        ("one shard", samples),
        ("16 shards", 16 * samples),
        ("65,536 samples", 65_536),
        ("all", shards * samples),
    ):
        figures = quality(shards, samples, window)
        print(
            f"{name:<18}{figures['gibibytes']:>20.1f}{figures['shards']:>20.1f}"
            f"{figures['same_shard']:>20.2e}{figures['same_recording']:>20.2e}"
        )


if __name__ == "__main__":
    main()
