"""Training curves of every stage, by which a change shows that the numerics did not move.

    python -m tests.golden.curves                 compare with tests/golden/curves.json, to 1e-5
    python -m tests.golden.curves --exact         the same, bit for bit: on the machine that recorded it
    python -m tests.golden.curves --record        write it anew, after an intended change; say why in the commit

With `--file FILE` another file is written and read. So two versions are compared bit for bit on any machine: record
with the first into a file of your own, and compare with the second. Runs that the first does not have are left out.

Latents are random, so that no codec and no video file has a part in it; float32 on one thread of a CPU. A curve holds
the loss and the gradient norm of each optimizer step, the validation loss, and a sha256 of the weights at the end,
which only `--exact` compares.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch is imported: sums depend on the number of threads.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpdit_lightning.cli import main as command
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.shard_writer import ShardSetWriter
from gpdit_lightning.specs import CodecSpec

RECORDED = Path(__file__).with_name("curves.json")
TOLERANCE = 1e-5
# Name in the recorded file -> tag.
TAGS = {"train/loss": "loss/train", "train/grad_norm": "train/grad_norm", "val/loss": "loss/val"}
STEPS = 6
CHANNELS = 4
CODEC = CodecSpec(
    "pca", None, CHANNELS, 8, 4, mean=(0.5, -0.25, 2.0, 0.0), std=(2.0, 0.5, 4.0, 1.0), fingerprint="0123456789abcdef"
)
# split, kind, latent shape (F, h, w), samples
CONTENT = [
    (split, kind, shape, count)
    for split, count in (("train", 9), ("validation", 3))
    for kind, shape in (
        ("image", (1, 8, 8)),
        ("image", (1, 6, 8)),
        ("video", (5, 8, 8)),
        ("video", (3, 8, 8)),
        ("sequence", (6, 8, 8)),
    )
]
# Data by stage; a name may continue the name of a stage after a plus sign.
STAGES: dict[str, dict[str, Any]] = {
    "ImageWarmupStage": {"images": {}},
    "MixedStage": {"images": {"weight": 0.5}, "videos": {"frames": 3}},
    "MixedStage+alternate": {"sampling": "alternate", "images": {"weight": 0.5}, "videos": {"frames": 3}},
    "LongVideoStage": {"videos": {"least_frames": 2}},
    "FewShotStage": {"sequences": {"loss_frames": "targets"}},
}


def write_latents(directory: Path) -> None:
    """Shards of random latents, of all three kinds, with held-out ones."""
    numbers = np.random.default_rng(0)
    with ShardSetWriter(directory, 5) as writer:
        for split, kind, (frames, height, width), count in CONTENT:
            for place in range(count):
                latent = numbers.normal(size=(frames, CHANNELS, height, width))
                writer.write(split, kind, latent, {"source": f"{split}-{kind}-{frames}x{height}x{width}-{place}"})
        shards = writer.close()
    Manifest(directory, CODEC, shards, preparation={"stride": 3}, validation={"held_out_by": "source"}).save()


def recipe(stage: str, attention: str, latents: Path, run_dir: Path) -> dict[str, Any]:
    """A small run of a stage that uses what training has: several micro-batches, lost contexts, copies, a schedule."""
    common = {"manifests": [str(latents)], "batch_size": 4, "micro_batches": 2}
    return {
        "run_dir": str(run_dir),
        "seed_everything": 3,
        "model": {
            "class_path": stage.partition("+")[0],
            "init_args": {
                "backbone": {
                    "size": "tiny",
                    "layers": 2,
                    "width": 24,
                    "heads": 2,
                    "mlp_width": 48,
                    "latent_channels": CHANNELS,
                    "attention": attention,
                },
                "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2, "decay": "cosine"},
            },
        },
        "data": {
            "seed": 5,
            "max_ranks": 2,
            "context_dropout": 0.25,
            "noise_draws": 2,
            **{name: common | own if isinstance(own, dict) else own for name, own in STAGES[stage].items()},
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "precision": "32-true",
            "max_steps": STEPS,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
        },
        "validate_every_steps": STEPS,
        "ema": {"decay": 0.5},
        "checkpoint": {"every_steps": STEPS},
    }


def curve(stage: str, attention: str, latents: Path, folder: Path) -> dict[str, Any]:
    """Train a stage by the commands that a user gives; its curve."""
    run_dir, path, model = folder / "run", folder / "recipe.yaml", folder / "model"
    folder.mkdir()
    path.write_text(yaml.safe_dump(recipe(stage, attention, latents, run_dir)))
    with contextlib.redirect_stdout(sys.stderr):
        assert command(["fit", f"--config={path}"]) == 0
        assert command(["export", f"--checkpoint={run_dir}", "--weights=raw", f"--out={model}"]) == 0
    events = EventAccumulator(str(run_dir))
    events.Reload()
    scalars = {name: [event.value for event in events.Scalars(tag)] for name, tag in TAGS.items()}
    return scalars | {"weights_sha256": weights_sha256(model / "model.safetensors")}


def weights_sha256(path: Path) -> str:
    """A hash of the values, independent of the names that the modules have."""
    digests = sorted(hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in load_file(path).values())
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def curves() -> dict[str, Any]:
    """The curves of all stages, with attention `of2` and `of`."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_latents(folder / "latents")
        return {
            f"{stage}-{attention}": curve(stage, attention, folder / "latents", folder / f"{stage}-{attention}")
            for stage in STAGES
            for attention in ("of2", "of")
        }


def differences(ours: dict[str, Any], recorded: dict[str, Any], exact: bool) -> Iterator[str]:
    """What differs, a sentence each."""
    if ours.keys() != recorded.keys():
        yield f"the runs are {sorted(ours)} and recorded are {sorted(recorded)}"
    for run in ours.keys() & recorded.keys():
        for tag in TAGS:
            ours_here, theirs = ours[run][tag], recorded[run][tag]
            if len(ours_here) != len(theirs):
                yield f"{run} {tag} has {len(ours_here)} values, recorded are {len(theirs)}"
            for step, (a, b) in enumerate(zip(ours_here, theirs, strict=False), start=1):
                if not (a == b if exact else math.isclose(a, b, rel_tol=TOLERANCE)):
                    yield f"{run} {tag} at point {step} is {a!r}, recorded is {b!r}"
        if exact and ours[run]["weights_sha256"] != recorded[run]["weights_sha256"]:
            yield f"{run}: other weights at the end"


def main() -> int:
    """The command; returns 1 if a curve moved."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--file", type=Path, default=RECORDED)
    options = parser.parse_args()
    ours = curves()
    if options.record:
        options.file.write_text(json.dumps(ours, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {options.file}")
        return 0
    recorded = json.loads(options.file.read_text(encoding="utf-8"))
    if options.file != RECORDED:
        ours = {run: ours[run] for run in ours if run in recorded}
    found = list(differences(ours, recorded, options.exact))
    print("\n".join(found) or f"{len(ours)} curves are as recorded" + (", bit for bit" if options.exact else ""))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
