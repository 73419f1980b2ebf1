"""Read a written checkpoint back and compare it with what was computed."""

import zlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, uint8

from msmoe.checkpoint.reader import TensorSpec, to_dtype
from msmoe.errors import UserError


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(tensor.contiguous().view(-1).view(uint8).numpy().data) if tensor.numel() else 0


def read_back(folder: Path, written: Mapping[str, tuple[TensorSpec, Mapping[int | None, int]]]) -> None:
    """Read tensors with the safetensors library and compare dtype, shape and bytes with what was written.

    Args:
        folder: checkpoint folder.
        written: name -> what the tensor is, and checksums of its slices by index, of all of it for None.

    Raises:
        UserError: if the storage gave back something else.
    """
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in sorted(written.keys() & set(tensors.keys())):
                spec, slices = written[name]
                stored = tensors.get_tensor(name) if None in slices else None
                same = stored is None or (stored.dtype == to_dtype(spec.dtype) and tuple(stored.shape) == spec.shape)
                for index, crc in slices.items():
                    rows = spec.shape[0] // len(slices) if index is not None else 0
                    where = index if rows < 2 else slice((index or 0) * rows, (index or 0) * rows + rows)
                    part = stored if index is None else tensors.get_slice(name)[where]
                    same = same and part.dtype == to_dtype(spec.dtype) and checksum(part) == crc
                if not same:
                    raise UserError(f"{name} read back from {file.name} differs from what was written: check the disk")
