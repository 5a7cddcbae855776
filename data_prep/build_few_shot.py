"""Script for `python -m gpdit_lightning prepare-pairs`: encode pairs of images as few-shot sequences."""

import sys

from gpdit_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare-pairs", *sys.argv[1:]]))
