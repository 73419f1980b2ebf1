"""Values on their way into a file: finite, and still themselves in the dtype that they are stored in."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from msmoe.errors import UserError


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in the dtype that it is stored in.

    Raises:
        UserError: if a value is not finite, or the dtype cannot hold it: a finite value would become infinite, a whole
            number another one.
    """
    if tensor.is_floating_point():
        check_finite(tensor, name)
    stored = tensor.to(dtype)
    if dtype == tensor.dtype:
        return stored
    fits = stored.isfinite() if dtype.is_floating_point else stored.to(tensor.dtype) == tensor
    if not fits.all():
        kind = str(dtype).removeprefix("torch.")
        raise UserError(
            f"tensor {name} holds {tensor[~fits][0].item():g}, which {kind} cannot store: use a checkpoint in float32"
        )
    return stored


def check_finite(tensor: Tensor, name: str, folder: Path | None = None) -> None:
    """Raise `UserError` if a tensor holds NaN or infinite values; says where it was read from."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    if tensor.sum(dtype=wide).isfinite():
        return
    if not tensor.to(wide).isfinite().all():
        raise UserError(f"tensor {name}{f' of {folder}' if folder else ''} holds NaN or infinite values")


def whole_items(blocks: Iterable[bytes], itemsize: int) -> Iterator[bytes]:
    """The same bytes, in blocks that end with a whole item."""
    rest = b""
    for block in blocks:
        data = rest + block if rest else block
        end = len(data) - len(data) % itemsize
        rest = data[end:]
        if end:
            yield data[:end] if rest else data
