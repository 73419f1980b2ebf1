"""The one exception that stands for a mistake of the caller; the command line prints it as one line."""


class UserError(ValueError):
    """Input that cannot be used. The message names the thing, the value received and what is allowed."""
