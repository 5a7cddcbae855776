"""What examples are worth to a few-shot model, and which: `python -m benchmarks.few_shot_examples --pictures FOLDER`.

Random pairs of half of the given pictures are shown, the other half are the sources: pictures that training has not
seen, for both to be new to the model. Mean squared errors relative to copying the source.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from gpdit_lightning.checkpoints.reading import load_trained_model
from gpdit_lightning.codecs import load_codec_from_spec
from gpdit_lightning.diffusion import RotationSampler
from gpdit_lightning.generation import GenerationConfig, transform
from gpdit_lightning.media.image_tasks import TASKS, make_pair
from gpdit_lightning.media.images import read_image, resize_and_crop
from gpdit_lightning.preparation.pairs import images_in


def error(made: Tensor, truth: Tensor) -> float:
    """Mean squared error in 8-bit levels."""
    return (made.float() - truth.float()).square().mean().item()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.few_shot_examples", description=__doc__)
    parser.add_argument("--checkpoint", default="runs/tiny/few_shot_two_tasks", help="a run of the few-shot stage")
    parser.add_argument("--pictures", required=True, type=Path, help="a folder of pictures; 10 or more")
    parser.add_argument("--tasks", nargs="+", default=["grayscale", "sketch"], choices=list(TASKS), help="those to try")
    parser.add_argument("--draws", type=int, default=20, help="contexts drawn for each pair of tasks")
    parser.add_argument("--pairs", type=int, default=2, help="examples in a context")
    parser.add_argument("--steps", type=int, default=8, help="of the rotation sampler")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    options = parser.parse_args(arguments)

    trained = load_trained_model(options.checkpoint)
    codec = load_codec_from_spec(trained.codec)
    config = GenerationConfig(RotationSampler(options.steps, schedule=trained.schedule))
    height, width = trained.geometry.sizes[0]
    pictures = [resize_and_crop(read_image(path), (height, width)) for path in images_in(options.pictures)]
    shown, asked = pictures[: len(pictures) // 2], torch.cat(pictures[len(pictures) // 2 :])

    print(f"{len(asked)} sources, examples of {len(shown)} other pictures; errors relative to copying the source\n")
    print("| asked for | examples of | median | worst | at or above 0.5 |\n|---|---|---|---|---|")
    for task in options.tasks:
        sources, truth = make_pair(TASKS[task], asked)
        for other in options.tasks:
            generator = torch.Generator().manual_seed(options.seed)  # the same pictures for every task
            ratios = []
            for _ in tqdm(range(options.draws), desc=f"{task} from {other}", leave=False):
                chosen = [shown[place] for place in torch.randperm(len(shown), generator=generator)[: options.pairs]]
                examples = [tuple(side[0] for side in make_pair(TASKS[other], picture)) for picture in chosen]
                made = transform(trained.backbone, codec, examples, sources, config)  # type: ignore[arg-type]
                ratios.append(error(made, truth) / error(sources, truth))
            found = torch.tensor(ratios)
            missed = int((found >= 0.5).sum())
            print(f"| {task} | {other} | {found.median():.2f} | {found.max():.2f} | {missed} of {options.draws} |")


if __name__ == "__main__":
    main()
