"""A plan in numbers: flows, groups, layers, and how far two plans agree."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from msmoe.analysis.report.artefacts import Artefacts, LabelledPlan
from msmoe.analysis.report.charts import short_names
from msmoe.analysis.report.document import shorten
from sklearn.metrics import adjusted_rand_score

from msmoe.planning.plan import Group, LayerPlan, Plan

MEMBERS = 8  # of a group that are named in the table
DOMINANT = 12  # experts of a layer that are named in a tooltip
GAP = 0.6  # between groups, in experts
CLASS = {"merged": "merged", "dominant": "dominant", "rerouted": "no weight", "removed": "removed"}


def usage_of(artefacts: Artefacts) -> dict[str, np.ndarray]:
    """Share (0 to 1) of each expert (E,) in its layer's routed tokens; nothing without statistics."""
    if artefacts.calibration is None:
        return {}
    layers = artefacts.calibration.layers
    return {name: layer.usage for name, layer in layers.items() if layer.num_tokens > 0}


def shares_in(usage: Mapping[str, np.ndarray], name: str, num_experts: int) -> np.ndarray:
    """Usage of a layer, NaN where it is not known."""
    found = usage.get(name)
    return found if found is not None and len(found) == num_experts else np.full(num_experts, np.nan)


def layer_names(artefacts: Artefacts, plan: Plan) -> list[str]:
    """Layers that the plan changes or names as kept, in forward order where that is known."""
    kept = plan.parameters.keep_layers or ()
    wanted = dict.fromkeys([*kept, *plan.layers, *artefacts.layers])
    return (
        sorted(wanted, key=list(artefacts.layers).index) if wanted.keys() <= artefacts.layers.keys() else list(wanted)
    )


def flow_frame(plan: Plan, usage: Mapping[str, np.ndarray], *, end: str) -> pd.DataFrame:
    """Who becomes part of whom; one row per layer and expert.

    Columns: layer (short); expert; y, at the left, and to, the height of its end at the right, both from 0 at the top
    to 1; weight (in its group, 0 to 1); kind, a value of `CLASS`; goal, what it becomes part of; g, the place of
    its group; size (experts that end there); tokens (share of the layer's, NaN if unknown).

    Args:
        end: what becomes of removed experts.
    """
    short = short_names(list(plan.layers))
    frames = [
        layer_flow(layer, shares_in(usage, name, layer.num_experts), end=end).assign(layer=short[name])
        for name, layer in plan.layers.items()
    ]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def layer_flow(layer: LayerPlan, usage: np.ndarray, *, end: str) -> pd.DataFrame:
    rows, at = [], 0.0
    for place, group in enumerate(layer.groups):
        members = by_usage(group, usage)
        to = at + len(members) / 2
        for i, (expert, weight) in enumerate(members):
            kind = "dominant" if expert == group.dominant else "merged" if weight > 0 else "rerouted"
            rows.append(
                (expert, at + i + 0.5, to, weight, CLASS[kind], f"expert {group.dominant}", place, len(members))
            )
        at += len(members) + GAP
    for i, expert in enumerate(layer.removed):
        to = at + len(layer.removed) / 2
        rows.append((expert, at + i + 0.5, to, 0.0, CLASS["removed"], end, len(layer.groups), len(layer.removed)))
    columns = ["expert", "y", "to", "weight", "kind", "goal", "g", "size"]
    frame = pd.DataFrame(rows, columns=columns)
    height = at + len(layer.removed) - (0 if layer.removed else GAP)
    frame[["y", "to"]] = (frame[["y", "to"]] / height).round(4)
    return frame.assign(tokens=usage[frame.expert])


def by_usage(group: Group, usage: np.ndarray) -> list[tuple[int, float]]:
    """Members and weights, the dominant expert first, then the most used ones."""
    found = zip(group.members, group.weights, strict=True)
    return sorted(found, key=lambda m: (m[0] != group.dominant, -np.nan_to_num(usage[m[0]]), -m[1], m[0]))


