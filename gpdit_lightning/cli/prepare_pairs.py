"""`prepare-pairs`: encode pairs of images as few-shot sequences."""

from gpdit_lightning.cli.prepare import codec_options
from gpdit_lightning.options.prepare_pairs import PreparePairsOptions
from gpdit_lightning.preparation import prepare_pairs, summary
from gpdit_lightning.specs import CodecSpec


def run(options: PreparePairsOptions) -> None:
    """Run the preparation, and print a summary and the next command."""
    manifest = prepare_pairs(options)
    print(summary(manifest))
    print(f"next: {next_command(options, manifest.codec)}")


def next_command(options: PreparePairsOptions, codec: CodecSpec) -> str:
    """Return the command that trains on the sequences."""
    recipe = "gpdit:stage4_few_shot"
    if options.codec == "pca":  # for a laptop: a warm-up that copies images, then the task
        run_dir = f"runs/tiny/few_shot_{options.out.absolute().name}"
        task = f"gpdit:few_shot/grayscale --run_dir {run_dir}"
        recipe = "gpdit:few_shot/warmup" if options.task == "copy" else task
    words = [f"--config {recipe}", f"--data.sequences.manifests \"['{options.out}']\"", *codec_options(codec)]
    return f"python -m gpdit_lightning fit {' '.join(words)}"
