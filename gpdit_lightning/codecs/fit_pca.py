"""Fit the codec `pca`: python -m gpdit_lightning.codecs.fit_pca --out FILE [--images DIR ...] [--videos DIR ...]

Without folders it makes the weights that ship with the package, from images that may be redistributed: the two
photographs and the handwritten digits of scikit-learn. Still images become clips by moving a camera over them, so that
the components of four frames represent motion.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from gpdit_lightning.codecs.pca import COMPONENTS, FIRST_FRAME_GAIN, GROUP, WEIGHT_SHAPES, PcaCodec, blocks_of
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import atomic_write
from gpdit_lightning.media.images import IMAGE_EXTENSIONS, read_image, resize_and_crop
from gpdit_lightning.media.video import VIDEO_EXTENSIONS, iterate_frames

FRAMES = 17
SIZE = 128  # pixels along a side of a fitted clip
CLIPS = 600
DIGIT_SHARE = 0.1
SEED = 0


def fit(clips: Sequence[Tensor]) -> PcaCodec:
    """The codec with the least squared error on `clips`, of all linear codes of 16 numbers per block.

    Args:
        clips: uint8 (T, 3, H, W) with T = 1 + 4k, k >= 1.

    Raises:
        InputError: there are none.
    """
    if not clips:
        raise InputError("There are no clips to fit the codec 'pca' on: give folders of images or videos.")
    centre = torch.stack([_values(clip).mean(dim=(0, 2, 3)).double() for clip in clips]).mean(dim=0).float()

    first_size, later_size = WEIGHT_SHAPES["first_components"][1], WEIGHT_SHAPES["later_components"][1]
    first_second_moment = torch.zeros(first_size, first_size, dtype=torch.float64)
    later_second_moment = torch.zeros(later_size, later_size, dtype=torch.float64)
    for clip in tqdm(clips, desc="fitting", file=sys.stderr, disable=None):
        values = (_values(clip) - centre.view(3, 1, 1))[None]
        # Every frame that starts a group is the first frame of a shorter clip.
        first_second_moment += _second_moment(blocks_of(values[:, ::GROUP], 1))
        later_second_moment += _second_moment(blocks_of(values[:, 1:], GROUP))
    later_components = principal_components(later_second_moment)
    weights = {
        "first_components": align(principal_components(first_second_moment), later_components).float(),
        "later_components": later_components.float(),
        "centre": centre,
        "mean": torch.zeros(COMPONENTS),
        "std": torch.ones(COMPONENTS),
    }
    return PcaCodec(weights | whitening(PcaCodec(weights), clips))


def principal_components(second_moment: Tensor) -> Tensor:
    """The 16 leading eigenvectors (16, n) of a second moment (n, n), largest first, each with a fixed sign."""
    components = torch.linalg.eigh(second_moment).eigenvectors.flip(1)[:, :COMPONENTS].T
    # The sign of an eigenvector is arbitrary; its product with a fixed random vector is made positive.
    reference = torch.rand(components.shape[1], generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    return components * (components @ reference).sign()[:, None]


def align(first_components: Tensor, later_components: Tensor) -> Tensor:
    """Rotate the first frame's components within their span, so that each matches the later component of its index.

    On a still video a later component acts as the sum of its four slices; the rotation brings the first frame's
    components closest to that (orthogonal Procrustes). Their span, and every decoded image, stays the same.
    """
    still = later_components.reshape(COMPONENTS, GROUP, -1).sum(dim=1) / FIRST_FRAME_GAIN
    left, _, right = torch.linalg.svd(first_components @ still.T)
    return (left @ right).T @ first_components


def whitening(codec: PcaCodec, clips: Iterable[Tensor]) -> dict[str, Tensor]:
    """`mean` and `std` (16,) of the codec's latents over both kinds of frames."""
    sums, squares, count = torch.zeros(COMPONENTS).double(), torch.zeros(COMPONENTS).double(), 0
    for clip in clips:
        latents = codec.encode(clip[None]).double()
        sums += latents.sum(dim=(0, 1, 3, 4))
        squares += latents.square().sum(dim=(0, 1, 3, 4))
        count += latents.numel() // COMPONENTS
    mean = sums / count
    return {"mean": mean.float(), "std": (squares / count - mean.square()).sqrt().float()}


def psnr(codec: PcaCodec, clips: Iterable[Tensor]) -> float:
    """Peak signal-to-noise ratio in dB of decoded clips, from the mean squared error over all pixels."""
    errors = [(codec.decode(codec.encode(clip[None]))[0].float() - clip).square().mean() for clip in clips]
    return float(10 * (255**2 / torch.stack(errors).mean()).log10())


def shipped_clips(count: int = CLIPS, seed: int = SEED) -> list[Tensor]:
    """Clips (17, 3, 128, 128) of the photographs and, one in ten, of the digits that are part of scikit-learn."""
    from sklearn.datasets import load_digits, load_sample_images

    photographs = [torch.tensor(image).permute(2, 0, 1) / 255 for image in load_sample_images().images]
    digits = torch.tensor(load_digits().images, dtype=torch.float32) / 16
    generator = torch.Generator().manual_seed(seed)
    digit_clips = round(count * DIGIT_SHARE)
    clips = [camera_clip(photographs, generator) for _ in range(count - digit_clips)]
    return clips + [sprite_clip(digits, generator) for _ in range(digit_clips)]


