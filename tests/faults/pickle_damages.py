"""Damages to `pytorch_model.bin`."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from checkpoint_damages import READS, WRITES
from damage import (
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

PICKLE = Table()


def pickle_of(trial: Trial) -> Path:
    return trial.path / "pytorch_model.bin"


def saved(change: Callable[[dict, Trial], object], **options) -> Callable[[Trial], None]:
    """Damage that saves something else with torch."""

    def do(trial: Trial) -> None:
        tensors = torch.load(pickle_of(trial), weights_only=True)
        torch.save(change(tensors, trial), pickle_of(trial), **options)

    return do


def first_of(tensors: dict, trial: Trial) -> str:
    return trial.rng.choice(sorted(tensors))


for label, change in {
    "empty": lambda b, t: b"",
    "truncated": lambda b, t: b[: t.rng.randrange(8, len(b) - 100)],
    "zeros": lambda b, t: bytes(len(b)),
    "an LFS pointer": lambda b, t: LFS,
    "a page": lambda b, t: b"<html>",
    "with its middle overwritten": lambda b, t: b[: len(b) // 4] + t.rng.randbytes(400) + b[len(b) // 4 + 400 :],
    "a plain pickle": lambda b, t: pickle.dumps({"a": 1}),
    "evil": lambda b, t: pickle.dumps(Evil()),
    "evil and old": lambda b, t: pickle.dumps(Evil(), protocol=0),
    "an empty archive": lambda b, t: b"PK\x05\x06" + bytes(18),
}.items():

    def overwrite(trial: Trial, change=change) -> None:
        rewrite(pickle_of(trial), change(pickle_of(trial).read_bytes(), trial))

    PICKLE.row(f"pickle {label}", overwrite, Expect.EITHER if "middle" in label else Expect.REFUSE)
for label, change, expect in (
    ("of a list", lambda x, t: list(x.values()), Expect.REFUSE), ("of one tensor",
    lambda x, t: torch.ones(3), Expect.REFUSE),
    ("of a number", lambda x, t: 5, Expect.REFUSE), ("of nothing", lambda x, t: {}, Expect.REFUSE),
    ("under state_dict", lambda x, t: {"state_dict": x}, Expect.SAME_OR_REFUSE),
    ("with a number in it", lambda x, t: x | {"epoch": 3}, Expect.SAME_OR_REFUSE),
    ("with a string in it", lambda x, t: x | {"note": "x"}, Expect.SAME_OR_REFUSE),
    ("with a number for a tensor", lambda x, t: x | {first_of(x, t): 3}, Expect.REFUSE),
    ("with an evil value", lambda x, t: x | {"evil": Evil()}, Expect.REFUSE),
    ("with a number for a name", lambda x, t: x | {5: torch.ones(2)}, Expect.SAME_OR_REFUSE),
    ("without a tensor", lambda x, t: {k: v for k, v in x.items() if k != first_of(x, t)}, Expect.REFUSE),
    ("with other shapes", lambda x, t: x | {first_of(x, t): torch.ones(3, 5)}, Expect.REFUSE),
    ("with complex numbers", lambda x, t: {k: v + 0j for k, v in x.items()}, Expect.REFUSE),
    ("with integers", lambda x, t: {k: v.int() for k, v in x.items()}, Expect.REFUSE),
    ("with a sparse tensor", lambda x, t: {k: v.to_sparse() if v.ndim > 1 else v for k, v in x.items()},
    Expect.SAME_OR_REFUSE),
    ("on the meta device", lambda x, t: {k: v.to("meta") for k, v in x.items()}, Expect.REFUSE),
    ("prefixed", lambda x, t: {f"module.{k}": v for k, v in x.items()}, Expect.REFUSE),
    ("in bfloat16", lambda x, t: {k: v.bfloat16() for k, v in x.items()}, Expect.EITHER),
    ("with transposed storage",
    lambda x, t: {k: v.T.contiguous().T if v.ndim > 1 else v for k, v in x.items()}, Expect.EITHER),
    ("with shared storage", lambda x, t: {k: torch.cat([v, v])[: len(v)] for k, v in x.items()}, Expect.SAME),
    ("of parameters", lambda x, t: {k: torch.nn.Parameter(v) for k, v in x.items()}, Expect.SAME_OR_REFUSE),
    ("with tied copies", lambda x, t: x | {"lm_head.weight": x["shared.weight"], "encoder.embed_tokens.weight":
     x["shared.weight"]}, Expect.EITHER),
    ("unchanged", lambda x, t: x, Expect.SAME),
):  # fmt: skip
    PICKLE.row(
        f"pickle {label}", saved(change), expect, READS if expect is Expect.REFUSE and "evil" not in label else None
    )
PICKLE.row("pickle in the old form", saved(lambda x, t: x, _use_new_zipfile_serialization=False), Expect.SAME_OR_REFUSE)


def nan_inside(tensors: dict, trial: Trial) -> dict:
    name = first_of(tensors, trial)
    return tensors | {name: torch.full_like(tensors[name], float("nan"))}


PICKLE.row("pickle with NaN", saved(nan_inside), by=WRITES)
PICKLE.row("pickle missing", lambda t: remove(pickle_of(t)))
PICKLE.row("pickle a pipe", lambda t: as_pipe(pickle_of(t)))
PICKLE.row("pickle a folder", lambda t: as_folder(pickle_of(t)))
PICKLE.row("pickle endless", lambda t: as_link(pickle_of(t), "/dev/zero"))


@PICKLE.add("pickle under a name above the folder")
def pickle_above(trial: Trial) -> None:
    shutil.move(pickle_of(trial), trial.root / "other.bin")
    names = list(torch.load(trial.root / "other.bin", weights_only=True))
    rewrite(trial.path / "pytorch_model.bin.index.json", dump({"weight_map": dict.fromkeys(names, "../other.bin")}))


@PICKLE.add("pickle in two shards", Expect.EITHER)
def pickle_shards(trial: Trial) -> None:
    tensors = torch.load(pickle_of(trial), weights_only=True)
    names = sorted(tensors)
    remove(pickle_of(trial))
    where = {n: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, n in enumerate(names)}
    for file in set(where.values()):
        torch.save({n: tensors[n] for n in names if where[n] == file}, trial.path / file)
    rewrite(trial.path / "pytorch_model.bin.index.json", dump({"metadata": {}, "weight_map": where}))
