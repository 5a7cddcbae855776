"""The one exception for what a user can mend."""


class InputError(ValueError):
    """What was given cannot be used. The message is one sentence: the file or field, its value, and the cure.

    The command line prints the message alone and exits with status 2; any other exception is a bug and keeps its
    traceback.
    """
