"""Read a written checkpoint back and compare it with what was computed."""

import zlib
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, uint8

from msmoe.errors import UserError


def checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(-1).view(uint8).numpy().tobytes())


def verify(folder: Path, checksums: dict[tuple[str, int | None], int]) -> None:
    """Read tensors, or slices of their leading axis, with the safetensors library and compare their checksums.

    Args:
        folder: checkpoint folder.
        checksums: (tensor, index or None) -> checksum of what was written.

    Raises:
        UserError: if the storage gave back something else.
    """
    wanted: dict[str, list[tuple[int | None, int]]] = {}
    for (name, index), value in checksums.items():
        wanted.setdefault(name, []).append((index, value))
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in wanted.keys() & set(tensors.keys()):
                for index, value in wanted[name]:
                    stored = tensors.get_tensor(name) if index is None else tensors.get_slice(name)[index]
                    if checksum(stored) != value:
                        raise UserError(
                            f"{name} read back from {file.name} differs from what was written: check the disk"
                        )
