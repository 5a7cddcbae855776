"""Progress bars that are rare lines where standard error is a file or a pipe."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LOG_INTERVAL = 15.0  # seconds between two updates in a file or a pipe, where each of them is a line


def progress_bar(iterable: Iterable[Any] | None = None, **settings: Any) -> "tqdm[Any]":
    """Return a bar of tqdm, which is updated at most every `LOG_INTERVAL` seconds unless it is shown in a terminal.

    Args:
        iterable: items to iterate over; None if the bar is updated by calls.
        settings: other arguments of tqdm.
    """
    if not sys.stderr.isatty():
        settings |= {"mininterval": LOG_INTERVAL, "maxinterval": LOG_INTERVAL}
    return tqdm(iterable, **settings)
