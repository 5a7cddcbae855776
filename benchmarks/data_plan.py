"""`python -m benchmarks.data_plan`: start-up time of a plan over 200 million images, and its shuffle quality.

The manifest describes sparse files, which are never read. The start at each step is measured in a separate process. The
memory is the peak minus the memory after the imports (from /proc, so on Linux only).

The shuffle quality is measured on micro-batches spaced evenly over an epoch of clips. Each recording has ten clips,
which are adjacent in their shard, as `prepare` writes them.
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
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.order import BucketOrder
from gpdit_lightning.data.plan import Plan, PlannedBucket, PlannedSource
from gpdit_lightning.data.shard_entry import ShardEntry
from gpdit_lightning.specs import CodecSpec

SHAPES = ((1, 16, 32, 32), (1, 16, 24, 40), (1, 16, 40, 24))  # the paper's sizes
CODEC = CodecSpec("none", None, 16, 8, 4, mean=(0.0,) * 16, std=(1.0,) * 16, fingerprint="0" * 16)
BATCH, MAX_RANKS = 960, 64  # the paper's first stage
STEPS = (0, 10_000_000)

CLIP_GIB = 5 * 16 * 24 * 40 * 2 / 2**30  # latents of 17 frames of 192x320
CLIPS_PER_RECORDING = 10
SAMPLED_BATCH_SIZE, SAMPLED_BATCHES = 256, 500


def write_manifest(folder: Path, shards: int, samples: int) -> None:
    """Write a manifest of images of three shapes, and sparse files of the right sizes."""
    entries = []
    for number in range(shards):
        shape = SHAPES[number % len(SHAPES)]
        size = samples * (2 * int(np.prod(shape)) + 2048)  # including headers and metadata
        paths = f"train-{number:05d}.tar", f"train-{number:05d}.index.npy"
        for path in paths:
            with (folder / path).open("wb") as file:
                file.truncate(size if path.endswith(".tar") else 0)
        entries.append(ShardEntry(*paths, "train", "image", shape, samples, size, f"{number:064x}", "0" * 64))
    Manifest(folder, CODEC, tuple(entries)).save()


def process_memory(name: str) -> float:
    """Return the resident memory of this process in MiB, now (VmRSS) or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def measure(folder: str, step: int) -> dict[str, float]:
    """Measure the start of a plan at a step, in this process.

    Returns:
        `manifest_seconds`, to read the manifest; `first_milliseconds`, to the first micro-batch; `ahead_milliseconds`,
        to list the shards that are read ahead; `microseconds` per further micro-batch; `mebibytes` of memory.
    """
    before, start = process_memory("VmRSS"), time.perf_counter()
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
        "mebibytes": process_memory("VmHWM") - before,
    }


def measure_in_new_process(folder: Path, step: int) -> dict[str, float]:
    """Run `measure` in a new process, and add `process_seconds`, the duration of the process."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.data_plan", "--measure", str(folder), str(step)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output) | {"process_seconds": time.perf_counter() - start}


def shuffle_quality(shards: int, samples: int, shuffle_window: int) -> dict[str, float]:
    """Measure how well micro-batches are mixed, as means over micro-batches of an epoch.

    Args:
        shards: number of shards of the data set.
        samples: clips per shard.
        shuffle_window: number of samples that are shuffled together.

    Returns:
        `gibibytes` of a window, number of different `shards` in a micro-batch, and the fractions of pairs of clips in a
        micro-batch that come from the `same_shard` and from the `same_recording`.
    """
    bucket = PlannedBucket((samples,) * shards, (5,), 24, 40)
    plan = Plan(
        (
            PlannedSource(
                "videos", (bucket,), SourceConfig(batch_size=SAMPLED_BATCH_SIZE, shuffle_window=shuffle_window)
            ),
        )
    )
    windows = BucketOrder(plan.seed, 0, bucket.counts, (SAMPLED_BATCH_SIZE,), shuffle_window).windows_from(0)
    batches = shards * samples // SAMPLED_BATCH_SIZE
    sampled = [plan.micro_batch(n).samples for n in range(0, batches, max(1, batches // SAMPLED_BATCHES))]
    window_shards = np.mean([len(window) for _, window in islice(windows, 10)])
    return {
        "gibibytes": float(window_shards) * samples * CLIP_GIB,
        "shards": float(np.mean([len(np.unique(batch // samples)) for batch in sampled])),
        "same_shard": float(np.mean([fraction_of_equal_pairs(batch // samples) for batch in sampled])),
        "same_recording": float(np.mean([fraction_of_equal_pairs(batch // CLIPS_PER_RECORDING) for batch in sampled])),
    }


def fraction_of_equal_pairs(values: np.ndarray) -> float:
    """Return the fraction of all pairs of entries whose two values are equal."""
    _, counts = np.unique(values, return_counts=True)
    return float((counts * (counts - 1)).sum() / (len(values) * (len(values) - 1)))


def print_start_times(shards: int, samples: int) -> None:
    """Print a table of times and memory for each of `STEPS`."""
    print(f"{shards * samples:,} images in {shards:,} shards of {len(SHAPES)} shapes")
    headings = ["manifest, s", "first, ms", "ahead, ms", "next, us", "MiB", "process, s"]
    print(" " * 14 + "".join(heading.rjust(13) for heading in headings))
    with tempfile.TemporaryDirectory() as folder:
        write_manifest(Path(folder), shards, samples)
        for step in STEPS:
            figures = measure_in_new_process(Path(folder), step)
            names = ("manifest_seconds", "first_milliseconds", "ahead_milliseconds", "microseconds", "mebibytes")
            row = "".join(f"{figures[name]:>13.1f}" for name in (*names, "process_seconds"))
            print(f"step {step:<9}{row}")


def print_shuffle_quality(shards: int, samples: int) -> None:
    """Print a table of the shuffle quality for several windows."""
    print(f"\n{shards * samples:,} clips in {shards:,} shards, {SAMPLED_BATCH_SIZE} per batch")
    headings = ["GiB per window", "shards per batch", "pairs, same shard", "same recording"]
    print("window".ljust(18) + "".join(heading.rjust(20) for heading in headings))
    for name, window in (
        ("one shard", samples),
        ("16 shards", 16 * samples),
        ("65,536 samples", 65_536),
        ("all", shards * samples),
    ):
        figures = shuffle_quality(shards, samples, window)
        print(
            f"{name:<18}{figures['gibibytes']:>20.1f}{figures['shards']:>20.1f}"
            f"{figures['same_shard']:>20.2e}{figures['same_recording']:>20.2e}"
        )


def main(arguments: list[str] | None = None) -> None:
    """Print the two tables."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("--shards", type=int, default=20_000, help="shards of images")
    parser.add_argument("--samples", type=int, default=10_000, help="images per shard")
    parser.add_argument("--clip_shards", type=int, default=2_000, help="shards of clips, for the shuffle quality")
    parser.add_argument("--clip_samples", type=int, default=1_000, help="clips per shard")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "STEP"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure(options.measure[0], int(options.measure[1]))))
        return

    print_start_times(options.shards, options.samples)
    print_shuffle_quality(options.clip_shards, options.clip_samples)


if __name__ == "__main__":
    main()
