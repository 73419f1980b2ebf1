"""How far the checkpoint can go: predicted errors against experts kept, sizes to choose, how good predictions were."""

from collections.abc import Callable
from typing import Any

from msmoe.analysis.report.artefacts import Artefacts
from msmoe.analysis.report.charts import short_names
from msmoe.analysis.report.document import Block, Note, Section
from msmoe.analysis.report.sections.forecast.charts import (
    TOLERANCES,
    bytes_table,
    layer_figure,
    measured_figure,
    suggestion_table,
    whole_figure,
)
from msmoe.analysis.report.sections.forecast.data import (
    WHOLE,
    Scope,
    choose_scope,
    correlations,
    curve_frame,
    make_forecast,
    measured_frame,
    read_check,
    suggested_bytes,
)

from msmoe.checkpoint import Checkpoint
from msmoe.demo import CHECKPOINT as DEMO
from msmoe.errors import UserError
from msmoe.forecasting import Forecast
from msmoe.planning.planner import Planner

LEAD_TOLERANCE = 0.05
NOTHING = "The only MoE layer is kept as it is by default: there is nothing to forecast."
NAMES = {"kl": "KL divergence", "text loss": "loss on text", "task loss": "loss on tasks"}
UNCHECKED = (
    "How far to trust this: no forecast of this checkpoint was checked. Results of `msmoe compare` beside these "
    "artefacts hold it against what was measured."
)
TOO_LARGE = (
    "A forecast of this checkpoint takes long: --thorough makes it, and in Python msmoe.forecast for the layers and "
    "sizes of your choice."
)


def forecast_section(artefacts: Artefacts, key: str, title: str, say: Callable[[str], None]) -> Section:
    """The chapter of an original checkpoint with statistics."""
    planner = artefacts.planner
    assert planner is not None
    scope = choose_scope(artefacts, planner)
    if scope is None:
        return Section(key, title, "", (Note(TOO_LARGE if len(artefacts.layers) > 1 else NOTHING),))
    try:
        found = make_forecast(scope, planner, say)
    except UserError as error:
        return Section(key, title, "", (Note(f"No forecast: {error}"),))
    return Section(key, title, lead(found, scope), tuple(blocks_of(artefacts, planner, found, scope)))


def lead(found: Forecast, scope: Scope) -> str:
    sizes = found.suggest(LEAD_TOLERANCE)
    kept, total = sum(sizes.values()), sum(layer.num_experts for layer in found.layers.values())
    where = (
        ""
        if scope.is_whole
        else f"Of {len(scope.compressible)} compressible layers, {len(scope.layers)} were forecast. "
    )
    coarse = "" if scope.has_every_size else f", of the sizes {', '.join(map(str, scope.sizes))} that were tried"
    return (
        f"{where}With {found.method}, {kept:,} of {total:,} experts would keep the predicted relative output error "
        f"of each layer within {LEAD_TOLERANCE:.0%}{coarse}. A prediction is of one layer at a time, on inputs of the "
        "original model."
    )


def blocks_of(artefacts: Artefacts, planner: Planner, found: Forecast, scope: Scope) -> list[Block]:
    experts = {layer.name: layer.num_experts for layer in planner.layers}
    short = short_names(list(experts))
    blocks: list[Block] = [
        layer_figure(curve_frame(found, short), bounded(scope)),
        whole_figure(found, is_whole=scope.is_whole),
    ]
    blocks.append(suggestion_table(found, experts, bounded(scope)))
    stored = {t: suggested_bytes(planner, found.method, found.suggest(t)) for t in TOLERANCES}
    blocks.append(bytes_table(found, stored, planner.source.num_bytes, bounded(scope)))
    blocks += measured_blocks(artefacts, found, short)
    return blocks + [Note(text) for text in notes(found, scope, is_demo=is_demo(planner.source))]


def bounded(scope: Scope) -> str:
    """What was left out, in words; empty for nothing."""
    if scope.is_whole and scope.has_every_size:
        return ""
    sizes = f"Sizes that were tried: {', '.join(map(str, scope.sizes))}"
    if scope.is_thorough:
        return f"{sizes}."
    of = f"{len(scope.layers)} of {len(scope.compressible)}"
    layers = "" if scope.is_whole else f"; layers: {of}, spread over the model"
    return f"{sizes}{layers}; --thorough tries more."


def measured_blocks(artefacts: Artefacts, found: Forecast, short: dict[str, str]) -> list[Block]:
    """Predicted against measured, for each comparison that holds the method."""
    blocks: list[Block] = []
    for i, comparison in enumerate(artefacts.comparisons):
        frame = measured_frame(comparison, found)
        if len(frame):
            name = "forecast-measured" if i == 0 else f"forecast-measured-{i + 1}"
            blocks += [
                measured_figure(frame, found, name=name, short=short),
                Note(correlation_text(frame, comparison.label)),
            ]
    return blocks


def correlation_text(frame: Any, label: str) -> str:
    """Both correlations of either kind of points."""
    parts = []
    for kind, points in (
        ("the whole model", frame[frame.what == WHOLE]),
        ("single layers", frame[frame.what != WHOLE]),
    ):
        found = correlations(points)
        if found is not None:
            parts.append(f"{kind} {found[0]:.2f} (Spearman) and {found[1]:.2f} (Pearson) over {len(points)} points")
    if not parts:
        return f"{label}: too few points for a correlation of predicted with measured losses."
    return f"Correlation of predicted with measured losses in {label}: {'; '.join(parts)}."


def is_demo(source: Checkpoint) -> bool:
    """Whether a checkpoint is the one that the forecast was checked on."""
    return source.fingerprint == Checkpoint(DEMO).fingerprint


def notes(found: Forecast, scope: Scope, *, is_demo: bool) -> list[str]:
    """What is missing or to be read with care; how good forecasts were only of the checkpoint they were checked on."""
    texts = []
    if found.whole().kl is None:
        texts.append(
            "These statistics hold no output gradients; with them (msmoe profile --fisher 64) the KL divergence of "
            "the whole model is predicted too."
        )
    elif not scope.is_whole:
        texts.append("The KL divergence of the whole model is not shown, as not all of its layers were forecast.")
    checked = read_check() if is_demo else None
    text = check_text(checked, found.method) if checked else ""
    return [*texts, text or UNCHECKED]


def check_text(checked: dict, method: str) -> str:
    """What the check on the demo checkpoint found: its verdict, and how predicted and measured sizes were ordered."""
    whole = checked.get("comparison", {}).get("whole", {})
    which = method if method in whole else "both"
    ranks = {name: found.get("spearman") for name, found in whole.get(which, {}).get("kl", {}).items()}
    known = [f"{NAMES.get(name, name)} {rank:.2f}" for name, rank in ranks.items() if isinstance(rank, float)]
    verdict = next(iter(checked.get("conclusion", ())), "")
    if not known:
        return ""
    of = f"method {method}" if which == method else "methods m-smoe and m-smoe-refit together"
    return (
        f"How far to trust this: in a check on this checkpoint, the demo's, {of}, the Spearman correlation over sizes "
        f"of the predicted KL divergence with what was measured was: {', '.join(known)}. Of both methods that were "
        f"checked, together: {verdict}."
    )
