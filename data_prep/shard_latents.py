"""Script for `python -m gpdit_lightning prepare`: encode videos, images and tars of images as latent shards."""

import sys

from gpdit_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
