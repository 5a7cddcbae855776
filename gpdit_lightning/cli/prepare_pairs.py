"""`prepare-pairs`: encode pairs of images as few-shot sequences."""

from gpdit_lightning.options.prepare_pairs import PreparePairsOptions
from gpdit_lightning.preparation import prepare_pairs, summary


def run(options: PreparePairsOptions) -> None:
    """Prepare, and print what the folder holds and the next command."""
    print(summary(prepare_pairs(options)))
    print(f"next: {next_command(options)}")


def next_command(options: PreparePairsOptions) -> str:
    """The command that trains on the sequences."""
    recipe = "gpdit:stage4_few_shot"
    if options.codec == "pca":  # on a laptop, where a task is learned after the warm-up of copying images
        run_dir = f"runs/tiny/few_shot_{options.out.absolute().name}"
        task = f"gpdit:few_shot/grayscale --run_dir {run_dir}"
        recipe = "gpdit:few_shot/warmup" if options.task == "copy" else task
    return f"python -m gpdit_lightning fit --config {recipe} --data.sequences.manifests \"['{options.out}']\""
