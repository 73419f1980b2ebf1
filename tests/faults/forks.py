"""Functions run in forks of a warm process: under limits of time, memory and file size, their output kept."""

import fcntl
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

MEMORY = 2 * 2**30  # bytes that a trial may ask for beyond what the warm process has
SECONDS = 60.0
IDLE = 15.0  # seconds without work after which a process waits for ever
PIPE = 2**20  # bytes of text


@dataclass
class Limits:
    """What surrounds a trial.

    Attributes:
        memory: bytes beyond those of the warm process; seconds: of wall clock.
        file_size: largest file in bytes, as a quota would have it.
        stdout: where standard output goes: `pipe`, `full` (a full device) or `closed`.
        signal, delay: sent after so many seconds.
    """

    memory: int = MEMORY
    seconds: float = SECONDS
    file_size: int | None = None
    stdout: str = "pipe"
    signal: int | None = None
    delay: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """How a fork ended: exit code (negative for a signal), texts, seconds, peak resident bytes."""

    code: int
    stdout: str
    stderr: str
    timed_out: bool
    peak: int = field(default=0)


def run_forked(work: Callable[[], object], folder: Path, scratch: Path, limits: Limits | None = None) -> Outcome:
    """Run `work` in a fork whose working directory is `folder` and whose temporary files go to `scratch`."""
    limits = limits or Limits()
    scratch.mkdir(parents=True, exist_ok=True)
    pipes = open_pipe(), open_pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        child(work, folder, scratch, (pipes[0][1], pipes[1][1]), limits)
    for _, writer in pipes:
        os.close(writer)
    status, usage, timed_out = wait(pid, limits)
    out, err = (drain(reader) for reader, _ in pipes)
    return Outcome(os.waitstatus_to_exitcode(status), out, err, timed_out, usage.ru_maxrss * 1024)


def open_pipe() -> tuple[int, int]:
    """A pipe that holds more than any command prints; files would count towards a quota."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE)
    os.set_blocking(reader, False)
    return reader, writer


def drain(reader: int) -> str:
    """What a pipe holds."""
    with open(reader, "rb") as stream:
        return (stream.read() or b"").decode("utf-8", "backslashreplace")


def child(work: Callable, folder: Path, scratch: Path, writers: tuple[int, int], limits: Limits) -> None:
    """Never returns."""
    code = 70
    try:
        os.setsid()
        redirect(writers, limits)
        os.chdir(folder)
        os.environ["TMPDIR"] = str(scratch)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        set_limits(limits)
        code = exit_code(work)
        ignore_signals()
        if sys.stdout is not None:
            sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        try:
            sys.stderr.flush()
        finally:
            os._exit(code)


def exit_code(work: Callable) -> int:
    """Exit code of a function that may end in `sys.exit`, as the interpreter would have it."""
    try:
        work()
    except SystemExit as done:
        if isinstance(done.code, str):
            print(done.code, file=sys.stderr)
            return 1
        return done.code or 0
    return 0


def ignore_signals() -> None:
    """The work is done: a signal that comes now is too late."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def redirect(writers: tuple[int, int], limits: Limits) -> None:
    sources = [os.open("/dev/null", os.O_RDONLY), *writers]
    if limits.stdout == "full":
        sources[1] = os.open("/dev/full", os.O_WRONLY)
    for number, source in enumerate(sources):
        os.dup2(source, number)
        os.close(source)
    if limits.stdout == "closed":
        os.close(1)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - the process ends with it
    sys.stdout = None if limits.stdout == "closed" else open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, errors="backslashreplace", buffering=1)  # noqa: SIM115
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr


def set_limits(limits: Limits) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    most = pages * resource.getpagesize() + limits.memory
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))  # not RLIMIT_AS: a browser engine reserves more than it uses
    if limits.file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_size, limits.file_size))


def finishes(pid: int, poller: select.poll, seconds: float) -> bool:
    """Wait for the end of a process; one that has done nothing for `IDLE` seconds waits for ever."""
    end, used, active = time.monotonic() + seconds, 0.0, time.monotonic()
    while time.monotonic() < end:
        if poller.poll(1000):
            return True
        now = cpu_seconds(pid)
        if now > used:
            used, active = now, time.monotonic()
        elif time.monotonic() - active > IDLE:
            return False
    return False


def cpu_seconds(pid: int) -> float:
    """Time that the threads of a process have used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait(pid: int, limits: Limits) -> tuple[int, resource.struct_rusage, bool]:
    """Wait for a fork, send its signal at its time, kill its process group when its time is over."""
    handle = os.pidfd_open(pid)
    poller = select.poll()
    poller.register(handle, select.POLLIN)
    try:
        left = limits.seconds
        if limits.signal is not None:
            left -= limits.delay
            if not poller.poll(limits.delay * 1000):
                os.kill(pid, limits.signal)
        timed_out = not finishes(pid, poller, left)
    finally:
        os.close(handle)
    if timed_out:
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what it left running
    return status, usage, timed_out
