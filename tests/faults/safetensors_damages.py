"""Damages to a safetensors file: its length, its header, what it is at all, what lies beside it."""

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from arrays import any_tensor, read_tensors, tensor_names, write_tensors
from checkpoint_damages import RUNS
from damage import (
    DEEP,
    LFS,
    Evil,
    Expect,
    Table,
    Trial,
    as_folder,
    as_link,
    as_pipe,
    dump,
    remove,
    rewrite,
)

WEIGHTS = Table()


def weights_of(trial: Trial) -> Path:
    return trial.path / "model.safetensors"


def header_edit(change: Callable[[dict, Trial], object]) -> Callable[[Trial], None]:
    """Damage that changes the header in place, or returns another one."""

    def do(trial: Trial) -> None:
        header, body = read_tensors(weights_of(trial))
        other = change(header, trial)
        write_tensors(weights_of(trial), header if other is None else other, body)

    return do


def entry_edit(key: str, value: Callable[[object, Trial], object]) -> Callable[[Trial], None]:
    """Damage that changes one field of one tensor's entry."""

    def change(header: dict, trial: Trial) -> None:
        entry = header[any_tensor(header, trial)]
        entry[key] = value(entry[key], trial)

    return header_edit(change)


def bytes_edit(change: Callable[[bytes, Trial], bytes]) -> Callable[[Trial], None]:
    return lambda t: rewrite(weights_of(t), change(weights_of(t).read_bytes(), t))


for label, change in {
    "empty": lambda b, t: b"",
    "of seven bytes": lambda b, t: b[:7],
    "truncated": lambda b, t: b[: t.rng.randrange(8, len(b) - 1)],
    "one byte short": lambda b, t: b[:-1],
    "one byte too long": lambda b, t: b + b"\0",
    "zeros": lambda b, t: bytes(len(b)),
    "random": lambda b, t: t.rng.randbytes(4000),
    "an LFS pointer": lambda b, t: LFS,
    "a pickle": lambda b, t: pickle.dumps({"a": 1}),
    "a page": lambda b, t: b"<!DOCTYPE html><html>404</html>",
    "with a huge header": lambda b, t: struct.pack("<Q", 2**62) + b[8:],
    "with a negative header": lambda b, t: struct.pack("<q", -1) + b[8:],
    "with a header of 90 MB": lambda b, t: struct.pack("<Q", 90_000_000) + b[8:],
    "with a short header": lambda b, t: struct.pack("<Q", 40) + b[8:],
    "with no header": lambda b, t: struct.pack("<Q", 0) + b[8:],
    "with a deep header": lambda b, t: struct.pack("<Q", len(DEEP)) + DEEP.encode(),
    "with an array for a header": lambda b, t: struct.pack("<Q", 2) + b"[]",
    "with no text in the header": lambda b, t: b[:8] + b"\xff" * 40 + b[48:],
}.items():
    WEIGHTS.row(f"weights {label}", bytes_edit(change))
for label, (key, value) in {
    "an unknown dtype": ("dtype", lambda v, t: "F99"), "a dtype that is a number": ("dtype", lambda v, t: 7),
    "a dtype that is a list": ("dtype", lambda v, t: ["F32"]), "dtype null": ("dtype", lambda v, t: None),
    "a dtype of another size": ("dtype", lambda v, t: "F64"), "a dtype for integers": ("dtype", lambda v, t: "BOOL"),
    "a negative shape": ("shape", lambda v, t: [-n for n in v]), "a fractional shape": ("shape", lambda v, t: [*v[:-1],
    2.5]), "a shape of text": ("shape", lambda v, t: "x"), "a shape [0]": ("shape", lambda v, t: [0]),
    "a huge shape": ("shape", lambda v, t: [2**62, 4]), "an overflowing shape": ("shape", lambda v, t: [2**32, 2**32]),
    "shape null": ("shape", lambda v, t: None), "shape true": ("shape", lambda v, t: [True, *v]),
    "a nested shape": ("shape", lambda v, t: [v]), "offsets reversed": ("data_offsets", lambda v, t: v[::-1]),
    "offsets shifted": ("data_offsets", lambda v, t: [v[0] + 4, v[1] + 4]), "offsets beyond": ("data_offsets",
    lambda v, t: [v[0], 2**60]), "offsets negative": ("data_offsets", lambda v, t: [-8, v[1]]),
    "offsets null": ("data_offsets", lambda v, t: None), "one offset": ("data_offsets", lambda v, t: v[:1]),
    "offsets of text": ("data_offsets", lambda v, t: ["0", "4"]), "fractional offsets": ("data_offsets",
    lambda v, t: [float(v[0]), v[1] + 0.5]),
}.items():  # fmt: skip
    WEIGHTS.row(f"tensor with {label}", entry_edit(key, value))
