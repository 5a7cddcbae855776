"""`features`: write the features of videos after a layer, in the layout of Video-ChatGPT (GPDiT, section A.2)."""

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset

from gpdit_lightning.checkpoints.reading import TrainedModel, load_trained_model
from gpdit_lightning.codecs import Codec
from gpdit_lightning.codecs.base import fingerprint_of
from gpdit_lightning.devices import available_device
from gpdit_lightning.errors import InputError, ResourceError
from gpdit_lightning.evaluation.videos import find_named_videos, read_clip
from gpdit_lightning.files import check_writable
from gpdit_lightning.generation import cast_linear_weights
from gpdit_lightning.generation.precision import autocast
from gpdit_lightning.generation.settings import (
    AUTOCAST_DTYPES,
    layout_of,
    load_codec_of,
    selected_precision,
    trained_size,
)
from gpdit_lightning.hashes import content_identity
from gpdit_lightning.media.images import parse_size
from gpdit_lightning.names import MAX_NAME_BYTES
from gpdit_lightning.options.features import FeaturesOptions
from gpdit_lightning.options.shared import names_of
from gpdit_lightning.probing.encoder import clip_frames, first_layers, pooled_features
from gpdit_lightning.probing.features import (
    RECORD,
    SOURCES,
    SUFFIXES,
    FeatureDigests,
    FeatureRecord,
    is_complete,
    write_features,
)
from gpdit_lightning.progress import progress_bar
from gpdit_lightning.regular_files import sha256_of
from gpdit_lightning.workers import WorkerLoader

log = logging.getLogger(__name__)


def features(options: FeaturesOptions) -> None:
    """Write the features of all videos whose files are missing or damaged; a stopped command resumes.

    Raises:
        InputError: an option, the checkpoint or all videos cannot be used, or `out` contains other features.
    """
    videos = videos_by_name(options.videos)
    trained = load_trained_model(options.checkpoint, available_device(options.device), options.weights)
    codec = load_codec_of(trained, options.codec, options.codec_source)
    layer = options.layer if options.layer is not None else max(1, round(0.75 * trained.backbone.config.layers))
    trained = replace(trained, backbone=first_layers(trained.backbone, layer))
    record = make_record(options, trained, codec, list(videos.values()))
    create_or_resume(options.out, record)
    usable = {name: path for name, path in videos.items() if has_short_name(record.path_of(options.out, name))}
    files = {name: record.path_of(options.out, name) for name in usable}
    digests = Digests(FeatureDigests(options.out), FeatureDigests(options.out, SOURCES))
    missing = {
        name: path
        for name, path in usable.items()
        if not is_complete(files[name], record, digests.features) or not digests.are_of(files[name], path)
    }
    with suppress(OSError):  # a folder that is not writable
        digests.complete({files[name]: usable[name] for name in sorted(usable.keys() - missing.keys())})
    if missing:
        check_writable(options.out, is_folder=True)
    unreadable = extract(missing, trained, codec, record, options, digests)
    skipped = unreadable + len(videos) - len(usable)
    if skipped == len(videos):
        raise InputError(
            f"none of the {skipped} videos in {' '.join(options.videos)} can be used, for the reasons above: give "
            "others, or fewer --frames for short videos."
        )
    tokens, width = record.shape
    print(
        f"{options.out}: features of {len(videos) - skipped} videos after layer {record.layer}, {tokens} tokens of "
        f"width {width} each; "
        f"{len(missing) - unreadable} of them are new, and {skipped} videos were skipped"
    )


class Digests(NamedTuple):
    """The recorded hashes of a folder.

    Attributes:
        features: sha256 of each file.
        sources: identity of its video.
    """

    features: FeatureDigests
    sources: FeatureDigests

    def are_of(self, file: Path, video: Path) -> bool:
        """Return whether a file of features is of the present content of its video, if the folder records it."""
        recorded = self.sources.get(file)
        if recorded is None or recorded == content_identity(video):
            return True
        log.warning("%s has another content than %s records: its features are written again", video, self.sources.path)
        return False

    def complete(self, videos: Mapping[Path, Path]) -> None:
        """Record the hashes of complete files that an earlier version wrote.

        Args:
            videos: the video of each file.

        Raises:
            OSError: a file cannot be read, or the folder is not writable.
        """
        sources = {file: video for file, video in videos.items() if self.sources.get(file) is None}
        if sources:
            self.sources.add({file: content_identity(video) for file, video in sources.items()})
        if videos and not self.features.are_recorded:
            self.features.add({file: sha256_of(file) for file in videos})

    def add(self, file: Path, source: str) -> None:
        """Record the hashes of a file, after it was written.

        That of the file is last: until then the file is damaged, so that the features of a killed process are not taken
        for those of another source.
        """
        self.sources.add({file: source})
        self.features.add({file: sha256_of(file)})


def has_short_name(path: Path) -> bool:
    """Return whether a file system accepts the name of a file; a warning names the file if not."""
    is_short = len(os.fsencode(path.name)) <= MAX_NAME_BYTES
    if not is_short:
        log.warning("skipped: the name of %s is too long for a file: rename the video", path)
    return is_short


def videos_by_name(paths: Sequence[str]) -> dict[str, Path]:
    """Return all videos by the names of their features: the path within the given folder, without its suffix.

    Raises:
        InputError: there are no videos, or two of them have the same name.
    """
    videos: dict[str, Path] = {}
    for path, name_with_suffix in find_named_videos(paths):
        name = PurePosixPath(name_with_suffix).with_suffix("").as_posix()
        if name in videos:
            raise InputError(
                f"{videos[name]} and {path} would both be written as {name}: give the folder above both, or rename one "
                "of them."
            )
        videos[name] = path
    return videos


