"""The exception for errors that a user can correct."""


class InputError(ValueError):
    """An input that cannot be used. The message is one sentence: the file or field, its value, and the cure.

    The command line prints the message without a traceback and exits with status 2. Any other exception is a bug and
    keeps its traceback.
    """
