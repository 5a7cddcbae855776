"""Script for `python -m gpdit_lightning inspect`: inspect a folder of latent shards."""

import sys

from gpdit_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main(["inspect", *sys.argv[1:]]))
