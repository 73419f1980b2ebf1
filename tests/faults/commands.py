"""Every command that writes, on a tiny model: as first run and over an earlier output."""

import json
from pathlib import Path

from killing import Command, Content, in_a_child
from msmoe.analysis.compare import write_all
from msmoe.analysis.report import report
from tiny import profile_small, random_records, save_switch, write_records

from msmoe.comparison.run import compare
from msmoe.compression.apply import apply
from msmoe.compression.factorize import factorize
from msmoe.evaluation.results import save_results
from msmoe.evaluation.run import evaluate
from msmoe.families.loading import load
from msmoe.planning.plan import Plan
from msmoe.planning.planner import plan as make_plan
from msmoe.recovery.run import recover

MEASURED = ("seconds", "evaluate_seconds", "peak_memory_bytes")  # differ from run to run


def timeless(content):
    """JSON without what a clock or a memory counter says."""
    if isinstance(content, dict):
        return {key: timeless(value) for key, value in content.items() if key not in MEASURED}
    return [timeless(value) for value in content] if isinstance(content, list) else content


def read_results(out: Path) -> Content | None:
    """Results but for times; a comparison's folder without any is one to be resumed, not yet an output."""
    file = out / "results.json" if out.is_dir() else out
    if not file.exists():
        return None
    content = timeless(json.loads(file.read_text()))
    if isinstance(content, dict) and "cells" in content:
        content["cells"].sort(key=lambda cell: (cell["method"], cell["seed"]))
    return {"": json.dumps(content, sort_keys=True).encode()}


class Inputs:
    """What the commands read, made in `work`."""

    def __init__(self, work: Path):
        self.work = work
        self.switch = save_switch(work / "switch")
        self.data = write_records(work / "data.jsonl", random_records(40))
        self.task = write_records(work / "task.jsonl", random_records(8, seed=3))
        self.stats = profile_small(self.switch, self.data)
        self.other = profile_small(self.switch, self.task)
        self.stats.save(work / "stats")
        self.plan = make_plan(self.switch, self.stats, experts=3)
        self.plan.save(work / "plan.json")
        apply(self.switch, make_plan(self.switch, self.stats, experts=2), work / "old", stats=self.stats, workers=1)


def compressing(inputs: Inputs) -> dict[str, tuple]:
    """Name -> run and earlier output of the commands on weights."""
    work, switch, stats = inputs.work, inputs.switch, inputs.work / "stats"
    both = make_plan(switch, inputs.stats, method="mc-smoe-refit", experts=3, target_ratio=0.75)
    apply(switch, inputs.plan, work / "merged", stats=stats, workers=1)
    inputs.other.save(work / "old-stats")
    again = {"stats": stats, "workers": 1, "resume": True, "force": True}
    return {
        "plan": (lambda out: Plan.load(work / "plan.json").save(out), work / "plan.json"),
        "profile": (lambda out: profile_small(switch, inputs.data).save(out, force=True), work / "old-stats"),
        "apply": (lambda out: apply(switch, work / "plan.json", out, **again), work / "old"),
        "mc-smoe": (lambda out: apply(switch, both, out, **again), work / "old"),
        "factorize": (lambda out: factorize(work / "merged", out, target_ratio=0.8, **again), work / "old"),
    }


def measuring(inputs: Inputs) -> dict[str, tuple]:
    """The same of the commands that run models or draw."""
    work, model = inputs.work, load(inputs.switch)
    save_results([evaluate(model, inputs.task, metrics=["loss"])], work / "old-results.json")
    pages = {"old": report(inputs.other), "new": report(inputs.stats)}
    in_a_child(lambda: pages["old"].save(work / "old.html"))  # a process that has drawn cannot be forked
    in_a_child(lambda: pages["old"].save_figures(work / "old-figures"))
    (work / "old-figures" / "mine.txt").write_text("a stranger's")
    (work / "tasks").mkdir()
    write_records(work / "tasks" / "one.jsonl", random_records(6, seed=11))
    comparing = {
        "data": inputs.data, "tasks": [work / "tasks"], "methods": ("reap",), "seeds": (0,), "samples": 25,
        "cost": False,
    }  # fmt: skip
    comparison = compare(inputs.switch, work / "old-comparison", experts=(4,), **comparing)
    write_all(comparison, work / "old-tables")
    training = {"data": inputs.data, "teacher": None, "steps": 2, "batch_size": 8, "resume": True, "force": True}

    def compare_again(out: Path) -> None:
        is_finished = (out / "results.json").exists() and not (out / ".started-over").exists()
        compare(inputs.switch, out, experts=(3,), **comparing, **({"force": True} if is_finished else {"resume": True}))

    def measure(out: Path) -> None:
        save_results([evaluate(model, inputs.data, metrics=["loss"], samples=8)], out, force=True)

    return {
        "evaluate": (measure, work / "old-results.json"),
        "report": (lambda out: pages["new"].save(out, force=True), work / "old.html"),
        "figures": (lambda out: pages["new"].save_figures(out, force=True), work / "old-figures"),
        "tables": (lambda out: write_all(comparison, out, force=True), work / "old-tables"),
        "recover": (lambda out: recover(inputs.switch, out, **training), work / "old"),
        "compare": (compare_again, work / "old-comparison"),
    }


def commands(runs: dict[str, tuple]) -> dict[str, Command]:
    """Every run as a first one, and over an earlier output."""
    extra, readers = {"recover": ("out.training",)}, {"evaluate": read_results, "compare": read_results}
    made = {}
    for name, (run, old) in runs.items():
        made[name] = Command(run, None, extra.get(name, ()), readers.get(name))
        made[f"{name} --force"] = Command(run, old, extra.get(name, ()), readers.get(name))
    return made
