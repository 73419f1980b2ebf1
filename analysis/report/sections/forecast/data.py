"""A forecast within bounded work: its method, layers and sizes; and what it can be held against."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from msmoe.analysis.report.artefacts import Artefacts, Comparison
from msmoe.analysis.report.charts import stack_of
from msmoe.analysis.report.document import shorten
from msmoe.analysis.report.sections.cost.data import MAX_NAME
from scipy.stats import pearsonr, spearmanr

from msmoe.calibration.stats import Stats
from msmoe.comparison.summary import FULL
from msmoe.errors import UserError
from msmoe.families import MoELayer
from msmoe.forecasting import Forecast, default_sizes, forecast
from msmoe.planning.methods import METHODS, REROUTING, check_statistics, resolve, variant
from msmoe.planning.plan import Plan
from msmoe.planning.planner import Planner, predict, sketch

WHOLE = "whole model"
DEFAULT_METHOD = "m-smoe-refit"
CHECK = Path(__file__).parents[3] / "results" / "forecast" / "forecast.json"
SECONDS = 2.0  # of one core, about: how much a report spends on a forecast before it leaves out sizes and layers
MOST_SECONDS = 900.0  # what the smallest forecast may take
FEWEST_LAYERS, FEWEST_SIZES = 4, 3
SECONDS_PER_EXPERT, SECONDS_PER_CUBE = 5.5e-4, 2.2e-10  # of one size; by the cube of d_ff where experts are merged
MAX_TOKENS = 1024  # that a layer is measured on


@dataclass(frozen=True)
class Scope:
    """What is forecast: `layers` out of `compressible`, all at `sizes`."""

    method: str
    layers: tuple[str, ...]
    sizes: tuple[int, ...]
    compressible: tuple[str, ...]
    is_thorough: bool = False

    @property
    def is_whole(self) -> bool:
        return len(self.layers) == len(self.compressible)

    @property
    def has_every_size(self) -> bool:
        return len(self.sizes) == self.sizes[-1]


def forecast_method(artefacts: Artefacts, stats: Stats) -> str:
    """The plan's method with its choices, if it can be forecast from these statistics, else the default method."""
    if artefacts.plan is None:
        return DEFAULT_METHOD
    try:
        label = method_label(artefacts.plan.plan)
        method, choices = variant(label)
        parameters = resolve(method, choices)
        for layer in stats.layers.values():
            check_statistics(parameters, method, layer)
    except UserError:
        return DEFAULT_METHOD
    impossible = METHODS[method].fixed or parameters.factors is not None or parameters.refit == "sequential"
    return DEFAULT_METHOD if impossible else label


def method_label(plan: Plan) -> str:
    """A plan's method with the choices that are not the method's own, as `msmoe compare` writes it.

    Raises:
        UserError: for a method that this version does not know.
    """
    usual, stated = resolve(plan.method, {}).to_dict(), plan.parameters.to_dict()
    chosen = {name: value for name, value in stated.items() if usual.get(name, value) != value}
    parts = [f"{name}={value}" for name, value in chosen.items() if name not in ("experts", "budget")]
    return ":".join([plan.method, *parts])


def kept_layers(artefacts: Artefacts, planner: Planner) -> list[str] | None:
    """Layers that the plan keeps; None for the default."""
    names = {layer.name for layer in planner.layers}
    kept = artefacts.plan.plan.parameters.keep_layers if artefacts.plan else None
    if kept is None or not names.issuperset(kept) or len(kept) == len(names):
        return None
    return list(kept) or ["none"]


def choose_scope(artefacts: Artefacts, planner: Planner) -> Scope | None:
    """As many sizes and layers, spread over the model, as the time allows; None if even the fewest take too long."""
    method = forecast_method(artefacts, planner.stats)
    layers = planner.compressible(kept_layers(artefacts, planner))
    if not layers:
        return None
    num_experts = min(layer.num_experts for layer in layers)
    names = tuple(layer.name for layer in layers)
    if artefacts.is_thorough:
        return Scope(method, names, tuple(default_sizes(num_experts)), names, is_thorough=True)
    cost = max(seconds(method, layer) for layer in layers)
    allowed = SECONDS / cost
    sizes = thinned(num_experts, max(int(allowed / len(layers)), FEWEST_SIZES))
    count = min(len(layers), max(int(allowed / max(len(sizes), 1)), FEWEST_LAYERS))
    if count * len(sizes) * cost > MOST_SECONDS:
        return None
    places = sorted({int(i) for i in np.linspace(0, len(names) - 1, count).round()})
    return Scope(method, tuple(names[i] for i in places), (*sizes, num_experts), names)


def seconds(method: str, layer: MoELayer) -> float:
    """About how long one layer takes at one size."""
    merges = resolve(*variant(method)).others == "merge"
    return layer.num_experts * (SECONDS_PER_EXPERT + merges * SECONDS_PER_CUBE * layer.d_ff**3)


