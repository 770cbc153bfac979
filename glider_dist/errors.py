"""The one exception for mistakes a user can fix. The command line turns it into one sentence and exit code 2."""


class GliderError(ValueError):
    """Bad input, a bad file or a bad cluster set-up.

    The message is one sentence that says what is wrong, where, and what to do about it.
    """
