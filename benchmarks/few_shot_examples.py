"""`python -m benchmarks.few_shot_examples --images FOLDER`: measure how much a few-shot model depends on its examples.

Examples are drawn at random from half of the images; the other half are the sources. For each requested task the
examples show the same task or another one. Errors are mean squared errors relative to copying the source. Use images
that are not in the training data.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gpdit_lightning.checkpoints.reading import load_trained_model
from gpdit_lightning.codecs import load_codec_from_spec
from gpdit_lightning.diffusion import RotationSampler
from gpdit_lightning.generation import GenerationConfig, transform
from gpdit_lightning.media.image_tasks import TASKS, make_pair
from gpdit_lightning.media.images import read_image, resize_and_crop
from gpdit_lightning.preparation.pairs import images_in
from gpdit_lightning.progress import progress_bar


def error(result: Tensor, target: Tensor) -> float:
    """Return the mean squared error in 8-bit levels."""
    return (result.float() - target.float()).square().mean().item()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m benchmarks.few_shot_examples", description=__doc__
    )
    parser.add_argument("--checkpoint", default="runs/tiny/few_shot_two_tasks", help="model of the few-shot stage")
    parser.add_argument("--images", required=True, type=Path, help="folder of at least 10 images")
    parser.add_argument(
        "--tasks", nargs="+", default=["grayscale", "sketch"], choices=list(TASKS), help="tasks to compare"
    )
    parser.add_argument("--draws", type=int, default=20, help="random draws of examples for each pair of tasks")
    parser.add_argument("--pairs", type=int, default=2, help="number of examples")
    parser.add_argument("--steps", type=int, default=8, help="steps of the rotation sampler")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws")
    options = parser.parse_args(arguments)

    trained = load_trained_model(options.checkpoint)
    codec = load_codec_from_spec(trained.codec)
    config = GenerationConfig(RotationSampler(options.steps, schedule=trained.schedule))
    height, width = trained.geometry.sizes[0]
    images = [resize_and_crop(read_image(path), (height, width)) for path, _ in images_in(options.images)]
    example_images, source_images = images[: len(images) // 2], torch.cat(images[len(images) // 2 :])

    print(
        f"{len(source_images)} sources, {len(example_images)} example images; errors relative to copying the source\n"
    )
    print("| task | examples of | median | worst | at or above 0.5 |\n|---|---|---|---|---|")
    for task in options.tasks:
        sources, targets = make_pair(TASKS[task], source_images)
        for other in options.tasks:
            generator = torch.Generator().manual_seed(options.seed)  # the same images for every task
            ratios = []
            for _ in progress_bar(range(options.draws), desc=f"{task} from {other}", leave=False):
                numbers = torch.randperm(len(example_images), generator=generator)[: options.pairs].tolist()
                pairs = (make_pair(TASKS[other], example_images[number]) for number in numbers)
                examples = [(source[0], target[0]) for source, target in pairs]
                results = transform(trained.backbone, codec, examples, sources, config)
                ratios.append(error(results, targets) / error(sources, targets))
            errors = torch.tensor(ratios)
            failures = int((errors >= 0.5).sum())
            print(f"| {task} | {other} | {errors.median():.2f} | {errors.max():.2f} | {failures} of {options.draws} |")


if __name__ == "__main__":
    main()