def thinned(num_experts: int, count: int) -> tuple[int, ...]:
    """At most `count` sizes below the number of experts: all of them, or about as many in every octave up to half."""
    if count >= num_experts - 1:
        return tuple(range(1, num_experts))
    half = max(num_experts // 2, 1)
    smallest = 1 if count > FEWEST_SIZES else max(num_experts // 16, 1)
    above = [3 * num_experts // 4] if count > FEWEST_SIZES + 1 else []
    wanted = [*np.geomspace(smallest, half, count - len(above)).round(), *above]
    return tuple(sorted({int(size) for size in wanted}))


def make_forecast(scope: Scope, planner: Planner, say: Callable[[str], None]) -> Forecast:
    """Forecast within a scope.

    Raises:
        UserError: as `msmoe.forecasting.forecast`.
    """
    kept = [layer.name for layer in planner.layers if layer.name not in scope.layers]
    return forecast(
        planner.source, planner.stats, method=scope.method, sizes=scope.sizes, keep_layers=kept or ["none"],
        tokens=MAX_TOKENS, progress=lambda done, total: say(f"layer {done} of {total}"),
    )  # fmt: skip


def curve_frame(found: Forecast, short: dict[str, str]) -> pd.DataFrame:
    """One row per layer and size; `needed` is the tolerance from which on the layer may have that size.

    Args:
        short: layer -> its name in charts.
    """
    frames = []
    for name, curve in found.layers.items():
        errors = np.array(curve.output_error)
        frame = {
            "layer": short[name],
            "name": name,
            "stack": shorten(stack_of(name), MAX_NAME),
            "size": curve.sizes,
            "error": errors,
            "kl": curve.kl or float("nan"),
            "needed": np.maximum.accumulate(errors[::-1])[::-1],
        }
        frames.append(pd.DataFrame(frame))
    return pd.concat(frames, ignore_index=True)


def suggested_bytes(planner: Planner, method: str, sizes: dict[str, int]) -> int:
    """Bytes of an `exact` export with so many experts in each layer; layers not named stay as they are."""
    known, choices = variant(method)
    parameters = resolve(known, choices)
    removes = parameters.others in REROUTING
    experts = {layer.name: layer.num_experts for layer in planner.layers}
    layers = {name: sketch(experts[name], size, removes=removes) for name, size in sizes.items()}
    plan = Plan(known, parameters, 0, {}, {}, layers)
    return predict(planner.family, planner.source, plan, export="exact").predicted["bytes"]


# ---- what was measured


def measured_frame(comparison: Comparison, found: Forecast) -> pd.DataFrame:
    """Measured loss increases of the forecast's method beside the predictions.

    Returns:
        one row per size (`what` is `WHOLE`) and per layer compressed alone, with `size`, `predicted` (KL
        divergence, or the output error without it) and `measured` (loss per token above the full model, mean over
        tasks and seeds); no row where nothing was measured.
    """
    cells = [cell for cell in comparison.content["cells"] if not cell.get("recover_steps")]
    mine = [cell for cell in cells if cell["method"] == found.method and cell.get("kept")]
    full = [loss for cell in cells if cell["method"] == FULL and (loss := mean_loss(cell)) is not None]
    rows = []
    for cell in mine:
        at = {name: predicted_at(found, name, size) for name, size in cell["kept"].items() if name in found.layers}
        loss = mean_loss(cell)
        if full and at.keys() == cell["kept"].keys() and loss is not None:
            total = float(np.sum(list(at.values()))) if has_divergence(found) else float(np.mean(list(at.values())))
            rows.append((WHOLE, cell["experts"], total, loss - float(np.mean(full))))
        for name, increase in (cell.get("layer_loss") or {}).items():
            if name in at:
                rows.append((name, cell["kept"][name], at[name], increase))
    frame: Any = pd.DataFrame(rows, columns=pd.Index(["what", "size", "predicted", "measured"]))
    return frame.groupby(["what", "size"], sort=False, as_index=False).mean().dropna()


def has_divergence(found: Forecast) -> bool:
    """Whether the KL divergence of every layer is predicted."""
    return all(layer.kl is not None for layer in found.layers.values())


def predicted_at(found: Forecast, name: str, size: float) -> float:
    """KL divergence of a layer alone, or its output error without divergences, between the sizes that were tried."""
    layer = found.layers[name]
    values = layer.kl if has_divergence(found) and layer.kl is not None else layer.output_error
    return float(np.interp(size, layer.sizes, values, left=np.nan, right=np.nan))


def mean_loss(cell: dict) -> float | None:
    """Loss per token, mean over the tasks; None unless it was measured on all of them."""
    losses = [task["metrics"].get("loss", {}).get("value") for task in cell["tasks"].values()]
    return None if None in losses or not losses else float(np.mean(losses))


def correlations(frame: pd.DataFrame) -> tuple[float, float] | None:
    """Spearman's and Pearson's correlation of predicted with measured; None for fewer than three, or equal, ones."""
    if len(frame) < 3 or frame.predicted.nunique() < 2 or frame.measured.nunique() < 2:
        return None
    rank, linear = spearmanr(frame.predicted, frame.measured), pearsonr(frame.predicted, frame.measured)
    return float(rank[0]), float(linear[0])  # pyright: ignore[reportArgumentType]


def read_check(path: Path = CHECK) -> dict | None:
    """Results of the check on the demo checkpoint; None where they are not installed or cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
