"""The undamaged files: videos and images in several formats, latents, a run, an exported model, and recipes."""

import contextlib
import io
import json
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

from benchmarks.fuzz.networks import ClipColours
from benchmarks.fuzz.parts import publish_in_parts
from benchmarks.fuzz.texts import LABELS, SYNSETS, annotation_files
from gpdit_lightning.checkpoints.files import checkpoint_path, remove_checkpoint
from gpdit_lightning.cli import main as command
from gpdit_lightning.cli.diagnose import read_run
from gpdit_lightning.diagnosis.references import HealthyRun, Reference, recorded, write_reference
from gpdit_lightning.imports import import_path

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
EVALUATE = (
    *("evaluate", "--checkpoint=model", "--videos=videos", "--device=cpu", "--chunk=4"),
    *("--context_frames=5", "--generated_frames=4", "--steps=1", "--self_check_videos=0"),
)
SCORE_SAMPLES = (
    *("evaluate", "--checkpoint=model", "--device=cpu", "--chunk=4", "--context_frames=0", "--samples=5", "--steps=1"),
    *("--self_check_videos=0", f"--video_network.kind={import_path(ClipColours)}"),
)
FEATURES = ("features", "--videos=videos", "--device=cpu")
ABLATE = (
    *("ablate", "--config=recipe.yaml", "--trainer.max_steps=1", "--seeds=[0]", "--validations=1", "--out=ablation"),
    "--arms={a: {}, b: {model.init_args.optimizer.learning_rate: 0.02}}",
)
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
    """Write all undamaged files to an empty folder; takes twelve seconds.

    The commands run in this process, so that processes which are forked later have imported all that they need.
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
    _write_tars(folder)
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
    (folder / "annotations").mkdir()
    for name, text in annotation_files().items():
        (folder / "annotations" / name).write_text(text)
    with contextlib.chdir(folder):  # the same words as of the commands that read the results again
        _write_results()


def _write_results() -> None:
    """Write the results of commands that read them again, in the current folder."""
    run_quietly([*EVALUATE, "--out=evaluation"])
    run_quietly([*SCORE_SAMPLES, "--videos=videos", "--out=scores"])
    run_quietly([*FEATURES, "--checkpoint=model", "--out=features"])
    run_quietly(ABLATE)
    run_quietly(["diagnose", "run", "--out=diagnosis.png"])
    runs = [(HealthyRun(3, "", "", "", recorded(read_run(Path("run"))[0])))]
    write_reference(Reference("reference", "a run", read_run(Path("run"))[1], runs), Path("reference.json"))


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


def _write_tars(folder: Path) -> None:
    """Write images as WebDataset tars with captions, or with classes and records, and as ImageNet's tar of tars."""
    (folder / "tars").mkdir()
    images = [(name[1:], (folder / "images" / name).read_bytes()) for name in ("a.png", "b.jpg", "d.webp")]
    captioned, labelled, classes = [], [], []
    for number, (ending, content) in enumerate(images):
        name, record = f"{number:05d}", {"caption": f"texture {number}", "width": SIDE, "url": "http://localhost:1/a"}
        captioned += [(f"{name}{ending}", content), (f"{name}.txt", b"a texture")]
        labelled += [(f"{name}{ending}", content), (f"{name}.cls", b"%d" % (number % 2))]
        labelled.append((f"{name}.json", json.dumps(record).encode()))
        inner = _tar([(f"{LABELS[number % 2]}_{number}{ending}", content)])
        classes.append((f"{SYNSETS[0][:-1]}{number}.tar", inner))
    for name, members in (("images", captioned), ("labelled", labelled), ("classes", classes)):
        (folder / "tars" / f"{name}.tar").write_bytes(_tar(members))


def _tar(members: Sequence[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
