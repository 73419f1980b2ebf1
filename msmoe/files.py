"""The one way to write outputs: made beside the final name, renamed when complete, the old one swapped by rename.

Beside an output NAME a folder `.NAME.msmoe-partial` holds, as long as a run lasts or waits to be resumed:

    journal     tells that the folder is ours, is locked by the process that writes, records what is done
    content     the output in the making; after a swap, what it has replaced
    scratch     whatever else a run keeps until it ends

The journal is made first and removed last, so a folder without it is a stranger's, unless it is empty. A killed process
leaves this folder and nothing else; the next run with the same output resumes it or clears it away.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError

from msmoe.errors import UserError
from msmoe.places import CHECKPOINT, FIGURES, FILE, Kind, check_figures, check_ours, check_place, partial_of, place_of

JOURNAL, CONTENT, SCRATCH, REPLACED = "journal", "content", "scratch", "replaced"
HEADER = b"msmoe-output/1\n"
NOREPLACE, EXCHANGE = 1, 2  # flags of renameat2
AT_FDCWD = -100
NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


class Output:
    """A file or folder in the making: written to `content`, given its name by `commit`.

    As a context, an error removes everything; an interrupt keeps a checkpoint in the making, for a resumed run.

    Args:
        path: final name.
        kind: what it is; `force` replaces nothing but an output of the kind.
        force: replace what exists, at the very end.
        resume: go on with what a killed or interrupted run left.
        inputs: what the output is made from, and must stay apart from.

    Attributes:
        content: where to write; a folder, but for the kind `FILE`.
        scratch: folder for whatever else the run keeps until it ends.
        records: what a run that is resumed has journalled.
        keep: whether an error, too, keeps everything.

    Raises:
        UserError: if the output must not or cannot be written, or another process is writing it.
    """

    def __init__(
        self,
        path: str | Path,
        kind: Kind,
        *,
        force: bool = False,
        resume: bool = False,
        inputs: Iterable[str | Path] = (),
    ):
        self.path, self.kind, self.force = Path(path), kind, force
        with explain_os_errors(self.path):
            self.place = place_of(self.path)
            self.partial = partial_of(self.place)
            restore_replaced(self.place, self.partial)
        check_place(self.path, kind, force=force, inputs=inputs)
        self.content, self.scratch = self.partial / CONTENT, self.partial / SCRATCH
        self.records: list[Any] = []
        self.keep = False
        self._journal: int | None = None
        self._made = missing_parents(self.place)
        try:
            with explain_os_errors(self.path):
                self.place.parent.mkdir(parents=True, exist_ok=True)
                self._journal = open_journal(self.partial)
                self._prepare(resume)
        except UserError:
            if self._journal is not None:
                self.abort()
            raise

    def _prepare(self, resume: bool) -> None:
        """Take over what a dead process left, or clear it away."""
        journal = self.partial / JOURNAL
        text = journal.read_bytes()
        records, valid = read_records(text)
        if resume and text and not self._has_its_name(records):
            self.records = records
            os.truncate(journal, valid)
        else:
            clear(self.partial, last=JOURNAL)
            os.truncate(journal, 0)
            self._append(HEADER)
        if not self.kind.is_file:
            self.content.mkdir(exist_ok=True)

    def _has_its_name(self, records: list[Any]) -> bool:
        """Whether what a killed process had made was renamed: `content` is what it replaced, or gone."""
        made = [record["commit"] for record in records if isinstance(record, dict) and "commit" in record]
        return bool(made) and not (self.content.exists() and self.content.stat().st_ino == made[-1])

    def record(self, entry: Any) -> None:
        """Journal something for a run that resumes this one."""
        self._append(json.dumps(entry, separators=(",", ":")).encode() + b"\n")

    def _append(self, line: bytes) -> None:
        assert self._journal is not None
        while line:
            line = line[os.write(self._journal, line) :]

    def commit(self) -> None:
        """Bring the content to disk and give it its final name; what was there is replaced by one rename.

        Raises:
            UserError: if something appeared under the name meanwhile.
        """
        with explain_os_errors(self.path):
            sync(self.content)
            self.record({"commit": self.content.stat().st_ino})
            if not os.path.lexists(self.place):
                self._name_first()
            elif not self.force:
                raise self._appeared()
            elif self.kind.is_file:
                os.replace(self.content, self.place)
            else:
                if self.place.is_dir() and not self.place.is_symlink():
                    check_ours(self.path, self.place, self.kind)
                swap(self.content, self.place, aside=self.partial / REPLACED)
            sync_entry(self.place.parent)
        self._made = []
        self.abort()

    def _name_first(self) -> None:
        try:
            rename(self.content, self.place, NOREPLACE)
        except FileExistsError:
            raise self._appeared() from None

    def _appeared(self) -> UserError:
        return UserError(f"{self.path} appeared while it was being written; use --force to replace it")

    def abort(self) -> None:
        """Remove everything but an output that has its name; let go of the lock."""
        if self._journal is None:
            return
        remove(self.partial, last=JOURNAL)
        for parent in reversed(self._made):
            with contextlib.suppress(OSError):
                parent.rmdir()
        self.release()

    def release(self) -> None:
        """Let go of the lock, keeping everything for a resumed run."""
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        can_be_resumed = self.kind is CHECKPOINT and not isinstance(error, Exception | None)
        if not can_be_resumed and not self.keep:
            self.abort()
        else:
            self.release()
        if isinstance(error, OSError | SafetensorError):
            with explain_os_errors(self.path):
                raise error


def write_whole(path: str | Path, text: str) -> None:
    """Write a file beside its name and rename it: the old content or the new, never half.

    Raises:
        UserError: if it cannot be written.
    """
    with Output(path, FILE, force=True) as output:
        output.content.write_text(text, encoding="utf-8")
        output.commit()


@contextlib.contextmanager
def write_into(out: Path, names: Sequence[str], *, force: bool = False) -> Iterator[Path]:
    """Write several files into a folder, all of them or none, beside what it holds; yields where to write them.

    The folder is replaced as a whole by one that has everything else in it as well.

    Args:
        names: of all files that may be written; those in the folder are removed.

    Raises:
        UserError: if a name is taken and `force` is not given, or the folder cannot be written or replaced.
    """
    check_figures(out, names, force=force)
    with Output(out, FIGURES, force=True) as output:
        yield output.content
        others = set(os.listdir(out)) - set(names) if out.exists() else set()
        for name in others:
            take_along(out / name, output.content / name)
        output.commit()


def take_along(file: Path, to: Path) -> None:
    """Give a file, or all in a folder, a second name; or copy it where the file system has no such thing."""
    if file.is_dir() and not file.is_symlink():
        to.mkdir()
        for entry in file.iterdir():
            take_along(entry, to / entry.name)
        shutil.copystat(file, to)
        return
    try:
        os.link(file, to, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EPERM, *NOT_SUPPORTED):
            raise
        shutil.copy2(file, to, follow_symlinks=False)


@contextlib.contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal to write into one clear line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        found = re.search(r"os error (\d+)", str(error))  # in what the safetensors library says
        number = getattr(error, "errno", None) or (int(found[1]) if found else None)
        if number is None:
            raise UserError(f"cannot write {path}: {error}") from error
        reasons = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
        reasons[errno.EFBIG] = "the file would be larger than this process may write (see ulimit -f)"
        raise UserError(f"cannot write {path}: {reasons.get(number, os.strerror(number))}") from error


# ---- the partial folder


def open_journal(partial: Path) -> int:
    """Make the folder of an output, or take over a dead process's; returns the locked journal, opened to append.

    Raises:
        UserError: if the folder is a stranger's, or a living process holds it.
    """
    while True:
        with contextlib.suppress(FileExistsError):
            partial.mkdir()
        check_partial(partial)
        try:
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(partial / JOURNAL, flags, 0o666)
        except FileNotFoundError:  # its process has just removed it
            continue
        try:
            lock(descriptor, partial)
        except BaseException:
            os.close(descriptor)
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(partial / JOURNAL)):
                return descriptor
        os.close(descriptor)


def lock(descriptor: int, folder: Path) -> None:
    """Lock the file that stands for a folder, or raise `UserError` if another process has."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is writing {folder}") from None


