"""The facts about prepared data from which a recipe is planned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gpdit_lightning.data.selection import load_data_dir
from gpdit_lightning.data.source_manifests import common_codec
from gpdit_lightning.errors import InputError
from gpdit_lightning.estimation.prepared import LatentShape, count_samples
from gpdit_lightning.specs import CodecSpec

PLANNED = ("images", "videos")  # the sources of planned recipes; sequences fine-tune a trained model


@dataclass(frozen=True)
class TrainingData:
    """Prepared images and videos."""

    folders: tuple[str, ...]
    """Folders of manifests, as given."""
    codec: CodecSpec
    samples: Mapping[str, Mapping[LatentShape, int]]
    """Number of training samples of each latent shape, by source."""
    held_out: Mapping[str, Mapping[LatentShape, int]]
    """The same for held-out samples."""
    recordings: int
    """Number of input files of the training samples; 0 if the manifests do not record it."""
    classes: int
    """Number of labels; 0 if the samples have none."""
    has_sequences: bool
    """Whether there are few-shot sequences too."""
    has_posterior: bool = False
    """Whether all training samples have the standard deviations of the codec's posterior."""
    has_flips: bool = False
    """Whether all training samples are also stored flipped left to right."""

    @classmethod
    def load(cls, folders: Sequence[str]) -> "TrainingData":
        """Read manifests.

        Raises:
            InputError: a manifest cannot be read, there are no images or videos for training, or codecs differ.
        """
        loaded = load_data_dir(folders, PLANNED)
        manifests = list(loaded.values())
        codec = common_codec(manifests)
        samples = {name: count_samples(name, manifests, "train") for name in PLANNED}
        samples = {name: shapes for name, shapes in samples.items() if shapes}
        train = [shard for manifest in manifests for shard in manifest.of_split("train") if shard.kind != "sequence"]
        has_sequences = any(shard.kind == "sequence" for manifest in manifests for shard in manifest.shards)
        if not samples:
            listed = " and ".join(str(manifest.path) for manifest in manifests)
            cure = (
                "few-shot sequences fine-tune a trained model, by `fit --config gpdit:stage4_few_shot "
                "--model.init_args.initial_weights RUN`"
                if has_sequences
                else "prepare some with `python -m gpdit_lightning prepare`"
            )
            raise InputError(f"{listed} contains no images or videos for training: {cure}.")
        return cls(
            folders=tuple(loaded),
            codec=codec,
            samples=samples,
            held_out={name: count_samples(name, manifests, "validation") for name in samples},
            recordings=sum(manifest.validation.get("train_sources", 0) for manifest in manifests),
            classes=len(dict.fromkeys(label for manifest in manifests for label in manifest.labels)),
            has_sequences=has_sequences,
            has_posterior=all(shard.has_posterior for shard in train),
            has_flips=all(shard.has_flips for shard in train),
        )

    @property
    def lengths(self) -> tuple[int, ...]:
        """The numbers of latent frames of the clips, also of held-out ones, in increasing order."""
        shapes = {*self.samples.get("videos", ()), *self.held_out.get("videos", ())}
        return tuple(sorted({frames for frames, *_ in shapes}))

    @property
    def patch_size(self) -> int:
        """The side of a patch in latent pixels: 2, or 1 if the frames of some samples cannot be divided by 2."""
        shapes = {shape for split in (self.samples, self.held_out) for source in split.values() for shape in source}
        return 1 if any(height % 2 or width % 2 for _, height, width in shapes) else 2

    @property
    def tokens(self) -> int:
        """The number of tokens of all training samples."""
        values = sum(
            count * frames * height * width
            for shapes in self.samples.values()
            for (frames, height, width), count in shapes.items()
        )
        return values // self.patch_size**2
