"""Damages to statistics."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
from arrays import INEXACT, NUMPY, SHAPES, array_edit, put, read_tensors, tensor_names, write_parts
from damage import (
    GONE,
    ODD,
    Expect,
    Table,
    Trial,
    any_place,
    as_pipe,
    dump,
    edit_json,
    layer_edit,
    layers_of,
    load,
    one_value,
    remove,
    rewrite,
    text_damages,
)

COMPUTES = frozenset({"plan", "plan outputs", "apply", "factorize"})  # commands that read the token sample
STATS = Table()


def stats_file(trial: Trial) -> Path:
    return trial.root / "stats" / "stats.json"


def arrays_file(trial: Trial) -> Path:
    return trial.root / "stats" / "stats.safetensors"


text_damages(STATS, stats_file, what="stats.json")
for key in ("routed", "dispatched", "gate_mass"):
    for label, value in {
        **INEXACT,
        "a negative count": -3,
        "text": "x",
        "null": None,
        "a list": [1],
        "2^70": 2**70,
    }.items():
        STATS.row(f"{key} with {label}", layer_edit(stats_file, key, one_value(value)))
    STATS.row(f"{key} too short", layer_edit(stats_file, key, lambda v, r: v[:-1]))
    STATS.row(f"{key} too long", layer_edit(stats_file, key, lambda v, r: [*v, 0]))
    STATS.row(f"{key} empty", layer_edit(stats_file, key, lambda v, r: []))
    STATS.row(f"{key} missing", layer_edit(stats_file, key, lambda v, r: GONE))
    STATS.row(f"{key} nested", layer_edit(stats_file, key, lambda v, r: [v]))
    for label in ("null", "a string", "an object", "zero"):
        STATS.row(f"{key} {label}", layer_edit(stats_file, key, lambda v, r, o=ODD[label]: o))
for key in ("routed", "dispatched"):
    STATS.row(f"{key} with a fraction", layer_edit(stats_file, key, one_value(2.5)))
    STATS.row(f"{key} with true", layer_edit(stats_file, key, one_value(True)), Expect.SAME_OR_REFUSE)
STATS.row("more dispatched than routed", layer_edit(stats_file, "dispatched", one_value(10**6)))
STATS.row("more gate mass than tokens", layer_edit(stats_file, "gate_mass", one_value(10.0**6)))
for key in ("num_experts", "num_tokens", "dropped", "usage_frequency"):
    for label in ("negative", "a string", "null", "huge", "NaN", "a fraction", "an object"):
        STATS.row(f"{key} {label}", layer_edit(stats_file, key, lambda v, r, o=ODD[label]: o), Expect.SAME_OR_REFUSE)
for label in ("negative", "a string", "null", "NaN", "a fraction", "an object", "beyond 64 bits"):
    STATS.row(
        f"sample_size {label}",
        layer_edit(stats_file, "sample_size", lambda v, r, o=ODD[label]: o),
        Expect.SAME_OR_REFUSE,
    )
for place in (("data",), ("checkpoint",), ("layers",), ("checkpoint", "fingerprint"), ("data", "sha256")):
    for label, value in {"null": None, "a string": "x", "a list": [], "a number": 5, "missing": GONE}.items():
        expect = Expect.EITHER if len(place) > 1 else Expect.REFUSE
        STATS.row(f"{'.'.join(place)} {label}", lambda t, p=place, v=value: edit_json(stats_file(t), p, v), expect)
for place in (("data", "num_records"), ("data", "num_tokens"), ("data", "source"), ("data", "seed"), ("data",
"domains"),
              ("data", "parts"), ("checkpoint", "model_type")):  # fmt: skip
    for label in ("negative", "a string", "null", "NaN", "a list", "an object"):
        STATS.row(
            f"{'.'.join(place)} {label}", lambda t, p=place, v=ODD[label]: edit_json(stats_file(t), p, v), Expect.EITHER
        )
STATS.row("no layers", lambda t: edit_json(stats_file(t), ("layers",), {}))
STATS.row("format of tomorrow", lambda t: edit_json(stats_file(t), ("format",), "msmoe-stats/9"))
STATS.row("format missing", lambda t: edit_json(stats_file(t), ("format",), GONE))


@STATS.add("a layer renamed")
def renamed_layer(trial: Trial) -> None:
    content = load(stats_file(trial))
    name = trial.rng.choice(layers_of(content))
    content["layers"]["encoder.block.9.layer.1.mlp"] = content["layers"].pop(name)
    rewrite(stats_file(trial), dump(content))


@STATS.add("a layer missing", Expect.EITHER)
def missing_layer(trial: Trial) -> None:
    content = load(stats_file(trial))
    del content["layers"][trial.rng.choice(layers_of(content))]
    rewrite(stats_file(trial), dump(content))


@STATS.add("layers swapped", by=frozenset({"apply"}))
def swapped_layers(trial: Trial) -> None:
    content = load(stats_file(trial))
    one, two = trial.rng.sample(layers_of(content), 2)
    content["layers"][one], content["layers"][two] = content["layers"][two], content["layers"][one]
    rewrite(stats_file(trial), dump(content))


@STATS.add("a layer named twice", Expect.SAME_OR_REFUSE)
def layer_twice(trial: Trial) -> None:
    text = json.dumps(load(stats_file(trial)))
    name = layers_of(load(stats_file(trial)))[0]
    rewrite(stats_file(trial), text.replace('"layers": {', f'"layers": {{"{name}": {{}}, ', 1))


def readers_of(part: str) -> frozenset[str] | None:
    """Commands that must see what is wrong with an array of the statistics; None for all."""
    return COMPUTES if part.startswith("sample/") else None


SUMS = ("router_logits_gram", "input_sum", "input_square_sum", "input_abs_sum", "output_sum", "output_norm_sum",
        "output_square_sum", "gated_norm_sum", "soft_mass", "sample/inputs", "sample/gate")  # fmt: skip
for part in (*SUMS, "sequence_counts", "sample/expert", "sample/key", "sample/record", "sample/position"):
    for label, change in SHAPES.items():
        STATS.row(f"{part} {label}", array_edit(part, change), by=readers_of(part))
for part in SUMS:
    for label, value in INEXACT.items():
        STATS.row(f"{label} in {part}", array_edit(part, put(value)), by=readers_of(part))
for part in (
    "input_square_sum",
    "input_abs_sum",
    "output_norm_sum",
    "output_square_sum",
    "gated_norm_sum",
    "soft_mass",
):
    STATS.row(f"negative {part}", array_edit(part, put(-5)))
for part, value in (("sample/expert", -1), ("sample/expert", 4), ("sample/expert", 2**40), ("sequence_counts", -1),
                    ("sample/gate", 7.0), ("sample/gate", -0.5)):  # fmt: skip
    STATS.row(f"{value} in {part}", array_edit(part, put(value)), by=readers_of(part))
for part in ("sample/inputs", "sample/gate", "router_logits_gram", "sample/record", "sample/position", "sample/key"):
    STATS.row(f"another value in {part}", array_edit(part, put(1)), by=frozenset({"apply"}))
STATS.row("counts in floats", array_edit("sequence_counts", lambda a, r: a.astype("<f4")))
STATS.row("experts in floats", array_edit("sample/expert", lambda a, r: a.astype("<f8")), by=COMPUTES)
STATS.row("sums in integers", array_edit("input_sum", lambda a, r: a.astype("<i8")))
STATS.row("a gram in float32", array_edit("router_logits_gram", lambda a, r: a.astype("<f4")), Expect.EITHER)
STATS.row(
    "a gram that is not symmetric",
    array_edit("router_logits_gram", lambda a, r: np.triu(a) * 9),
    by=frozenset({"apply"}),
)
STATS.row("arrays missing", lambda t: remove(arrays_file(t)))
STATS.row("arrays empty", lambda t: rewrite(arrays_file(t), b""))
STATS.row(
    "arrays truncated", lambda t: rewrite(arrays_file(t), arrays_file(t).read_bytes()[: t.rng.randrange(8, 30_000)])
)
STATS.row("arrays a pipe", lambda t: as_pipe(arrays_file(t)))
STATS.row("arrays with a huge header", lambda t: rewrite(arrays_file(t), struct.pack("<Q", 2**40) + bytes(100)))
STATS.row("statistics a file", lambda t: (shutil.rmtree(t.path), t.path.write_text("{}")))
STATS.row("statistics empty", lambda t: (shutil.rmtree(t.path), t.path.mkdir()))


@STATS.add("arrays of another profile", by=frozenset({"apply"}))
def other_arrays(trial: Trial) -> None:
    """Every float changed a little, as other data would have it."""
    header, body = read_tensors(arrays_file(trial))
    parts = {}
    for n in tensor_names(header):
        dtype, shape = header[n]["dtype"], header[n]["shape"]
        array = np.frombuffer(body[slice(*header[n]["data_offsets"])], NUMPY[dtype])
        parts[n] = dtype, shape, (array * 1.01).astype(NUMPY[dtype]).tobytes() if dtype[0] == "F" else array.tobytes()
    write_parts(arrays_file(trial), parts)


for turn in range(24):
    STATS.row(f"stats odd anywhere {turn}", lambda t: any_place(t, stats_file(t)), Expect.EITHER)
