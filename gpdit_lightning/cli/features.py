"""`features`: what a model's first layers see in videos, in the layout Video-ChatGPT trains on (GPDiT, section A.2)."""

import argparse
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from gpdit_lightning.checkpoints.reading import TrainedModel
from gpdit_lightning.cli.argparse_options import (
    PRECISIONS,
    add_opening,
    add_precision,
    opened,
    parser_of,
    trained_sizes,
)
from gpdit_lightning.cli.recipe_files import read_yaml
from gpdit_lightning.codecs import Codec
from gpdit_lightning.codecs.base import fingerprint_of
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.videos import find_videos, read_clip
from gpdit_lightning.generation import cast_linear_weights
from gpdit_lightning.media.images import Size
from gpdit_lightning.probing.encoder import first_layers, pooled_features
from gpdit_lightning.probing.features import ENDINGS, RECORD, FeatureRecord, write_features

log = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    """The verb's options."""
    options = parser_of(
        "features",
        "Write for each video what the first layers of a model see in it, pooled over space and over time, as "
        "Video-ChatGPT pools CLIP's features; probing/features.py says how to load them. Interrupted, the "
        "same command goes on.",
    )
    add = options.add_argument
    add("--config", metavar="FILE.yaml", help="options under `features`, as recipes/video_chatgpt.yaml has them")
    add("--layer", type=int, required=True, help="how many blocks are run; the paper takes 18 of H's 24")

    what = options.add_argument_group("what the model sees of each video")
    add = what.add_argument
    add("--videos", nargs="+", required=True, help="videos, and folders of videos")
    add("--frames", type=int, help="pixel frames of a clip, 1 + 4k (default: as many as in training)")
    add(
        "--stride",
        type=int,
        help="from one frame of the clip to the next, in the middle of the video, or spread evenly where that is too "
        "short; 0: spread over the whole video always, as Video-ChatGPT does (default: the stride of training)",
    )
    add("--size", help="HEIGHTxWIDTH in pixels, one that was trained on (default: the only one)")

    result = options.add_argument_group("what to write")
    add = result.add_argument
    add("--out", type=Path, required=True, help="the folder; each file is named like its video in the folder given")
    add("--format", default="npy", choices=list(ENDINGS), help="pickle for Video-ChatGPT's own loader; not opened here")
    add("--temporal_tokens", type=int, default=0, help="zeros follow the latent frames up to so many tokens; 0: none")

    how = options.add_argument_group("how to compute")
    add = how.add_argument
    add("--batch_size", type=int, default=4, help="videos side by side")
    add("--workers", type=int, default=4, help="processes that read videos; 0 reads in this one")
    add_precision(add)
    add_opening(add)
    return options


def run(verb: str, arguments: Sequence[str]) -> None:
    """Write the features of all videos that have none yet."""
    options = parser().parse_args([*configured(arguments), *arguments])
    for name, least in (("batch_size", 1), ("workers", 0), ("temporal_tokens", 0)):
        if getattr(options, name) < least:
            raise InputError(f"--{name} is {getattr(options, name)}: give at least {least}.")
    videos = videos_by_name(options.videos)
    trained, codec = opened(options)
    trained = replace(trained, backbone=first_layers(trained.backbone, options.layer))
    size = size_of(options, trained)
    record = record_of(options, trained, codec, size)
    begin(options.out, record)
    missing = {name: path for name, path in videos.items() if not record.path_of(options.out, name).exists()}
    skipped = extract(missing, trained, codec, size, record, options)
    if skipped == len(videos):
        raise InputError(f"None of the {skipped} videos in {' '.join(options.videos)} could be read: give others.")
    tokens, width = record.shape
    print(
        f"{options.out}: features of {len(videos) - skipped} videos, {tokens} tokens of width {width} each; "
        f"{len(missing) - skipped} of them are new, and {skipped} videos were skipped"
    )


