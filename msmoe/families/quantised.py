"""Quantised experts: the values of a stored part, and a part of some values.

`fp8`: float8 values with one scale for each block of rows and columns, value = float8 x scale (DeepSeek-V3).
`mxfp4`: 4 bits a value, one power of two for each 32 along the inputs (gpt-oss; OCP Microscaling 1.0).

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from msmoe.checkpoint.reader import FLOATS, to_dtype
from msmoe.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from msmoe.checkpoint.reader import Checkpoint, TensorSpec
    from msmoe.layer.stored import Place, StoredPart

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
FP4_LARGEST_EXPONENT = 2  # of 6.0 = 1.5 * 2**2
FP4_BLOCK = 32
SCALE_BIAS = 127
SCALE_NAMES = ("_scale_inv", "_scales")  # of the companions that are understood


def read_values(checkpoint: Checkpoint, part: StoredPart) -> Tensor:
    """The values of a part in float32, outputs first unless the part is transposed.

    Raises:
        UserError: for NaN and infinite values, or a quantisation that is not read; the tensor is named.
    """
    if part.encoding == "plain" and not part.companions:
        return checkpoint.read_finite(part.key, index=part.index, rows=part.rows)
    raw = checkpoint.read(part.key, index=part.index, rows=part.rows)
    scales = scales_of(checkpoint, part)
    values = fp8_values(raw, scales) if part.encoding == "fp8" else mxfp4_values(raw, scales)
    if not values.isfinite().all():
        raise UserError(f"tensor {part.key} of {checkpoint.path} holds NaN or infinite values")
    return values


def scales_of(checkpoint: Checkpoint, part: StoredPart) -> Tensor:
    """The scales that belong to a quantised part.

    Raises:
        UserError: if they are missing, or others than those of the two formats that are read.
    """
    if reason := why_unread(checkpoint, part):
        raise UserError(f"{checkpoint.path}: {reason}")
    name, index = part.companions[0]
    return checkpoint.read(name, index=index)


def why_unread(checkpoint: Checkpoint, part: StoredPart) -> str:
    """Why the values of a part are not read; "" where they are."""
    names = [name for name, _ in part.companions]
    if part.encoding == "plain" and not names:
        return ""
    if len(names) == 1 and names[0].endswith(SCALE_NAMES) and scales_are_read(part, checkpoint.spec(names[0]).dtype):
        return ""
    beside = f" with {', '.join(names)} beside it" if names else ""
    return (
        f"{part.key} is {checkpoint.spec(part.key).dtype}{beside}: of this quantisation experts can be pruned, but not "
        "read or merged"
    )


def scales_are_read(part: StoredPart, dtype: str) -> bool:
    """Whether scales of a dtype are understood: floats beside float8, bytes of exponents beside MXFP4."""
    return (part.encoding == "fp8" and dtype in FLOATS) or (part.encoding == "mxfp4" and dtype == "U8")


def why_unwritten(checkpoint: Checkpoint, part: StoredPart) -> str:
    """Why other values cannot be written in the place of a part; "" where they can."""
    if reason := why_unread(checkpoint, part):
        return reason
    if part.index is not None and any(index is None for _, index in part.companions):
        return f"{part.companions[0][0]} is shared by all experts, which can be pruned, but not merged"
    return ""


def encoded(part: StoredPart, values: Tensor, specs: Mapping[str, TensorSpec]) -> Iterator[tuple[Place, Tensor]]:
    """What is stored of a part's values: themselves, or codes and scales.

    Args:
        specs: of the tensors that are written.
    """
    place, *companions = part.places
    if part.encoding == "plain":
        yield place, values
        return
    (scale,) = companions
    codes, scales = (
        to_fp8(values, to_dtype(specs[part.key].dtype), scale.shape(specs[scale.tensor].shape))
        if part.encoding == "fp8"
        else to_mxfp4(values)
    )
    yield place, codes
    yield scale, scales


def fp8_values(raw: Tensor, scales: Tensor) -> Tensor:
    """Values (O, I) float32 of float8 ones with scales (number of row blocks, number of column blocks), or of one."""
    if scales.numel() == 1:
        return raw.float() * scales.float()
    rows, columns = block_size(raw.shape, scales.shape)
    spread = scales.float().repeat_interleave(rows, 0)[: raw.shape[0]]
    return raw.float() * spread.repeat_interleave(columns, 1)[:, : raw.shape[1]]


def block_size(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a block: the smallest power of two that gives as many blocks as there are scales."""
    sizes = [2 ** math.ceil(math.log2(n / count)) for n, count in zip(shape, scales, strict=True)]
    return sizes[0], sizes[1]


def to_fp8(values: Tensor, dtype: torch.dtype, scales_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Float8 values and their scales, of values (O, I): the largest of each block becomes the largest float8."""
    import torch

    largest = torch.finfo(dtype).max
    if math.prod(scales_shape) == 1:
        scale = (values.abs().amax() / largest).clamp_min(torch.finfo(torch.float32).tiny)
        return (values / scale).to(dtype), scale.reshape(scales_shape)
    rows, columns = block_size(tuple(values.shape), scales_shape)
    padded = values.new_zeros(scales_shape[0] * rows, scales_shape[1] * columns)
    padded[: values.shape[0], : values.shape[1]] = values
    blocks = padded.view(scales_shape[0], rows, scales_shape[1], columns)
    scales = (blocks.abs().amax((1, 3)) / largest).clamp_min(torch.finfo(torch.float32).tiny)
    stored = (blocks / scales[:, None, :, None]).reshape(padded.shape)[: values.shape[0], : values.shape[1]]
    return stored.clamp(-largest, largest).to(dtype), scales


def mxfp4_values(blocks: Tensor, scales: Tensor) -> Tensor:
    """Values (O, I) float32 of bytes (O, I / 32, 16), lower half first, and exponents (O, I / 32) plus 127."""
    import torch

    table = torch.tensor(FP4_VALUES)
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    values = torch.ldexp(table[codes.int()], (scales.int() - SCALE_BIAS)[..., None])
    return values.flatten(-2)


def to_mxfp4(values: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes (O, I / 32, 16) and exponents (O, I / 32) of values (O, I): the nearest ones, ties to the smaller."""
    import torch

    grouped = values.float().unflatten(-1, (-1, FP4_BLOCK))
    _, exponents = torch.frexp(grouped.abs().amax(-1))  # 0.5 <= mantissa < 1
    exponents = (exponents - 1 - FP4_LARGEST_EXPONENT).clamp(-SCALE_BIAS, SCALE_BIAS)
    scaled = torch.ldexp(grouped, -exponents[..., None])
    magnitudes = torch.tensor(FP4_VALUES[:8])
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    codes = torch.bucketize(scaled.abs().contiguous(), middles) + 8 * (scaled < 0)
    codes = codes.to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponents + SCALE_BIAS).to(torch.uint8)
