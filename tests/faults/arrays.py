"""Tools that take safetensors files apart and put them together again, changed."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
from damage import (
    Trial,
    rewrite,
)

NUMPY = {"I64": "<i8", "I32": "<i4", "F64": "<f8", "F32": "<f4", "BOOL": "?"}
INEXACT = {"NaN": float("nan"), "infinity": float("inf"), "minus infinity": -float("inf")}
SHAPES = {
    "missing": lambda a, r: None, "a row short": lambda a, r: a[:-1], "empty": lambda a, r: a[:0],
    "flat": lambda a, r: a.reshape(-1) if a.ndim > 1 else a[None], "twice": lambda a, r: np.concatenate([a, a]),
}  # fmt: skip


def read_tensors(file: Path) -> tuple[dict, bytes]:
    """Header and body of a safetensors file."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_tensors(file: Path, header: dict | str, body: bytes, length: int | None = None) -> None:
    """Put header and body together again, with any length in front."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    text += b" " * (-len(text) % 8)  # values that lie elsewhere are rounded elsewhere
    rewrite(file, (len(text) if length is None else length).to_bytes(8, "little") + text + body)


def tensor_names(header: dict) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def write_parts(file: Path, tensors: dict) -> None:
    header, parts, end = {"__metadata__": {"format": "pt"}}, [], 0
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(content)]}
        parts.append(content)
        end += len(content)
    write_tensors(file, header, b"".join(parts))


def any_tensor(header: dict, trial: Trial) -> str:
    return trial.rng.choice(tensor_names(header))


def array_edit(part: str, change: Callable[[np.ndarray, Random], np.ndarray | None]) -> Callable[[Trial], None]:
    """Damage to one array of the statistics, or of a checkpoint; None takes it out."""

    def do(trial: Trial) -> None:
        file = trial.path / ("stats.safetensors" if trial.target == "stats" else "model.safetensors")
        header, body = read_tensors(file)
        names = tensor_names(header)
        chosen = trial.rng.choice([n for n in names if n.endswith(part)])
        tensors = {n: (header[n]["dtype"], header[n]["shape"], body[slice(*header[n]["data_offsets"])]) for n in names}
        dtype, shape, content = tensors.pop(chosen)
        value = change(np.frombuffer(content, NUMPY[dtype]).reshape(shape).copy(), trial.rng)
        if value is not None:
            kind = next(k for k, v in NUMPY.items() if np.dtype(v) == value.dtype)
            tensors[chosen] = kind, list(value.shape), value.tobytes()
        write_parts(file, tensors)

    return do


def put(value: float) -> Callable[[np.ndarray, Random], np.ndarray]:
    def change(array: np.ndarray, rng: Random) -> np.ndarray:
        array.flat[rng.randrange(array.size)] = value
        return array

    return change
