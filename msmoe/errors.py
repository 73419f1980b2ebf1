"""The one exception that stands for a mistake of the caller; the command line prints it as one line."""

import contextlib
from collections.abc import Iterator

MAX_QUOTED = 400  # characters of another library's message


class UserError(ValueError):
    """Input that cannot be used. The message names the thing, the value received and what is allowed."""


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
