"""Lazy reader of checkpoints: headers first, tensors one at a time, no mapped file left in memory.

Opening one needs neither torch nor numpy; reading a tensor does.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from msmoe.checkpoint.source import (
    download_configuration,
    hub_id,
    local_folder,
    remote_headers,
    weight_files,
)
from msmoe.errors import UserError
from msmoe.strict_json import LFS_ADVICE, LFS_POINTER, distinct, read_object

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Stored(NamedTuple):
    """Bytes of a value, and the name of its torch dtype."""

    itemsize: int
    torch_name: str


DTYPES = {
    "F64": Stored(8, "float64"), "F32": Stored(4, "float32"), "F16": Stored(2, "float16"),
    "BF16": Stored(2, "bfloat16"), "I64": Stored(8, "int64"), "I32": Stored(4, "int32"), "I16": Stored(2, "int16"),
    "I8": Stored(1, "int8"), "U8": Stored(1, "uint8"), "BOOL": Stored(1, "bool"),
    "F8_E4M3": Stored(1, "float8_e4m3fn"), "F8_E5M2": Stored(1, "float8_e5m2"),
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
MAX_HEADER_BYTES = 100 * 2**20  # the limit of the safetensors library
LFS_BYTES = 1024  # more than any pointer has
COPY_BLOCK = 8 * 2**20


@dataclass(frozen=True)
class TensorSpec:
    """Name, safetensors dtype (`F32`, `BF16`, ...) and shape of a stored tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_parameters(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_parameters * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Location:
    file: Path
    start: int  # absolute offset in the file


def to_dtype(name: str) -> torch.dtype:
    """Torch dtype of a safetensors dtype name."""
    import torch

    return getattr(torch, DTYPES[name].torch_name)


def wider(*names: str) -> str:
    """The narrowest float dtype that holds every value of some: float32 for float16 beside bfloat16."""
    different = sorted(set(names), key=FLOATS.index)
    return "F32" if set(different) == {"F16", "BF16"} else different[0]


def read_header(file: Path) -> dict[str, tuple[TensorSpec, Location]]:
    """Read the header of one safetensors file and check it against the file's size.

    Raises:
        UserError: if the file is missing, truncated, has trailing bytes, or its header is not safetensors.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            if start and LFS_POINTER.encode().startswith(start) and size < LFS_BYTES:
                raise UserError(f"{file} holds no weights: {LFS_ADVICE}")
            (length,) = struct.unpack("<Q", start.ljust(8, b"\0"))
            if size < 8 or not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
                raise UserError(f"{file} is truncated or not a safetensors file ({size} bytes)")
            header = json.loads(stream.read(length), object_pairs_hook=distinct)
    except RecursionError:
        raise UserError(f"{file} has a corrupted safetensors header") from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} has a corrupted safetensors header") from error

    entries, end = {}, 0
    try:
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            spec = TensorSpec(name, entry["dtype"], tuple(entry["shape"]))
            start, stop = entry["data_offsets"]
            if spec.dtype not in DTYPES:
                raise UserError(f"{file}: tensor {name} has dtype {spec.dtype}; supported are {', '.join(DTYPES)}")
            if any(type(n) is not int for n in (*spec.shape, start, stop)) or not isinstance(spec.dtype, str):
                raise UserError(f"{file} has a corrupted header: shape or place of tensor {name} is no integer")
            if start != end or stop - start != spec.num_bytes or min(spec.shape, default=0) < 0:
                raise UserError(f"{file} has a corrupted header: tensor {name} does not fit its place")
            entries[name] = spec, Location(file, 8 + length + start)
            end = stop
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} has a corrupted safetensors header") from error
    if size != 8 + length + end:
        raise UserError(f"{file} is truncated: its header asks for {8 + length + end} bytes, the file has {size}")
    return entries


class Checkpoint:
    """A folder with `config.json` and weights, opened lazily; or the id of a repository on the hub.

    Opening reads headers only. `read` loads one tensor through the file system cache, never through a mapping,
    so the memory of a tensor is given back with it. Of weights that are tied and stored under several names, as
    pickles do, the first name counts.

    Args:
        path: folder with `config.json` and `model.safetensors` or `pytorch_model.bin`, or shards and their index; or
            `OWNER/NAME` or `OWNER/NAME@REVISION` of the hub.
        headers_only: of a repository on the hub, fetch no weights where their headers can be had alone; nothing can be
            read then.

    Raises:
        UserError: if the folder, its configuration or any weight file cannot be used.
    """

    def __init__(self, path: str | Path, *, headers_only: bool = False):
        self._entries: dict[str, tuple[TensorSpec, Location | Tensor | None]] = {}
        wanted = hub_id(path)
        headers = remote_headers(wanted) if headers_only and wanted else None
        self.path = download_configuration(wanted) if wanted and headers is not None else local_folder(path)
        self.name = str(path) if wanted else str(self.path)
        self.is_pickled = False
        if not (self.path / "config.json").exists():
            raise UserError(f"{self.path} has no config.json: not a checkpoint folder")
        self.config = read_object(self.path / "config.json", "a model's configuration")
        if headers is not None:
            self._entries = {name: (TensorSpec(name, *header), None) for name, header in headers.items()}
        else:
            self._read_headers()

    def _read_headers(self) -> None:
        weights = weight_files(self.path)
        self.is_pickled = weights.pickled
        for file in weights.files:
            for name, entry in self._entries_of(file).items():
                if name in self._entries:
                    raise UserError(f"tensor {name} is stored twice, once in {file}")
                self._entries[name] = entry
        missing = sorted(weights.weight_map.keys() - self._entries.keys())
        if missing:
            raise UserError(f"{self.path}: the index names tensor {missing[0]}, which no shard holds")
        if self.is_pickled and self.config.get("tie_word_embeddings", True):
            from msmoe.checkpoint.pickled import aliases

            size = self.config.get("vocab_size")
            for name in aliases(self._entries):
                if size is None or self.spec(name).shape[:1] == (size,):  # not experts that were saved as one
                    del self._entries[name]

    def _entries_of(self, file: Path) -> dict[str, tuple[TensorSpec, Location | Tensor | None]]:
        if not self.is_pickled:
            return dict(read_header(file))
        from msmoe.checkpoint.pickled import read_pickle

        return dict(read_pickle(file))

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    @property
    def model_type(self) -> str:
        """Architecture; an `exact` export states its own beside that of the stock class whose tools serve it."""
        return str(self.config.get("compressed_model_type") or self.config.get("model_type", "unknown"))

    @property
    def num_parameters(self) -> int:
        return sum(spec.num_parameters for spec, _ in self._entries.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(spec.num_bytes for spec, _ in self._entries.values())

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files."""
        return weight_files(self.path).files

    def spec(self, name: str) -> TensorSpec:
        try:
            return self._entries[name][0]
        except KeyError:
            raise UserError(f"{self.path} has no tensor {name}") from None

    def read(self, name: str, *, index: int | None = None, rows: int = 0) -> Tensor:
        """Load one tensor, or a slice of its leading axis, in its stored dtype.

        Args:
            index: of the slice; None for the whole tensor.
            rows: that a slice has; 0 for the entry at `index`, without the axis.
        """
        import torch

        spec = self.spec(name)
        place = self._entries[name][1]
        slice_shape = (rows, *spec.shape[1:]) if rows else spec.shape[1:]
        if isinstance(place, torch.Tensor):
            if index is not None:
                place = place[index * rows : (index + 1) * rows] if rows else place[index]
            return place.clone(memory_format=torch.contiguous_format)
        tensor = torch.empty(spec.shape if index is None else slice_shape, dtype=to_dtype(spec.dtype))
        if tensor.numel():
            buffer = tensor.view(-1).view(torch.uint8).numpy().data
            with self._opened(name, (index or 0) * len(buffer)) as stream:
                while buffer:
                    count = stream.readinto(buffer)
                    if not count:
                        raise UserError(f"{stream.name} ended while reading {name}")
                    buffer = buffer[count:]
        return tensor

    def read_integers(self, name: str) -> list[int]:
        """All values of a small tensor of 32 or 64 bit integers; torch is not needed."""
        spec = self.spec(name)
        letter = {"I64": "q", "I32": "i"}.get(spec.dtype)
        if letter is None:
            raise UserError(f"{name} of {self.path} is {spec.dtype}, expected integers (I64 or I32)")
        return list(struct.unpack(f"<{spec.num_parameters}{letter}", b"".join(self.blocks(name))))

    def read_finite(self, name: str, *, index: int | None = None, rows: int = 0) -> Tensor:
        """Load one tensor, or a slice of its leading axis as of `read`, in float32.

        Raises:
            UserError: if it holds NaN or infinite values; the message names the tensor.
        """
        tensor = self.read(name, index=index, rows=rows).float()
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise UserError(f"tensor {name} of {self.path} holds NaN or infinite values")
        return tensor

    def blocks(self, name: str) -> Iterator[bytes]:
        """The stored bytes of one tensor, in blocks of bounded size."""
        place, left = self._entries[name][1], self.spec(name).num_bytes
        if place is not None and not isinstance(place, Location):
            import torch

            for part in place.contiguous().view(-1).view(torch.uint8).split(COPY_BLOCK) if left else ():
                yield part.numpy().tobytes()
            return
        with self._opened(name, 0) as stream:
            while left:
                block = stream.read(min(left, COPY_BLOCK))
                if not block:
                    raise UserError(f"{stream.name} ended while reading {name}")
                left -= len(block)
                yield block

    def _opened(self, name: str, offset: int) -> io.FileIO:
        """The file that a tensor lies in, at its values."""
        location = self._entries[name][1]
        if not isinstance(location, Location):
            raise ValueError(f"only the headers of {self.name} were fetched: {name} cannot be read")
        stream = location.file.open("rb", buffering=0)
        stream.seek(location.start + offset)
        return stream

    @cached_property
    def fingerprint(self) -> str:
        """Digest of everything that decides what the model computes, see `msmoe.checkpoint.fingerprint`."""
        from msmoe.checkpoint.fingerprint import fingerprint

        return fingerprint(self)
