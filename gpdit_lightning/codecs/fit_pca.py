"""Fit the codec `pca`: python -m gpdit_lightning.codecs.fit_pca --out FILE [--images DIR ...] [--videos DIR ...]

Without folders it makes the weights that ship with the package, from pictures that may be redistributed: the two
photographs and the handwritten digits inside scikit-learn. Still pictures become movies by moving a camera over them,
so that the components of four frames know motion.
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
from gpdit_lightning.files import written_whole
from gpdit_lightning.media.images import IMAGE_EXTENSIONS, read_image, resize_and_crop
from gpdit_lightning.media.video import VIDEO_EXTENSIONS, iterate_frames

FRAMES = 17
SIZE = 128  # pixels along a side of a fitted clip
CLIPS = 600
DIGIT_SHARE = 0.1
SEED = 0


def fit(clips: Sequence[Tensor]) -> PcaCodec:
    """The codec that rebuilds `clips` with the least squared error, of all linear codes of 16 numbers a block.

    Args:
        clips: uint8 (T, 3, H, W) with T = 1 + 4k, k >= 1.

    Raises:
        InputError: when there are none.
    """
    if not clips:
        raise InputError("There are no clips to fit the codec 'pca' on: give folders that hold pictures or videos.")
    centre = torch.stack([_values(clip).mean(dim=(0, 2, 3)).double() for clip in clips]).mean(dim=0).float()

    first_size, later_size = WEIGHT_SHAPES["first_components"][1], WEIGHT_SHAPES["later_components"][1]
    first_moment = torch.zeros(first_size, first_size, dtype=torch.float64)
    later_moment = torch.zeros(later_size, later_size, dtype=torch.float64)
    for clip in tqdm(clips, desc="fitting", file=sys.stderr, disable=None):
        values = (_values(clip) - centre.view(3, 1, 1))[None]
        # Every frame that starts a group is a first frame of some shorter clip.
        first_moment += _second_moment(blocks_of(values[:, ::GROUP], 1))
        later_moment += _second_moment(blocks_of(values[:, 1:], GROUP))
    later_components = principal_components(later_moment)
    weights = {
        "first_components": align(principal_components(first_moment), later_components).float(),
        "later_components": later_components.float(),
        "centre": centre,
        "mean": torch.zeros(COMPONENTS),
        "std": torch.ones(COMPONENTS),
    }
    return PcaCodec(weights | whitening(PcaCodec(weights), clips))


def principal_components(moment: Tensor) -> Tensor:
    """The 16 leading eigenvectors (16, n) of a second moment (n, n), largest first, each with a fixed sign."""
    components = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :COMPONENTS].T
    # An eigenvector's sign is free; a fixed vector without symmetries decides it.
    judge = torch.rand(components.shape[1], generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    return components * (components @ judge).sign()[:, None]


def align(first_components: Tensor, later_components: Tensor) -> Tensor:
    """Turn the first frame's components inside their own span, so that each means what its namesake means later.

    What a later component sees of a video that stands still is the sum of its four slices; the rotation brings the
    first frame's components nearest to that (orthogonal Procrustes). Their span, and every picture rebuilt, stays.
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
    """Movies (17, 3, 128, 128) of the photographs and, for one in ten, of the digits that scikit-learn brings."""
    from sklearn.datasets import load_digits, load_sample_images

    photographs = [torch.tensor(image).permute(2, 0, 1) / 255 for image in load_sample_images().images]
    digits = torch.tensor(load_digits().images, dtype=torch.float32) / 16
    generator = torch.Generator().manual_seed(seed)
    digit_clips = round(count * DIGIT_SHARE)
    movies = [camera_movie(photographs, generator) for _ in range(count - digit_clips)]
    return movies + [sprite_movie(digits, generator) for _ in range(digit_clips)]


def camera_movie(pictures: list[Tensor], generator: torch.Generator) -> Tensor:
    """A camera that pans and zooms over a picture; in every other movie a piece of a picture moves in front.

    Args:
        pictures: (3, H, W) in [0, 1].
        generator: decides everything.

    Returns:
        uint8 (17, 3, 128, 128).
    """
    movie = _pan(_recolour(_choose(pictures, generator), generator), generator)
    if _uniform(0, 1, generator) < 0.5:
        front = _pan(_recolour(_choose(pictures, generator), generator), generator)
        radius = _uniform(0.1, 0.5, generator)
        shape = torch.ones(FRAMES, 1, 2, 2)  # interpolated towards nothing outside: a square with soft edges
        mask = F.grid_sample(shape, (_grid() - _paths(generator)) / radius, align_corners=False)
        movie = torch.lerp(movie, front, mask)
    return (movie * 255).round().to(torch.uint8)


