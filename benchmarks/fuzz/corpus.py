"""The undamaged files: videos and images in several formats, latents, a run, an exported model, and recipes."""

import contextlib
import io
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import yaml
from PIL import Image, ImageCms

from benchmarks.fuzz.parts import publish_in_parts
from gpdit_lightning.checkpoints.files import checkpoint_path, remove_checkpoint
from gpdit_lightning.cli import main as command

SIDE, FRAMES, FPS = 64, 21, 24
# File -> encoder, pixel format and options. Packets are small, with key frames and frames that depend on later ones.
VIDEOS: Mapping[str, tuple[str, str, Mapping[str, str]]] = {
    "a.mp4": ("libx264", "yuv420p", {"g": "8", "bf": "2", "preset": "veryfast"}),
    "b.mov": ("libx264", "yuv420p", {"g": "10", "bf": "0", "preset": "ultrafast"}),
    "c.mkv": ("ffv1", "yuv420p", {"level": "3", "slicecrc": "1", "g": "1"}),
    "d.webm": ("libvpx-vp9", "yuv420p", {"b": "200k", "deadline": "realtime", "cpu-used": "8"}),
    "e.avi": ("mpeg4", "yuv420p", {"b": "400000", "bf": "2"}),
    "f.ts": ("libx264", "yuv420p", {"g": "8", "bf": "0", "preset": "ultrafast"}),
    "g.mpg": ("mpeg2video", "yuv420p", {"b": "600000", "bf": "2"}),
    "h.gif": ("gif", "rgb8", {}),
    "i.apng": ("apng", "rgb24", {}),
    "j.mkv": ("mjpeg", "yuvj420p", {}),
}
IMAGES: Mapping[str, Mapping[str, Any]] = {
    "a.png": {},
    "b.jpg": {"quality": 90},
    "c.jpg": {"quality": 80, "progressive": True},
    "d.webp": {"quality": 90},
    "e.bmp": {},
    "f.tif": {"compression": "tiff_lzw"},
    "g.avif": {},
    "h.gif": {},
    "i.tif": {},
}
PREPARE = (
    *("--codec=pca", "--video_sizes=64x64", "--image_sizes=64x64", "--stride=1", "--clip_frames=9", "--shard_size=4"),
    *("--workers=0", "--device=cpu", "--validation_fraction=0.2"),
)
PAIRS = ("--task=grayscale", "--size=64x64", "--codec=pca", "--device=cpu")
SAMPLE = ("--context_frames=5", "--frames=4", "--steps=1", "--device=cpu")
BASE_RECIPE: dict[str, Any] = {
    "seed_everything": 3,
    "runs": "runs",
    "trainer": {"accelerator": "cpu", "devices": 1, "precision": "32-true", "log_every_n_steps": 1},
    "ema": {"decay": 0.5},
}
RECIPE: dict[str, Any] = {
    "base": ["base.yaml"],
    "run_dir": "${runs}/trained",
    "data_dir": "latents",
    "model": {
        "class_path": "MixedStage",
        "init_args": {
            "backbone": {"size": "tiny", "layers": 2, "width": 24, "heads": 2, "mlp_width": 48},
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
        },
    },
    "data": {
        "seed": 5,
        "max_ranks": 2,
        "workers": 0,
        "validation_batches": 1,
        "images": {"batch_size": 8},
        "videos": {"batch_size": 16, "frames": 3},
    },
    "trainer": {"max_steps": 2, "enable_progress_bar": False, "gradient_clip_val": 1.0},
    "checkpoint": {"every_steps": 1, "keep_every_steps": 1},
}


ENDS = (0.4, 1.0)  # of the two parts of a tensor
FEW_SHOT = ("--model=FewShotStage", "--trainer.max_steps=1", "--data.sequences.batch_size=2")


