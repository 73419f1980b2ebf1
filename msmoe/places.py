"""Where an output may go: never over what it is made from or inside it, never over a stranger's files."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from msmoe.errors import UserError

PARTIAL = ".msmoe-partial"
NAME_BYTES = 255  # the longest name that common file systems take


class Kind(NamedTuple):
    """What an output is: its name in messages, and the files by which a folder of the kind is known."""

    name: str
    marks: tuple[str, ...]

    @property
    def is_file(self) -> bool:
        return not self.marks


FILE = Kind("file", ())
CHECKPOINT = Kind("checkpoint", ("model.safetensors", "model.safetensors.index.json", "msmoe.json"))
STATISTICS = Kind("statistics directory", ("stats.json",))
FIGURES = Kind("folder of figures", ("*",))  # whatever else is in it is taken along


def place_of(path: Path) -> Path:
    """The path with its folder resolved; a link in the place of the output itself is not followed."""
    if path.name in ("", ".."):
        return real(path)
    return real(path.parent) / path.name


def real(path: Path) -> Path:
    """The path without links; unlike `Path.resolve` it takes links that lead in a circle."""
    return Path(os.path.realpath(path))


def partial_of(place: Path) -> Path:
    """The folder in which an output is made, beside its place."""
    name = os.fsencode(f".{place.name}{PARTIAL}")
    if len(name) > NAME_BYTES:
        from hashlib import sha256

        name = os.fsencode(f".{sha256(os.fsencode(place.name)).hexdigest()[:32]}{PARTIAL}")
    return place.with_name(os.fsdecode(name))


def check_place(path: Path, kind: Kind, *, force: bool = False, inputs: Iterable[str | Path] = ()) -> None:
    """Refuse, before any work, an output that must not or cannot be written.

    Args:
        inputs: files and folders that the output is made from; names of other things are skipped.

    Raises:
        UserError: if the path is an input, within or around one, exists without `force`, holds what is no output of
            the kind, or has no folder that can be written to.
    """
    place = place_of(path)
    try:
        for source in inputs:
            check_apart(path, Path(source))
        if kind.is_file and not place.parent.is_dir():
            raise UserError(f"cannot write {path}: no folder {path.parent}")
        if not exists(place):
            check_parent(path, place)
        elif not force:
            raise UserError(f"{path} exists; use --force to replace it")
        else:
            check_replaceable(path, kind)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def exists(place: Path) -> bool:
    """Whether a name is taken, be it by a link to nowhere; a name that cannot be is an OSError."""
    try:
        place.lstat()
    except FileNotFoundError:
        return False
    return True


def check_apart(path: Path, source: Path) -> None:
    """Raise `UserError` if an output is its input, lies within it or holds it, whatever the spelling."""
    if not source.exists():
        return
    for place in {place_of(path), real(path)}:
        if place.exists() and place.samefile(source):
            raise UserError(f"{path} is what it would be made from: choose another --out")
        if source.is_dir() and any(parent.exists() and parent.samefile(source) for parent in place.parents):
            raise UserError(f"{path} lies inside {source}, which it is made from: choose another --out")
        if place in real(source).parents:
            raise UserError(f"{path} holds {source}, which it is made from: choose another --out")


def check_parent(path: Path, place: Path) -> None:
    """Raise `UserError` for a folder that cannot be made or written to."""
    ancestor = next(parent for parent in place.parents if os.path.lexists(parent))
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {path}: {ancestor} is not a folder that can be written to")


def check_replaceable(path: Path, kind: Kind) -> None:
    """Raise `UserError` for what `--force` must not replace.

    A link is replaced itself; what it points to stays as it is.
    """
    place = place_of(path)
    check_parent(path, place)
    mode = place.stat().st_mode if place.exists() else None
    if mode is not None and not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise UserError(f"{path} is neither a file nor a folder: choose another --out")
    if place.is_symlink():
        return
    if kind.is_file and place.is_dir():
        raise UserError(f"{path} is a folder: give the name of a file")
    if not kind.is_file and not place.is_dir():
        raise UserError(f"{path} is a file: give the name of a folder")
    if not kind.is_file:
        check_ours(path, place, kind)


def check_in_use(path: Path, place: Path) -> None:
    """Raise `UserError` for a folder that no rename can put another in the place of."""
    if os.path.ismount(place) or place in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"{path} is a mount point or holds the current folder: give a folder inside it")


def check_ours(path: Path, place: Path, kind: Kind) -> None:
    """Raise `UserError` for a folder that is not empty and no earlier output of the kind."""
    check_in_use(path, place)
    if kind is FIGURES:
        return
    with os.scandir(place) as entries:
        inside = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
    if inside and not inside.keys() & set(kind.marks):
        raise UserError(f"{path} is no {kind.name}, so --force does not replace it: choose another --out")
    folders = sorted(name for name, is_folder in inside.items() if is_folder)
    if folders:
        raise UserError(f"{path} holds the folder {folders[0]}, which no {kind.name} does: move it away first")


def check_figures(out: Path, names: Iterable[str], *, force: bool) -> None:
    """Refuse, before any work, a folder that files cannot be written into beside what it holds.

    Raises:
        UserError: if one of the names is taken and `force` is not given, or the folder cannot be replaced.
    """
    place = place_of(out)
    if not exists(place):
        return
    if place.is_symlink() or not place.is_dir():
        raise UserError(f"{out} is {'a link' if place.is_symlink() else 'a file'}: give the name of a folder")
    taken = next((name for name in names if os.path.lexists(place / name)), None)
    if taken is not None and not force:
        raise UserError(f"{out / taken} exists; use --force to replace it")
    check_in_use(out, place)
