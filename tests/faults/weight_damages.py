"""Damages to the files that hold weights: safetensors, their index, pickles."""

import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from checkpoint_damages import RUNS
from damage import (
    DEEP,
    GONE,
    LFS,
    Expect,
    Table,
    Trial,
    as_folder,
    as_link,
    as_pipe,
    dump,
    edit_json,
    load,
    read_tensors,
    remove,
    rewrite,
    tensor_names,
    text_damages,
    write_tensors,
)

WRITES = frozenset({"apply", "factorize", "recover", "teacher", "compress"})
READS = RUNS | WRITES
LOSSES = frozenset({"evaluate", "apply", "factorize", "compress"})  # results whose loss can be compared
FLOATS = {"F16": np.float16, "BF16": None}

WEIGHTS = Table()
SHARDS = Table()
PICKLE = Table()


def weights_of(trial: Trial) -> Path:
    return trial.path / "model.safetensors"


def header_edit(change: Callable[[dict, Trial], object]) -> Callable[[Trial], None]:
    """Damage that changes the header in place, or returns another one."""

    def do(trial: Trial) -> None:
        header, body = read_tensors(weights_of(trial))
        other = change(header, trial)
        write_tensors(weights_of(trial), header if other is None else other, body)

    return do


def any_tensor(header: dict, trial: Trial) -> str:
    return trial.rng.choice(tensor_names(header))


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
                Expect.SAME_OR_REFUSE, by=RUNS)  # fmt: skip


def rebuilt(trial: Trial, change: Callable[[dict, Trial], dict]) -> None:
    """Write the tensors again, changed; values are (dtype, shape, bytes)."""
    file = weights_of(trial)
    header, body = read_tensors(file)
    tensors = {
        name: (header[name]["dtype"], header[name]["shape"], body[slice(*header[name]["data_offsets"])])
        for name in tensor_names(header)
    }
    write_parts(file, change(tensors, trial))


def write_parts(file: Path, tensors: dict) -> None:
    header, parts, end = {"__metadata__": {"format": "pt"}}, [], 0
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(content)]}
        parts.append(content)
        end += len(content)
    write_tensors(file, header, b"".join(parts))


def tensor_damage(name: str, change: Callable[[dict, Trial], dict], expect=Expect.REFUSE, by=READS) -> None:
    WEIGHTS.row(name, lambda trial: rebuilt(trial, change), expect, by)


def chosen(tensors: dict, trial: Trial, part: str = "") -> str:
    return trial.rng.choice([name for name in tensors if part in name])


PARTS = {"attention": "Attention", "an expert": ".experts.", "a router": ".router.", "a norm": "layer_norm",
         "the embedding": "shared", "a dense layer": ".mlp.w"}  # fmt: skip


def without(part: str) -> Callable[[dict, Trial], dict]:
    def change(tensors: dict, trial: Trial) -> dict:
        gone = chosen(tensors, trial, part)
        return {name: value for name, value in tensors.items() if name != gone}

    return change


