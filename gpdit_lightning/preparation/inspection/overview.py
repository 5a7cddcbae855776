"""Overview of a folder of shards: counts, labels, codec, statistics of the latents."""

from collections.abc import Iterator, Sequence

from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.shard_entry import ShardEntry
from gpdit_lightning.data.shards import ShardReader
from gpdit_lightning.errors import InputError
from gpdit_lightning.preparation.inspection.sampling import evenly_spaced
from gpdit_lightning.preparation.inspection.statistics import LatentStatistics, statistics_table
from gpdit_lightning.preparation.summary import summary
from gpdit_lightning.progress import progress_bar

MAX_LABELS_SHOWN = 5


def overview(manifest: Manifest, samples: int = 512) -> str:
    """Describe a folder: numbers of samples, input files, skipped inputs, labels, codec, statistics of the latents.

    Args:
        manifest: manifest of the folder.
        samples: number of training samples to measure, evenly spaced; damaged ones are listed and left out.
    """
    training = manifest.of_split("train") or manifest.shards
    statistics = LatentStatistics(manifest.codec.latent_channels)
    frame_seconds: list[float] = []  # time from one frame of a clip to the next
    damaged: list[str] = []
    measured = evenly_spaced(training, samples)
    for entry, number in progress_bar(measured, desc="measuring", unit=" samples", disable=None, leave=False):
        try:
            latent, metadata = ShardReader(manifest.directory, entry).read(number)
        except InputError as error:
            damaged.append(str(error))
            continue
        statistics.add(latent)
        if entry.kind == "video" and metadata.get("fps"):
            frame_seconds.append(metadata.get("stride", 1) / metadata["fps"])
    lines = [summary(manifest), *_videos(manifest, training, frame_seconds), *_labels(manifest), _codec(manifest)]
    lines += [*_arrays(manifest), ""]
    lines += dict.fromkeys(damaged)  # a damaged index gives the same message for all its samples
    lines.append(f"latents, over {len(measured) - len(damaged)} of {sum(entry.count for entry in training)} samples:")
    if statistics.count:
        lines.append(statistics_table(statistics, manifest.codec))
    else:
        lines.append("none of them is readable: find the damage with --verify")
    return "\n".join(lines)


def _videos(manifest: Manifest, training: Sequence[ShardEntry], frame_seconds: Sequence[float]) -> Iterator[str]:
    clips = [entry for entry in training if entry.kind == "video"]
    if clips and frame_seconds:
        frames = sum(entry.count * manifest.codec.pixel_frames(entry.shape[0]) for entry in clips)
        hours = frames * sum(frame_seconds) / len(frame_seconds) / 3600
        yield f"video for training: {sum(entry.count for entry in clips)} clips, {frames} frames, {hours:.3g} hours"


def _labels(manifest: Manifest) -> Iterator[str]:
    if manifest.labels:
        more = ", ..." if len(manifest.labels) > MAX_LABELS_SHOWN else ""
        yield f"labels: {len(manifest.labels)} ({', '.join(manifest.labels[:MAX_LABELS_SHOWN])}{more})"


def _codec(manifest: Manifest) -> str:
    codec = manifest.codec
    return f"codec: {codec.name} from {codec.source or 'the package'}, fingerprint {codec.fingerprint}"


def _arrays(manifest: Manifest) -> Iterator[str]:
    for kind in dict.fromkeys(entry.kind for entry in manifest.shards):
        of_kind = [entry for entry in manifest.shards if entry.kind == kind]
        stored = {"posterior": "standard deviations of the posterior", "flips": "flipped left to right too"}
        found = [text for name, text in stored.items() if any(getattr(entry, f"has_{name}") for entry in of_kind)]
        if found:
            yield f"{kind} samples: {', '.join(found)}"
