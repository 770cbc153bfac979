"""What ends a job other than its work: a mistake that a user can fix, and a stop that was asked for."""


class GliderError(ValueError):
    """Bad input, a bad file or a bad cluster set-up; the command line prints the sentence and exits with code 2.

    The message is one sentence that says what is wrong, where, and what to do about it.
    """


class Stopped(Exception):
    """The job was asked to stop and has kept what it did; the command line exits with :data:`EXIT_STOPPED`."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type, for a message of one sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


EXIT_STOPPED = 85
"""Nothing is wrong and not all is done: the same command goes on."""
