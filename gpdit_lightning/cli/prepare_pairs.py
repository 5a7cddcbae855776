"""`prepare-pairs`: encode pairs of images as few-shot sequences."""

import shlex

from gpdit_lightning.cli.prepare import codec_options, size_overlay
from gpdit_lightning.options.prepare_pairs import PreparePairsOptions
from gpdit_lightning.preparation import prepare_pairs, summary
from gpdit_lightning.specs import CodecSpec

WARM_UP = "copy"  # task of the recipe few_shot/warmup


def run(options: PreparePairsOptions) -> None:
    """Run the preparation, and print a summary and the next command."""
    manifest = prepare_pairs(options)
    print(summary(manifest))
    print(f"next: {next_command(options, manifest.codec)}")
    if options.task != WARM_UP:
        print("(it begins from random weights; from those of a run: --model.init_args.initial_weights RUN_DIR)")


def next_command(options: PreparePairsOptions, codec: CodecSpec) -> str:
    """Return a command that trains on the sequences from random weights."""
    words = ["--config gpdit:few_shot/warmup"]
    if options.task != WARM_UP:
        run_dir = shlex.quote(f"runs/few_shot_{options.out.absolute().name}")
        words = ["--config gpdit:stage4_few_shot", f"--config {size_overlay(codec)}", f"--run_dir {run_dir}"]
    words += [f"--data_dir {shlex.quote(str(options.out))}", *codec_options(codec)]
    return f"python -m gpdit_lightning fit {' '.join(words)}"
