"""Damages to what the package itself writes: statistics, plans, compressed checkpoints, results."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
from checkpoint_damages import ODD
from damage import (
    GONE,
    Expect,
    Table,
    Trial,
    as_pipe,
    dump,
    edit_json,
    load,
    places,
    read_tensors,
    remove,
    rewrite,
    set_at,
    tensor_names,
    text_damages,
    write_tensors,
)
from weight_damages import write_parts

READERS = ("inspect", "evaluate", "factorize", "recover", "report")
LOADS = frozenset({"evaluate", "recover", "factorize"})
COMPUTES = frozenset({"plan", "plan outputs", "apply", "factorize"})  # commands that read the token sample
KNOWS_LAYERS = frozenset({"apply", "report page"})  # readers of a plan that have its checkpoint
STATS, PLAN, EXACT, NATIVE, FACTORS, RESULTS, COMPARISON = (Table() for _ in range(7))
KINDS = {"I64": "<i8", "I32": "<i4", "F64": "<f8", "F32": "<f4", "BOOL": "?"}
INEXACT = {"NaN": float("nan"), "infinity": float("inf"), "minus infinity": -float("inf")}


def stats_file(trial: Trial) -> Path:
    return trial.root / "stats" / "stats.json"


def arrays_file(trial: Trial) -> Path:
    return trial.root / "stats" / "stats.safetensors"


def layers_of(content: dict) -> list[str]:
    return list(content["layers"])


def layer_edit(file: Callable[[Trial], Path], key: str, change: Callable[[object, Random], object]) -> Callable:
    """Damage to one field of one layer of statistics or a plan."""

    def do(trial: Trial) -> None:
        content = load(file(trial))
        layer = content["layers"][trial.rng.choice(layers_of(content))]
        value = change(layer[key], trial.rng)
        set_at(layer, (key,), value)
        rewrite(file(trial), dump(content))

    return do


def one_value(value: object) -> Callable[[list, Random], list]:
    def change(values: list, rng: Random) -> list:
        place = rng.randrange(len(values))
        return [value if i == place else v for i, v in enumerate(values)]

    return change


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


def array_edit(part: str, change: Callable[[np.ndarray, Random], np.ndarray | None]) -> Callable[[Trial], None]:
    """Damage to one array of the statistics, or of a checkpoint; None takes it out."""

    def do(trial: Trial) -> None:
        file = arrays_file(trial) if trial.target == "stats" else trial.path / "model.safetensors"
        header, body = read_tensors(file)
        names = tensor_names(header)
        chosen = trial.rng.choice([n for n in names if n.endswith(part)])
        tensors = {n: (header[n]["dtype"], header[n]["shape"], body[slice(*header[n]["data_offsets"])]) for n in names}
        dtype, shape, content = tensors.pop(chosen)
        value = change(np.frombuffer(content, KINDS[dtype]).reshape(shape).copy(), trial.rng)
        if value is not None:
            kind = next(k for k, v in KINDS.items() if np.dtype(v) == value.dtype)
            tensors[chosen] = kind, list(value.shape), value.tobytes()
        write_parts(file, tensors)

    return do


def put(value: float) -> Callable[[np.ndarray, Random], np.ndarray]:
    def change(array: np.ndarray, rng: Random) -> np.ndarray:
        array.flat[rng.randrange(array.size)] = value
        return array

    return change


SHAPES = {
    "missing": lambda a, r: None, "a row short": lambda a, r: a[:-1], "empty": lambda a, r: a[:0],
    "flat": lambda a, r: a.reshape(-1) if a.ndim > 1 else a[None], "twice": lambda a, r: np.concatenate([a, a]),
}  # fmt: skip
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
        array = np.frombuffer(body[slice(*header[n]["data_offsets"])], KINDS[dtype])
        parts[n] = dtype, shape, (array * 1.01).astype(KINDS[dtype]).tobytes() if dtype[0] == "F" else array.tobytes()
    write_parts(arrays_file(trial), parts)


def plan_file(trial: Trial) -> Path:
    return trial.path


def group_edit(key: str, change: Callable[[object, Random], object]) -> Callable[[Trial], None]:
    """Damage to one field of a group of several members."""

    def do(trial: Trial) -> None:
        content = load(plan_file(trial))
        groups = [g for layer in content["layers"].values() for g in layer["groups"] if len(g["members"]) > 1]
        group = trial.rng.choice(groups)
        set_at(group, (key,), change(group[key], trial.rng))
        rewrite(plan_file(trial), dump(content))

    return do


text_damages(PLAN, plan_file, what="plan")
for label, value in {**ODD, "a float": 2.0, "out of range": 4, "2^31": 2**31}.items():
    if label not in ("zero", "a list"):
        PLAN.row(f"dominant {label}", group_edit("dominant", lambda v, r, o=value: o))
    PLAN.row(f"num_experts {label}", layer_edit(plan_file, "num_experts", lambda v, r, o=value: o),
             Expect.SAME if value == 4 and value is not True else Expect.REFUSE)  # fmt: skip
    if label != "zero":
        PLAN.row(f"members with {label}", group_edit("members", one_value(value)))
    PLAN.row(f"weights with {label}!", group_edit("weights", one_value(value)))
for key in ("members", "weights"):
    for label in ("null", "a string", "an object", "zero"):
        PLAN.row(f"{key} {label}", group_edit(key, lambda v, r, o=ODD[label]: o))
    PLAN.row(f"{key} empty", group_edit(key, lambda v, r: []))
    PLAN.row(f"{key} too long", group_edit(key, lambda v, r: [*v, v[0]]))
    PLAN.row(f"{key} too short", group_edit(key, lambda v, r: v[:-1]))
    PLAN.row(f"{key} nested", group_edit(key, lambda v, r: [v]))
    PLAN.row(f"{key} missing", group_edit(key, lambda v, r: GONE))
PLAN.row("dominant missing", group_edit("dominant", lambda v, r: GONE))
PLAN.row("members of text", group_edit("members", lambda v, r: [str(m) for m in v]))
PLAN.row("members in floats", group_edit("members", lambda v, r: [float(m) for m in v]))
PLAN.row("members as one text", group_edit("members", lambda v, r: "".join(map(str, v))))
PLAN.row("weights of text", group_edit("weights", lambda v, r: [str(m) for m in v]))
PLAN.row("weights that sum to 2", group_edit("weights", lambda v, r: [2 * w for w in v]))
PLAN.row("weights that cancel out", group_edit("weights", lambda v, r: [5.0, -4.0, *[0.0] * len(v)][: len(v)]))
PLAN.row("weights beyond", group_edit("weights", lambda v, r: [1e308] * len(v)))
for key, values in {
    "groups": (None, "x", {}, 5, [], [None], [5], [[]], [{}]),
    "removed": (None, "x", 5, [0], [-1], [2.5], ["a"], [9], {}),
}.items():
    for value in values:
        PLAN.row(f"{key} {value}", layer_edit(plan_file, key, lambda v, r, o=value: o),
                 Expect.EITHER if key == "removed" and value in (None, {}) else Expect.REFUSE)  # fmt: skip
for place, values in {
    ("layers",): (None, [], "x", 5), ("checkpoint",): (None, [], "x", 5, {}, GONE), ("method",): (None, 5, [], GONE),
    ("parameters",): (None, [], "x", 5), ("seed",): ("x", 2.5, -1, None, [], 2**70, True), ("stats",): (5, "x", []),
    ("checkpoint", "fingerprint"): (None, 5, "sha256:00"), ("format",): (GONE, None, "msmoe-plan/9", 5),
    ("predicted",): ([], "x", 5), ("notes",): (5, "x", [1]),
}.items():  # fmt: skip
    for value in values:
        lenient = place[0] in ("predicted", "notes", "method", "stats", "parameters", "seed")
        what = "missing" if value is GONE else value
        PLAN.row(f"{'.'.join(place)} {what}", lambda t, p=place, v=value: edit_json(plan_file(t), p, v),
                 Expect.EITHER if lenient else Expect.REFUSE)  # fmt: skip


def any_place(trial: Trial, file: Path, prefix: str = "") -> None:
    """Put an odd value at any place of a JSON file."""
    content = load(file)
    found = [p for p in places(content) if not prefix or p[0] == prefix]
    value = trial.rng.choice([*ODD.values(), GONE, "\ud800", "\x1b[31m\n", [None], -0.0])
    set_at(content, trial.rng.choice(found), value)
    rewrite(file, dump(content))


for turn in range(24):
    PLAN.row(f"parameters odd {turn}", lambda t: any_place(t, plan_file(t), "parameters"), Expect.EITHER)
    PLAN.row(f"odd anywhere {turn}", lambda t: any_place(t, plan_file(t)), Expect.EITHER)
    STATS.row(f"stats odd anywhere {turn}", lambda t: any_place(t, stats_file(t)), Expect.EITHER)
    for table in (EXACT, NATIVE, FACTORS):
        table.row(f"msmoe.json odd {turn}", lambda t: any_place(t, t.path / "msmoe.json"), Expect.EITHER)
        table.row(f"config odd {turn}", lambda t: any_place(t, t.path / "config.json"), Expect.EITHER)
        table.row(f"plan.json odd {turn}", lambda t: any_place(t, t.path / "plan.json"), Expect.EITHER)
    RESULTS.row(f"results odd anywhere {turn}", lambda t: any_place(t, t.path), Expect.EITHER)
    COMPARISON.row(f"results odd anywhere {turn}", lambda t: any_place(t, t.path / "results.json"), Expect.EITHER)
    COMPARISON.row(f"a cell odd {turn}", lambda t: any_place(t, any_cell(t)), Expect.EITHER)


def any_cell(trial: Trial) -> Path:
    return trial.rng.choice(sorted((trial.path / "cells").glob("*.json")))


@PLAN.add("an expert in two groups")
def in_two_groups(trial: Trial) -> None:
    content = load(plan_file(trial))
    layer = content["layers"][trial.rng.choice(layers_of(content))]
    layer["groups"].append(dict(layer["groups"][0]))
    rewrite(plan_file(trial), dump(content))


@PLAN.add("a group missing")
def group_missing(trial: Trial) -> None:
    content = load(plan_file(trial))
    content["layers"][trial.rng.choice(layers_of(content))]["groups"].pop()
    rewrite(plan_file(trial), dump(content))


@PLAN.add("a key twice")
def key_twice(trial: Trial) -> None:
    text = json.dumps(load(plan_file(trial)))
    key = trial.rng.choice(['"groups": ', '"num_experts": ', '"seed": ', '"dominant": ', '"layers": '])
    rewrite(plan_file(trial), text.replace(key, f"{key}0, {key}", 1))


@PLAN.add("a layer of another model", by=KNOWS_LAYERS)
def other_layer(trial: Trial) -> None:
    content = load(plan_file(trial))
    content["layers"]["encoder.block.7.layer.1.mlp"] = next(iter(content["layers"].values()))
    rewrite(plan_file(trial), dump(content))


for name in ("../../x", "a/b", "", "\x1b[31m", "a\nb", "shared", "encoder.block.1.layer.1.mlp.experts"):

    @PLAN.add(f"a layer named {name!r}", by=KNOWS_LAYERS)
    def named(trial: Trial, name=name) -> None:
        content = load(plan_file(trial))
        content["layers"][name] = next(iter(content["layers"].values()))
        rewrite(plan_file(trial), dump(content))


@PLAN.add("an unknown key", Expect.SAME_OR_REFUSE)
def unknown_key(trial: Trial) -> None:
    edit_json(plan_file(trial), ("comment",), "by hand")


PLAN.row("a byte order mark", lambda t: rewrite(t.path, b"\xef\xbb\xbf" + t.path.read_bytes()), Expect.SAME_OR_REFUSE)


for table in (EXACT, NATIVE, FACTORS):
    text_damages(
        table,
        lambda t: t.path / "msmoe.json",
        what="msmoe.json",
        expect=Expect.SAME_OR_REFUSE,
        by=frozenset({"evaluate"}),
    )
    text_damages(
        table,
        lambda t: t.path / "plan.json",
        what="plan.json",
        expect=Expect.SAME_OR_REFUSE,
        by=frozenset({"evaluate"}),
    )
    text_damages(table, lambda t: t.path / "config.json", what="config")
for table in (EXACT, FACTORS):
    for value in (-1, 4, 2**31, 2**31 - 1, -(2**63), 2**62):
        table.row(f"{value} in expert_map", array_edit("expert_map", put(value)))
    for label, change in SHAPES.items():
        table.row(f"expert_map {label}", array_edit("expert_map", change))
    table.row("expert_map in floats", array_edit("expert_map", lambda a, r: a.astype("<f8")))
    table.row(
        "a group that no expert goes to",
        array_edit("block.3.layer.1.mlp.expert_map", lambda a, r: a * 0),
        Expect.EITHER,
    )
for label, change in SHAPES.items():
    for part in ("experts.wi", "experts.wo", "router.classifier.weight"):
        EXACT.row(f"{part} {label}", array_edit(part, change), by=LOADS)
    for part in (".U", ".V", ".S", ".rows"):
        FACTORS.row(f"{part} {label}", array_edit(part, change), by=LOADS)
    NATIVE.row(f"expert {label}", array_edit("wi.weight", change), by=LOADS)
for label, value in INEXACT.items():
    EXACT.row(f"{label} in experts.wo", array_edit("experts.wo", put(value)), by=frozenset({"factorize", "recover"}))
    for part in (".U", ".V", ".S"):
        FACTORS.row(f"{label} in {part}", array_edit(part, put(value)), by=frozenset({"factorize", "recover"}))
for value in (-1, 24, 2**31 - 1):
    FACTORS.row(f"{value} in rows", array_edit(".rows", put(value)))
FACTORS.row("a row twice", array_edit(".rows", lambda a, r: a * 0), Expect.EITHER)
FACTORS.row("rows in floats", array_edit(".rows", lambda a, r: a.astype("<f4")))
for table in (EXACT, FACTORS):
    keys = ("moe_layers",) if table is EXACT else ("moe_layers", "factors")
    for key in keys:
        for label, value in {**ODD, "missing": GONE, "unknown layers": {"x.y": 3}, "empty": {}}.items():
            table.row(f"{key} {label}", lambda t, k=key, v=value: edit_json(t.path / "config.json", (k,), v), by=LOADS)
    for label, value in {**ODD, "one": 1, "five": 5}.items():

        @table.add(f"moe_layers of a layer {label}", by=LOADS)
        def stored(trial: Trial, value=value) -> None:
            file = trial.path / "config.json"
            layers = list(load(file)["moe_layers"])
            edit_json(file, ("moe_layers", trial.rng.choice(layers)), value)

    for label, value in {**ODD, "of an unknown layer": {"x": 2}, "too few": {"encoder.block.3.layer.1.mlp": 2}}.items():
        for key in ("router_rows", "constants"):
            table.row(
                f"{key} {label}", lambda t, k=key, v=value: edit_json(t.path / "config.json", (k,), v), Expect.EITHER
            )
for label, value in {**ODD, "short": [1], "of text": ["a", "b"], "too large": [10**9, 10**9], "other": [3, 1]}.items():

    @FACTORS.add(f"factors of a matrix {label}", by=LOADS)
    def factor(trial: Trial, value=value) -> None:
        file = trial.path / "config.json"
        layers = load(file)["factors"]
        layer = trial.rng.choice(list(layers))
        edit_json(file, ("factors", layer, trial.rng.choice(list(layers[layer]))), value)


@EXACT.add("code of its own replaced", Expect.SAME)
def own_code(trial: Trial) -> None:
    for file in trial.path.glob("*.py"):
        rewrite(file, "open('pwned', 'w').close()\n")


@EXACT.add("the plan of another checkpoint", Expect.EITHER)
def other_plan(trial: Trial) -> None:
    content = load(trial.path / "plan.json")
    content["layers"].popitem()
    rewrite(trial.path / "plan.json", dump(content))


text_damages(RESULTS, lambda t: t.path, what="results")
for label, value in {**ODD, "missing": GONE, "text": "nine"}.items():
    for place in (("results", 0, "metrics", "loss", "value"), ("results", 0, "metrics", "loss", "ci95", 0)):
        RESULTS.row(f"{'.'.join(map(str, place[2:]))} {label}", lambda t, p=place, v=value: edit_json(t.path, p, v),
                    Expect.EITHER if label in ("zero", "negative", "a fraction", "huge", "beyond 64 bits",
                    "a list", "true")
                    else Expect.REFUSE)  # fmt: skip
    for place in (("results",), ("results", 0), ("results", 0, "metrics"), ("results", 0, "metrics", "loss"),
                  ("results", 0, "checkpoint"), ("results", 0, "task"), ("results", 0, "source"), ("format",),
                  ("results", 0, "num_parameters"), ("results", 0, "bytes"), ("results", 0, "majority_share"),
                  ("results", 0, "flops_per_token"), ("results", 0, "metrics", "loss", "ci95"),
                  ("results", 0, "metrics", "loss", "num_examples"), ("results", 0, "peak_memory_bytes")):  # fmt: skip
        RESULTS.row(
            f"{'.'.join(map(str, place))} {label}", lambda t, p=place, v=value: edit_json(t.path, p, v), Expect.EITHER
        )
text_damages(COMPARISON, lambda t: t.path / "results.json", what="results", by=frozenset({"report", "report file"}))
text_damages(COMPARISON, any_cell, what="cell", expect=Expect.EITHER)
COMPARISON.row("nothing wrong", lambda t: None, Expect.SAME)
COMPARISON.row("no cells", lambda t: shutil.rmtree(t.path / "cells"), Expect.EITHER)
COMPARISON.row("no plans", lambda t: shutil.rmtree(t.path / "plans"), Expect.EITHER)
COMPARISON.row("no statistics", lambda t: shutil.rmtree(t.path / "stats"), Expect.EITHER)


@COMPARISON.add("another model", Expect.EITHER)
def another_model(trial: Trial) -> None:
    """The middle of one tensor of the checkpoint changed since."""
    file = trial.root / "ck" / "model.safetensors"
    if file.exists():
        header, body = read_tensors(file)
        start, end = header["shared.weight"]["data_offsets"]
        middle = (start + end) // 8 * 4
        write_tensors(file, header, body[:middle] + struct.pack("<f", 3.0) + body[middle + 4 :])


@COMPARISON.add("cells swapped", Expect.EITHER)
def swapped_cells(trial: Trial) -> None:
    one, two = sorted((trial.path / "cells").glob("*.json"))[:2]
    first, second = one.read_bytes(), two.read_bytes()
    rewrite(one, second)
    rewrite(two, first)