@contextlib.contextmanager
def locked(marker: Path) -> Iterator[None]:
    """Hold a folder against other processes by a file in it, which is made where it is not there."""
    with explain_os_errors(marker.parent):
        descriptor = os.open(marker, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        lock(descriptor, marker.parent)
        yield
    finally:
        os.close(descriptor)


def check_partial(partial: Path) -> None:
    """Raise `UserError` unless a folder is empty or carries our journal."""
    if stat.S_ISDIR(partial.lstat().st_mode):
        names = os.listdir(partial)
        if not names:
            return
        journal = partial / JOURNAL
        if JOURNAL in names and stat.S_ISREG(journal.lstat().st_mode):
            start = journal.read_bytes()[: len(HEADER)]
            if start == HEADER or (names == [JOURNAL] and HEADER.startswith(start)):
                return
    raise UserError(f"{partial} is in the way, and not of msmoe's making: move it away or choose another --out")


def read_records(journal: bytes) -> tuple[list[Any], int]:
    """Records of a journal, and its length up to the last whole one: what follows a torn line is not trusted."""
    records, valid = [], len(HEADER)
    for line in journal[valid:].splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        records.append(record)
        valid += len(line)
    return records, valid


def restore_replaced(place: Path, partial: Path) -> None:
    """Give the old output its name back if a process was killed between the two renames of a swap."""
    if not os.path.lexists(place) and os.path.lexists(partial / REPLACED):
        descriptor = open_journal(partial)
        try:
            rename(partial / REPLACED, place, NOREPLACE)
        finally:
            os.close(descriptor)


def missing_parents(place: Path) -> list[Path]:
    """Folders above a path that do not exist yet, the outermost first."""
    return [parent for parent in reversed(place.parents) if not parent.exists()]


def clear(folder: Path, *, last: str) -> None:
    """Empty a folder, but for the file `last`."""
    for entry in list(folder.iterdir()):
        if entry.name != last:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def remove(folder: Path, *, last: str) -> None:
    """Remove a folder as far as the system allows, the file that marks it as ours after everything else."""
    with contextlib.suppress(OSError):
        clear(folder, last=last)
        (folder / last).unlink(missing_ok=True)
        folder.rmdir()


# ---- renames


def swap(content: Path, place: Path, *, aside: Path) -> None:
    """Exchange two names at once where the system can, else by way of a third that the next run finds."""
    try:
        rename(content, place, EXCHANGE)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        os.rename(place, aside)
        os.rename(content, place)


def rename(source: Path, target: Path, flags: int) -> None:
    """renameat2, which Python has no function for; a plain rename where NOREPLACE is not supported."""
    sys.audit("os.rename", source, target, -1, -1)
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    number = errno.ENOSYS
    if function is not None:
        if function(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), ctypes.c_uint(flags)) == 0:
            return
        number = ctypes.get_errno()
    if number in NOT_SUPPORTED and flags == NOREPLACE:
        os.rename(source, target)
        return
    raise OSError(number, os.strerror(number), str(source), None, str(target))


def reserve(descriptor: int) -> None:
    """Have the disk set aside the room of a file with holes, so that it cannot be full later."""
    try:
        os.posix_fallocate(descriptor, 0, os.fstat(descriptor).st_size)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise


def sync(content: Path) -> None:
    """Bring a file, or a folder and its files, to disk."""
    for path in [content, *(content.iterdir() if content.is_dir() else ())]:
        if stat.S_ISREG(path.lstat().st_mode) or path == content:
            sync_entry(path)


def sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
