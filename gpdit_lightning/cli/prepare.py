"""`prepare`: encode videos, images and tars of images as latent shards."""

from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.options.prepare import PrepareOptions
from gpdit_lightning.preparation import prepare, summary

# The stage that trains on shards of these kinds, as a shipped recipe.
RECIPES = {
    ("image",): "gpdit:stage1_image_warmup",
    ("image", "video"): "gpdit:stage2_mixed",
    ("video",): "gpdit:stage3_long_video",
}
SOURCES = {"image": "images", "video": "videos"}


def run(options: PrepareOptions) -> None:
    """Prepare, and print what the folder holds and the next command."""
    manifest = prepare(options)
    if manifest is None:
        print(
            f"Other processes still encode for {options.out}; the last of them writes the manifest. If one was killed, "
            "run this command again."
        )
        return
    print(summary(manifest))
    print(f"next: {next_command(manifest)}")


def next_command(manifest: Manifest) -> str:
    """The command that trains on the shards."""
    kinds = tuple(sorted({shard.kind for shard in manifest.shards}))
    sources = " ".join(f"--data.{SOURCES[kind]}.manifests \"['{manifest.directory}']\"" for kind in kinds)
    size = " --config gpdit:size/tiny" if manifest.codec.name == "pca" else ""
    return f"python -m gpdit_lightning fit --config {RECIPES[kinds]}{size} {sources}"
