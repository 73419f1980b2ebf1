"""Curves of a forecast, and what they suggest."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from msmoe.errors import UserError, choose

FLAT = 1e-6  # a smaller range of errors is rounding
BEND = 0.1  # of the range of errors: a curve closer to its chord is straight


@dataclass(frozen=True)
class LayerForecast:
    """Curves of one layer, one value per size.

    Attributes:
        num_experts: experts of the original layer.
        sizes: experts kept, ascending.
        output_error: squared error of the layer's gate-weighted output relative to its square, on tokens that the
            compression did not see; NaN for a layer without such tokens.
        kl: predicted KL divergence, nats per target token, of the model with this layer alone compressed, see
            `token_divergence`; None where the statistics hold no output gradients.
    """

    num_experts: int
    sizes: tuple[int, ...]
    output_error: tuple[float, ...]
    kl: tuple[float, ...] | None


@dataclass(frozen=True)
class WholeForecast:
    """Curves of the model with every compressible layer at the same size.

    Attributes:
        sizes: experts kept per layer, ascending.
        output_error: mean over the layers that have tokens.
        kl: sum over layers, nats per target token: their effects are taken as uncorrelated. None without output
            gradients.
    """

    sizes: tuple[int, ...]
    output_error: tuple[float, ...]
    kl: tuple[float, ...] | None


@dataclass(frozen=True)
class Forecast:
    """Predicted curves of every compressible layer.

    Attributes:
        method: what would compress the layers.
        layers: layer -> its curves, in forward order; all have the same sizes.
    """

    method: str
    layers: Mapping[str, LayerForecast]

    def to_frame(self):
        """A pandas DataFrame, one row per (layer, size), layers in forward order and sizes ascending.

        Columns:
            layer: name of the MoE layer.
            num_experts: experts of the original.
            experts: experts kept, 1 to `num_experts`.
            output_error: relative squared error of the layer's output; 0 for an unchanged layer, 1 for an output of
                zeros.
            kl: predicted KL divergence in nats per target token; NaN without output gradients.
        """
        import pandas as pd

        return pd.concat(
            pd.DataFrame(
                {
                    "layer": name,
                    "num_experts": layer.num_experts,
                    "experts": layer.sizes,
                    "output_error": layer.output_error,
                    "kl": layer.kl or float("nan"),
                }
            )
            for name, layer in self.layers.items()
        ).reset_index(drop=True)

    def suggest(self, tolerance: float) -> dict[str, int]:
        """Layer -> the smallest size from which on all larger sizes stay within a relative output error.

        The number of experts itself where no size does, or the error is unknown.

        Raises:
            UserError: for a tolerance that is negative or NaN.
        """
        if not tolerance >= 0:
            raise UserError(f"tolerance must be at least 0, got {tolerance:g}")
        suggested = {}
        for name, layer in self.layers.items():
            suggested[name] = layer.num_experts
            for size, error in zip(reversed(layer.sizes), reversed(layer.output_error), strict=True):
                if not error <= tolerance:
                    break
                suggested[name] = size
        return suggested

    def cliff(self, layer: str) -> int | None:
        """The size below which the output error of a layer takes off.

        The point farthest below the chord from the smallest size to the largest (Kneedle, Satopaa et al. 2011, for a
        falling convex curve). None for a flat curve, one that stays within a tenth of its range of the chord, and one
        with NaN.

        Raises:
            UserError: for a name that is no layer of the forecast.
        """
        curve = self.layers[choose("layer", layer, tuple(self.layers))]
        sizes, errors = np.array(curve.sizes, dtype=float), np.array(curve.output_error)
        span = errors.max() - errors.min()
        if len(sizes) < 3 or not span > FLAT:
            return None
        chord = np.interp(sizes, sizes[[0, -1]], errors[[0, -1]])
        below = (chord - errors) / span
        return curve.sizes[int(below.argmax())] if below.max() > BEND else None

    def whole(self) -> WholeForecast:
        """The curves of the model over sizes that all layers share."""
        layers = list(self.layers.values())
        errors = np.array([layer.output_error for layer in layers])
        known = errors[~np.isnan(errors).any(1)]
        mean = known.mean(0) if len(known) else np.full(errors.shape[1], np.nan)
        kl = [layer.kl for layer in layers if layer.kl is not None]
        summed = tuple(np.nansum(np.array(kl), axis=0).tolist()) if len(kl) == len(layers) else None
        return WholeForecast(layers[0].sizes, tuple(mean.tolist()), summed)
