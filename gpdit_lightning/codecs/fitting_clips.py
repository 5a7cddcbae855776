"""Clips for fitting the codec `pca`: synthetic motion over images, and cut videos."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gpdit_lightning.media.finding import FoundFile, find_media, without_repeated
from gpdit_lightning.media.images import read_image
from gpdit_lightning.media.video import iterate_frames
from gpdit_lightning.path_kinds import Medium

log = logging.getLogger(__name__)

FRAMES = 17
SIZE = 128  # pixels along a side of a clip
CLIPS = 600
DIGIT_FRACTION = 0.1
CLIPS_PER_IMAGE = 4
SEED = 0


def shipped_clips(count: int = CLIPS) -> list[Tensor]:
    """Return clips (17, 3, 128, 128) of scikit-learn's photographs and, one in ten, of its handwritten digits."""
    from sklearn.datasets import load_digits, load_sample_images

    photographs = [torch.tensor(image).permute(2, 0, 1) / 255 for image in load_sample_images().images]
    digits = torch.tensor(load_digits().images, dtype=torch.float32) / 16
    generator = torch.Generator().manual_seed(SEED)
    digit_clips = round(count * DIGIT_FRACTION)
    clips = [camera_clip(photographs, generator) for _ in range(count - digit_clips)]
    return clips + [sprite_clip(digits, generator) for _ in range(digit_clips)]


def camera_clip(images: list[Tensor], generator: torch.Generator) -> Tensor:
    """Pan and zoom over a random image; with probability 1/2 a piece of another image moves in front.

    Args:
        images: (3, H, W) in [0, 1].
        generator: generator of all random choices.

    Returns:
        uint8 (17, 3, 128, 128).
    """
    clip = _pan(_recolour(_choose(images, generator), generator), generator)
    if _uniform(0, 1, generator) < 0.5:
        front = _pan(_recolour(_choose(images, generator), generator), generator)
        radius = _uniform(0.1, 0.5, generator)
        shape = torch.ones(FRAMES, 1, 2, 2)  # zero outside: a square with soft edges
        mask = F.grid_sample(shape, (_grid() - _paths(generator)) / radius, align_corners=False)
        clip = torch.lerp(clip, front, mask)
    return (clip * 255).round().to(torch.uint8)


def sprite_clip(sprites: Tensor, generator: torch.Generator) -> Tensor:
    """Move one to three bright sprites over a background of one dark colour.

    Args:
        sprites: (n, h, w) in [0, 1].
        generator: generator of all random choices.

    Returns:
        uint8 (17, 3, 128, 128).
    """
    darkness = _uniform(0, 0.8, generator)
    clip = torch.rand(1, 3, 1, 1, generator=generator).mul(darkness).expand(FRAMES, 3, SIZE, SIZE)
    for _ in range(int(_uniform(1, 4, generator))):
        sprite = sprites[int(_uniform(0, len(sprites), generator))].expand(FRAMES, 1, -1, -1)
        radius = _uniform(0.1, 0.4, generator)
        mask = F.grid_sample(sprite, (_grid() - _paths(generator)) / radius, align_corners=False)
        colour = 1 - torch.rand(1, 3, 1, 1, generator=generator).mul(0.5)
        clip = torch.lerp(clip, colour.expand_as(clip), mask)
    return (clip * 255).round().to(torch.uint8)


def _pan(image: Tensor, generator: torch.Generator) -> Tensor:
    """Return frames (17, 3, 128, 128) of a window that moves over an image (3, H, W)."""
    side = min(image.shape[1:])
    # Image pixels per window pixel: from 0.5 to as many as fit into the image.
    scale = _log_uniform(0.5, max(0.6, side / SIZE), generator)
    height, width = (max(SIZE, round(size / scale)) for size in image.shape[1:])
    image = F.interpolate(image[None], (height, width), mode="bicubic", antialias=True, align_corners=False)
    zoom = torch.tensor(_uniform(-0.01, 0.01, generator)).mul(torch.arange(FRAMES)).exp().view(-1, 1, 1, 1)
    window = torch.tensor([SIZE / width, SIZE / height])
    centre = (
        torch.rand(2, generator=generator).mul(2).sub(1) * (1 - window) + _paths(generator, still_start=True) * window
    )
    window_grid = _grid() * zoom * window + centre
    frames = image.expand(FRAMES, -1, -1, -1)
    return F.grid_sample(frames, window_grid, "bicubic", padding_mode="reflection", align_corners=False).clamp(0, 1)


def _paths(generator: torch.Generator, still_start: bool = False) -> Tensor:
    """Return a position for each frame (17, 1, 1, 2) on a straight path, in units of half the side of the clip."""
    start = torch.zeros(2) if still_start else torch.rand(2, generator=generator).mul(2).sub(1)
    angle = _uniform(0, 2 * math.pi, generator)
    speed = _log_uniform(0.02, 6, generator) * 2 / SIZE  # 0.02 to 6 pixels per frame
    direction = torch.tensor([math.cos(angle), math.sin(angle)])
    return (start + torch.arange(FRAMES)[:, None] * speed * direction).view(FRAMES, 1, 1, 2)


def _grid() -> Tensor:
    """Return the positions (1, 128, 128, 2) of the pixels of a clip, in [-1, 1]."""
    return F.affine_grid(torch.eye(2, 3)[None], [1, 1, SIZE, SIZE], align_corners=False)


def _recolour(image: Tensor, generator: torch.Generator) -> Tensor:
    """Randomly mirror an image and change its colours, for more variety than that of two photographs."""
    if _uniform(0, 1, generator) < 0.5:
        image = image.flip(2)
    if _uniform(0, 1, generator) < 0.5:
        image = image[torch.randperm(3, generator=generator)]
    grey = image.mean(dim=0, keepdim=True)
    image = torch.lerp(grey, image, _uniform(0.2, 1.0, generator))
    return (image * _uniform(0.5, 1.1, generator) + _uniform(-0.15, 0.15, generator)).clamp(0, 1)


def _choose(images: list[Tensor], generator: torch.Generator) -> Tensor:
    return images[int(_uniform(0, len(images), generator))]


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _log_uniform(low: float, high: float, generator: torch.Generator) -> float:
    return math.exp(_uniform(math.log(low), math.log(high), generator))


def folder_clips(images: list[Path], videos: list[Path], video_size: int = SIZE, stride: int = 1) -> Iterator[Tensor]:
    """Yield clips of the files in folders.

    Args:
        images: folders of images, of each of which there are four camera clips.
        videos: folders of videos, of each of which there are all consecutive clips.
        video_size: side of the clips of videos, in pixels.
        stride: use every stride-th frame of a video.

    Yields:
        uint8 (17, 3, 128, 128), with `video_size` in place of 128 for videos.
    """
    generator = torch.Generator().manual_seed(SEED)
    for path in _files(images, "image"):
        image = read_image(path)[0].float() / 255
        for _ in range(CLIPS_PER_IMAGE):
            yield camera_clip([image], generator)
    for path in _files(videos, "video"):
        frames = [frame.resized((video_size, video_size))[None] for frame in iterate_frames(path, stride=stride)]
        for start in range(0, len(frames) - FRAMES + 1, FRAMES):
            yield torch.cat(frames[start : start + FRAMES])


def _files(paths: list[Path], medium: Medium) -> list[Path]:
    """Return the files of folders, lists and single files; the log names those that are left out."""
    files: list[FoundFile] = []
    for path in paths:
        findings = find_media(path, medium)
        files += findings.files
        for sentence in findings.describe_left_out():
            log.info("%s: %s", path, sentence)
    return sorted(path for path, _ in without_repeated(files)[0])
