"""`python -m benchmarks.samplers`: error of each sampler as a function of the number of steps, on a trained model.

The third latent frame of held-out clips is generated from the two frames before it, always with the same noise. The
error is the root mean square distance from the result of 600 steps of `adams`. The default model is that of the demo:
run `python -m gpdit_lightning demo` first.
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from gpdit_lightning.checkpoints.reading import load_trained_model
from gpdit_lightning.data.buckets import Bucket
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.diffusion import SAMPLERS, Sampler, make_sampler
from gpdit_lightning.generation import GenerationConfig, rollout

STEPS = (4, 6, 8, 12, 16, 25, 50)
REFERENCE_STEPS = 600
CONTEXT_FRAMES = 2  # latent frames


def held_out(folder: str, clips: int, mean: Tensor, std: Tensor) -> Tensor:
    """Return the first two latent frames of held-out clips, whitened: (B, 2, C, h, w)."""
    manifest = Manifest.load(folder)
    entry = next(e for e in manifest.of_split("validation") if e.kind == "video" and e.shape[0] >= CONTEXT_FRAMES)
    bucket = Bucket([(manifest, entry)], [CONTEXT_FRAMES])
    raw = [torch.from_numpy(bucket.read(number).latents.copy()) for number in range(min(clips, len(bucket)))]
    return (torch.stack(raw).float() - mean) / std


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(allow_abbrev=False, prog="python -m benchmarks.samplers", description=__doc__)
    parser.add_argument("--checkpoint", default="runs/demo/stage3_long_video", help="model trained on videos")
    parser.add_argument("--data", default="runs/demo/latents/video", help="shards with held-out videos")
    parser.add_argument("--clips", type=int, default=16, help="number of held-out clips")
    options = parser.parse_args(arguments)

    trained = load_trained_model(options.checkpoint)
    mean, std = (torch.tensor(values)[:, None, None] for values in (trained.codec.mean, trained.codec.std))
    context, schedule = held_out(options.data, options.clips, mean, std), trained.schedule

    def generated(sampler: Sampler) -> Tensor:
        return next(rollout(trained.backbone, context, 1, GenerationConfig(sampler)))

    reference = generated(make_sampler("adams", REFERENCE_STEPS, schedule))
    print(f"{len(context)} clips; root mean square of the reference {reference.square().mean().sqrt():.2f}\n")
    print("| steps | " + " | ".join(str(steps) for steps in STEPS) + " |")
    print("|---" * (1 + len(STEPS)) + "|")
    for name in SAMPLERS:
        if name == "stochastic":
            continue  # it adds noise at every step, so its results do not converge to the reference
        distances = [
            (generated(make_sampler(name, steps, schedule)) - reference).square().mean().sqrt() for steps in STEPS
        ]
        print(f"| `{name}` | " + " | ".join(f"{distance:.3f}" for distance in distances) + " |")


if __name__ == "__main__":
    main()
