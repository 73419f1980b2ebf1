"""Sharded, atomic, resumable writer: the layout is fixed before the first byte, tensors arrive in any order."""

import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from msmoe.checkpoint.casting import cast, check_finite, whole_items
from msmoe.checkpoint.readback import checksum, read_back
from msmoe.checkpoint.reader import Checkpoint, TensorSpec, to_dtype
from msmoe.checkpoint.shards import encode_header, plan_shards, write_header
from msmoe.errors import UserError
from msmoe.files import Output, explain_os_errors
from msmoe.layer.stored import Place
from msmoe.places import CHECKPOINT

MAX_SHARD_BYTES = 5 * 10**9
Slices = dict[int | None, int]  # index along the leading axis, None for all of the tensor -> checksum


class CheckpointWriter:
    """Writes a checkpoint as an `Output`, and reads it back before it gets its name.

    Every tensor's place is known from the start, so the folder's size is the predicted one to the byte. The output's
    journal names the tensors already written, with checksums: a killed process is finished by a new writer with
    `resume=True`, which trusts a tensor only if its bytes are what the journal says. An error removes everything; an
    interrupt keeps it.

    Args:
        out: final folder; must not exist unless `force`. Or an `Output` that is open already; `force`, `resume` and
            `inputs` are those it was opened with.
        specs: all tensors that will be written.
        identity: digest of everything that decides the bytes; resuming with another one is refused.
        force: replace an existing checkpoint, at the very end.
        resume: go on with what a run of the same identity left.
        max_shard_bytes: shards are cut at tensor borders so as not to exceed this, where a tensor allows it.
        inputs: files and folders that the output must stay apart from.
        check: called with the complete folder before it gets its name; an error refuses it.

    Attributes:
        partial: folder in which the checkpoint is made.
        done: tensors that are written; notes: what `note` and `finish` were told of them.

    Raises:
        UserError: if `out` exists or is no checkpoint, the disk has too little room, the folder cannot be written,
            another process is writing it, or what is to be resumed belongs to another run.
    """

    def __init__(
        self,
        out: str | Path | Output,
        specs: Iterable[TensorSpec],
        *,
        identity: str,
        force: bool = False,
        resume: bool = False,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        inputs: Iterable[str | Path] = (),
        check: Callable[[Path], None] | None = None,
    ):
        self.specs = {spec.name: spec for spec in specs}
        self.done: set[str] = set()
        self.notes: dict[str, dict] = {}
        self._check = check
        self._written: dict[str, Slices] = {}
        self._rows: dict[str, int] = {}  # of a slice of a tensor that is written in slices
        self._shards = plan_shards(list(self.specs.values()), max_shard_bytes)
        layout = json.dumps([[s.name, s.dtype, s.shape] for s in self.specs.values()] + [max_shard_bytes])
        digest = sha256(f"{identity}\0{layout}".encode()).hexdigest()
        opened = isinstance(out, Output)
        self.output = (
            out if isinstance(out, Output) else Output(out, CHECKPOINT, force=force, resume=resume, inputs=inputs)
        )
        self.out, self.partial = self.output.path, self.output.content
        try:
            with explain_os_errors(self.out):
                self._open(digest)
        except BaseException as error:
            if not opened:
                self.output.__exit__(type(error), error, None)
            raise

    def _open(self, identity: str) -> None:
        records = [record for record in self.output.records if "commit" not in record]
        if records and records[0] != {"identity": identity}:
            self.output.keep = True
            raise UserError(
                f"{self.output.partial} was left by a run with other inputs; remove it or run without --resume"
            )
        self._places = self._lay_out()
        for record in records[1:]:
            self._take_over(record)
        needed = sum(spec.num_bytes for name, spec in self.specs.items() if name not in self.done)
        free = shutil.disk_usage(self.partial).free
        if needed > free:
            self.output.keep = bool(self.done)
            raise UserError(f"{self.out} needs {needed:,} bytes, the disk has {free:,} free")
        if not records:
            self.output.record({"identity": identity})
        for file_name, names in self._shards.items():
            write_header(self.partial / file_name, [self.specs[name] for name in names])

    def _lay_out(self) -> dict[str, tuple[Path, int]]:
        """Name -> file and offset of every tensor."""
        places = {}
        for file_name, names in self._shards.items():
            offset = len(encode_header([self.specs[name] for name in names]))
            for name in names:
                places[name] = self.partial / file_name, offset
                offset += self.specs[name].num_bytes
        return places

    def _take_over(self, record: dict) -> None:
        """Trust a record of a dead process if the bytes of all its tensors are there."""
        tensors: dict[str, Slices] = {name: dict(slices) for name, slices in record.get("tensors", {}).items()}
        if all(name in self.specs and self._holds(name, slices) for name, slices in tensors.items()):
            self.done |= tensors.keys()
            self.notes |= record.get("notes", {})

    def _holds(self, name: str, slices: Slices) -> bool:
        """Whether the bytes of a tensor are those of some checksums."""
        path, start = self._places[name]
        if not path.is_file():
            return False
        whole = self.specs[name].num_bytes
        size = whole if None in slices else whole // max(len(slices), 1)
        with path.open("rb") as stream:
            return all(
                zlib.crc32(read_at(stream, start + (index or 0) * size, size)) == crc for index, crc in slices.items()
            )

    def note(self, key: str, content: dict) -> None:
        """Keep something about the work until the folder is complete, also over a kill; see `notes`."""
        self.output.record({"notes": {key: content}})
        self.notes[key] = content

    def write(self, name: str, tensor: Tensor, *, index: int | None = None, finish: bool = True) -> int:
        """Store a tensor, or the slice `index` of its leading axis, cast to the tensor's dtype.

        A sliced tensor counts as written only after `finish(name)`, and so does a whole one without `finish`.

        Returns:
            checksum of the stored bytes.

        Raises:
            UserError: if a value is not finite, or cannot be held by the dtype.
        """
        return self.write_place(Place(name, index), tensor, finish=finish)

    def write_place(self, place: Place, tensor: Tensor, *, finish: bool = True) -> int:
        """Store a tensor in a place; as `write`."""
        spec = self.specs[place.tensor]
        if tuple(tensor.shape) != place.shape(spec.shape):
            raise ValueError(f"{place.tensor} is laid out as {place.shape(spec.shape)}, got {tuple(tensor.shape)}")
        stored = cast(place.tensor, tensor.detach().cpu(), to_dtype(spec.dtype)).contiguous()
        raw = stored.view(-1).view(torch.uint8).numpy().data if stored.numel() else memoryview(b"")
        self._write_at(place.tensor, (place.index or 0) * len(raw), [raw])
        return self._wrote(place, checksum(stored), finish=finish)

    def copy(self, name: str, source: Checkpoint, source_name: str, *, index: int | None = None) -> None:
        """Copy a tensor from another checkpoint, as of `copy_place`; all of it, or to a slice of the leading axis."""
        self.copy_place(Place(name, index), source, Place(source_name))

    def copy_place(self, target: Place, source: Checkpoint, given: Place) -> None:
        """Copy a place of another checkpoint: its bytes where the dtypes are the same, else its values, cast.

        Raises:
            UserError: if the shapes differ, a value is not finite, or cannot be held by the dtype.
        """
        spec, source_spec = self.specs[target.tensor], source.spec(given.tensor)
        shape, expected = given.shape(source_spec.shape), target.shape(spec.shape)
        if shape != expected:
            shapes = f"{shape}, where {expected} is needed"
            raise UserError(f"tensor {given.tensor} of {source.path} has shape {shapes}")
        if source_spec.dtype != spec.dtype:
            self.write_place(target, source.read(given.tensor, index=given.index, rows=given.rows))
            return
        crc = 0

        def checked() -> Iterator[bytes]:
            nonlocal crc
            for block in whole_items(source.blocks(given), to_dtype(spec.dtype).itemsize):
                values = torch.frombuffer(bytearray(block), dtype=to_dtype(spec.dtype))
                check_finite(values, given.tensor, source.path)
                crc = zlib.crc32(block, crc)
                yield block

        size = prod(shape) * to_dtype(spec.dtype).itemsize
        self._write_at(target.tensor, (target.index or 0) * size, checked())
        self._wrote(target, crc, finish=True)

    def _wrote(self, place: Place, crc: int, *, finish: bool) -> int:
        name, index, rows = place
        self._rows[name] = max(rows, 1)
        slices = self._written.setdefault(name, {})
        for replaced in [None] if index is not None else list(slices):
            slices.pop(replaced, None)
        slices[index] = crc
        if index is None and finish:
            self.finish(name)
        return crc

    def _write_at(self, name: str, offset: int, blocks: Iterable[bytes | memoryview]) -> None:
        path, start = self._places[name]
        with path.open("r+b", buffering=0) as stream:
            stream.seek(start + offset)
            for block in blocks:
                view = memoryview(block)
                while view:
                    view = view[stream.write(view) :]

    def finish(self, *names: str, notes: dict[str, dict] | None = None) -> None:
        """Record tensors as completely written, and what there is to say about them, at once.

        Raises:
            ValueError: if a slice of one was never written.
        """
        for name in names:
            slices = self._written.get(name, {})
            if None not in slices and len(slices) != self._num_slices(name):
                raise ValueError(f"{name} has {self._num_slices(name)} slices, of which {len(slices)} were written")
        tensors = {name: list(self._written[name].items()) for name in names}
        self.output.record({"tensors": tensors, "notes": notes or {}})
        self.done |= set(names)
        self.notes |= notes or {}

    def finish_copied(self) -> None:
        """Finish the tensors of which every slice has been written."""
        for name in sorted(self._written.keys() - self.done):
            if None not in self._written[name] and len(self._written[name]) == self._num_slices(name):
                self.finish(name)

    def _num_slices(self, name: str) -> int:
        return self.specs[name].shape[0] // self._rows.get(name, 1)

    def write_text(self, name: str, text: str) -> None:
        (self.partial / name).write_text(text, encoding="utf-8")

    def copy_file(self, file: Path) -> None:
        shutil.copyfile(file, self.partial / file.name)

    def commit(self) -> None:
        """Read back what was written, and give the complete folder its final name.

        Raises:
            ValueError: if a tensor was never written.
            UserError: if the storage gave back something else, or something appeared under the name meanwhile.
        """
        missing = self.specs.keys() - self.done
        if missing:
            raise ValueError(f"{len(missing)} tensors were never written, {sorted(missing)[0]} first")
        if len(self._shards) > 1:
            weight_map = {name: file for file, names in self._shards.items() for name in names}
            total = sum(spec.num_bytes for spec in self.specs.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            self.write_text("model.safetensors.index.json", json.dumps(index, indent=1))
        read_back(self.partial, {name: (self.specs[name], slices) for name, slices in self._written.items()})
        if self._check is not None:
            self._check(self.partial)
        self.output.commit()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if error is not None:
            self.output.__exit__(kind, error, trace)
            return
        with self.output, explain_os_errors(self.out):
            self.commit()


def read_at(stream, start: int, size: int) -> bytes:
    stream.seek(start)
    return stream.read(size)
