"""`python -m benchmarks.preparation`: throughput of preparing videos, compared with the codec alone.

The script generates videos of 720x1280 pixels, prepares shards from the files, and encodes the same clips, already
decoded and scaled, with the same codec. The result is the ratio of the two throughputs: at 1, decoding, scaling and
writing add no time to that of the codec. The WanVAE has full size and random weights, unless `--codec_source` names its
folder. On a CPU, use a small one (`--base_dim 16`); decoding is then a larger share of the time.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from gpdit_lightning.codecs import Codec, load_codec
from gpdit_lightning.devices import available_device
from gpdit_lightning.media.video_writer import write_video
from gpdit_lightning.preparation import PrepareOptions, list_input_files, prepare
from gpdit_lightning.preparation.clips import Clip
from gpdit_lightning.preparation.interleave import read_clips
from gpdit_lightning.preparation.parts import worker_count
from gpdit_lightning.progress import progress_bar

HEIGHT, WIDTH, RATE = 720, 1280, 24


def write_videos(folder: Path, count: int, frames: int) -> None:
    """Write videos of a large, smooth image that moves slowly."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    for number in progress_bar(range(count), desc="generating", unit="video", leave=False):
        coarse = torch.rand(1, 3, 12, 20, generator=generator)
        image = torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH + frames), mode="bicubic").clamp(0, 1)[0]
        image = (image * 255).to(torch.uint8)
        video = torch.stack([image[..., frame : frame + WIDTH] for frame in range(frames)])
        write_video(folder / f"{number}.mp4", video, RATE)


def write_wan(folder: Path, base_dim: int) -> str:
    """Write a WanVAE with random weights; return its folder."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    AutoencoderKLWan(base_dim=base_dim).save_pretrained(folder)
    return str(folder)


def seconds_of_codec(codec: Codec, clips: Sequence[Clip], batch_size: int) -> float:
    """Return the seconds that the codec takes for batches of equal shape, after a warm-up batch."""
    by_shape: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for clip in clips:
        by_shape.setdefault(tuple(clip.pixels.shape), []).append(clip.pixels)
    batches = [
        torch.stack(pixels[start : start + batch_size])
        for pixels in by_shape.values()
        for start in range(0, len(pixels), batch_size)
    ]
    codec.encode(batches[0]).cpu()
    start = time.perf_counter()
    for batch in batches:
        codec.encode(batch).cpu()
    return time.perf_counter() - start


def compare(options: PrepareOptions) -> float:
    """Measure decoding, the codec and preparation; print a table and return the ratio of the throughputs."""
    device, workers = available_device("auto"), worker_count(options)
    codec = load_codec(options.codec, options.codec_source, device)

    start = time.perf_counter()
    items = read_clips(list_input_files(options), options, codec.temporal_factor, workers)
    clips = [item for item in items if isinstance(item, Clip)]
    decoding = time.perf_counter() - start
    codec_alone = seconds_of_codec(codec, clips, options.batch_size)
    start = time.perf_counter()
    load_codec(options.codec, options.codec_source, device)
    loading = time.perf_counter() - start
    start = time.perf_counter()
    manifest = prepare(options)
    preparing = time.perf_counter() - start - loading
    assert manifest is not None
    assert sum(shard.count for shard in manifest.shards) == len(clips)

    frames = sum(len(clip.pixels) for clip in clips)
    print(f"{device}, {workers} decoding processes, {len(clips)} clips, {frames} frames, codec {options.codec}")
    print(f"{'':<32}{'seconds':>9}{'clips/s':>9}{'frames/s':>10}")
    for name, seconds in (
        ("decoding and scaling alone", decoding),
        ("codec alone", codec_alone),
        ("preparation, files to shards", preparing),
    ):
        print(f"{name:<32}{seconds:>9.1f}{len(clips) / seconds:>9.2f}{frames / seconds:>10.1f}")
    print(f"preparation achieves {codec_alone / preparing:.0%} of the throughput of the codec alone")
    return codec_alone / preparing


def option_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=Path, help="folder of videos to use instead of generated ones")
    parser.add_argument("--count", type=int, default=32, help="number of videos to generate")
    parser.add_argument("--seconds", type=int, default=12, help="length of each generated video in seconds")
    parser.add_argument("--size", default="192x320", help="HEIGHTxWIDTH of the clips in pixels")
    parser.add_argument("--codec", default="wan", help="wan or pca")
    parser.add_argument("--codec_source", help="folder of the WanVAE")
    parser.add_argument("--base_dim", type=int, default=96, help="base width of the WanVAE with random weights")
    parser.add_argument("--batch_size", type=int, default=4, help="clips per encoded batch")
    parser.add_argument("--workers", type=int, help="decoding processes (default: one per core)")
    return parser


def main(arguments: Sequence[str] | None = None) -> float:
    """Print the table; return the ratio of the throughputs."""
    given = option_parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if given.videos is None:
            write_videos(folder / "videos", given.count, given.seconds * RATE)
        source = given.codec_source
        if given.codec == "wan" and source is None:
            source = write_wan(folder / "wan", given.base_dim)
        options = PrepareOptions(
            out=folder / "out",
            videos=[given.videos or folder / "videos"],
            codec=given.codec,
            codec_source=source,
            video_sizes=[given.size],
            batch_size=given.batch_size,
            validation_fraction=0,  # so that both measurements encode the same batches
            workers=given.workers,
        )
        return compare(options)


if __name__ == "__main__":
    main()