def group_frame(plan: Plan, usage: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """One row per group: dominant expert, members and weights as text, size, share of the layer's tokens."""
    rows = []
    for name, layer in plan.layers.items():
        tokens = shares_in(usage, name, layer.num_experts)
        for group in layer.groups:
            heaviest = sorted(zip(group.members, group.weights, strict=True), key=lambda m: (-m[1], m[0]))
            row = {"layer": name, "dominant": group.dominant, "size": len(group.members)}
            row |= {"tokens": float(tokens[list(group.members)].sum()), "weights": weights_text(heaviest)}
            row |= {"members": " ".join(map(str, group.members)), "all_weights": " ".join(map(str, group.weights))}
            rows.append(row)
    columns = ["layer", "dominant", "size", "tokens", "weights", "members", "all_weights"]
    return pd.DataFrame(rows, columns=columns)


def weights_text(members: Sequence[tuple[int, float]]) -> str:
    """Such as `5: 0.62, 2: 0.38`, the first few."""
    text = ", ".join(f"{expert}: {weight:.2g}" for expert, weight in members[:MEMBERS])
    return text if len(members) <= MEMBERS else f"{text}, … ({len(members) - MEMBERS} more)"


def budget_frame(artefacts: Artefacts, plan: Plan) -> pd.DataFrame:
    """Experts and kept ones by layer; kept layers keep all of theirs. `experts` is NaN where nothing tells."""
    names = layer_names(artefacts, plan)
    short, rows = short_names(names), []
    for name in names:
        layer = plan.layers.get(name)
        known = artefacts.layers.get(name, float("nan"))
        row = {"layer": name, "short": short[name], "note": shorten(plan.notes.get(name, ""), 160)}
        if layer is None:
            row |= {
                "experts": known,
                "kept": known,
                "removed": 0,
                "largest": 1,
                "what": "kept as it is",
                "dominant": "all",
            }
        else:
            dominant = [str(group.dominant) for group in layer.groups]
            more = f", … ({len(dominant) - DOMINANT} more)" if len(dominant) > DOMINANT else ""
            row |= {"experts": layer.num_experts, "kept": len(layer.groups), "removed": unmerged(layer)}
            row |= {"largest": max(len(group.members) for group in layer.groups), "what": "compressed"}
            row["dominant"] = ", ".join(dominant[:DOMINANT]) + more
        rows.append(row)
    return pd.DataFrame(rows)


def unmerged(layer: LayerPlan) -> int:
    """Experts whose weights go, whether their tokens are sent to another expert or not."""
    weightless = [w for group in layer.groups for w in group.weights if w == 0]
    return len(layer.removed) + len(weightless)


def all_plans(artefacts: Artefacts) -> list[LabelledPlan]:
    """The plan of the report first, then the other ones given, then those of compressed checkpoints."""
    inside = [LabelledPlan(folder.label, folder.plan) for folder in artefacts.compressed if folder.plan]
    return [*artefacts.plans, *inside]


def comparison_frame(plans: Sequence[LabelledPlan]) -> pd.DataFrame:
    """One row per plan; agreement is that of its groupings with those of the first."""
    first, rows = plans[0].plan, []
    for item in plans:
        plan = item.plan
        counts = [len(layer.groups) for layer in plan.layers.values()]
        row = {"plan": shorten(item.label), "method": shorten(plan.method), "layers": len(plan.layers)}
        row |= {
            "kept": np.mean(counts) if counts else np.nan,
            "least": min(counts, default=0),
            "most": max(counts, default=0),
        }
        row |= {"bytes": as_number(plan.predicted.get("bytes")), "agreement": agreement(first, plan)}
        rows.append(row)
    return pd.DataFrame(rows)


def agreement(a: Plan, b: Plan) -> float:
    """Adjusted Rand index of two plans' groupings, mean over the layers that both change: 1 is the same, 0 chance.

    Removed experts are one group.
    """
    values = [
        adjusted_rand_score(labels(layer), labels(b.layers[name]))
        for name, layer in a.layers.items()
        if name in b.layers and b.layers[name].num_experts == layer.num_experts
    ]
    return float(np.mean(values)) if values else float("nan")


def labels(layer: LayerPlan) -> list[int]:
    """Group of each expert (E,)."""
    return layer.expert_map


def as_number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
