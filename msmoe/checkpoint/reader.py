"""Lazy reader of safetensors checkpoints: headers first, tensors one at a time, no mapped file left in memory."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from msmoe.errors import UserError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
MAX_HEADER_BYTES = 100 * 2**20  # the limit of the safetensors library
FINGERPRINT_BYTES = 256  # of either end of each tensor
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
    return DTYPES[name]


def read_header(file: Path) -> dict[str, tuple[TensorSpec, Location]]:
    """Read the header of one safetensors file and check it against the file's size.

    Raises:
        UserError: if the file is missing, truncated, has trailing bytes, or its header is not safetensors.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))
            if size < 8 or not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
                raise UserError(f"{file} is truncated or not a safetensors file ({size} bytes)")
            header = json.loads(stream.read(length))
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
    """A folder with `config.json` and safetensors weights, opened lazily.

    Opening reads headers only. `read` loads one tensor through the file system cache, never through a mapping,
    so the memory of a tensor is given back with it.

    Args:
        path: folder with `config.json` and `model.safetensors`, or shards and their index.

    Raises:
        UserError: if the folder, its configuration or any weight file cannot be used.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"no checkpoint folder at {self.path}")
        self.config = self._read_json("config.json")
        self._entries: dict[str, tuple[TensorSpec, Location]] = {}
        for file in self._weight_files():
            for name, entry in read_header(file).items():
                if name in self._entries:
                    raise UserError(f"tensor {name} is stored twice, in {self._entries[name][1].file} and {file}")
                self._entries[name] = entry

    def _read_json(self, name: str) -> dict:
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"{self.path} has no {name}: not a checkpoint folder") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path / name} is not readable JSON") from error
        if not isinstance(content, dict):
            raise UserError(f"{self.path / name} must hold a JSON object")
        return content

    def _weight_files(self) -> list[Path]:
        single, index = self.path / "model.safetensors", self.path / "model.safetensors.index.json"
        if index.exists():
            try:
                names = sorted(set(self._read_json(index.name)["weight_map"].values()))
            except (KeyError, AttributeError) as error:
                raise UserError(f"{index} has no weight_map") from error
            for name in names:
                if not (self.path / name).is_file():
                    raise UserError(f"{index.name} names the shard {name}, which is missing from {self.path}")
            return [self.path / name for name in names]
        if single.exists():
            return [single]
        pickled = next(self.path.glob("*.bin"), None)
        hint = f" ({pickled.name} is a pickle, which is never read: save it as safetensors first)" if pickled else ""
        raise UserError(f"{self.path} holds no model.safetensors and no model.safetensors.index.json{hint}")

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", "unknown"))

    @property
    def num_parameters(self) -> int:
        return sum(spec.num_parameters for spec, _ in self._entries.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(spec.num_bytes for spec, _ in self._entries.values())

    def spec(self, name: str) -> TensorSpec:
        try:
            return self._entries[name][0]
        except KeyError:
            raise UserError(f"{self.path} has no tensor {name}") from None

    def read(self, name: str, *, index: int | None = None) -> Tensor:
        """Load one tensor, or the slice `index` of its leading axis, in its stored dtype."""
        spec = self.spec(name)
        tensor = torch.empty(spec.shape if index is None else spec.shape[1:], dtype=DTYPES[spec.dtype])
        if tensor.numel():
            location = self._entries[name][1]
            buffer = tensor.view(-1).view(torch.uint8).numpy().data
            with location.file.open("rb", buffering=0) as stream:
                stream.seek(location.start + (index or 0) * len(buffer))
                while buffer:
                    count = stream.readinto(buffer)
                    if not count:
                        raise UserError(f"{location.file} ended while reading {name}")
                    buffer = buffer[count:]
        return tensor

    def read_finite(self, name: str, *, index: int | None = None) -> Tensor:
        """Load one tensor, or the slice `index` of its leading axis, as float32.

        Raises:
            UserError: if it holds NaN or infinite values; the message names the tensor.
        """
        tensor = self.read(name, index=index).float()
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise UserError(f"tensor {name} of {self.path} holds NaN or infinite values")
        return tensor

    def blocks(self, name: str) -> Iterator[bytes]:
        """The stored bytes of one tensor, in blocks of bounded size."""
        spec, location = self.spec(name), self._entries[name][1]
        left = spec.num_bytes
        with location.file.open("rb", buffering=0) as stream:
            stream.seek(location.start)
            while left:
                block = stream.read(min(left, COPY_BLOCK))
                if not block:
                    raise UserError(f"{location.file} ended while reading {name}")
                left -= len(block)
                yield block

    @cached_property
    def fingerprint(self) -> str:
        """Digest that tells checkpoints apart, whatever their sharding: names, dtypes, shapes, ends of each tensor."""
        digest = sha256()
        for name in sorted(self._entries):
            spec, location = self._entries[name]
            digest.update(f"{name}\0{spec.dtype}\0{spec.shape}\0".encode())
            with location.file.open("rb", buffering=0) as stream:
                for offset in (0, max(spec.num_bytes - FINGERPRINT_BYTES, 0)):
                    stream.seek(location.start + offset)
                    digest.update(stream.read(min(FINGERPRINT_BYTES, spec.num_bytes)))
        return f"sha256:{digest.hexdigest()}"
