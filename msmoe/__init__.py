"""msmoe: make Mixture-of-Experts checkpoints small.

    stats = msmoe.profile("switch-dir", "calibration.jsonl")
    plan = msmoe.plan("switch-dir", stats, experts=8)
    msmoe.apply("switch-dir", plan, "out-dir", stats=stats)
    model = msmoe.load("out-dir")
    scores = msmoe.evaluate(model, "task.jsonl")

Importing the package lets transformers' Auto classes open compressed checkpoints.
"""

from msmoe.apply import ApplyReport, apply
from msmoe.calibration.profile import profile
from msmoe.calibration.stats import Stats
from msmoe.errors import UserError
from msmoe.evaluate.results import TaskResult, save_results
from msmoe.evaluate.run import evaluate
from msmoe.inspect import Summary, inspect
from msmoe.loading import load
from msmoe.methods import METHODS, plan
from msmoe.plan import Plan
from msmoe.registration import is_command, register

if not is_command():
    register()

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
