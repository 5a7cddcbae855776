"""`prepare`: encode videos, images and tars of images as latent shards."""

from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.model import GPDiTConfig
from gpdit_lightning.options.prepare import PrepareOptions
from gpdit_lightning.preparation import prepare, summary
from gpdit_lightning.specs import CodecSpec

CLIP_FRAMES = 5  # latent frames per clip in the recipes below
PREVIEW_CONTEXT = 2  # latent frames at the beginning of previews, by default


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
    kinds = {shard.kind for shard in manifest.shards}
    if kinds == {"image"}:
        words = ["--config gpdit:stage1_image_warmup"]
    elif kinds == {"video"}:
        words = ["--config gpdit:ucf101_b", f"--run_dir runs/{manifest.directory.absolute().name}"]
    else:
        words = ["--config gpdit:stage2_mixed", "--model.init_args.initial_weights ''"]
    if manifest.codec.name == "pca":  # for a laptop
        words.insert(1, "--config gpdit:size/tiny")
    words += [f"--data.{kind}s.manifests \"['{manifest.directory}']\"" for kind in sorted(kinds)]
    shortest = min((shard.shape[0] for shard in manifest.shards if shard.kind == "video"), default=CLIP_FRAMES)
    if shortest < CLIP_FRAMES:
        words.append(f"--data.videos.frames {shortest}")
    if shortest <= PREVIEW_CONTEXT:
        words.append(f"--preview.context_frames {shortest - 1}" if shortest > 1 else "--preview.every_steps 0")
    words += codec_options(manifest.codec)
    return f"python -m gpdit_lightning fit {' '.join(words)}"


def codec_options(codec: CodecSpec) -> list[str]:
    """Return the options of `fit` that latents of this codec need."""
    channels = codec.latent_channels
    words = (
        [f"--model.init_args.backbone.latent_channels {channels}"] if channels != GPDiTConfig.latent_channels else []
    )
    return [*words, f"--preview.codec {codec.name}"] if codec.is_custom else words
