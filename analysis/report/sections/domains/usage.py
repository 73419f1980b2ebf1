"""How differently the domains of the calibration data use the experts, in numbers.

Shapes: K domains, E experts, N sequences, R draws, P pairs of domains, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from msmoe.analysis.report.artefacts import LabelledStats
from msmoe.analysis.report.document import distinct

from msmoe.calibration.stats import Stats

if TYPE_CHECKING:
    from msmoe.planning.plan import Plan

MAX_NAME = 28  # characters
MAX_PAIRED = 24  # domains between which distances are measured: the largest
OWN_SHARE = 0.9  # of an expert's use, from which it belongs to a domain
HANDFUL = 10  # tokens
MAX_DRAWS, DRAWN_CELLS, SEED = 50, 25e6, 0  # of the chance level; cells are numbers handled in all draws together


@dataclass(frozen=True)
class Domains:
    """Domains, the largest first.

    Attributes:
        names: short and unique.
        num_records, num_tokens: (K,) in the calibration data.
        routed: layer -> (K, E) routed tokens.
    """

    names: list[str]
    num_records: list[int]
    num_tokens: list[int]
    routed: dict[str, np.ndarray]


@dataclass(frozen=True)
class Distances:
    """Jensen-Shannon divergences of usage in bits, 0 to 1; NaN where a domain has no token.

    Attributes:
        first, second: (P,) positions of the domains of each pair.
        between: (L, P) of the pairs.
        to_all: (L, K) of each domain and all data.
    """

    first: np.ndarray
    second: np.ndarray
    between: np.ndarray
    to_all: np.ndarray


def find_domains(stats: Sequence[LabelledStats]) -> Domains:
    """The domains inside of statistics, added up by name, and statistics without any, each one a domain by its label.

    Several statistics that know one and the same domain only are told apart by their labels.
    """
    inside, whole = domains_inside(stats), [item for item in stats if not item.stats.data.get("domains")]
    if len(inside) + len(whole) < 2:
        inside, whole = {}, list(stats)
    found = [(name, *part) for name, part in inside.items()]
    found += [(item.label, *whole_part(item.stats)) for item in whole]
    found.sort(key=lambda part: -part[2])
    names, records, tokens, routed = zip(*found, strict=True)
    layers = stats[0].stats.layers
    return Domains(
        distinct(names, MAX_NAME),
        list(records),
        list(tokens),
        {layer: np.stack([r[layer] for r in routed]) for layer in layers},
    )


Part = tuple[int, int, dict[str, np.ndarray]]  # records, tokens, layer -> (E,) routed tokens


def domains_inside(stats: Sequence[LabelledStats]) -> dict[str, Part]:
    found: dict[str, Part] = {}
    for item in stats:
        for name, size in item.stats.data.get("domains", {}).items():
            routed = {layer: sums.domain_arrays()[name] for layer, sums in item.stats.layers.items()}
            part = size["num_records"], size["num_tokens"], routed
            found[name] = added(found[name], part) if name in found else part
    return found


def whole_part(stats: Stats) -> Part:
    routed = {layer: sums.array("routed") for layer, sums in stats.layers.items()}
    return stats.data["num_records"], stats.data["num_tokens"], routed


def added(a: Part, b: Part) -> Part:
    return a[0] + b[0], a[1] + b[1], {layer: counts + b[2][layer] for layer, counts in a[2].items()}


def usage(counts: np.ndarray) -> np.ndarray:
    """Shares (..., E) of counts (..., E) in their sum; NaN where that is 0."""
    total = counts.sum(-1, keepdims=True)
    return np.where(total > 0, counts / np.maximum(total, 1), np.nan)


def divergence(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence (...) of shares (..., E): 0 for equal ones, 1 bit for ones that share no expert."""
    from scipy.special import entr

    bits = entr((a + b) / 2).sum(-1) - (entr(a).sum(-1) + entr(b).sum(-1)) / 2
    return (bits / np.log(2)).clip(0, 1)