def sprite_movie(sprites: Tensor, generator: torch.Generator) -> Tensor:
    """Up to three bright sprites (n, h, w) in [0, 1] that move over a plain, dark or coloured, ground.

    Returns:
        uint8 (17, 3, 128, 128).
    """
    darkness = _uniform(0, 0.8, generator)
    movie = torch.rand(1, 3, 1, 1, generator=generator).mul(darkness).expand(FRAMES, 3, SIZE, SIZE)
    for _ in range(int(_uniform(1, 4, generator))):
        sprite = sprites[int(_uniform(0, len(sprites), generator))].expand(FRAMES, 1, -1, -1)
        radius = _uniform(0.1, 0.4, generator)
        mask = F.grid_sample(sprite, (_grid() - _paths(generator)) / radius, align_corners=False)
        colour = 1 - torch.rand(1, 3, 1, 1, generator=generator).mul(0.5)
        movie = torch.lerp(movie, colour.expand_as(movie), mask)
    return (movie * 255).round().to(torch.uint8)


def _pan(picture: Tensor, generator: torch.Generator) -> Tensor:
    """A moving window (17, 3, 128, 128) over a picture (3, H, W)."""
    side = min(picture.shape[1:])
    # One pixel of the window is between half a pixel of the picture and as much as the picture has room for.
    scale = _log_uniform(0.5, max(0.6, side / SIZE), generator)
    height, width = (max(SIZE, round(size / scale)) for size in picture.shape[1:])
    picture = F.interpolate(picture[None], (height, width), mode="bicubic", antialias=True, align_corners=False)
    zoom = torch.tensor(_uniform(-0.01, 0.01, generator)).mul(torch.arange(FRAMES)).exp().view(-1, 1, 1, 1)
    window = torch.tensor([SIZE / width, SIZE / height])
    room = 1 - window
    place = torch.rand(2, generator=generator).mul(2).sub(1) * room + _paths(generator, still_start=True) * window
    window_grid = _grid() * zoom * window + place
    frames = picture.expand(FRAMES, -1, -1, -1)
    return F.grid_sample(frames, window_grid, "bicubic", padding_mode="reflection", align_corners=False).clamp(0, 1)


def _paths(generator: torch.Generator, still_start: bool = False) -> Tensor:
    """A place for each frame (17, 1, 1, 2) on a straight path, in units of half the clip's side."""
    start = torch.zeros(2) if still_start else torch.rand(2, generator=generator).mul(2).sub(1)
    angle = _uniform(0, 2 * math.pi, generator)
    speed = _log_uniform(0.02, 6, generator) * 2 / SIZE  # from next to nothing to 6 pixels a frame
    direction = torch.tensor([math.cos(angle), math.sin(angle)])
    return (start + torch.arange(FRAMES)[:, None] * speed * direction).view(FRAMES, 1, 1, 2)


def _grid() -> Tensor:
    """The places (1, 128, 128, 2) of a clip's pixels in [-1, 1]."""
    return F.affine_grid(torch.eye(2, 3)[None], [1, 1, SIZE, SIZE], align_corners=False)


def _recolour(picture: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror a picture and shift its colours, so that two photographs do not decide what colours exist."""
    if _uniform(0, 1, generator) < 0.5:
        picture = picture.flip(2)
    if _uniform(0, 1, generator) < 0.5:
        picture = picture[torch.randperm(3, generator=generator)]
    grey = picture.mean(dim=0, keepdim=True)
    picture = torch.lerp(grey, picture, _uniform(0.2, 1.0, generator))
    return (picture * _uniform(0.5, 1.1, generator) + _uniform(-0.15, 0.15, generator)).clamp(0, 1)


def _values(clip: Tensor) -> Tensor:
    return clip.float() / 127.5 - 1


def _second_moment(blocks: Tensor) -> Tensor:
    blocks = blocks.flatten(0, -2)
    return (blocks.T @ blocks).double()


def _choose(pictures: list[Tensor], generator: torch.Generator) -> Tensor:
    return pictures[int(_uniform(0, len(pictures), generator))]


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _log_uniform(low: float, high: float, generator: torch.Generator) -> float:
    return math.exp(_uniform(math.log(low), math.log(high), generator))


def _folder_clips(images: list[Path], videos: list[Path]) -> Iterator[Tensor]:
    """Camera movies of every picture, and every video's consecutive clips, at 128x128."""
    generator = torch.Generator().manual_seed(SEED)
    for path in _files(images, IMAGE_EXTENSIONS):
        picture = read_image(path)[0].float() / 255
        for _ in range(4):
            yield camera_movie([picture], generator)
    for path in _files(videos, VIDEO_EXTENSIONS):
        frames = [resize_and_crop(frame[None], (SIZE, SIZE)) for frame in iterate_frames(path)]
        for start in range(0, len(frames) - FRAMES + 1, FRAMES):
            yield torch.cat(frames[start : start + FRAMES])


def _files(folders: list[Path], endings: tuple[str, ...]) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*") if path.suffix.lower() in endings)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs="+", type=Path, default=[], help="folders of pictures to fit on")
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
    with written_whole(options.out) as temporary:
        save_file({name: values.contiguous() for name, values in codec.weights.items()}, temporary)
    print(
        f"{options.out}: {options.out.stat().st_size} bytes, {len(clips)} clips rebuilt at {psnr(codec, clips):.1f} dB"
    )


if __name__ == "__main__":
    main()
