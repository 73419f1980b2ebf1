"""What compression cost: bytes, output errors, stable ranks and dropped tokens of every compressed checkpoint."""

from collections.abc import Callable, Sequence

import pandas as pd
from msmoe.analysis.report.artefacts import Artefacts
from msmoe.analysis.report.document import Block, Fact, Facts, Note, Section
from msmoe.analysis.report.sections.cost.data import (
    MAX_CHECKPOINTS,
    Cost,
    gather_costs,
    layer_frame,
    lost_experts,
    part_frame,
    step_frame,
)
from msmoe.analysis.report.sections.cost.layers import (
    drop_figure,
    error_figure,
    expert_table,
    layer_table,
    rank_figure,
    refit_figure,
)
from msmoe.analysis.report.sections.cost.size import recovery_table, size_blocks

from msmoe.families import drops_tokens
from msmoe.units import human_bytes

LEAST_ERROR = 5e-4  # of a layer that the lead names
MAX_EXPERTS, MIN_EXPERTS = 30, 10  # in the table of those that lost most: in all, of one checkpoint


def section(artefacts: Artefacts, say: Callable[[str], None]) -> Section | None:
    if not artefacts.compressed:
        return None
    costs = gather_costs(artefacts, say)
    blocks: list[Block] = [Facts(tuple(fact(cost) for cost in costs))]
    blocks += size_blocks(costs, part_frame(artefacts, costs), step_frame(artefacts, costs))
    blocks += layer_blocks(artefacts, costs, layer_frame(costs))
    if (recovered := recovery_table(costs)) is not None:
        blocks.append(recovered)
    blocks += [Note(text) for text in notes(artefacts, costs)]
    return Section("cost", "What it cost", lead(costs), tuple(blocks))


def lead(costs: Sequence[Cost]) -> str:
    smallest = min(costs, key=lambda cost: cost.num_bytes)
    before, after = smallest.experts
    of_source = (
        f", {share_text(smallest)} of the original's {human_bytes(smallest.source_bytes)}"
        if smallest.source_bytes
        else ""
    )
    name = smallest.label if len(costs) == 1 else f"The smallest of {len(costs)} checkpoints, {smallest.label},"
    text = f"{name} stores {human_bytes(smallest.num_bytes)}{of_source}, and {after:,} of {before:,} experts."
    if smallest.worst is None or smallest.worst[1] < LEAST_ERROR:
        return text
    layer, error = smallest.worst
    text = f"{text} Its most changed layer is {layer}, with a relative output error of {error:.1%}."
    worst = max((cost for cost in costs if cost.worst), key=lambda cost: cost.worst[1] if cost.worst else 0.0)
    if worst is smallest or worst.worst is None:
        return text
    return f"{text} Most changed of all is {worst.worst[0]} of {worst.label}, with {worst.worst[1]:.1%}."


def share_text(cost: Cost) -> str:
    return f"{cost.num_bytes / cost.source_bytes:.1%}" if cost.source_bytes else "an unknown share"


def fact(cost: Cost) -> Fact:
    """Bytes, experts and largest error of one checkpoint."""
    before, after = cost.experts
    source = f"{share_text(cost)} of {human_bytes(cost.source_bytes)}; " if cost.source_bytes else ""
    error = f"; largest layer error {cost.worst[1]:.1%} ({cost.worst[0]})" if cost.worst else ""
    return Fact(cost.label, human_bytes(cost.num_bytes), f"{source}{before:,} → {after:,} experts{error}")


def layer_blocks(artefacts: Artefacts, costs: Sequence[Cost], layers: pd.DataFrame) -> list[Block]:
    """Figures and tables of what is known of layers and experts."""
    if layers.empty:
        return []
    blocks: list[Block | None] = []
    if layers.error.notna().any():
        count = max(MAX_EXPERTS // sum(bool(cost.errors) for cost in costs), MIN_EXPERTS)
        lost = lost_experts(costs, artefacts.calibration, count)
        blocks += [error_figure(layers), expert_table(lost, count) if len(lost) else None]
    blocks += [make(layers, costs) for make in (refit_figure, rank_figure, drop_figure)]
    return [block for block in blocks if block is not None] + [layer_table(layers, costs)]


def notes(artefacts: Artefacts, costs: Sequence[Cost]) -> list[str]:
    """What is missing or to be read with care."""
    texts = []
    if artefacts.original is None:
        texts.append(
            "Give the original checkpoint too to see its bytes by part and what each step took away; without it only "
            "its total is known, from the compressed checkpoint."
        )
    if artefacts.original is None or artefacts.calibration is None:
        texts.append(
            "Give the original checkpoint and its statistics beside the compressed one to see the output error of "
            "every layer and expert, measured on held-out tokens."
        )
    texts += [f"{cost.label} could not be measured: {cost.lacking}" for cost in costs if cost.lacking]
    seen = [cost.label for cost in costs if any(found.seen for found in cost.errors.values())]
    if seen:
        texts.append(
            f"The weights of {', '.join(seen)} were computed from the tokens of these very statistics: the errors "
            "would be larger on other tokens. Statistics of other records of the same checkpoint (msmoe profile) "
            "give a fair number."
        )
    trained = [cost.label for cost in costs if cost.errors and cost.folder.provenance.get("recovery")]
    if trained:
        texts.append(
            f"{', '.join(trained)} was trained after compression: its layers make up for one another and need not give "
            "what the original's gave, so their output errors say little of its quality."
        )
    unranked = [cost.label for cost in costs if any(f.stable_rank_after is None for f in cost.errors.values())]
    if unranked:
        texts.append(f"Stable ranks of {', '.join(unranked)} were not computed, which takes long: --thorough does it.")
    texts += dropped_notes(costs)
    if len(artefacts.compressed) > MAX_CHECKPOINTS:
        texts.append(f"Of {len(artefacts.compressed)} compressed checkpoints, the first {MAX_CHECKPOINTS} are shown.")
    return texts


def dropped_notes(costs: Sequence[Cost]) -> list[str]:
    """Which checkpoints say nothing of dropped tokens, or nothing new."""
    costs = [cost for cost in costs if drops_tokens(cost.folder.summary.model_type)]
    unknown = [cost.label for cost in costs if not cost.folder.provenance.get("drop_rates")]
    rates = [
        rate for cost in costs for rate in cost.folder.provenance.get("drop_rates", {}).values()
        if rate.get("before") != rate.get("after")
    ]  # fmt: skip
    texts = []
    if unknown:
        texts.append(
            f"Dropped tokens after compression are not known for {', '.join(unknown)}: its router lost rows, or it was "
            "made without statistics."
        )
    if not rates and len(unknown) < len(costs):
        texts.append("Where it is known, as many tokens are dropped in every layer as in the original.")
    return texts
