"""The one exception that stands for a mistake of the caller, and the one way to warn."""

import sys
import warnings


class UserError(ValueError):
    """Input that cannot be used. The message names the thing, the value received and what is allowed."""


class MsmoeWarning(UserWarning):
    """Something that the caller should know of a result."""


def warn(message: str) -> None:
    """Warn, in the name of the first caller outside of the package; a command prints the message alone."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "msmoe":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, MsmoeWarning, stacklevel=level)
