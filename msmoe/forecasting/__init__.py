"""Forecast: how far can a checkpoint go? Predicted error of every layer, and of the model, against experts kept.

From one calibration pass: each layer is compressed to each size in memory, by the code that `apply` runs, on three
quarters of the sampled records, and measured on the other quarter. Layers are measured one at a time on the inputs that
the original model shows them; the model's curve adds them up.
"""

from msmoe.forecasting.curves import Forecast, LayerForecast, WholeForecast
from msmoe.forecasting.run import default_sizes, forecast

__all__ = ["Forecast", "LayerForecast", "WholeForecast", "default_sizes", "forecast"]
