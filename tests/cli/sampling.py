"""What tests of `sample` continue, with which models, and what the library itself makes of it."""

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
from gpdit_lightning.media.video import write_video
from gpdit_lightning.model import NO_LABEL
from gpdit_lightning.preparation import PrepareOptions, prepare

CODEC = load_codec("pca")
LABELS = ("jump", "run")
LATENT_FRAMES = 5  # of the training clips: 17 frames, of which a context has 13
VIDEO = "videos/run/1.mp4"  # of the label 1 and the stripes 1


def stripes(number: int) -> Tensor:
    """A wave that moves on by a pixel each frame: (60, 3, 32, 48)."""
    moments, columns = torch.arange(60)[:, None], torch.arange(48)
    wave = (torch.sin((columns + moments + 7 * number) / 5) * 100 + 128).byte()
    return wave[:, None, None].expand(-1, 3, 32, -1).contiguous()


def given(number: int, first: int, frames: int) -> Tensor:
    """What a model is given of stripes: every third frame, the middle of it."""
    return stripes(number)[first::3, ..., 8:40][:frames].contiguous()


def make(place: Path, randomise: Callable[[GPDiT], GPDiT]) -> None:
    """Fill a folder: `videos/LABEL/NUMBER.mp4` and their `latents`, `movie.gif`, `still.png` and `frames`; a `run` of
    one step, and the models `of2`, `of` and, without labels, `bare`."""
    for number, label in enumerate(LABELS):
        (place / "videos" / label).mkdir(parents=True)
        write_video(place / "videos" / label / f"{number}.mp4", stripes(number), 24)
    pictures = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in stripes(2)]
    pictures[0].save(place / "movie.gif", save_all=True, append_images=pictures[1:], duration=100)
    pictures[57].save(place / "still.png")
    (place / "frames").mkdir()
    for number, picture in enumerate(pictures):
        picture.save(place / "frames" / f"{number}.png")
    sources: dict[str, Any] = {"videos": [place / "videos"], "labels": True, "validation_fraction": 0}
    prepare(PrepareOptions(out=place / "latents", codec="pca", video_sizes=["32x32"], workers=0, **sources))
    backbone = {"size": "tiny", "layers": 1, "width": 24, "heads": 2, "mlp_width": 48, "classes": len(LABELS)}
    recipe: dict[str, Any] = {
        "run_dir": str(place / "run"),
        "model": {"class_path": "GPDiTStage", "init_args": {"backbone": backbone}},
        "data": {"videos": {"manifests": [str(place / "latents")], "batch_size": 1}, "labels": True},
        "trainer": {"accelerator": "cpu", "max_steps": 1, "enable_progress_bar": False, "enable_model_summary": False},
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "--config", str(place / "recipe.yaml")]) == 0
    # One step leaves an output layer of next to nothing, which would hide what the frames depend on.
    trained = load_trained_model(place / "run").backbone
    changes: dict[str, dict[str, Any]] = {"of2": {}, "of": {"attention": "of"}, "bare": {"classes": 0}}
    for name, changed in changes.items():
        model = randomise(GPDiT(trained.config.replaced(**changed)))
        model.facts = trained.facts if model.config.classes else replace(trained.facts, classes=())
        model.save_pretrained(place / name)


def sample(place: Path, out: Path, *options: Any, context: str | None = VIDEO, model: str = "of2") -> int:
    """`sample` with two steps and what else is given; its exit status."""
    contexts = ["--context", place / context] if context else []
    basic = ["--checkpoint", place / model, *contexts, "--out", out, "--steps=2"]
    return main(["sample", *map(str, [*basic, *options])])


def streamed(place: Path, known: Tensor, frames: int, model: str = "of2", label: int = NO_LABEL, **how: Any) -> Tensor:
    """What the library makes of the latents (k, C, h, w) of a context: these, and those of the frames that follow."""
    trained = load_trained_model(place / model)
    config = replace(GenerationConfig(RotationSampler(2), window=LATENT_FRAMES - 1), **how)
    if config.autocast_dtype:
        cast_linear_weights(trained.backbone, config.autocast_dtype)
    pieces = stream_video(
        trained.backbone, CODEC, known[None], frames, config, ClipInputs(condition=torch.tensor([label]))
    )
    return torch.cat([known, *(piece.latents[0] for piece in pieces)])


def latents(path: Path) -> Tensor:
    """Those of a file, (F, C, h, w)."""
    return load_file(path)["latents"]


def decoded(path: Path) -> Tensor:
    """The pixels of a file of latents, (T, 3, H, W)."""
    return CODEC.decode(latents(path)[None])[0]


def looks_like(first: Tensor, second: Tensor) -> bool:
    """Whether frames differ by no more than what H.264 or a GIF's palette changes."""
    return first.shape == second.shape and bool((first.float() - second.float()).abs().mean() < 8)


def assert_near(first: Tensor, second: Tensor) -> None:
    """Latents that sums in another order have made differ by much less than a level of a pixel."""
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-3)
