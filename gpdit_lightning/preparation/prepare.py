"""Folders of videos and pictures to latent shards and their manifest (GPDiT, section 5.1)."""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gpdit_lightning.codecs import Codec, load_codec
from gpdit_lightning.data.manifest import FILE_NAME, SKIPPED_NAME, Kind, Manifest, ShardEntry, Split
from gpdit_lightning.data.shards import ShardSetWriter
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import written_whole
from gpdit_lightning.media.images import closest_size, parse_size, read_image, resize_and_crop
from gpdit_lightning.media.video import iterate_frames, video_info
from gpdit_lightning.preparation.options import PrepareOptions, check_options
from gpdit_lightning.preparation.sources import Source, find_sources, label_of

# Options that change how fast the shards are made, and nothing in them.
SPEED_OPTIONS = ("out", "device", "batch_size")
# What a run that was killed leaves in the output folder.
OWN_FILES = re.compile(r"(train|validation)-(image|video|sequence)-\d+x\d+x\d+-\d{5}\.(tar|index\.npy)(\.partial)?")


@dataclass(frozen=True)
class Clip:
    """Pixels of one sample, ready to be encoded."""

    source: Source
    pixels: Tensor
    """uint8 (T, 3, H, W)."""
    metadata: dict[str, Any]


def prepare(options: PrepareOptions) -> Manifest:
    """Encode every source and write the shards, then the manifest.

    A folder that already holds what these options make is returned as it is. A run that was killed leaves no manifest;
    running again starts again. Files that cannot be read and videos too short for a clip are left out, and named in the
    `skipped.jsonl`.

    Raises:
        InputError: for an option without sense, no sources, none that can be used, or a folder that holds other data.
    """
    check_options(options)
    sources = find_sources(options)
    preparation = described(options, sources)
    if (options.out / FILE_NAME).exists():
        return reused(Manifest.load(options.out), preparation)

    codec = load_codec(options.codec, options.codec_source, available_device(options.device))
    for frames in (options.clip_frames, options.least_clip_frames or options.clip_frames):
        codec.latent_frames(frames)
    for text in (*options.video_sizes, *options.image_sizes):
        codec.check_frame_size(*parse_size(text))
    remove_leftovers(options.out)
    shards, used, skipped = encode(sources, options, codec)
    if not shards:
        raise InputError(f"None of the {len(sources)} sources could be used; the first: {skipped[0]['reason']}")
    manifest = Manifest(
        directory=options.out,
        codec=codec.spec(),
        shards=shards,
        preparation=preparation,
        validation={
            "held_out_by": "source",
            "fraction": options.validation_fraction,
            "source_pattern": options.source_pattern,
            "train_sources": sum(source.split == "train" for source in used),
            "validation_sources": sum(source.split == "validation" for source in used),
        },
        labels=tuple(sorted({label_of(source) for source in used})) if options.labels else (),
        skipped=len(skipped),
    )
    with written_whole(options.out / SKIPPED_NAME) as temporary:
        temporary.write_text(
            "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped), encoding="utf-8"
        )
    manifest.save()
    return manifest


def remove_leftovers(folder: Path) -> None:
    """Remove what a preparation that was killed left in its output folder, and nothing else."""
    if folder.is_dir():
        for path in folder.iterdir():
            if OWN_FILES.fullmatch(path.name):
                path.unlink()


def described(options: PrepareOptions, sources: Sequence[Source]) -> dict[str, Any]:
    """The options that decide what the shards hold, and a sha256 over them and every source's name, split and size."""
    values = {name: value for name, value in asdict(options).items() if name not in SPEED_OPTIONS}
    # Machine paths stay out of the manifest; the sources' names are in the sha256.
    places = ("videos", "images", "validation_videos", "validation_images")
    values |= {name: [Path(path).name for path in values[name]] for name in places}
    values |= {name: list(values[name]) for name in ("video_sizes", "image_sizes")}
    identity = [values, [[source.name, source.kind, source.split, source.path.stat().st_size] for source in sources]]
    return values | {"inputs_sha256": hashlib.sha256(json.dumps(identity).encode()).hexdigest()}


def reused(manifest: Manifest, preparation: dict[str, Any]) -> Manifest:
    """The manifest that is already there, if it was made by the same preparation; else an `InputError`."""
    if manifest.preparation == preparation:
        print(f"{manifest.path} already holds what these options make: nothing to do.")
        return manifest
    names = [name for name in preparation if manifest.preparation.get(name) != preparation[name]]
    differing = next((name for name in names if name != "inputs_sha256"), "the source files")
    raise InputError(
        f"{manifest.directory} holds shards made differently ({differing}): give another --out or delete that folder."
    )


