"""SIGINT and SIGTERM: one line and the exit code, whatever the process is doing.

A signal is raised in the main thread as `KeyboardInterrupt`, so that what is open is closed. Python does that between
two of its own instructions only; a long calculation in a library, or a pool that waits for its threads, would hold it
up. So a thread watches as well, and ends the process when it has not ended itself after `GRACE` seconds. That is safe
at any moment: an output gets its name when it is complete.
"""

import atexit
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
GRACE = 2.0  # seconds


def interruptible(work: Callable[[], None]) -> None:
    """Do some work; when a signal comes, end the process with one line and exit code 128 + its number.

    Raises:
        SystemExit: after a signal, or as the work raises it.
    """
    if threading.current_thread() is not threading.main_thread():
        work()
        return
    state = State()
    try:
        try:
            state.listen()
            work()
        except BaseException as error:
            if state.number is None and not isinstance(error, KeyboardInterrupt):
                raise
            state.say(getattr(error, "__notes__", ()))
            raise SystemExit(state.code) from None
        finally:
            state.close()
    except KeyboardInterrupt:  # a signal that came on the way out
        state.end_at_once()


class State:
    """The signal that has come, if one has, whether its line is printed, and how things were before."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.pid = os.getpid()
        self.saying = threading.Lock()
        self.stopped = threading.Event()
        self.before = {number: signal.getsignal(number) for number in SIGNALS}
        self.reader, self.writer = os.pipe()

    @property
    def code(self) -> int:
        return 128 + (self.number or signal.SIGINT)

    def listen(self) -> None:
        """Take over the signals that are not ignored (as by nohup, or in the background of a shell)."""
        os.set_blocking(self.writer, False)
        signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self.forget)
        threading.Thread(target=self.watch, name="msmoe-signals", daemon=True).start()
        for number in SIGNALS:
            if self.before[number] is not signal.SIG_IGN:
                signal.signal(number, self.hear)

    def hear(self, number: int, frame: FrameType | None) -> None:
        """The handler: interrupt what the main thread does; end at once where that has been tried."""
        if self.number is not None:
            self.end_at_once()
        self.number = number
        raise KeyboardInterrupt

    def watch(self) -> None:
        """End the process some time after a signal, should the main thread not have got round to it."""
        while heard := os.read(self.reader, 1):
            if heard[0] in SIGNALS and signal.getsignal(heard[0]) == self.hear and not self.stopped.wait(GRACE):
                self.number = heard[0]
                self.end_at_once()
        os.close(self.reader)

    def forget(self) -> None:
        """A fork is a process of its own: its signals are none of ours."""
        if self.pid != os.getpid() and not self.stopped.is_set():
            signal.set_wakeup_fd(-1)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)

    def close(self) -> None:
        """Leave the signals as they were; where one has come, the watch goes on until the process has ended."""
        if self.number is not None:
            return
        self.stopped.set()
        atexit.register(ignore_signals)  # the work is done, and what libraries do in the end takes its time
        for number in SIGNALS:
            signal.signal(number, self.before[number])
        signal.set_wakeup_fd(-1)
        os.close(self.writer)

    def end_at_once(self) -> None:
        self.say()
        os._exit(self.code)

    def say(self, notes: Sequence[str] = ()) -> None:
        """Print the line, once, whichever thread comes first, with what the work has noted on the interrupt."""
        if self.saying.acquire(blocking=False):
            line = "; ".join([WORDS[signal.Signals(self.number or signal.SIGINT)], *notes])
            with contextlib.suppress(OSError):
                os.write(2, f"msmoe: {line}\n".encode())


def ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
