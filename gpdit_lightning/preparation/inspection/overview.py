"""What a folder of shards holds, in a page."""

from collections.abc import Iterator, Sequence

from tqdm import tqdm

from gpdit_lightning.data.manifest import Manifest, ShardEntry
from gpdit_lightning.data.shards import ShardReader
from gpdit_lightning.errors import InputError
from gpdit_lightning.preparation.inspection.samples import spread
from gpdit_lightning.preparation.inspection.statistics import Moments, statistics
from gpdit_lightning.preparation.prepare import summary

LABELS_SHOWN = 5


def overview(manifest: Manifest, samples: int = 512) -> str:
    """Counts by bucket, sources, what was left out, labels, the codec, and the statistics of the latents.

    Args:
        manifest: of the folder.
        samples: how many to measure, evenly spread over the training's; a damaged one is named and left out.

    Raises:
        InputError: `samples` is below 1.
    """
    if samples < 1:
        raise InputError(f"--samples is {samples}: measure at least 1.")
    training = manifest.of_split("train") or manifest.shards
    moments = Moments(manifest.codec.latent_channels)
    spacings: list[float] = []  # seconds from one frame of a clip to the next
    damaged: list[str] = []
    measured = spread(training, samples)
    for entry, number in tqdm(measured, desc="measuring", unit=" samples", disable=None, leave=False):
        try:
            latent, metadata = ShardReader(manifest.directory, entry).read(number)
        except InputError as error:
            damaged.append(str(error))
            continue
        moments.add(latent)
        if entry.kind == "video" and metadata.get("fps"):
            spacings.append(metadata.get("stride", 1) / metadata["fps"])
    lines = [summary(manifest), *_videos(manifest, training, spacings), *_labels(manifest), _codec(manifest), ""]
    lines += dict.fromkeys(damaged)  # an index says the same of all its samples
    lines.append(f"latents, over {len(measured) - len(damaged)} of {sum(entry.count for entry in training)} samples:")
    lines.append(statistics(moments, manifest.codec) if moments.count else "none of them can be read: try --verify")
    return "\n".join(lines)


def _videos(manifest: Manifest, training: Sequence[ShardEntry], spacings: Sequence[float]) -> Iterator[str]:
    clips = [entry for entry in training if entry.kind == "video"]
    if clips and spacings:
        frames = sum(entry.count * manifest.codec.pixel_frames(entry.shape[0]) for entry in clips)
        hours = frames * sum(spacings) / len(spacings) / 3600
        yield f"video for training: {sum(entry.count for entry in clips)} clips, {frames} frames, {hours:.3g} hours"


def _labels(manifest: Manifest) -> Iterator[str]:
    if manifest.labels:
        more = ", ..." if len(manifest.labels) > LABELS_SHOWN else ""
        yield f"labels: {len(manifest.labels)} ({', '.join(manifest.labels[:LABELS_SHOWN])}{more})"


def _codec(manifest: Manifest) -> str:
    codec = manifest.codec
    return f"codec: {codec.name} from {codec.source or 'the package'}, fingerprint {codec.fingerprint}"
