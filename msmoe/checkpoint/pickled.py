"""Lazy reader of `pytorch_model.bin`: torch's restricted unpickler reads names, shapes and places, nothing else.

A pickle can run code. `weights_only` lets it build tensors and plain containers only, and the file's tensors are then
read where they lie, as those of a safetensors file.
"""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msmoe.checkpoint.reader import DTYPES, Location, TensorSpec
from msmoe.errors import UserError
from msmoe.strict_json import LFS_ADVICE, LFS_POINTER

NAMES = {getattr(torch, stored.torch_name): name for name, stored in DTYPES.items()}
FORBIDDEN = re.compile(r"GLOBAL (\S+)|class (\S+)")


def read_pickle(file: Path) -> dict[str, tuple[TensorSpec, Location | Tensor]]:
    """Names, shapes and places of the tensors of one file.

    Returns:
        name -> its spec, and where its values lie one after the other in the file; or the tensor itself, where the
        file is of the format before torch 1.6 or its values do not lie so.

    Raises:
        UserError: if the file is damaged, or holds anything but tensors.
    """
    with file.open("rb") as stream:
        start = stream.read(64)
    if start.startswith(LFS_POINTER.encode()):
        raise UserError(f"{file} holds no weights: {LFS_ADVICE}")
    is_zip = start.startswith(b"PK")
    state = load(file, on_disk=is_zip)
    if not isinstance(state, dict):
        raise UserError(f"{file} is refused: it holds {type(state).__name__}, not named tensors")
    lies_in_file = is_zip and byte_order(file) == b"little"
    loaded: dict[str, Any] = {} if lies_in_file else load(file, on_disk=False)
    entries: dict[str, tuple[TensorSpec, Location | Tensor]] = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{file} is refused: {name!r} is {type(tensor).__name__}, not a tensor")
        if tensor.dtype not in NAMES or tensor.layout != torch.strided:
            kind = tensor.dtype if tensor.dtype not in NAMES else tensor.layout
            raise UserError(f"{file}: tensor {name} is {kind}; supported dtypes are {', '.join(DTYPES)}")
        spec = TensorSpec(name, NAMES[tensor.dtype], tuple(tensor.shape))
        offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if lies_in_file and offset is not None and tensor.is_contiguous():
            entries[name] = spec, Location(file, offset + tensor.storage_offset() * tensor.element_size())
        else:
            loaded = loaded or load(file, on_disk=False)
            if loaded[name].is_meta:
                raise UserError(f"{file}: tensor {name} was saved without its values (on the meta device)")
            entries[name] = spec, loaded[name]
    return entries


def load(file: Path, *, on_disk: bool) -> Any:
    """Unpickle under torch's restrictions; `on_disk` leaves the tensors' values in the file."""
    where = {"map_location": "meta", "mmap": True} if on_disk else {"map_location": "cpu"}
    try:
        return torch.load(file, weights_only=True, **where)
    except pickle.UnpicklingError as error:
        found = FORBIDDEN.search(str(error))
        what = f"it holds {found[1] or found[2]}, not only tensors" if found else "it holds more than tensors"
        raise UserError(f"{file} is refused: {what}; a pickle can run code, so only tensors are read") from error
    except Exception as error:  # torch and zipfile raise many kinds for a damaged file
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{file} is truncated or not a file of torch.save: {reason}") from error


def byte_order(file: Path) -> bytes:
    """Byte order that a file was written in; files before torch 2.1 do not say, and are little-endian here."""
    with zipfile.ZipFile(file) as archive:
        name = next((n for n in archive.namelist() if n.endswith("/byteorder")), None)
        return archive.read(name) if name else b"little"


def aliases(entries: dict[str, tuple[TensorSpec, Location | Tensor]]) -> list[str]:
    """Names whose values are those of an earlier name: what is shared, a pickle stores once under several names."""
    seen: dict[tuple, str] = {}
    found = []
    for name, (spec, place) in entries.items():
        where = (str(place.file), place.start) if isinstance(place, Location) else place.data_ptr()
        if spec.num_bytes and seen.setdefault((where, spec.dtype, spec.shape), name) != name:
            found.append(name)
    return found
