"""Sharded, atomic, resumable writer: the layout is fixed before the first byte, tensors arrive in any order."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import struct
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from msmoe.checkpoint.reader import Checkpoint, TensorSpec, to_dtype
from msmoe.errors import UserError

MAX_SHARD_BYTES = 5 * 10**9
JOURNAL = ".journal"
NOTES = ".notes"
ALIGNMENT = 8


class CheckpointWriter:
    """Writes `out` under `out.partial` and renames it when it is complete.

    Every tensor's place is known from the start, so the folder's size is the predicted one to the byte. A journal
    names the tensors already written: a killed process is finished by a new writer with `resume=True`. An error
    removes the partial folder; an interrupt keeps it.

    Args:
        out: final folder; must not exist unless `force`.
        specs: all tensors that will be written.
        identity: digest of everything that decides the bytes; resuming with another one is refused.
        force: replace an existing `out`, at the very end.
        resume: go on with an existing partial folder of the same identity.
        max_shard_bytes: shards are cut at tensor borders so as not to exceed this, where a tensor allows it.

    Raises:
        UserError: if `out` exists, the disk has too little room, the folder cannot be written, another process
            is writing it, or the partial folder belongs to another run.
    """

    def __init__(
        self,
        out: str | Path,
        specs: Iterable[TensorSpec],
        *,
        identity: str,
        force: bool = False,
        resume: bool = False,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ):
        self.out = Path(out)
        self.partial = self.out.with_name(self.out.name + ".partial")
        self.specs = {spec.name: spec for spec in specs}
        self.force = force
        self.done: set[str] = set()
        self._shards = plan_shards(list(self.specs.values()), max_shard_bytes)
        layout = json.dumps([[s.name, s.dtype, s.shape] for s in self.specs.values()] + [max_shard_bytes])
        self._identity = sha256(f"{identity}\0{layout}".encode()).hexdigest()
        if self.out.exists() and not force:
            raise UserError(f"{self.out} exists; use --force to replace it")
        with explain_os_errors(self.partial):
            self._open(resume)

    def _open(self, resume: bool) -> None:
        journal_file = self.partial / JOURNAL
        if self.partial.exists() and not resume:
            with lock_journal(journal_file):
                shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True, exist_ok=True)
        journal_file.touch()
        self._lock = contextlib.ExitStack()
        self._journal = self._lock.enter_context(lock_journal(journal_file))
        text = journal_file.read_text(encoding="utf-8")
        lines = text.split("\n")[:-1]
        os.truncate(journal_file, len(text[: text.rfind("\n") + 1].encode()))  # a torn last line is not trusted
        if lines and lines[0] != self._identity:
            self._lock.close()
            raise UserError(f"{self.partial} was left by a run with other inputs; remove it or run without --resume")
        self.done = set(lines[1:]) & self.specs.keys()
        self.notes = self._read_notes()
        needed = sum(spec.num_bytes for name, spec in self.specs.items() if name not in self.done)
        free = shutil.disk_usage(self.partial).free
        if needed > free:
            if self.done:
                self._lock.close()
            else:
                self._abort()
            raise UserError(f"{self.out} needs {needed:,} bytes, the disk has {free:,} free")
        if not lines:
            self._append(self._identity)
        self._places: dict[str, tuple[Path, int]] = {}
        for file_name, names in self._shards.items():
            header = encode_header([self.specs[name] for name in names])
            path, offset = self.partial / file_name, len(header)
            path.touch()
            with path.open("r+b") as stream:
                stream.write(header)
                for name in names:
                    self._places[name] = path, offset
                    offset += self.specs[name].num_bytes
                stream.truncate(offset)

    def _read_notes(self) -> dict[str, dict]:
        try:
            lines = (self.partial / NOTES).read_text(encoding="utf-8").split("\n")[:-1]
        except FileNotFoundError:
            return {}
        os.truncate(self.partial / NOTES, len("".join(f"{line}\n" for line in lines).encode()))
        return dict(json.loads(line) for line in lines)

    def note(self, key: str, content: dict) -> None:
        """Keep something about the work until the folder is complete, also over a kill; see `notes`."""
        with (self.partial / NOTES).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([key, content]) + "\n")
        self.notes[key] = content

    def _append(self, line: str) -> None:
        os.write(self._journal, f"{line}\n".encode())

    def write(self, name: str, tensor: Tensor, *, index: int | None = None) -> None:
        """Store a tensor, or the slice `index` of its leading axis, cast to the tensor's dtype.

        A sliced tensor counts as written only after `finish(name)`.
        """
        spec = self.specs[name]
        expected = spec.shape if index is None else spec.shape[1:]
        if tuple(tensor.shape) != tuple(expected):
            raise ValueError(f"{name} is laid out as {expected}, got {tuple(tensor.shape)}")
        stored = tensor.detach().to("cpu", to_dtype(spec.dtype)).contiguous()
        raw = stored.view(-1).view(torch.uint8).numpy().data if stored.numel() else memoryview(b"")
        self._write_at(name, (index or 0) * len(raw), [raw])
        if index is None:
            self.finish(name)

    def copy(self, name: str, source: Checkpoint, source_name: str, *, index: int | None = None) -> None:
        """Copy a tensor's bytes from another checkpoint without decoding them."""
        size = source.spec(source_name).num_bytes
        self._write_at(name, (index or 0) * size, source.blocks(source_name))
        if index is None:
            self.finish(name)

    def _write_at(self, name: str, offset: int, blocks: Iterable[bytes | memoryview]) -> None:
        path, start = self._places[name]
        with path.open("r+b", buffering=0) as stream:
            stream.seek(start + offset)
            for block in blocks:
                view = memoryview(block)
                while view:
                    view = view[stream.write(view) :]

    def finish(self, name: str) -> None:
        """Record a tensor as completely written."""
        self._append(name)
        self.done.add(name)

    def write_text(self, name: str, text: str) -> None:
        (self.partial / name).write_text(text, encoding="utf-8")

    def copy_file(self, file: Path) -> None:
        shutil.copyfile(file, self.partial / file.name)

    def commit(self) -> None:
        """Give the complete folder its final name.

        Raises:
            ValueError: if a tensor was never written.
        """
        missing = self.specs.keys() - self.done
        if missing:
            raise ValueError(f"{len(missing)} tensors were never written, {sorted(missing)[0]} first")
        if len(self._shards) > 1:
            weight_map = {name: file for file, names in self._shards.items() for name in names}
            total = sum(spec.num_bytes for spec in self.specs.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            self.write_text("model.safetensors.index.json", json.dumps(index, indent=1))
        for path in self.partial.iterdir():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        (self.partial / JOURNAL).unlink()
        (self.partial / NOTES).unlink(missing_ok=True)
        replaced = self.out.with_name(self.out.name + ".replaced")
        if self.out.exists():
            if not self.force:
                raise UserError(f"{self.out} appeared while it was being written; use --force to replace it")
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(self.out, replaced)
        os.rename(self.partial, self.out)
        shutil.rmtree(replaced, ignore_errors=True)
        self._lock.close()

    def _abort(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        self._lock.close()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            with explain_os_errors(self.out):
                self.commit()
        elif isinstance(error, Exception):
            self._abort()
            if isinstance(error, OSError):
                with explain_os_errors(self.out):
                    raise error
        else:
            self._lock.close()


@contextlib.contextmanager
def lock_journal(path: Path):
    """Hold the journal against a second writer of the same folder; yields its descriptor, opened to append."""
    path.touch()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {path.parent}") from None
        yield descriptor
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a small file beside its name and rename it: the old content or the new, never half.

    Raises:
        UserError: if it cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    with explain_os_errors(path):
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def explain_os_errors(path: Path):
    """Turn an operating system's refusal to write into one clear line."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        raise UserError(f"cannot write {path}: {reason}") from error


def plan_shards(specs: list[TensorSpec], max_shard_bytes: int) -> dict[str, list[str]]:
    """File name -> tensor names, in order; one `model.safetensors` if everything fits."""
    groups: list[list[str]] = [[]]
    size = 0
    for spec in specs:
        if groups[-1] and size + spec.num_bytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(spec.name)
        size += spec.num_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def encode_header(specs: list[TensorSpec]) -> bytes:
    """Length-prefixed safetensors header for tensors stored one after the other."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        end = offset + spec.num_bytes
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
