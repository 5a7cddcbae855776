"""Contexts and models for tests of `sample`, and the same generation by calls of the library."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from gpdit_lightning import GPDiT
from gpdit_lightning.checkpoints.reading import load_trained_model
from gpdit_lightning.cli import main
from gpdit_lightning.codecs import load_codec
from gpdit_lightning.diffusion import RotationSampler
from gpdit_lightning.generation import ClipInputs, GenerationConfig, cast_linear_weights, stream_video
from gpdit_lightning.media.video_writer import write_video
from gpdit_lightning.model import NO_LABEL
from gpdit_lightning.preparation import PrepareOptions, prepare

CODEC = load_codec("pca")
LABELS = ("jump", "run")
LATENT_FRAMES = 5  # of a training clip of 17 frames, 13 of which are the default context
VIDEO = "videos/run/1.mp4"  # shows stripes(1)


def stripes(number: int) -> Tensor:
    """Return a video (60, 3, 32, 48) of a wave that moves by one pixel per frame."""
    times, columns = torch.arange(60)[:, None], torch.arange(48)
    wave = (torch.sin((columns + times + 7 * number) / 5) * 100 + 128).byte()
    return wave[:, None, None].expand(-1, 3, 32, -1).contiguous()


def stripe_context(number: int, first: int, frames: int) -> Tensor:
    """Return stripes as a context: every third frame, cropped to 32x32."""
    return stripes(number)[first::3, ..., 8:40][:frames].contiguous()


def make_sampling_folder(workspace: Path, randomise: Callable[[GPDiT], GPDiT]) -> None:
    """Write contexts and models into a folder.

    The contexts are `videos/LABEL/NUMBER.mp4` and their `latents`, `movie.gif`, `still.png` and `frames`. The models
    are a `run` of one step, and with random weights `of2`, `of` and, without labels, `unlabelled`.
    """
    for number, label in enumerate(LABELS):
        (workspace / "videos" / label).mkdir(parents=True)
        write_video(workspace / "videos" / label / f"{number}.mp4", stripes(number), 24)
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in stripes(2)]
    images[0].save(workspace / "movie.gif", save_all=True, append_images=images[1:], duration=100)
    images[57].save(workspace / "still.png")
    (workspace / "frames").mkdir()
    for number, image in enumerate(images):
        image.save(workspace / "frames" / f"{number}.png")
    sources: dict[str, Any] = {"videos": [workspace / "videos"], "labels": True, "validation_fraction": 0}
    prepare(PrepareOptions(out=workspace / "latents", codec="pca", video_sizes=["32x32"], workers=0, **sources))
    backbone = {"size": "tiny", "layers": 1, "width": 24, "heads": 2, "mlp_width": 48, "classes": len(LABELS)}
    recipe: dict[str, Any] = {
        "run_dir": str(workspace / "run"),
        "model": {"class_path": "GPDiTStage", "init_args": {"backbone": backbone}},
        "data": {"videos": {"manifests": [str(workspace / "latents")], "batch_size": 1}, "labels": True},
        "trainer": {"accelerator": "cpu", "max_steps": 1, "enable_progress_bar": False, "enable_model_summary": False},
    }
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "--config", str(workspace / "recipe.yaml")]) == 0
    # After one step the output layer is almost 0, so that frames would hardly depend on anything.
    trained = load_trained_model(workspace / "run").backbone
    changes: dict[str, dict[str, Any]] = {"of2": {}, "of": {"attention": "of"}, "unlabelled": {"classes": 0}}
    for name, changed in changes.items():
        model = randomise(GPDiT(trained.config.replaced(**changed)))
        model.facts = trained.facts if model.config.classes else replace(trained.facts, classes=())
        model.save_pretrained(workspace / name)


def sample(workspace: Path, out: Path, *options: Any, context: str | None = VIDEO, model: str = "of2") -> int:
    """Run `sample` with two steps and further options, and return its exit status."""
    contexts = ["--context", workspace / context] if context else []
    basic = ["--checkpoint", workspace / model, *contexts, "--out", out, "--steps=2"]
    return main(["sample", *map(str, [*basic, *options])])


def expected_latents(
    workspace: Path, context: Tensor, frames: int, model: str = "of2", label: int = NO_LABEL, **settings: Any
) -> Tensor:
    """Return the latents (k, C, h, w) of a context, and those that the library generates after them."""
    trained = load_trained_model(workspace / model)
    config = replace(GenerationConfig(RotationSampler(2), window=LATENT_FRAMES - 1), **settings)
    if config.autocast_dtype:
        cast_linear_weights(trained.backbone, config.autocast_dtype)
    pieces = stream_video(
        trained.backbone, CODEC, context[None], frames, config, ClipInputs(condition=torch.tensor([label]))
    )
    return torch.cat([context, *(piece.latents[0] for piece in pieces)])


def latents(path: Path) -> Tensor:
    """Read the latents (F, C, h, w) of a file."""
    return load_file(path)["latents"]


def decoded(path: Path) -> Tensor:
    """Decode the latents of a file: (T, 3, H, W)."""
    return CODEC.decode(latents(path)[None])[0]


def looks_like(first: Tensor, second: Tensor) -> bool:
    """Return whether frames are equal up to the errors of H.264 or of a GIF's palette."""
    return first.shape == second.shape and bool((first.float() - second.float()).abs().mean() < 8)


def assert_near(first: Tensor, second: Tensor) -> None:
    """Check that latents are equal up to rounding, by much less than one level of a pixel."""
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-3)
