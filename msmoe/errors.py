"""The one exception that stands for a mistake of the caller, and the one way to warn."""

import contextlib
import difflib
import sys
import warnings
from collections.abc import Collection, Iterator

MAX_QUOTED = 400  # characters of another library's message


class UserError(ValueError):
    """Input that cannot be used. The message names the thing, the value received and what is allowed."""


def choose(kind: str, name: str, choices: Collection[str]) -> str:
    """Return `name` if it is a choice; otherwise raise `UserError` with the list and the closest one."""
    if name in choices:
        return name
    close = difflib.get_close_matches(str(name), list(choices), n=1)
    hint = f" - did you mean {close[0]!r}?" if close else "."
    raise UserError(f"unknown {kind} {name!r}{hint} Choose one of: {', '.join(choices)}")


@contextlib.contextmanager
def explain_library_errors(what: str) -> Iterator[None]:
    """Turn what another library says about a user's file into one line that starts with `what`.

    Want of memory is no fault of the file and passes through.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what}: {said if len(said) <= MAX_QUOTED else said[:MAX_QUOTED] + ' ...'}") from error


class MsmoeWarning(UserWarning):
    """Something that the caller should know of a result."""


def warn(message: str, category: type[MsmoeWarning] = MsmoeWarning) -> None:
    """Warn, in the name of the first caller outside of the package; a command prints the message alone."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "msmoe":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
