"""The entry point of `python -m gpdit_lightning`."""

import os
import signal
import sys
import threading


def _stop(*_: object) -> None:
    try:
        os.write(2, b"stopped.\n")
    finally:
        os._exit(128 + signal.SIGINT)


# Set before anything of the package is imported, also what handles signals later: an interrupted import is a traceback.
# It is not set in another thread, which Python forbids, or if the signal is ignored, as by nohup.
is_handled = threading.current_thread() is threading.main_thread()
is_handled = is_handled and signal.getsignal(signal.SIGINT) == signal.default_int_handler
if is_handled:
    signal.signal(signal.SIGINT, _stop)

from gpdit_lightning.cli import main  # noqa: E402

if is_handled:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if __name__ == "__main__":
    sys.exit(main())
