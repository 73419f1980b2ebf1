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
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from msmoe.errors import MsmoeWarning, UserError
from msmoe.registration import register_when_needed

if TYPE_CHECKING:
    from msmoe.apply import ApplyReport, apply
    from msmoe.calibration.profile import profile
    from msmoe.calibration.stats import Stats
    from msmoe.compare.run import compare
    from msmoe.convert import ConvertReport, convert
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
    from msmoe.reporting import report

PLACES = {  # name -> the module that has it, imported when the name is first used
    "METHODS": "msmoe.methods",
    "ApplyReport": "msmoe.apply",
    "ConvertReport": "msmoe.convert",
    "FactorizeReport": "msmoe.factorize.run",
    "Forecast": "msmoe.forecast",
    "LayerError": "msmoe.layer_errors",
    "Plan": "msmoe.plan",
    "RecoverReport": "msmoe.recover.run",
    "Stats": "msmoe.calibration.stats",
    "Summary": "msmoe.inspect",
    "TaskResult": "msmoe.evaluate.results",
    "apply": "msmoe.apply",
    "compare": "msmoe.compare.run",
    "convert": "msmoe.convert",
    "evaluate": "msmoe.evaluate.run",
    "factorize": "msmoe.factorize.run",
    "forecast": "msmoe.forecast",
    "inspect": "msmoe.inspect",
    "layer_errors": "msmoe.layer_errors",
    "load": "msmoe.loading",
    "plan": "msmoe.planning",
    "profile": "msmoe.calibration.profile",
    "recover": "msmoe.recover.run",
    "report": "msmoe.reporting",
    "results_frame": "msmoe.evaluate.results",
    "save_results": "msmoe.evaluate.results",
}


class Package(ModuleType):
    """The package, whose `plan` is the function whatever has been imported.

    Python sets a submodule as an attribute of its package, so that `import msmoe.plan` would put the module in the
    place of the function of that name. `from msmoe.plan import Plan` finds the module without the attribute.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in PLACES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *PLACES})


sys.modules[__name__].__class__ = Package
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
