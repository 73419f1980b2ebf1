"""How evenly a layer uses its experts: measures of a usage distribution.

Shapes: E experts.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from msmoe.calibration.stats import Stats

COLD = 0.1  # of an equal share: experts that get less are cold


def entropy(usage: np.ndarray) -> float:
    """Entropy over ln E: 1 for equal shares, 0 for a single expert.

    Args:
        usage: (E,) shares, summing to 1.
    """
    return float(np.log(effective_experts(usage)) / np.log(len(usage))) if len(usage) > 1 else 1.0


def effective_experts(usage: np.ndarray) -> float:
    """exp of the entropy: how many equally used experts would be as hard to guess, 1 to E."""
    used = usage[usage > 0]
    return float(np.exp(-(used * np.log(used)).sum()))


def gini(usage: np.ndarray) -> float:
    """Gini coefficient: 0 for equal shares, (E - 1) / E for a single expert."""
    ascending = np.sort(usage)
    ranks = np.arange(1, len(usage) + 1)
    return float((2 * ranks - len(usage) - 1) @ ascending / (len(usage) * ascending.sum()))


def imbalance(usage: np.ndarray) -> float:
    """Largest share over the mean share, 1 to E."""
    return float(usage.max() * len(usage))


def layer_frame(stats: "Stats") -> "pd.DataFrame":
    """One row per MoE layer.

    Columns: layer; num_experts; num_tokens (routed ones); used, cold, dead (experts: of at least one routed token; of
    less than a tenth of an equal share, dead ones left out; of none); dropped (tokens) and dropped_share (of the routed
    ones); entropy (over ln E, 0 to 1); effective_experts (exp of the entropy, 1 to E); gini (0 to 1); imbalance
    (largest over mean share); largest_share. A layer that saw no token has no number for what follows from shares.
    """
    import pandas as pd

    rows = []
    for name, layer in stats.layers.items():
        usage = layer.usage
        dead = int((layer.array("routed") == 0).sum())
        seen = layer.num_tokens > 0
        measured = {
            "entropy": entropy(usage), "effective_experts": effective_experts(usage), "gini": gini(usage),
            "imbalance": imbalance(usage), "largest_share": float(usage.max()),
        }  # fmt: skip
        rows.append(
            {
                "layer": name,
                "num_experts": len(usage),
                "num_tokens": layer.num_tokens,
                "used": len(usage) - dead,
                "cold": int((usage < COLD / len(usage)).sum()) - dead if seen else 0,
                "dead": dead,
                "dropped": layer.dropped,
                "dropped_share": layer.dropped / layer.num_tokens if seen else float("nan"),
                **(measured if seen else dict.fromkeys(measured, float("nan"))),
            }
        )
    return pd.DataFrame(rows)
