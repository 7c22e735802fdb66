"""The one exception that a user's mistake raises."""


class UserError(Exception):
    """A mistake in what the user gave: a key, a file, a combination.

    The message is one line that names the key or file, what was found, what was expected and what to do.
    The command line prints it without a traceback and exits with `status`.
    """

    status = 1


class InUseError(UserError):
    """What the user gave belongs to another run that is alive. A job script must not try again at once."""

    status = 75  # EX_TEMPFAIL of sysexits.h
