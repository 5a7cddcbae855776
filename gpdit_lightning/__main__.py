"""The entry point of `python -m gpdit_lightning`."""

import os
import signal
import sys


def _stop(*_: object) -> None:
    try:
        os.write(2, b"stopped.\n")
    finally:
        os._exit(128 + signal.SIGINT)


# Set before anything of the package is imported, also what handles signals later: an interrupted import is a traceback.
is_handled = signal.getsignal(signal.SIGINT) == signal.default_int_handler  # it is not if it is ignored, as by nohup
if is_handled:
    signal.signal(signal.SIGINT, _stop)

from gpdit_lightning.cli import main  # noqa: E402

if is_handled:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if __name__ == "__main__":
    sys.exit(main())