def make_corpus(folder: Path) -> None:
    """Write all undamaged files to an empty folder; takes eight seconds.

    The commands run in this process, so that processes which are forked later have imported all that they need. Their
    paths are absolute, so that no cache of this process applies to the relative paths in the forked processes.
    """
    (folder / "videos").mkdir()
    (folder / "images").mkdir()
    for number, (name, (encoder, pixel_format, options)) in enumerate(VIDEOS.items()):
        _write_video(folder / "videos" / name, _moving_texture(number), encoder, pixel_format, options)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112] = 1  # orientation
    for number, (name, settings) in enumerate(IMAGES.items()):
        image = Image.fromarray(_moving_texture(20 + number)[0])
        image.save(folder / "images" / name, icc_profile=profile, exif=exif, **settings)
    _write_tar(folder)
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE_RECIPE))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    latents, run, model = folder / "latents", folder / "run", folder / "model"
    sources = (f"--videos={folder}/videos", f"--images={folder}/images")
    run_quietly(["prepare", *sources, f"--out={latents}", *PREPARE])
    recipe = (f"--config={folder}/recipe.yaml", f"--data_dir={latents}", f"--run_dir={run}")
    run_quietly(["fit", *recipe])
    run_quietly(["export", f"--checkpoint={run}", f"--out={model}"])
    _write_sharded_run(run, folder / "sharded_run")
    pairs, few_shot = folder / "pairs", folder / "few_shot_run"
    few = ("--pairs_per_sequence=2", "--sequences=4", "--held_out_pairs=2")
    run_quietly(["prepare-pairs", f"--sources={folder}/images", f"--out={pairs}", *PAIRS, *few])
    run_quietly(["fit", *recipe[:1], f"--data_dir={pairs}", f"--run_dir={few_shot}", *FEW_SHOT])
    run_quietly(["export", f"--checkpoint={few_shot}", f"--out={folder}/few_shot_model"])
    run_quietly(["inspect", str(latents), "--verify", "--workers=1"])
    context = f"--context={folder}/videos/a.mp4"
    run_quietly(["sample", f"--checkpoint={model}", context, *SAMPLE, f"--out={folder}/sample.safetensors"])


def _write_sharded_run(run: Path, copy: Path) -> None:
    """Copy a run, with its checkpoints in two parts, as two ranks write them under ZeRO or FSDP2."""
    shutil.copytree(run, copy, symlinks=True)
    for step in (1, 2):
        remove_checkpoint(checkpoint_path(copy, step))
        publish_in_parts(checkpoint_path(run, step), checkpoint_path(copy, step), ENDS)


def run_quietly(arguments: Sequence[str]) -> None:
    """Run a command of the library; its output is shown only if it fails."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = command(arguments)
    if status:
        raise RuntimeError(f"{' '.join(arguments)} ended with status {status}: {output.getvalue()}")


def _moving_texture(seed: int) -> np.ndarray:
    """Return a smooth texture that moves to the left, uint8 (FRAMES, SIDE, SIDE, 3)."""
    coarse = np.random.default_rng(seed).integers(20, 236, (8, 16, 3), dtype=np.uint8)
    wide = np.array(Image.fromarray(coarse).resize((SIDE + 2 * FRAMES, SIDE), Image.Resampling.BICUBIC))
    return np.stack([wide[:, 2 * number : 2 * number + SIDE] for number in range(FRAMES)])


def _write_video(path: Path, frames: np.ndarray, encoder: str, pixel_format: str, options: Mapping[str, str]) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, FPS, options=dict(options))
        stream.width = stream.height = SIDE
        stream.pix_fmt = pixel_format
        stream.codec_context.thread_count = 1
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(
                format=pixel_format
            )
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _write_tar(folder: Path) -> None:
    """Write the images as a WebDataset tar with captions."""
    (folder / "tars").mkdir()
    with tarfile.open(folder / "tars" / "images.tar", "w") as tar:
        for number, name in enumerate(("a.png", "b.jpg", "d.webp")):
            for ending, content in ((name[1:], (folder / "images" / name).read_bytes()), (".txt", b"a texture")):
                member = tarfile.TarInfo(f"{number:05d}{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
