"""Which experts the domains of the calibration data use, how far apart they are, and what serves only one of them.

Shapes: K domains, E experts, P pairs of domains, L layers.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
from msmoe.analysis.report.artefacts import Artefacts
from msmoe.analysis.report.charts import short_names
from msmoe.analysis.report.document import Block, Column, Note, Section, Table
from msmoe.analysis.report.sections.domains.charts import (
    distance_frame,
    distance_map,
    layer_bars,
    layer_frame,
    usage_map,
)
from msmoe.analysis.report.sections.domains.usage import (
    HANDFUL,
    OWN_SHARE,
    Distances,
    Domains,
    bounded,
    by_chance,
    fate,
    find_domains,
    mean_of_known,
    measure,
    own_experts,
    usage,
)
from msmoe.analysis.report.sections.usage import expert_frame, kept_counts

from msmoe.calibration.stats import Stats
from msmoe.calibration.usage import effective_experts

FEW = 20  # tokens per expert, under which usage is noisy
HOW = (
    "To see how domains use the experts, give records a `domain` field or several --data files in `msmoe profile`, or "
    "give several statistics directories."
)


def section(artefacts: Artefacts, say: Callable[[str], None]) -> Section | None:
    stats = artefacts.calibration
    if stats is None:
        return None
    domains = find_domains(artefacts.stats)
    if len(domains.names) < 2:
        return Section("domains", "Domains", "", (Note(f"The calibration data is all of one domain. {HOW}"),))
    measured = measure(domains)
    say("distances by chance")
    chance = by_chance(domains, stats)
    own, overview = own_frame(domains, artefacts, stats), domain_frame(domains, measured, chance)
    blocks: list[Block] = [
        domain_table(overview),
        *few_note(overview),
        usage_map(domains, overview),
        *([distance_map(distance_frame(domains, measured, chance), domains)] if len(domains.names) > 2 else []),
        layer_bars(layer_frame(domains, measured, chance)),
        own_table(own, has_plan=artefacts.plan is not None)
        if len(own)
        else Note(f"No expert has {OWN_SHARE:.0%} of its use from one domain."),
    ]
    return Section("domains", "Domains", lead(domains, measured, chance, len(own)), tuple(blocks))


def lead(domains: Domains, measured: Distances, chance: Distances, num_own: int) -> str:
    pairs, layers = mean_of_known(measured.between, 0), mean_of_known(measured.between, 1)
    if np.isnan(pairs).all():
        return "No two domains have tokens in the same MoE layer."
    pairs_dealt, layers_dealt = mean_of_known(chance.between, 0), mean_of_known(chance.between, 1)
    pair, layer = int(np.nanargmax(above(pairs, pairs_dealt))), int(np.nanargmax(above(layers, layers_dealt)))
    a, b = domains.names[measured.first[pair]], domains.names[measured.second[pair]]
    numbers = f"{pairs[pair]:.2g}, at random {pairs_dealt[pair]:.2g}"
    apart = f" Furthest beyond chance are {a} and {b} ({numbers})." if len(pairs) > 1 else ""
    who = "The two domains" if len(domains.names) == 2 else f"Any two of {bounded(domains)}"
    return (
        f"{who} differ in their use of the experts by {mean_of_known(pairs, 0):.2g} bits on "
        f"average (0: the same use, 1: no expert in common); random splits of the same texts, by "
        f"{mean_of_known(pairs_dealt, 0):.2g}.{apart} The layer that tells domains apart most, beyond chance, is "
        f"{list(short_names(list(domains.routed)).values())[layer]} ({layers[layer]:.2g}, at random "
        f"{layers_dealt[layer]:.2g}). Experts that serve one domain almost alone: {num_own:,}."
    )


def above(measured: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """What is above chance, where that is known."""
    return measured - np.nan_to_num(chance)


def domain_frame(domains: Domains, measured: Distances, chance: Distances) -> pd.DataFrame:
    """One row per domain, furthest from all data first.

    Columns: domain; position; num_records, num_tokens; tokens_per_expert (fewest of all layers), few (whether under
    `FEW`); effective_experts (mean over layers with tokens), used and num_experts (of all layers); distance, chance
    (bits, mean over layers).
    """
    counts = list(domains.routed.values())
    shares = [usage(c) for c in counts]
    effective = np.array([[np.nan if np.isnan(u).any() else effective_experts(u) for u in s] for s in shares])
    frame = pd.DataFrame(
        {
            "domain": domains.names,
            "position": np.arange(len(domains.names)),
            "num_records": domains.num_records,
            "num_tokens": domains.num_tokens,
            "tokens_per_expert": np.min([c.sum(1) / c.shape[1] for c in counts], axis=0).round(1),
            "effective_experts": mean_of_known(effective, 0).round(2),
            "used": np.sum([(c > 0).sum(1) for c in counts], axis=0),
            "num_experts": sum(c.shape[1] for c in counts),
            "distance": mean_of_known(measured.to_all, 0).round(4),
            "chance": mean_of_known(chance.to_all, 0).round(4),
        }
    )
    frame["few"] = frame.tokens_per_expert < FEW
    return frame.sort_values("distance", ascending=False, kind="stable", ignore_index=True)


def domain_table(overview: pd.DataFrame) -> Table:
    return Table(
        "domains",
        "Size and distance of each domain",
        "One row per domain, the furthest from all data first. Distances are Jensen-Shannon divergences of usage, mean "
        "over layers: what is not well above its level by chance is noise. Bold: too few tokens for sure numbers.",
        overview,
        (
            Column("domain", "domain"),
            Column("num_records", "records", "integer"),
            Column("num_tokens", "tokens", "integer", "of the records; layers of a decoder see those of the targets"),
            Column(
                "tokens_per_expert",
                "tokens per expert, scarcest layer",
                "number",
                "tokens per expert, fewest of all layers",
                strong="few",
            ),
            Column("effective_experts", "effective", "number", "exp of the entropy of usage, mean over layers"),
            Column("used", "used", "integer", "experts that saw a token of the domain, all layers"),
            Column("distance", "distance to all", "number", "bits, 0 to 1"),
            Column("chance", "by chance", "number", "the distance of as many tokens of texts dealt out at random"),
        ),
        is_essential=True,
    )


def few_note(overview: pd.DataFrame) -> list[Note]:
    few = list(overview.domain[overview.few])
    if not few:
        return []
    named = ", ".join(few[:8]) + (f" and {len(few) - 8} more" if len(few) > 8 else "")
    return [
        Note(
            f"Fewer than {FEW} tokens per expert in at least one layer: {named}. Usage of so few tokens is noisy, and "
            "noise makes distances larger: compare them with their level by chance."
        )
    ]


def own_frame(domains: Domains, artefacts: Artefacts, stats: Stats) -> pd.DataFrame:
    """`own_experts` with `layer` (short) and `fate`: by the plan, else by the adaptive budget."""
    own = own_experts(domains)
    own.insert(0, "layer", own.name.map(short_names(list(domains.routed))))
    if artefacts.plan is not None:
        plan = artefacts.plan.plan
        return own.assign(fate=[fate(plan, name, expert) for name, expert in zip(own.name, own.expert, strict=True)])
    experts = expert_frame(stats)
    ranks = dict(zip(zip(experts["name"], experts["expert"], strict=True), experts["rank"], strict=True))
    kept = {label: dict(zip(stats.layers, counts, strict=True)) for label, counts in kept_counts(stats).items()}
    first = [
        next((label for label, counts in kept.items() if ranks[name, expert] >= counts[name]), "never")
        for name, expert in zip(own.name, own.expert, strict=True)
    ]
    return own.assign(fate=first)


def own_table(own: pd.DataFrame, *, has_plan: bool) -> Table:
    last = (
        Column("fate", "plan", help="what the plan does to the expert")
        if has_plan
        else Column("fate", "cut at", help="largest share of all experts at which the adaptive budget does not keep it")
    )
    return Table(
        "domains-own-experts",
        "Experts of one domain",
        f"Experts with at least {OWN_SHARE:.0%} of their use from one domain, every domain counting the same (by "
        f"shares of its tokens in the layer): at least {HANDFUL} of its tokens, and as many of the others' would go "
        "there if they used it alike. Their domain depends on them: see which are not kept.",
        own,
        (
            Column("layer", "layer"),
            Column("expert", "expert", "integer"),
            Column("domain", "domain"),
            Column("tokens", "tokens", "integer", "of the domain that are routed to the expert"),
            Column("usage", "of the domain", "share", "share of the domain's tokens in the layer"),
            Column("share", "of the expert", "share", "share of the expert's use, every domain counting the same"),
            Column("token_share", "of its tokens", "share", "share of the expert's tokens, as counted"),
            last,
        ),
    )
