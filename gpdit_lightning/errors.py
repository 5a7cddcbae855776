"""The exception for errors that a user can correct, and what messages say of other exceptions."""

import os


class InputError(ValueError):
    """An input that cannot be used. The message is one sentence: the file or field, its value, and the cure.

    The command line prints the message without a traceback and exits with status 2. Any other exception is a bug and
    keeps its traceback.
    """


class TransientError(InputError):
    """An input that could not be read for a reason that may pass, such as an I/O error or a time-out.

    The input may be intact, so the message does not call it damaged.

    Attributes:
        retried: whether several attempts have failed.
        is_download: whether a server or the network is the cause, which may take longer to pass.
        requested_wait: seconds that the server requests before the next attempt.
    """

    retried = False
    is_download = False
    requested_wait = 0.0


class ResourceError(TransientError):
    """An input that could not be read because memory, open files or disk space ran out, as would be others after it."""


def message_line(error: BaseException, place: int = 0) -> str:
    """Return a line of an exception's message, by default the first; the name of its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[place]


def file_of(error: OSError, otherwise: str) -> str:
    """Return the file that an error names, which some libraries give as bytes; another text if it names none.

    Of a file that could not be renamed, it is the new name, and of one that is written under `partial_path` its own
    name: the other one is temporary.
    """
    name = error.filename2 or error.filename
    if name is None:
        return otherwise
    return (os.fsdecode(name) if isinstance(name, bytes) else str(name)).removesuffix(".partial")