def mean_of_known(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Mean of the values that are not NaN; NaN where there is none."""
    num_known = (~np.isnan(values)).sum(axis)
    return np.where(num_known > 0, np.nansum(values, axis) / np.maximum(num_known, 1), np.nan)


def measure(domains: Domains) -> Distances:
    """How far domains are from each other and from all data."""
    first, second = np.triu_indices(min(len(domains.names), MAX_PAIRED), 1)
    found = [divergences(counts, counts.sum(0), first, second) for counts in domains.routed.values()]
    return Distances(first, second, *(np.stack(values) for values in zip(*found, strict=True)))


def bounded(domains: Domains) -> str:
    """The domains between which distances are measured."""
    many = len(domains.names)
    return f"the {MAX_PAIRED} largest of {many} domains" if many > MAX_PAIRED else f"{many} domains"


def divergences(
    counts: np.ndarray, whole: np.ndarray, first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Divergences of pairs (..., P) and to the data as a whole (..., K), from counts (..., K, E) and (E,)."""
    shares = usage(counts)
    return divergence(shares[..., first, :], shares[..., second, :]), divergence(shares, usage(whole))


def by_chance(domains: Domains, stats: Stats) -> Distances:
    """What `measure` gives, on average, if sequences are shared out among the domains at random.

    Whole sequences, since tokens of one text resemble each other; every domain gets as many tokens as it has, up to
    the length of a sequence.

    Args:
        stats: of all domains together.
    """
    first, second = np.triu_indices(min(len(domains.names), MAX_PAIRED), 1)
    sequences = {name: layer.array("sequence_counts") for name, layer in stats.layers.items()}
    per_expert = [len(sequences[name]) + len(first) + len(c) for name, c in domains.routed.items()]
    cells = sum(n * c.shape[1] for n, c in zip(per_expert, domains.routed.values(), strict=True))
    num_draws = int(np.clip(DRAWN_CELLS // cells, 1, MAX_DRAWS))
    found = []
    for place, (name, counts) in enumerate(domains.routed.items()):
        rng = np.random.default_rng((SEED, place))
        drawn = shared_out(sequences[name], counts.sum(1), num_draws, rng)
        found.append([mean_of_known(values, 0) for values in divergences(drawn, counts.sum(0), first, second)])
    return Distances(first, second, *(np.stack(values) for values in zip(*found, strict=True)))


def shared_out(sequences: np.ndarray, num_tokens: np.ndarray, num_draws: int, rng: np.random.Generator) -> np.ndarray:
    """Routed tokens (R, K, E) of sequences (N, E) that are dealt at random into parts of `num_tokens` (K,)."""
    lengths, ends = sequences.sum(1), num_tokens.cumsum()
    parts = np.empty((num_draws, len(sequences)), dtype=np.int64)
    for draw in parts:
        order = rng.permutation(len(sequences))
        middle = lengths[order].cumsum() - lengths[order] / 2
        draw[order] = np.searchsorted(ends, middle, side="right").clip(max=len(ends) - 1)
    rows = (parts + np.arange(num_draws)[:, None] * len(ends)).ravel()
    columns = np.tile(np.arange(len(sequences)), num_draws)
    from scipy.sparse import csr_array

    dealt = csr_array((np.ones(len(rows), dtype=np.int64), (rows, columns)), (num_draws * len(ends), len(sequences)))
    return (dealt @ sequences).reshape(num_draws, len(ends), -1)


def own_experts(domains: Domains) -> pd.DataFrame:
    """Experts that serve one domain, those first of which their domain sends most of its tokens there.

    An expert is its domain's own if that has `OWN_SHARE` of its use once every domain counts the same, by shares of its
    own tokens in the layer: u_d / sum of u over domains. At least `HANDFUL` of the domain's tokens go there, and as
    many of the others' would if they used it like the domain: where they have few, that they are absent says little.

    Columns: name (of the layer), expert, domain, tokens (of the domain), usage (their share of the domain's tokens in
    the layer), share (of the expert's use, every domain counting the same), token_share (of the expert's tokens).
    """
    frames = [own_experts_of(name, counts, domains.names) for name, counts in domains.routed.items()]
    return pd.concat(frames, ignore_index=True).sort_values("usage", ascending=False, kind="stable", ignore_index=True)


def own_experts_of(name: str, counts: np.ndarray, names: list[str]) -> pd.DataFrame:
    """`own_experts` of a layer, from its routed tokens (K, E)."""
    num_tokens, shares = counts.sum(1), np.nan_to_num(usage(counts))
    experts = np.arange(counts.shape[1])
    most = shares.argmax(0)
    tokens, used = counts[most, experts], shares[most, experts]
    frame = pd.DataFrame(
        {
            "name": name,
            "expert": experts,
            "domain": np.array(names, dtype=object)[most],
            "tokens": tokens,
            "usage": used,
            "share": used / np.where(used > 0, shares.sum(0), 1),
            "token_share": tokens / np.maximum(counts.sum(0), 1),
        }
    )
    expected = used * (num_tokens.sum() - num_tokens[most])
    return frame.loc[(frame.share >= OWN_SHARE) & (tokens >= HANDFUL) & (expected >= HANDFUL)]


def fate(plan: "Plan", name: str, expert: int) -> str:
    """What a plan does to an expert of a layer; a layer that it does not name is copied."""
    layer = plan.layers.get(name)
    if layer is None:
        return "kept"
    if expert in layer.removed:
        return "only its mean output kept" if plan.parameters.others == "mean-output" else "removed"
    group = next(group for group in layer.groups if expert in group.members)
    weights = dict(zip(group.members, group.weights, strict=True))
    if expert != group.dominant:
        return f"{'merged into' if weights[expert] else 'replaced by'} {group.dominant}"
    others = sum(1 for member, weight in weights.items() if weight and member != expert)
    return f"kept, {others} merged into it" if others else "kept"
