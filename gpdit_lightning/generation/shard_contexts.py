"""Contexts that are samples of shards."""

import math
import os
from pathlib import Path

import numpy as np
import torch

from gpdit_lightning.codecs import Codec
from gpdit_lightning.data.manifest import FILE_NAME, Manifest
from gpdit_lightning.data.shards import ShardReader
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation.contexts import ContextSettings, VideoContext, name_for_files
from gpdit_lightning.names import number_in
from gpdit_lightning.path_kinds import does_not_exist

SHARD_EXTENSION = ".tar"
MANIFEST_SEARCH_DEPTH = 3  # a shard's manifest is searched for in its folder and the two above


def open_shard(path: Path, settings: ContextSettings, codec: Codec) -> ShardReader:
    """Open a shard, and check that its samples match the codec and the training clips."""
    if not os.path.isfile(path):  # unlike `Path.is_file`, False for a name that is too long
        raise InputError(f"{path} {does_not_exist(path)}: give the path of a shard of latents.")
    manifest, reader = _find_in_manifest(path)
    manifest.codec.check_same(
        codec.spec(), f"the latents of {manifest.path}", f"the checkpoint's codec from {codec.source or 'the package'}"
    )
    frames, _, *sides = reader.entry.shape
    height, width = (side * codec.spatial_factor for side in sides)
    if reader.entry.kind == "sequence":
        raise InputError(f"{path} contains sequences of image pairs: give a shard of videos or images.")
    if (height, width) not in settings.sizes:
        sizes = ", ".join(f"{height}x{width}" for height, width in settings.sizes)
        raise InputError(
            f"{path} has samples of {height}x{width} pixels, but the checkpoint was trained on {sizes}: give others."
        )
    if reader.entry.kind == "video":
        settings.context_frames(codec.pixel_frames(frames), path, codec)
    settings.check_no_start(path)
    return reader


def _find_in_manifest(path: Path) -> tuple[Manifest, ShardReader]:
    """Find the manifest that lists a shard, and open the shard."""
    for folder in path.absolute().parents[:MANIFEST_SEARCH_DEPTH]:
        if (folder / FILE_NAME).is_file():
            manifest = Manifest.load(folder, check_files=False)  # other shards may be missing
            for entry in manifest.shards:
                if folder / entry.path == path.absolute():
                    return manifest, ShardReader(folder, entry)
    raise InputError(
        f"no {FILE_NAME} in the folder of {path} or the two above lists this shard: copy the one it was made with."
    )


def sample_number(sample: str, reader: ShardReader) -> int:
    """Parse the number or key of a sample. A key is the shard's name, a dash, and the number in six digits."""
    number = number_in(sample.removeprefix(f"{reader.path.stem}-"))
    if number is None or number >= len(reader):
        last = len(reader) - 1
        raise InputError(
            f"{reader.path} has no sample {sample!r}: give 0 to {last}, or {reader.path.stem}-000000 to -{last:06d}."
        )
    return number


def read_sample(reader: ShardReader, number: int, settings: ContextSettings, codec: Codec) -> VideoContext:
    """Read the context, its latents and the ground truth after it from a sample of an open shard."""
    is_video = reader.entry.kind == "video"
    context_frames = 1
    if is_video:
        pixel_frames = min(settings.frames, codec.pixel_frames(reader.entry.shape[0]))
        context_frames = codec.latent_frames(settings.encodable_frames(pixel_frames, codec))
    else:
        settings.check_one_frame(f"a sample of {reader.path}", codec)
    later_frames = math.ceil(settings.ground_truth_frames / codec.temporal_factor)
    values, metadata = reader.read(number, min(context_frames + later_frames, reader.entry.shape[0]))
    if is_video and (stride := metadata.get("stride", 1)) != settings.stride:
        raise InputError(
            f"sample {number} of {reader.path} has stride {stride}, but the context is read at stride "
            f"{settings.stride}, by default that of training: give samples of that stride."
        )
    latents = torch.from_numpy(values.astype(np.float32))
    pixels = codec.decode(latents[None])[0].cpu()
    frames = codec.pixel_frames(context_frames)
    return VideoContext(
        name=name_for_files(metadata["key"]),
        pixels=pixels[:frames],
        ground_truth=pixels[frames : frames + settings.ground_truth_frames],
        fps=settings.source_fps(metadata.get("fps")) / settings.stride,
        latents=latents[:context_frames],
        label=metadata.get("label"),
    )
