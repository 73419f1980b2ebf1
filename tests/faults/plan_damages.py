"""Damages to a plan file."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

from damage import (
    GONE,
    ODD,
    Expect,
    Table,
    Trial,
    any_place,
    dump,
    edit_json,
    layer_edit,
    layers_of,
    load,
    one_value,
    rewrite,
    set_at,
    text_damages,
)

KNOWS_LAYERS = frozenset({"apply", "report page"})  # readers of a plan that have its checkpoint
PLAN = Table()


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


for turn in range(24):
    PLAN.row(f"parameters odd {turn}", lambda t: any_place(t, plan_file(t), "parameters"), Expect.EITHER)
    PLAN.row(f"odd anywhere {turn}", lambda t: any_place(t, plan_file(t)), Expect.EITHER)


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
