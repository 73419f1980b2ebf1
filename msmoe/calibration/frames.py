"""Statistics as tables of pandas, one row per expert."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from msmoe.calibration.layer_stats import LayerStats, frequency

if TYPE_CHECKING:
    import pandas as pd


def expert_frame(layers: Mapping[str, LayerStats]) -> "pd.DataFrame":
    """One row per (layer, expert); see `Stats.to_frame`."""
    import pandas as pd

    return pd.concat(
        pd.DataFrame(
            {
                "layer": name,
                "expert": range(layer.num_experts),
                "routed": layer.array("routed"),
                "dispatched": layer.array("dispatched"),
                "dropped": layer.array("routed") - layer.array("dispatched"),
                "usage_frequency": layer.usage,
                "gate_mass": layer.array("gate_mass"),
                "soft_mass": layer.array("soft_mass"),
            }
        )
        for name, layer in layers.items()
    ).reset_index(drop=True)


def domain_frame(layers: Mapping[str, LayerStats], domains: Mapping) -> "pd.DataFrame":
    """One row per (domain, layer, expert); see `Stats.domain_frame`."""
    import pandas as pd

    columns = ["domain", "layer", "expert", "routed", "usage_frequency"]
    rows = [
        (domain, name, expert, *values)
        for domain in domains
        for name, layer in layers.items()
        for expert, values in enumerate(_counts_and_shares(layer.domain_arrays()[domain]))
    ]
    frame = pd.DataFrame(rows, columns=pd.Index(columns))
    return frame.astype({"expert": "int64", "routed": "int64", "usage_frequency": "float64"})


def _counts_and_shares(counts: np.ndarray) -> list[tuple[int, float]]:
    return list(zip(counts.tolist(), frequency(counts).tolist(), strict=True))
