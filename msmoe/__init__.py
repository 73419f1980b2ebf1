"""msmoe: make Mixture-of-Experts checkpoints small.

    stats = msmoe.profile("switch-dir", "calibration.jsonl")
    plan = msmoe.plan("switch-dir", stats, experts=8)
    msmoe.apply("switch-dir", plan, "out-dir", stats=stats)
    model = msmoe.load("out-dir")
    msmoe.factorize("out-dir", "small-dir", stats=stats, rank=32)
    msmoe.recover("small-dir", "final-dir", teacher="switch-dir", data="train.jsonl", epochs=3)
    scores = msmoe.evaluate(model, "task.jsonl")
    results = msmoe.compare("switch-dir", "comparison", data="calibration.jsonl", tasks=["tasks"],
                            methods=["m-smoe", "reap"], experts=[4, 2])
    msmoe.report("switch-dir", stats, plan, "out-dir")  # a notebook shows it; .save("report.html")

Importing the package lets transformers' Auto classes open compressed checkpoints.
"""

from msmoe.apply import ApplyReport, apply
from msmoe.calibration.profile import profile
from msmoe.calibration.stats import Stats
from msmoe.compare.run import compare
from msmoe.errors import UserError
from msmoe.evaluate.results import TaskResult, results_frame, save_results
from msmoe.evaluate.run import evaluate
from msmoe.factorize.run import FactorizeReport, factorize
from msmoe.forecast import Forecast, forecast
from msmoe.inspect import Summary, inspect
from msmoe.layer_errors import LayerError, layer_errors
from msmoe.loading import load
from msmoe.methods import METHODS
from msmoe.plan import Plan
from msmoe.planning import plan
from msmoe.recover.run import RecoverReport, recover
from msmoe.registration import is_command, register
from msmoe.reporting import report

if not is_command():
    register()

__all__ = [
    "METHODS",
    "ApplyReport",
    "FactorizeReport",
    "Forecast",
    "LayerError",
    "Plan",
    "RecoverReport",
    "Stats",
    "Summary",
    "TaskResult",
    "UserError",
    "apply",
    "compare",
    "evaluate",
    "factorize",
    "forecast",
    "inspect",
    "layer_errors",
    "load",
    "plan",
    "profile",
    "recover",
    "report",
    "results_frame",
    "save_results",
]