def encode(
    sources: Sequence[Source], options: PrepareOptions, codec: Codec
) -> tuple[tuple[ShardEntry, ...], list[Source], list[dict[str, str]]]:
    """Write the shards; returns their entries, the sources that gave samples, and `skipped` for the manifest."""
    waiting: dict[tuple[Split, Kind, tuple[int, ...]], list[Clip]] = defaultdict(list)
    samples: Counter[Source] = Counter()
    skipped: list[dict[str, str]] = []
    progress = tqdm(total=len(sources), unit=" sources", disable=None)
    with ShardSetWriter(options.out, options.shard_size) as writer, progress:

        def flush(clips: list[Clip]) -> None:
            latents = codec.encode(torch.stack([clip.pixels for clip in clips])).cpu().numpy()
            for clip, latent in zip(clips, latents, strict=True):
                try:
                    writer.write(clip.source.split, clip.source.kind, latent, clip.metadata)
                    samples[clip.source] += 1
                except InputError as error:
                    skipped.append({"source": clip.source.name, "reason": str(error)})
            clips.clear()
            seconds = max(progress.format_dict["elapsed"], 1e-9)
            progress.set_postfix_str(f"{samples.total()} samples, {samples.total() / seconds:.1f} samples/s")

        for source in sources:
            taken = 0
            try:
                for taken, clip in enumerate(clips_of(source, options, codec), start=1):  # noqa: B007, read when it breaks
                    bucket = waiting[source.split, source.kind, tuple(clip.pixels.shape)]
                    bucket.append(clip)
                    if len(bucket) == options.batch_size:
                        flush(bucket)
            except InputError as error:
                part = f" Its first {taken} clips were used." if taken else ""
                skipped.append({"source": source.name, "reason": f"{error}{part}"})
            progress.update()
        for bucket in waiting.values():
            if bucket:
                flush(bucket)
        return writer.close(), list(samples), skipped


def clips_of(source: Source, options: PrepareOptions, codec: Codec) -> Iterator[Clip]:
    """The samples of one source, scaled and cropped; raises `InputError` where the file is damaged or too short."""
    metadata: dict[str, Any] = {"source": source.name}
    if options.labels:
        metadata["label"] = label_of(source)
    if source.kind == "image":
        pixels = read_image(source.path)
        height, width = pixels.shape[2:]
        size = closest_size(height, width, [parse_size(text) for text in options.image_sizes])
        yield Clip(source, resize_and_crop(pixels, size), metadata | {"pixel_size": list(size)})
        return

    info = video_info(source.path)
    size = closest_size(info.height, info.width, [parse_size(text) for text in options.video_sizes])
    metadata |= {"fps": float(info.fps), "stride": options.stride, "pixel_size": list(size)}
    most = None if options.clips_per_video is None else options.clips_per_video * options.clip_frames
    frames: list[Tensor] = []
    count = 0
    for count, frame in enumerate(iterate_frames(source.path, stride=options.stride, most=most), start=1):
        frames.append(resize_and_crop(frame[None], size))
        if len(frames) == options.clip_frames:
            first = (count - options.clip_frames) * options.stride
            yield Clip(source, torch.cat(frames), metadata | {"first_frame": first})
            frames.clear()
    least = options.least_clip_frames or options.clip_frames
    if len(frames) >= least:
        rest = frames[: len(frames) - (len(frames) - 1) % codec.temporal_factor]
        yield Clip(source, torch.cat(rest), metadata | {"first_frame": (count - len(frames)) * options.stride})
    if count < least:
        raise InputError(
            f"{source.path} gives {count} frames at stride {options.stride} and a clip has {least}: "
            f"lower the stride or the clip's length."
        )


def summary(manifest: Manifest) -> str:
    """A table of what a manifest holds, by bucket, and what was left out."""
    totals: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for shard in manifest.shards:
        row = totals[shard.kind, "x".join(map(str, shard.shape)), shard.split]
        for column, amount in enumerate((1, shard.count, shard.bytes)):
            row[column] += amount
    lines = [f"{'kind':<6} {'latents FxCxhxw':<16} {'split':<11} {'shards':>6} {'samples':>8} {'MB':>9}"]
    for (kind, shape, split), (shards, count, size) in sorted(totals.items()):
        lines.append(f"{kind:<6} {shape:<16} {split:<11} {shards:>6} {count:>8} {size / 1e6:>9.1f}")
    lines.append(
        f"sources: {manifest.validation['train_sources']} for training, "
        f"{manifest.validation['validation_sources']} held out for validation"
    )
    if manifest.skipped:
        report = manifest.directory / SKIPPED_NAME
        lines.append(f"left out: {manifest.skipped} (all in {report})")
        with report.open(encoding="utf-8") as file:
            lines += [f"  {entry['source']}: {entry['reason']}" for entry in map(json.loads, islice(file, 10))]
    return "\n".join(lines)


def available_device(name: str) -> torch.device:
    """The device that a name means here (`auto`: CUDA where there is one); raises `InputError` if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"The device {name!r} cannot be used ({str(error).splitlines()[0]}): try cpu or cuda."
        ) from None