def camera_clip(images: list[Tensor], generator: torch.Generator) -> Tensor:
    """A camera that pans and zooms over an image; in every other clip a piece of an image moves in front.

    Args:
        images: (3, H, W) in [0, 1].
        generator: of all random choices.

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
    """Up to three bright sprites (n, h, w) in [0, 1] that move over a plain, dark or coloured, background.

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
    """A moving window (17, 3, 128, 128) over an image (3, H, W)."""
    side = min(image.shape[1:])
    # One pixel of the window is between half a pixel of the image and as much as the image has room for.
    scale = _log_uniform(0.5, max(0.6, side / SIZE), generator)
    height, width = (max(SIZE, round(size / scale)) for size in image.shape[1:])
    image = F.interpolate(image[None], (height, width), mode="bicubic", antialias=True, align_corners=False)
    zoom = torch.tensor(_uniform(-0.01, 0.01, generator)).mul(torch.arange(FRAMES)).exp().view(-1, 1, 1, 1)
    window = torch.tensor([SIZE / width, SIZE / height])
    room = 1 - window
    centre = torch.rand(2, generator=generator).mul(2).sub(1) * room + _paths(generator, still_start=True) * window
    window_grid = _grid() * zoom * window + centre
    frames = image.expand(FRAMES, -1, -1, -1)
    return F.grid_sample(frames, window_grid, "bicubic", padding_mode="reflection", align_corners=False).clamp(0, 1)


def _paths(generator: torch.Generator, still_start: bool = False) -> Tensor:
    """A position for each frame (17, 1, 1, 2) on a straight path, in units of half the clip's side."""
    start = torch.zeros(2) if still_start else torch.rand(2, generator=generator).mul(2).sub(1)
    angle = _uniform(0, 2 * math.pi, generator)
    speed = _log_uniform(0.02, 6, generator) * 2 / SIZE  # 0.02 to 6 pixels per frame
    direction = torch.tensor([math.cos(angle), math.sin(angle)])
    return (start + torch.arange(FRAMES)[:, None] * speed * direction).view(FRAMES, 1, 1, 2)


def _grid() -> Tensor:
    """The positions (1, 128, 128, 2) of a clip's pixels in [-1, 1]."""
    return F.affine_grid(torch.eye(2, 3)[None], [1, 1, SIZE, SIZE], align_corners=False)


def _recolour(image: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror an image and change its colours, for more variety than two photographs have."""
    if _uniform(0, 1, generator) < 0.5:
        image = image.flip(2)
    if _uniform(0, 1, generator) < 0.5:
        image = image[torch.randperm(3, generator=generator)]
    grey = image.mean(dim=0, keepdim=True)
    image = torch.lerp(grey, image, _uniform(0.2, 1.0, generator))
    return (image * _uniform(0.5, 1.1, generator) + _uniform(-0.15, 0.15, generator)).clamp(0, 1)


def _values(clip: Tensor) -> Tensor:
    return clip.float() / 127.5 - 1


def _second_moment(blocks: Tensor) -> Tensor:
    blocks = blocks.flatten(0, -2)
    return (blocks.T @ blocks).double()


def _choose(images: list[Tensor], generator: torch.Generator) -> Tensor:
    return images[int(_uniform(0, len(images), generator))]


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _log_uniform(low: float, high: float, generator: torch.Generator) -> float:
    return math.exp(_uniform(math.log(low), math.log(high), generator))


def _folder_clips(images: list[Path], videos: list[Path]) -> Iterator[Tensor]:
    """Camera clips of every image, and every video's consecutive clips, at 128x128."""
    generator = torch.Generator().manual_seed(SEED)
    for path in _files(images, IMAGE_EXTENSIONS):
        image = read_image(path)[0].float() / 255
        for _ in range(4):
            yield camera_clip([image], generator)
    for path in _files(videos, VIDEO_EXTENSIONS):
        frames = [resize_and_crop(frame[None], (SIZE, SIZE)) for frame in iterate_frames(path)]
        for start in range(0, len(frames) - FRAMES + 1, FRAMES):
            yield torch.cat(frames[start : start + FRAMES])


def _files(folders: list[Path], endings: tuple[str, ...]) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*") if path.suffix.lower() in endings)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs="+", type=Path, default=[], help="folders of images to fit on")
    parser.add_argument("--videos", nargs="+", type=Path, default=[], help="folders of videos to fit on")
    parser.add_argument("--out", type=Path, required=True, help="the weights file to write (.safetensors)")
    options = parser.parse_args()
    try:
        clips = (
            list(_folder_clips(options.images, options.videos)) if options.images or options.videos else shipped_clips()
        )
        codec = fit(clips)
    except InputError as error:
        parser.exit(2, f"{error}\n")
    with atomic_write(options.out) as temporary:
        save_file({name: values.contiguous() for name, values in codec.weights.items()}, temporary)
    size, decibels = options.out.stat().st_size, psnr(codec, clips)
    print(f"{options.out}: {size} bytes, {len(clips)} clips reproduced at {decibels:.1f} dB")


if __name__ == "__main__":
    main()
