"""msmoe: make Mixture-of-Experts checkpoints small.

    stats = msmoe.profile("switch-dir", "calibration.jsonl")
    plan = msmoe.plan("switch-dir", stats, experts=8)
    msmoe.apply("switch-dir", plan, "out-dir", stats=stats)
    model = msmoe.load("out-dir")
    scores = msmoe.evaluate(model, "task.jsonl")

Importing the package lets transformers' Auto classes open compressed checkpoints.
"""

import importlib
from typing import TYPE_CHECKING

from msmoe.errors import UserError
from msmoe.registration import is_command, register

if TYPE_CHECKING:
    from msmoe.apply import ApplyReport, apply
    from msmoe.calibration.profile import profile
    from msmoe.calibration.stats import Stats
    from msmoe.evaluate.results import TaskResult, save_results
    from msmoe.evaluate.run import evaluate
    from msmoe.inspect import Summary, inspect
    from msmoe.loading import load
    from msmoe.methods import METHODS, plan
    from msmoe.plan import Plan

LAZY = {
    "METHODS": "msmoe.methods",
    "ApplyReport": "msmoe.apply",
    "Plan": "msmoe.plan",
    "Stats": "msmoe.calibration.stats",
    "Summary": "msmoe.inspect",
    "TaskResult": "msmoe.evaluate.results",
    "apply": "msmoe.apply",
    "evaluate": "msmoe.evaluate.run",
    "inspect": "msmoe.inspect",
    "load": "msmoe.loading",
    "plan": "msmoe.methods",
    "profile": "msmoe.calibration.profile",
    "save_results": "msmoe.evaluate.results",
}

if not is_command():
    register()


def __getattr__(name: str):
    if name not in LAZY:
        raise AttributeError(f"module 'msmoe' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(LAZY[name]), name)
    return value


__all__ = [
    "METHODS",
    "ApplyReport",
    "Plan",
    "Stats",
    "Summary",
    "TaskResult",
    "UserError",
    "apply",
    "evaluate",
    "inspect",
    "load",
    "plan",
    "profile",
    "save_results",
]