def configured(arguments: Sequence[str]) -> list[str]:
    """The options that a `--config` gives, as arguments; those of the command line come behind and override them.

    Raises:
        InputError: no such file, or none of this verb.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    path = first.parse_known_args(arguments)[0].config
    if path is None:
        return []
    settings = read_yaml(path).get("features")
    if not isinstance(settings, dict):
        raise InputError(f"{path} holds no options under `features`: give a file like recipes/video_chatgpt.yaml.")
    given = []
    known = {action.dest for action in parser()._actions}
    for name, value in settings.items():
        if name not in known or value is None:
            raise InputError(
                f"{path} gives {name}: {value} under `features`: name options of this verb (--help), each with a value."
            )
        values = value if isinstance(value, list) else [value]
        given += [f"--{name}", *map(str, values)]
    return given


def videos_by_name(places: Sequence[str]) -> dict[str, Path]:
    """All videos by what their files are called: the path within the folder that was given, without its ending.

    Raises:
        InputError: no videos, or two that would be called the same.
    """
    videos: dict[str, Path] = {}
    for place in places:
        for path in find_videos([place]):
            inside = path.relative_to(place) if path != Path(place) else Path(path.name)
            name = inside.with_suffix("").as_posix()
            if name in videos:
                raise InputError(
                    f"{videos[name]} and {path} would both be written as {name}: give the folder above both, or rename "
                    "one of them."
                )
            videos[name] = path
    return videos


def size_of(options: argparse.Namespace, trained: TrainedModel) -> Size:
    """Height and width at which the model sees all videos, so that they have the same tokens."""
    sizes = trained_sizes(options.size, trained)
    if len(sizes) > 1:
        known = ", ".join(f"{height}x{width}" for height, width in sizes)
        raise InputError(f"{options.checkpoint} was trained on {known}: choose one of them by --size.")
    return sizes[0]


def record_of(options: argparse.Namespace, trained: TrainedModel, codec: Codec, size: Size) -> FeatureRecord:
    """What all features of the run share.

    Raises:
        InputError: a number of frames or a stride that cannot be.
    """
    backbone, geometry = trained.backbone, trained.geometry
    frames = codec.pixel_frames(geometry["frames"]) if options.frames is None else options.frames
    stride = geometry["stride"] if options.stride is None else options.stride
    latent_frames, _, height, width = codec.latent_shape((frames, 3, *size))
    longest = backbone.config.rope_lengths[0]
    if latent_frames > longest:
        raise InputError(
            f"--frames is {frames}, but the model's positions are made for {codec.pixel_frames(longest)}: give fewer."
        )
    if latent_frames > geometry["frames"]:
        seen = codec.pixel_frames(geometry["frames"])
        log.warning("warning: --frames is %d, but training clips had at most %d", frames, seen)
    if stride < 0:
        raise InputError(f"--stride is {stride}: give at least 1, or 0 for clips that are spread over their videos.")
    if 0 < options.temporal_tokens < latent_frames:
        raise InputError(
            f"--temporal_tokens is {options.temporal_tokens} for {latent_frames} latent frames: give at least as many, "
            "or 0."
        )
    cuda = next(backbone.parameters()).is_cuda
    return FeatureRecord(
        format=options.format,
        layer=options.layer,
        width=backbone.config.width,
        temporal_tokens=options.temporal_tokens or latent_frames,
        spatial_tokens=height * width // backbone.config.patch_size**2,
        frames=frames,
        stride=stride,
        size=f"{size[0]}x{size[1]}",
        precision=("bf16" if cuda else "32") if options.precision == "auto" else options.precision,
        codec=f"{codec.name} {codec.fingerprint}",
        weights=backbone.facts.get("weights", options.weights),  # a run may have no averaged ones
        step=trained.step,
        fingerprint=fingerprint_of(backbone.state_dict()),
        architecture={
            name: list(v) if isinstance(v, tuple) else v for name, v in backbone.config.architecture().items()
        },
    )


def begin(out: Path, record: FeatureRecord) -> None:
    """Open the folder, or an earlier one of the same features.

    Raises:
        InputError: other features are there.
    """
    if (out / RECORD).exists():
        FeatureRecord.load(out).check(asdict(record), out)
    elif any(out.rglob(f"*{ENDINGS[record.format]}")):
        raise InputError(f"{out} holds {ENDINGS[record.format]} files and no {RECORD}: give another --out.")
    else:
        record.save(out)


class Clips(Dataset[tuple[str, Tensor | str]]):
    """The clip of each video by its name, or why there is none."""

    def __init__(self, videos: Mapping[str, Path], record: FeatureRecord, size: Size) -> None:
        self.videos, self.record, self.size = list(videos.items()), record, size

    def __len__(self) -> int:
        """How many videos there are."""
        return len(self.videos)

    def __getitem__(self, number: int) -> tuple[str, Tensor | str]:
        """A name, with uint8 (T, 3, H, W) or the sentence that says what is wrong."""
        name, path = self.videos[number]
        try:
            clip = read_clip(path, self.record.frames, self.record.stride, self.size, centred=True, resample_short=True)
            return name, clip
        except InputError as error:
            return name, str(error)


def extract(
    videos: Mapping[str, Path],
    trained: TrainedModel,
    codec: Codec,
    size: Size,
    record: FeatureRecord,
    options: argparse.Namespace,
) -> int:
    """Write the features of videos; returns how many could not be read."""
    backbone, skipped = trained.backbone, 0
    device, precision = next(backbone.parameters()).device, PRECISIONS[record.precision]
    if precision is not None:
        cast_linear_weights(backbone, precision)
    clips = Clips(videos, record, size)
    batches = DataLoader(clips, options.batch_size, num_workers=options.workers, collate_fn=list)
    with (
        tqdm(total=len(clips), unit=" videos", desc="features") as bar,
        logging_redirect_tqdm([logging.getLogger("gpdit_lightning")]),
    ):
        for batch in batches:
            known = {name: clip for name, clip in batch if isinstance(clip, Tensor)}
            for reason in (clip for _, clip in batch if isinstance(clip, str)):
                log.warning("skipped: %s", reason)
            if known:
                latents = codec.whitened(codec.encode(torch.stack(list(known.values()))).to(device))
                with nullcontext() if precision is None else torch.autocast(device.type, dtype=precision):
                    pooled = pooled_features(backbone, latents, record.temporal_tokens)
                for name, features in zip(known, pooled, strict=True):
                    write_features(record.path_of(options.out, name), features, record)
            skipped += len(batch) - len(known)
            bar.update(len(batch))
    return skipped
