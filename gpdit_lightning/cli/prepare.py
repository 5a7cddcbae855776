"""`prepare`: encode videos, images and tars of images as latent shards."""

import shlex

from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.devices import available_device
from gpdit_lightning.model import GPDiTConfig
from gpdit_lightning.options.prepare import PrepareOptions
from gpdit_lightning.preparation import prepare, summary
from gpdit_lightning.specs import CodecSpec


def run(options: PrepareOptions) -> None:
    """Run the preparation, and print a summary and the next command."""
    manifest = prepare(options)
    if manifest is None:
        print(
            f"Other processes are still encoding for {options.out}; the last of them writes the manifest. If one was "
            "killed, run this command again."
        )
        return
    print(summary(manifest))
    print(f"next: {next_command(manifest)}")


def next_command(manifest: Manifest) -> str:
    """Return a command that trains on the shards from random weights."""
    images_only = {shard.kind for shard in manifest.shards} == {"image"}
    words = [f"--config gpdit:{'stage1_image_warmup' if images_only else 'stage2_mixed'}"]
    words.append(f"--config {size_overlay(manifest.codec)}")
    words += [f"--data_dir {shlex.quote(str(manifest.directory))}", *codec_options(manifest.codec)]
    words += patch_options(manifest)
    return f"python -m gpdit_lightning fit {' '.join(words)}"


def size_overlay(codec: CodecSpec) -> str:
    """Return the overlay for the device of this machine: that of a laptop without a GPU, or for the codec `pca`."""
    return "gpdit:tiny" if codec.name == "pca" or available_device("auto").type == "cpu" else "gpdit:b"


def patch_options(manifest: Manifest) -> list[str]:
    """Return the option of `fit` for latent frames that do not divide into patches of the default size."""
    sides = {side for shard in manifest.shards for side in shard.shape[2:]}
    divides = not any(side % GPDiTConfig.patch_size for side in sides)
    return [] if divides else ["--model.init_args.backbone.patch_size 1"]


def codec_options(codec: CodecSpec) -> list[str]:
    """Return the options of `fit` that latents of this codec need."""
    channels = codec.latent_channels
    words = (
        [f"--model.init_args.backbone.latent_channels {channels}"] if channels != GPDiTConfig.latent_channels else []
    )
    return [*words, f"--preview.codec {codec.name}"] if codec.is_custom else words
