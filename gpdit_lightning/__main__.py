"""The entry point of `python -m gpdit_lightning`."""

import signal
import sys

from gpdit_lightning.signals import exit_at_signals

with exit_at_signals({signal.SIGINT: "stopped."}):
    from gpdit_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
