"""Fit the codec `pca`: python -m gpdit_lightning.codecs.fit_pca --out FILE [--images DIR ...] [--videos DIR ...]

Without folders it computes the weights that ship with the package, from images that may be redistributed: the two
photographs and the handwritten digits of scikit-learn. Still images become clips by a moving camera, so that the
components of four frames represent motion. The weights of `pca_digits` are the result of
`--videos runs/demo/movies/train --video_size 64 --stride 3` after `demo`.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from gpdit_lightning.codecs.fitting_clips import SEED, SIZE, folder_clips, shipped_clips
from gpdit_lightning.codecs.pca import COMPONENTS, FIRST_FRAME_GAIN, GROUP, WEIGHT_SHAPES, PcaCodec, blocks_of
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import atomic_write
from gpdit_lightning.progress import progress_bar


def fit(clips: Sequence[Tensor]) -> PcaCodec:
    """Fit the codec, on the CPU, with the least squared error on `clips` of all linear codes of 16 numbers per block.

    Args:
        clips: uint8 (T, 3, H, W) with T = 1 + 4k, k >= 1, on any device.

    Raises:
        InputError: there are no clips.
    """
    if not clips:
        raise InputError("there are no clips to fit the codec 'pca' on: give folders of images or videos.")
    centre = torch.stack([_values(clip).mean(dim=(0, 2, 3)).double() for clip in clips]).mean(dim=0).float()
    first_size, later_size = WEIGHT_SHAPES["first_components"][1], WEIGHT_SHAPES["later_components"][1]
    first_second_moment = torch.zeros(first_size, first_size, dtype=torch.float64)
    later_second_moment = torch.zeros(later_size, later_size, dtype=torch.float64)
    for clip in progress_bar(clips, desc="fitting", disable=None):
        values = (_values(clip) - centre.view(3, 1, 1))[None]
        # The first frame of every group is used as the first frame of a clip.
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
    """Return the 16 leading eigenvectors (16, n) of a second moment (n, n), largest first, with fixed signs."""
    components = torch.linalg.eigh(second_moment).eigenvectors.flip(1)[:, :COMPONENTS].T
    # The sign of an eigenvector is arbitrary; it is chosen so that the product with a fixed random vector is positive.
    reference = torch.rand(components.shape[1], generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    return components * (components @ reference).sign()[:, None]


def align(first_components: Tensor, later_components: Tensor) -> Tensor:
    """Rotate the components of the first frame within their span to match the later components of the same index.

    On a still video a later component acts as the sum of its four slices; the rotation minimizes the distance to these
    (orthogonal Procrustes). The span, and so every decoded image, is unchanged.
    """
    still = later_components.reshape(COMPONENTS, GROUP, -1).sum(dim=1) / FIRST_FRAME_GAIN
    left, _, right = torch.linalg.svd(first_components @ still.T)
    return (left @ right).T @ first_components


def whitening(codec: PcaCodec, clips: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return `mean` and `std` (16,) of the latents of clips, over first and later frames."""
    sums, squares, count = torch.zeros(COMPONENTS).double(), torch.zeros(COMPONENTS).double(), 0
    for clip in clips:
        latents = codec.encode(clip[None]).double()
        sums += latents.sum(dim=(0, 1, 3, 4))
        squares += latents.square().sum(dim=(0, 1, 3, 4))
        count += latents.numel() // COMPONENTS
    mean = sums / count
    return {"mean": mean.float(), "std": (squares / count - mean.square()).sqrt().float()}


def psnr(codec: PcaCodec, clips: Iterable[Tensor]) -> float:
    """Return the peak signal-to-noise ratio in dB of decoded clips, from the mean squared error over all pixels."""
    decoded = ((codec.decode(codec.encode(clip[None]))[0].float(), clip) for clip in clips)
    errors = [(result - clip.to(result.device)).square().mean() for result, clip in decoded]
    return float(10 * (255**2 / torch.stack(errors).mean()).log10())


def _values(clip: Tensor) -> Tensor:
    return clip.cpu().float() / 127.5 - 1


def _second_moment(blocks: Tensor) -> Tensor:
    blocks = blocks.flatten(0, -2)
    return (blocks.T @ blocks).double()


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", nargs="+", type=Path, default=[], help="folders of images to fit on")
    parser.add_argument("--videos", nargs="+", type=Path, default=[], help="folders of videos to fit on")
    parser.add_argument("--video_size", type=int, default=SIZE, help="side in pixels to which videos are resized")
    parser.add_argument("--stride", type=int, default=1, help="use every stride-th frame of a video")
    parser.add_argument("--out", type=Path, required=True, help="the weights file to write (.safetensors)")
    options = parser.parse_args()
    try:
        clips = (
            list(folder_clips(options.images, options.videos, options.video_size, options.stride))
            if options.images or options.videos
            else shipped_clips()
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