def with_value(part: str, value: float) -> Callable[[dict, Trial], dict]:
    def change(tensors: dict, trial: Trial) -> dict:
        name = chosen(tensors, trial, part)
        dtype, shape, content = tensors[name]
        place = 4 * trial.rng.randrange(len(content) // 4)
        return tensors | {name: (dtype, shape, content[:place] + struct.pack("<f", value) + content[place + 4 :])}

    return change


def reshaped(part: str, change_shape: Callable[[list], list]) -> Callable[[dict, Trial], dict]:
    def change(tensors: dict, trial: Trial) -> dict:
        name = chosen(tensors, trial, part)
        dtype, shape, content = tensors[name]
        other = change_shape(shape)
        size = 4 * int(np.prod(other))
        return tensors | {name: (dtype, other, (content * 3)[:size])}

    return change


for label, part in PARTS.items():
    tensor_damage(f"without {label}", without(part), by=RUNS)
    for text, value in (("NaN", float("nan")), ("infinity", float("inf")), ("minus infinity", -float("inf"))):
        tensor_damage(f"{text} in {label}", with_value(part, value), by=WRITES)
    tensor_damage(f"1e38 in {label}", with_value(part, 1e38), Expect.EITHER)
    for text, shape in (("[0]", lambda s: [0]), ("a row more", lambda s: [s[0] + 1, *s[1:]]),
                        ("a row less", lambda s: [s[0] - 1, *s[1:]]), ("a leading axis", lambda s: [1, *s]),
                        ("flat", lambda s: [int(np.prod(s))] if len(s) > 1 else [len(s), *s])):  # fmt: skip
        tensor_damage(f"{label} of shape {text}", reshaped(part, shape), by=RUNS)
for label, rename in {
    "prefixed module.": lambda n: f"module.{n}", "prefixed model.": lambda n: f"model.{n}",
    "prefixed base_model.model.": lambda n: f"base_model.model.{n}", "in capitals": str.upper,
    "with the encoder renamed": lambda n: n.replace("encoder", "enc"), "suffixed": lambda n: f"{n}_0",
    "with attention renamed": lambda n: n.replace("Attention", "Attn"), "with blocks shifted": lambda n: n.replace(
    "block.1.", "block.9."), "with experts renamed": lambda n: n.replace("expert_", "e"),
    "with norms renamed": lambda n: n.replace("layer_norm", "ln"),
}.items():  # fmt: skip
    tensor_damage(f"names {label}", lambda x, t, f=rename: {f(n): v for n, v in x.items()}, by=RUNS)


def cast(content: bytes, dtype: str) -> bytes:
    """Float32 bytes in another float type."""
    values = torch.frombuffer(bytearray(content), dtype=torch.float32)
    return values.to({"F16": torch.float16, "BF16": torch.bfloat16}[dtype]).view(torch.uint8).numpy().tobytes()


def uncast(content: bytes, dtype: str) -> bytes:
    kind = {"F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    return torch.frombuffer(bytearray(content), dtype=kind).float().view(torch.uint8).numpy().tobytes()


def mixed(pattern: Callable[[str], bool] | None, stored: bool) -> Callable[[Trial], None]:
    """Tensors in two dtypes, stored as such or with the same values in float32."""

    def change(tensors: dict, trial: Trial) -> dict:
        names = [n for n in tensors if pattern(n)] if pattern else trial.rng.sample(list(tensors), 9)
        dtypes = {n: trial.rng.choice(["F16", "BF16"]) for n in names}
        return {n: part(v, dtypes.get(n)) for n, v in tensors.items()}

    def part(value: tuple, dtype: str | None) -> tuple:
        _, shape, content = value
        if dtype is None:
            return value
        small = cast(content, dtype)
        return (dtype, shape, small) if stored else ("F32", shape, uncast(small, dtype))

    return lambda trial: rebuilt(trial, change)


for label, pattern in {
    "any nine tensors": None, "half of the experts": lambda n: "expert_0" in n or "expert_3" in n,
    "wo of the experts": lambda n: ".wo." in n and "expert" in n, "wi of the experts": lambda n: ".wi." in n,
    "the routers": lambda n: "router" in n, "expert 0": lambda n: "expert_0" in n, "attention": lambda n: "Att" in n,
    "the embedding": lambda n: "shared" in n, "all experts": lambda n: ".experts." in n, "everything": lambda n: True,
}.items():  # fmt: skip
    WEIGHTS.row(f"two dtypes: {label}", mixed(pattern, True), Expect.TWIN, LOSSES, mixed(pattern, False))


@WEIGHTS.add("an additional tensor", Expect.EITHER)
def additional(trial: Trial) -> None:
    rebuilt(trial, lambda x, t: x | {"extra.weight": ("F32", [2], bytes(8))})


@WEIGHTS.add("an additional expert")
def additional_expert(trial: Trial) -> None:
    def change(tensors: dict, trial: Trial) -> dict:
        name = chosen(tensors, trial, "expert_3.")
        return tensors | {name.replace("expert_3", "expert_4"): tensors[name]}

    rebuilt(trial, change)


WEIGHTS.pop()  # what an expert without a router row means is for the commands to say
WEIGHTS.row("an additional expert", additional_expert, Expect.EITHER)
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


@SHARDS.add("shards swapped", Expect.SAME_OR_REFUSE)
def swapped(trial: Trial) -> None:
    first, second = sorted(trial.path.glob("*-of-*.safetensors"))[:2]
    one, two = first.read_bytes(), second.read_bytes()
    rewrite(first, two)
    rewrite(second, one)


SHARDS.row("metadata of the index odd", lambda t: edit_json(index_of(t), ("metadata",), 5), Expect.SAME_OR_REFUSE)
SHARDS.row("total_size odd", lambda t: edit_json(index_of(t), ("metadata", "total_size"), "x"), Expect.SAME_OR_REFUSE)
SHARDS.row("nothing wrong with shards", lambda t: None, Expect.SAME)


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


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
    lambda x, t: {k: v.T.contiguous().T if v.ndim > 1 else v for k, v in x.items()}, Expect.SAME),
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
