"""`prepare`: encode videos, images and tars of images as latent shards."""

from gpdit_lightning.cli.first_training import first_training
from gpdit_lightning.options.prepare import PrepareOptions
from gpdit_lightning.preparation import prepare, summary


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
    print(f"next: {first_training(manifest)}")
