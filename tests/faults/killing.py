"""Kill a command at any one of its file operations, and check what it leaves and what the next run makes of it."""

import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

Content = dict[str, bytes]
EVENTS = (
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.truncate",
    "os.listdir",
    "os.scandir",
)
CALLS = ("write", "fsync", "posix_fallocate", "close")  # of `os`, which no audit event tells of
STRANGERS = ("out.partial", "out.replaced", "out.merged", "out.spectra", ".out.partial")  # never ours to touch


class Command(NamedTuple):
    """What is killed.

    Attributes:
        run: write the output of a given name, over whatever is there; resume where the command can.
        old: an earlier output, to be replaced; None for a first run.
        extra: names that belong to the output beside it.
        read: what two runs have in common that write the same; by default every byte.
    """

    run: Callable[[Path], object]
    old: Path | None
    extra: tuple[str, ...] = ()
    read: Callable[[Path], Content | None] | None = None

    def content(self, out: Path) -> Content | None:
        """What an output holds; None if there is none."""
        if not os.path.lexists(out):
            return None
        return self.read(out) if self.read else files_of(out)


def files_of(out: Path) -> Content:
    """Every file of an output, by name."""
    if out.is_file():
        return {"": out.read_bytes()}
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}


def in_a_child(run: Callable[[], object], *, die_at: int | None = None) -> tuple[int, int]:
    """Run in a process of its own; returns its exit status (negative for a signal) and its file operations.

    Args:
        die_at: file operation, counted from 1, before which the process kills itself.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            count = count_operations(die_at)
            run()
            tell(writing, count())
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as stream:
        told = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(told or 0)


tell = lambda descriptor, number, write=os.write: write(descriptor, str(number).encode())


def count_operations(die_at: int | None) -> Callable[[], int]:
    """Count this process's file operations from now on, and end it by SIGKILL before one of them."""
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if done == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def heard(event: str, arguments: tuple) -> None:
        if event in EVENTS and not (event == "open" and isinstance(arguments[1], str) and arguments[1][:1] == "r"):
            step()

    def counted(function: Callable) -> Callable:
        def call(*arguments):
            step()
            return function(*arguments)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    sys.addaudithook(heard)
    return lambda: done


def kill_and_recover(command: Command, folder: Path, die_at: int, new: Content) -> str | None:
    """Kill a run at an operation and run again; says what went wrong, None if nothing did."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lay_strangers(folder)
    out = folder / "out"
    if command.old is not None:
        copy(command.old, out)
    old = command.content(out)
    status, _ = in_a_child(lambda: command.run(out), die_at=die_at)
    if status not in (-signal.SIGKILL, 0):
        return f"ended with {status} in place of being killed"
    left = command.content(out)
    if left not in (old, new):
        return "left something else than the old or the new output under its name"
    if not strangers_intact(folder):
        return "touched what is not its own"
    status, _ = in_a_child(lambda: command.run(out))
    if status:
        return f"could not be run again: {status}"
    if command.content(out) != new:
        return "another result when run again"
    names = {entry.name for entry in folder.iterdir()}
    return None if names == {"out", *STRANGERS, *command.extra} else f"leaves {sorted(names)}"


def kills(command: Command, folder: Path, count: int, *, seed: int = 0) -> Iterator[tuple[int, str | None]]:
    """Kill a command at `count` of its operations, a seeded choice of all; yields each and what went wrong there."""
    reference = folder / "reference"
    shutil.rmtree(folder, ignore_errors=True)
    reference.mkdir(parents=True)
    if command.old is not None:
        copy(command.old, reference / "out")
    status, operations = in_a_child(lambda: command.run(reference / "out"))
    assert status == 0, "an undisturbed run failed"
    new = command.content(reference / "out")
    assert new is not None
    points = range(1, operations + 1)
    for die_at in sorted(random.Random(seed).sample(points, min(count, operations))):
        yield die_at, kill_and_recover(command, folder / "killed", die_at, new)


def copy(source: Path, to: Path) -> None:
    shutil.copytree(source, to) if source.is_dir() else shutil.copyfile(source, to)


def lay_strangers(folder: Path) -> None:
    for name in STRANGERS:
        (folder / name).mkdir()
        (folder / name / "precious").write_text(name)


def strangers_intact(folder: Path) -> bool:
    return all(files_of(folder / name) == {"precious": name.encode()} for name in STRANGERS)
