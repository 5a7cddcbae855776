"""`prepare-pairs`: encode pairs of images as few-shot sequences."""

import shlex

from gpdit_lightning.cli.first_training import codec_options, configs, fit_command, patch_options, size_overlay
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.devices import this_machine
from gpdit_lightning.options.prepare_pairs import PreparePairsOptions
from gpdit_lightning.preparation import prepare_pairs, summary

WARM_UP = "copy"  # task of the recipe few_shot/warmup


def run(options: PreparePairsOptions) -> None:
    """Run the preparation, and print a summary and the next command."""
    manifest = prepare_pairs(options)
    print(summary(manifest))
    print(f"next: {next_command(options, manifest)}")
    if options.task != WARM_UP:
        print("(it begins from random weights; from those of a run: --model.init_args.initial_weights RUN_DIR)")


def next_command(options: PreparePairsOptions, manifest: Manifest) -> str:
    """Return a command that trains on the sequences from random weights."""
    words = configs("few_shot/warmup")
    if options.task != WARM_UP:
        run_dir = shlex.quote(f"runs/few_shot_{options.out.absolute().name}")
        words = [*configs("stage4_few_shot", size_overlay(manifest.codec, this_machine())), f"--run_dir {run_dir}"]
    return fit_command(manifest, [*words, *codec_options(manifest.codec), *patch_options(manifest)])
