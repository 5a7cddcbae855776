"""The entry point of `python -m gpdit_lightning`."""

import sys

from gpdit_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
