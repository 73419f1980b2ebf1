"""Weight files of a checkpoint: which tensors go into which, their headers, their room on the disk."""

import json
import os
import struct
from pathlib import Path

from msmoe.checkpoint.reader import TensorSpec
from msmoe.files import reserve

ALIGNMENT = 8


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


def write_header(path: Path, specs: list[TensorSpec]) -> None:
    """Make a shard with its header, its room on the disk reserved; what it holds already is kept."""
    header = encode_header(specs)
    size = len(header) + sum(spec.num_bytes for spec in specs)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with os.fdopen(descriptor, "r+b") as stream:
        stream.write(header)
        stream.truncate(size)
        reserve(stream.fileno())
