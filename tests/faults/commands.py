"""Every command that writes, on a tiny model: as first run and over an earlier output."""

import json
from pathlib import Path

from killing import Command, Content
from msmoe.analysis.compare import write_all
from msmoe.analysis.report import report
from tiny import profile_small, random_records, save_switch, write_records

from msmoe.apply import apply
from msmoe.compare.run import compare
from msmoe.evaluate.results import save_results
from msmoe.evaluate.run import evaluate
from msmoe.factorize.run import factorize
from msmoe.loading import load
from msmoe.plan import Plan
from msmoe.planning import plan as make_plan
from msmoe.recover.run import recover

MEASURED = ("seconds", "evaluate_seconds", "peak_memory", "samples_per_second")  # differ from run to run


def timeless(content):
    """JSON without what a clock or a memory counter says."""
    if isinstance(content, dict):
        return {key: timeless(value) for key, value in content.items() if key not in MEASURED}
    return [timeless(value) for value in content] if isinstance(content, list) else content


def read_results(out: Path) -> Content:
    file = out / "results.json" if out.is_dir() else out
    if not file.exists():
        return {}
    content = timeless(json.loads(file.read_text()))
    if isinstance(content, dict) and "cells" in content:
        content["cells"].sort(key=lambda cell: (cell["method"], cell["seed"]))
    return {"": json.dumps(content, sort_keys=True).encode()}


def commands(work: Path) -> dict[str, Command]:
    """Name -> command; what they read is made in `work`."""
    switch = save_switch(work / "switch")
    data = write_records(work / "data.jsonl", random_records(40))
    task = write_records(work / "task.jsonl", random_records(8, seed=3))
    stats = profile_small(switch, data)
    other = profile_small(switch, task)
    stats.save(work / "stats")
    plan = make_plan(switch, stats, experts=3)
    both = make_plan(switch, stats, method="mc-smoe-refit", experts=3, target_ratio=0.75)
    plan.save(work / "plan.json")
    apply(switch, make_plan(switch, stats, experts=2), work / "old", stats=stats, workers=1)
    apply(switch, plan, work / "merged", stats=stats, workers=1)
    other.save(work / "old-stats")
    model = load(switch)
    save_results([evaluate(model, task, metrics=["loss"])], work / "old-results.json")
    pages = {"old": report(other), "new": report(stats)}
    pages["old"].save(work / "old.html")
    pages["old"].save_figures(work / "old-figures")
    (work / "old-figures" / "mine.txt").write_text("a stranger's")
    tasks = work / "tasks"
    tasks.mkdir()
    write_records(tasks / "one.jsonl", random_records(6, seed=11))
    compared = {"data": data, "tasks": [tasks], "methods": ("reap",), "seeds": (0,), "samples": 25, "cost": False}
    comparison = compare(switch, work / "old-comparison", experts=(4,), **compared)
    write_all(comparison, work / "old-tables")
    plan_file, stats_folder, resumed = work / "plan.json", work / "stats", {"workers": 1, "resume": True, "force": True}
    training = {"data": data, "teacher": None, "steps": 2, "batch_size": 8, "resume": True, "force": True}

    def compare_again(out: Path) -> None:
        started = (out / ".lock").exists() and (out / "results.json").exists()
        fresh = not started or (out / ".started-over").exists()
        how = {"resume": True} if fresh else {"force": True}
        compare(switch, out, experts=(3,), **compared, **how)

    runs = {
        "profile": (lambda out: profile_small(switch, data).save(out, force=True), work / "old-stats"),
        "plan": (lambda out: Plan.load(plan_file).save(out), work / "plan.json"),
        "apply": (lambda out: apply(switch, plan_file, out, stats=stats_folder, **resumed), work / "old"),
        "mc-smoe": (lambda out: apply(switch, both, out, stats=stats_folder, **resumed), work / "old"),
        "factorize": (
            lambda out: factorize(work / "merged", out, stats=stats_folder, target_ratio=0.8, **resumed), work / "old",
        ),
        "evaluate": (
            lambda out: save_results([evaluate(model, data, metrics=["loss"], samples=8)], out, force=True),
            work / "old-results.json",
        ),
        "report": (lambda out: pages["new"].save(out, force=True), work / "old.html"),
        "figures": (lambda out: pages["new"].save_figures(out, force=True), work / "old-figures"),
        "tables": (lambda out: write_all(comparison, out, force=True), work / "old-tables"),
        "recover": (lambda out: recover(switch, out, **training), work / "old"),
        "compare": (compare_again, work / "old-comparison"),
    }  # fmt: skip
    extra = {"recover": ("out.training",)}
    readers = {"evaluate": read_results, "compare": read_results}
    made = {}
    for name, (run, old) in runs.items():
        made[name] = Command(run, None, extra.get(name, ()), readers.get(name))
        made[f"{name} --force"] = Command(run, old, extra.get(name, ()), readers.get(name))
    return made
