"""Exceptions for user errors."""


class UserError(Exception):
    """A mistake in the user's input: a key, a file, or a combination of them.

    The message is one line that names the key or file, the value found, the values allowed and the remedy. The command
    line prints it without a traceback and exits with `status`.
    """

    status = 1


class InUseError(UserError):
    """A directory is in use by another running process. A job script must not retry immediately."""

    status = 75  # EX_TEMPFAIL of sysexits.h
