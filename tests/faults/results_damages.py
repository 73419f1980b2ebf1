"""Damages to results: of an evaluation, and a comparison's folder."""

import shutil
import struct
from pathlib import Path

from arrays import read_tensors, write_tensors
from damage import (
    GONE,
    ODD,
    Expect,
    Table,
    Trial,
    any_place,
    edit_json,
    rewrite,
    text_damages,
)

RESULTS, COMPARISON = Table(), Table()


def any_cell(trial: Trial) -> Path:
    return trial.rng.choice(sorted((trial.path / "cells").glob("*.json")))


for turn in range(24):
    RESULTS.row(f"results odd anywhere {turn}", lambda t: any_place(t, t.path), Expect.EITHER)
    COMPARISON.row(f"results odd anywhere {turn}", lambda t: any_place(t, t.path / "results.json"), Expect.EITHER)
    COMPARISON.row(f"a cell odd {turn}", lambda t: any_place(t, any_cell(t)), Expect.EITHER)
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
