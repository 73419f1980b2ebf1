"""Damages to shards and to the index that names them."""

import shutil
from collections.abc import Callable
from pathlib import Path

from arrays import any_tensor, read_tensors, write_tensors
from checkpoint_damages import READS
from damage import (
    GONE,
    Expect,
    Table,
    Trial,
    dump,
    edit_json,
    load,
    rewrite,
    text_damages,
)

SHARDS = Table()


def index_of(trial: Trial) -> Path:
    return trial.path / "model.safetensors.index.json"


text_damages(SHARDS, index_of, what="index")
text_damages(SHARDS, lambda t: sorted(t.path.glob("*-of-*.safetensors"))[t.rng.randrange(2)], what="shard", by=READS)
for label, value in {
    "a number": 5, "null": None, "a list": ["x"], "an object": {}, "empty": "", "missing": "nope.safetensors",
    "above": "../evil.safetensors", "absolute": "/tmp/evil.safetensors", "a folder": ".", "true": True,
    "below": "sub/evil.safetensors", "a lone surrogate": "\ud800.safetensors", "with a null byte": "a\0b.safetensors",
    "endless": "/dev/zero", "too long": "x" * 5000 + ".safetensors", "the index": "model.safetensors.index.json",
    "the configuration": "config.json",
}.items():  # fmt: skip

    def point(trial: Trial, value=value) -> None:
        names = list(load(index_of(trial))["weight_map"])
        edit_json(index_of(trial), ("weight_map", trial.rng.choice(names)), value)

    SHARDS.row(f"weight_map {label}", point, Expect.EITHER if label == "below" else Expect.REFUSE)
for label, value in {"missing": GONE, "a list": [], "null": None, "empty": {}, "a string": "x"}.items():
    SHARDS.row(f"weight_map as a whole {label}", lambda t, v=value: edit_json(index_of(t), ("weight_map",), v))


def escape(trial: Trial, make: Callable[[Path, Path], str]) -> None:
    """Let the index name a shard that really is elsewhere."""
    content = load(index_of(trial))
    shard = sorted(set(content["weight_map"].values()))[0]
    name = make(trial.path / shard, trial.root / "elsewhere.safetensors")
    content["weight_map"] = {k: name if v == shard else v for k, v in content["weight_map"].items()}
    rewrite(index_of(trial), dump(content))


@SHARDS.add("a shard above the folder")
def above(trial: Trial) -> None:
    escape(trial, lambda a, b: f"../{shutil.move(a, b).name}")


@SHARDS.add("a shard by absolute path")
def absolute(trial: Trial) -> None:
    escape(trial, lambda a, b: str(shutil.move(a, b)))


@SHARDS.add("a shard round about", Expect.SAME_OR_REFUSE)
def round_about(trial: Trial) -> None:
    escape(trial, lambda a, b: f"../{a.parent.name}/{a.name}")


@SHARDS.add("a tensor under another shard", Expect.SAME_OR_REFUSE)
def other_shard(trial: Trial) -> None:
    content = load(index_of(trial))
    name = trial.rng.choice(list(content["weight_map"]))
    others = sorted(set(content["weight_map"].values()) - {content["weight_map"][name]})
    edit_json(index_of(trial), ("weight_map", name), others[0])


@SHARDS.add("a tensor not in the index", Expect.SAME_OR_REFUSE)
def not_indexed(trial: Trial) -> None:
    edit_json(index_of(trial), ("weight_map", trial.rng.choice(list(load(index_of(trial))["weight_map"]))), GONE)


@SHARDS.add("a tensor in the index that no shard has", Expect.SAME_OR_REFUSE)
def not_stored(trial: Trial) -> None:
    content = load(index_of(trial))
    content["weight_map"]["ghost.weight"] = next(iter(content["weight_map"].values()))
    rewrite(index_of(trial), dump(content))


@SHARDS.add("a tensor in two shards", Expect.SAME_OR_REFUSE)
def in_two(trial: Trial) -> None:
    first, second = sorted(trial.path.glob("*-of-*.safetensors"))[:2]
    header, _ = read_tensors(first)
    name = any_tensor(header, trial)
    start, end = header[name]["data_offsets"]
    other, rest = read_tensors(second)
    place = [len(rest), len(rest) + end - start]
    write_tensors(second, other | {name: header[name] | {"data_offsets": place}}, rest + bytes(end - start))


@SHARDS.add("shards swapped", Expect.EITHER)
def swapped(trial: Trial) -> None:
    first, second = sorted(trial.path.glob("*-of-*.safetensors"))[:2]
    one, two = first.read_bytes(), second.read_bytes()
    rewrite(first, two)
    rewrite(second, one)


SHARDS.row("metadata of the index odd", lambda t: edit_json(index_of(t), ("metadata",), 5), Expect.SAME_OR_REFUSE)
SHARDS.row("total_size odd", lambda t: edit_json(index_of(t), ("metadata", "total_size"), "x"), Expect.SAME_OR_REFUSE)
SHARDS.row("nothing wrong with shards", lambda t: None, Expect.SAME)
