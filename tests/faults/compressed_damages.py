"""Damages to compressed checkpoints: provenance, expert maps, factors."""

from arrays import INEXACT, SHAPES, array_edit, put
from damage import (
    GONE,
    ODD,
    Expect,
    Table,
    Trial,
    any_place,
    dump,
    edit_json,
    load,
    rewrite,
    text_damages,
)

READERS = ("inspect", "evaluate", "factorize", "recover", "report", "convert")
LOADS = frozenset({"evaluate", "recover", "factorize"})
EXACT, NATIVE, FACTORS = Table(), Table(), Table()

for turn in range(24):
    for table in (EXACT, NATIVE, FACTORS):
        table.row(f"msmoe.json odd {turn}", lambda t: any_place(t, t.path / "msmoe.json"), Expect.EITHER)
        table.row(f"config odd {turn}", lambda t: any_place(t, t.path / "config.json"), Expect.EITHER)
        table.row(f"plan.json odd {turn}", lambda t: any_place(t, t.path / "plan.json"), Expect.EITHER)
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
