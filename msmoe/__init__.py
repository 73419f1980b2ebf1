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

import importlib
from typing import TYPE_CHECKING, Any

from msmoe.errors import MsmoeWarning, UserError
from msmoe.formats.registration import register_when_needed

if TYPE_CHECKING:
    from msmoe.calibration.profile import profile
    from msmoe.calibration.stats import Stats
    from msmoe.comparison.run import compare
    from msmoe.compression.apply import ApplyReport, apply
    from msmoe.compression.factorize import FactorizeReport, factorize
    from msmoe.compression.layer_errors import LayerError, layer_errors
    from msmoe.evaluation.results import TaskResult, results_frame, save_results
    from msmoe.evaluation.run import evaluate
    from msmoe.families.inspection import Summary, inspect
    from msmoe.families.loading import load
    from msmoe.forecasting import Forecast, forecast
    from msmoe.formats.convert import ConvertReport, convert
    from msmoe.planning.methods import METHODS
    from msmoe.planning.plan import Plan
    from msmoe.planning.planner import plan
    from msmoe.recovery.run import RecoverReport, recover
    from msmoe.reporting import report

PLACES = {  # name -> the module that has it, imported when the name is first used
    "METHODS": "msmoe.planning.methods",
    "ApplyReport": "msmoe.compression.apply",
    "ConvertReport": "msmoe.formats.convert",
    "FactorizeReport": "msmoe.compression.factorize",
    "Forecast": "msmoe.forecasting",
    "LayerError": "msmoe.compression.layer_errors",
    "Plan": "msmoe.planning.plan",
    "RecoverReport": "msmoe.recovery.run",
    "Stats": "msmoe.calibration.stats",
    "Summary": "msmoe.families.inspection",
    "TaskResult": "msmoe.evaluation.results",
    "apply": "msmoe.compression.apply",
    "compare": "msmoe.comparison.run",
    "convert": "msmoe.formats.convert",
    "evaluate": "msmoe.evaluation.run",
    "factorize": "msmoe.compression.factorize",
    "forecast": "msmoe.forecasting",
    "inspect": "msmoe.families.inspection",
    "layer_errors": "msmoe.compression.layer_errors",
    "load": "msmoe.families.loading",
    "plan": "msmoe.planning.planner",
    "profile": "msmoe.calibration.profile",
    "recover": "msmoe.recovery.run",
    "report": "msmoe.reporting",
    "results_frame": "msmoe.evaluation.results",
    "save_results": "msmoe.evaluation.results",
}


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *PLACES})


register_when_needed()

__all__ = [
    "METHODS",
    "ApplyReport",
    "ConvertReport",
    "FactorizeReport",
    "Forecast",
    "LayerError",
    "MsmoeWarning",
    "Plan",
    "RecoverReport",
    "Stats",
    "Summary",
    "TaskResult",
    "UserError",
    "apply",
    "compare",
    "convert",
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
