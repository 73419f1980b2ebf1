"""What an exception means to the one who typed the command; None where it is a fault of ours."""

import errno
import os
import re

import click

from msmoe.errors import UserError

ENVIRONMENT = {  # errors of the system that no program can help
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE,
    errno.ENFILE, errno.ENAMETOOLONG, errno.ELOOP, errno.EBADF,
}  # fmt: skip
FULL = {errno.ENOSPC, errno.EDQUOT}
NO_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "bad_alloc",
    "unable to mmap",
    "cannot allocate memory",
    "failed to map segment",
)
LOWERS_MEMORY = ("batch_size", "max_source_length", "max_target_length", "token_sample", "samples", "processes")


def explain(error: Exception) -> str | None:
    """One line on a mistake of the caller or a limit of the machine.

    Returns:
        None for anything else: it keeps its traceback.
    """
    line = None
    if isinstance(error, click.ClickException):
        line = error.format_message()
    elif isinstance(error, UserError):
        line = str(error)
    elif is_out_of_memory(error):
        line = f"out of memory: {what_to_lower()}"
    elif (number := system_error(error)) in ENVIRONMENT:
        line = explain_system_error(error, number)
    return line and " ".join(line.split())


def is_out_of_memory(error: Exception) -> bool:
    """Of the machine or of a graphics card, whichever library says it."""
    if isinstance(error, MemoryError) or system_error(error) == errno.ENOMEM:
        return True
    if type(error).__name__ == "OutOfMemoryError":
        return True
    said = str(error).lower() if isinstance(error, RuntimeError | ImportError | OSError) else ""
    return any(text in said for text in NO_MEMORY)


def what_to_lower() -> str:
    """The options of the running command that memory follows from."""
    context = click.get_current_context(silent=True)
    names = {parameter.name for parameter in context.command.params} if context else set()
    options = [f"--{name.replace('_', '-')}" for name in LOWERS_MEMORY if name in names]
    if options:
        return f"lower {' or '.join(options)}, or use a machine with more memory"
    return "use a machine with more memory"


def system_error(error: Exception) -> int:
    """The number of an error of the system; 0 if it is none. Libraries in Rust only write it into their message."""
    if isinstance(error, OSError):
        return error.errno or 0
    written = re.search(r"os error (\d+)", str(error))
    return int(written.group(1)) if written else 0


def explain_system_error(error: Exception, number: int) -> str:
    if comes_from_printing(error):
        return f"cannot write to standard output: {os.strerror(number)}"
    name = getattr(error, "filename", None)
    where = f"{os.fsdecode(name)}: " if isinstance(name, str | bytes) else ""
    hint = ": free space, or give a place with more" if number in FULL else ""
    if number == errno.EFBIG:
        hint = ": raise the limit of file sizes (ulimit -f)"
    return f"{where}{os.strerror(number)}{hint}"


def comes_from_printing(error: Exception) -> bool:
    """Whether it was raised by what prints: nothing else of the command writes through these."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    return module.partition(".")[0] in ("click", "rich") or module == "msmoe.cli.group"