def make_record(options: FeaturesOptions, trained: TrainedModel, codec: Codec, videos: Sequence[Path]) -> FeatureRecord:
    """Return the record of the folder: the properties that all its features share.

    Args:
        options: of the verb.
        trained: the first layers of the model.
        codec: of the model.
        videos: paths of all videos.

    Raises:
        InputError: the size, the number of frames or the number of temporal tokens cannot be used.
    """
    backbone, geometry = trained.backbone, trained.geometry
    size = trained_size(options.size, trained, videos)
    frames = clip_frames(options.frames, trained, codec, layout_of(trained, codec))
    latent_frames, _, height, width = codec.latent_shape((frames, 3, *size))
    if 0 < options.temporal_tokens < latent_frames:
        raise InputError(
            f"--temporal_tokens is {options.temporal_tokens} for {latent_frames} latent frames: give at least as many, "
            "or 0."
        )
    return FeatureRecord(
        format=options.format,
        layer=backbone.config.layers,
        width=backbone.config.width,
        temporal_tokens=options.temporal_tokens or latent_frames,
        spatial_tokens=height * width // backbone.config.patch_size**2,
        frames=frames,
        stride=geometry.stride if options.stride is None else options.stride,
        fps=geometry.fps,
        size=f"{size[0]}x{size[1]}",
        precision=selected_precision(options.precision, trained.backbone.device),
        codec=codec.spec(),
        weights=trained.weights,  # a run may have no EMA weights
        step=trained.step,
        fingerprint=fingerprint_of(backbone.state_dict()),
        architecture={
            name: list(v) if isinstance(v, tuple) else v for name, v in backbone.config.architecture().items()
        },
    )


def create_or_resume(out: Path, record: FeatureRecord) -> None:
    """Write the record into a new folder, and check that it is the record of the folder.

    Of two commands that start at the same time with different models, the second one is refused.

    Raises:
        InputError: the folder contains other features.
    """
    if not (out / RECORD).exists():
        if any(out.rglob(f"*{SUFFIXES[record.format]}")):
            raise InputError(f"{out} contains {SUFFIXES[record.format]} files but no {RECORD}: give another --out.")
        record.save(out)
    FeatureRecord.load(out).check(vars(record), out, option_of)


def option_of(name: str) -> str:
    """Return the option that determines a field of the record."""
    return f"--{name}" if name in names_of(FeaturesOptions) else f"{name} (of --checkpoint)"


class ReadClip(NamedTuple):
    """The clip of a video.

    Attributes:
        name: of the video.
        pixels: uint8 (T, 3, H, W), or the reason why it cannot be read.
        source: identity of the video.
    """

    name: str
    pixels: Tensor | str
    source: str = ""


class Clips(Dataset[list[ReadClip]]):
    """Batches of the clip of each video.

    Args:
        videos: paths by name.
        record: gives frames, stride and size.
    """

    def __init__(self, videos: Mapping[str, Path], record: FeatureRecord) -> None:
        self.videos, self.record, self.size = list(videos.items()), record, parse_size(record.size)

    def __len__(self) -> int:
        """Number of videos."""
        return len(self.videos)

    def __getitem__(self, numbers: Sequence[int]) -> list[ReadClip]:
        """Return the clips of videos."""
        return [self._read(*self.videos[number]) for number in numbers]

    def _read(self, name: str, path: Path) -> ReadClip:
        try:
            record, source = self.record, content_identity(path)
            clip = read_clip(path, record.frames, record.stride, self.size, True, resample_short=True, fps=record.fps)
            return ReadClip(name, clip, source)
        except ResourceError:  # other videos would fail too
            raise
        except InputError as error:
            return ReadClip(name, str(error))


def extract(
    videos: Mapping[str, Path],
    trained: TrainedModel,
    codec: Codec,
    record: FeatureRecord,
    options: FeaturesOptions,
    digests: Digests,
) -> int:
    """Write the features of videos; return the number of videos that could not be read."""
    backbone, skipped = trained.backbone, 0
    autocast_dtype = AUTOCAST_DTYPES[record.precision]
    if autocast_dtype is not None:
        cast_linear_weights(backbone, autocast_dtype)
    clips = Clips(videos, record)
    numbers = BatchSampler(range(len(clips)), options.batch_size, drop_last=False)
    loader = WorkerLoader(clips, options.workers, sampler=numbers)
    with progress_bar(total=len(clips), unit=" videos", desc="features") as bar:
        for batch in loader:
            readable = [clip for clip in batch if isinstance(clip.pixels, Tensor)]
            for clip in batch:
                if isinstance(clip.pixels, str):
                    log.warning("skipped: %s", clip.pixels)
            if readable:
                pixels = torch.stack([clip.pixels for clip in readable])
                pooled = features_of_clips(pixels, trained, codec, record).cpu()
                for clip, values in zip(readable, pooled, strict=True):
                    file = record.path_of(options.out, clip.name)
                    write_features(file, values, record)
                    digests.add(file, clip.source)
            skipped += len(batch) - len(readable)
            bar.update(len(batch))
    return skipped


def features_of_clips(pixels: Tensor, trained: TrainedModel, codec: Codec, record: FeatureRecord) -> Tensor:
    """Return the pooled features of clips.

    Args:
        pixels: uint8 (B, T, 3, H, W).
        trained: the first layers of the model.
        codec: of the model.
        record: gives the precision and the number of temporal tokens.

    Returns:
        float32 (B, temporal tokens + N, D).
    """
    latents = codec.whitened(codec.encode(pixels).to(trained.backbone.device))
    with autocast(latents, AUTOCAST_DTYPES[record.precision]):
        return pooled_features(trained.backbone, latents, record.temporal_tokens)