for key in ("dtype", "shape", "data_offsets"):
    WEIGHTS.row(f"tensor without {key}", header_edit(lambda h, t, k=key: h[any_tensor(h, t)].pop(k) and None))


@WEIGHTS.add("two tensors in one place")
def overlap(trial: Trial) -> None:
    def change(header: dict, trial: Trial) -> None:
        first, second = trial.rng.sample(tensor_names(header), 2)
        header[first] = dict(header[second])

    header_edit(change)(trial)


@WEIGHTS.add("an entry that is no object")
def no_object(trial: Trial) -> None:
    header_edit(lambda h, t: h.update({any_tensor(h, t): [1, 2]}))(trial)


@WEIGHTS.add("a tensor named twice")
def named_twice(trial: Trial) -> None:
    header, body = read_tensors(weights_of(trial))
    name = any_tensor(header, trial)
    again = ", ".join(f'"{name}": {dump(header[name])}' for _ in range(2))
    write_tensors(weights_of(trial), dump(header)[:-1] + "," + again + "}", body)


@WEIGHTS.add("no tensors at all")
def no_tensors(trial: Trial) -> None:
    write_tensors(weights_of(trial), {}, b"")


for label, metadata in {"a number": 5, "of numbers": {"a": 1}, "null": None, "pt": {"format": "tf"}}.items():
    WEIGHTS.row(f"metadata {label}", header_edit(lambda h, t, m=metadata: h.update(__metadata__=m)),
                Expect.EITHER, by=RUNS)  # fmt: skip

WEIGHTS.row("weights missing", lambda t: remove(weights_of(t)))
WEIGHTS.row("weights a folder", lambda t: as_folder(weights_of(t)))
WEIGHTS.row("weights a pipe", lambda t: as_pipe(weights_of(t)))
WEIGHTS.row("weights a link to itself", lambda t: as_link(weights_of(t), "model.safetensors"))
WEIGHTS.row("weights a link to nothing", lambda t: as_link(weights_of(t), "/nowhere/x"))
WEIGHTS.row("weights endless", lambda t: as_link(weights_of(t), "/dev/zero"))


@WEIGHTS.add("weights linked from another folder", Expect.SAME)
def linked(trial: Trial) -> None:
    blobs = trial.root / "blobs"
    blobs.mkdir()
    os.rename(weights_of(trial), blobs / "abc")
    weights_of(trial).symlink_to("../blobs/abc")


def noise(trial: Trial, file: Path) -> None:
    """Other weights of the same names and shapes."""
    header, body = read_tensors(weights_of(trial))
    write_tensors(file, header, np.random.default_rng(0).normal(size=len(body) // 4).astype("<f4").tobytes())


@WEIGHTS.add("a stale index beside the weights", Expect.SAME_OR_REFUSE)
def stale_index(trial: Trial) -> None:
    shard = trial.path / "model-00001-of-00001.safetensors"
    noise(trial, shard)
    names = tensor_names(read_tensors(shard)[0])
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard.name)}
    rewrite(trial.path / "model.safetensors.index.json", dump(index))


@WEIGHTS.add("a stale index of missing shards", Expect.SAME_OR_REFUSE)
def stale_index_alone(trial: Trial) -> None:
    stale_index(trial)
    remove(trial.path / "model-00001-of-00001.safetensors")


@WEIGHTS.add("a broken index beside the weights", Expect.SAME_OR_REFUSE)
def broken_index(trial: Trial) -> None:
    rewrite(trial.path / "model.safetensors.index.json", "{")


@WEIGHTS.add("an old pickle beside the weights", Expect.SAME)
def old_pickle(trial: Trial) -> None:
    torch.save({"shared.weight": torch.zeros(64, 16)}, trial.path / "pytorch_model.bin")


@WEIGHTS.add("an evil pickle beside the weights", Expect.SAME_OR_REFUSE)
def evil_pickle(trial: Trial) -> None:
    rewrite(trial.path / "pytorch_model.bin", pickle.dumps(Evil()))


@WEIGHTS.add("other weights beside the weights", Expect.SAME)
def other_file(trial: Trial) -> None:
    noise(trial, trial.path / "optimizer.safetensors")
