"""Matrices as small PNG images, for layers whose cells are too many to be drawn one by one."""

import base64
import io
from collections.abc import Mapping

import numpy as np
from msmoe.analysis.report.charts import SEQUENTIAL
from PIL import Image

SHADES = 32  # colours of an image
MAX_SIDE = 192  # pixels
MAX_PIXELS = 240_000  # of all images together: about 200 kB of base64


def draw(matrices: Mapping[str, np.ndarray], low: float, high: float) -> list[tuple[str, str]]:
    """Key and image of each matrix as a data URI.

    Args:
        matrices: key -> values (E, E); the diagonal is shown as `high`.
        low, high: values of the first and the last colour.
    """
    side = min(MAX_SIDE, int((MAX_PIXELS / max(len(matrices), 1)) ** 0.5))
    return [(key, data_uri(levels(matrix, low, high, side=side))) for key, matrix in matrices.items()]


def levels(matrix: np.ndarray, low: float, high: float, *, side: int) -> np.ndarray:
    """Values as indices of shades, uint8, averaged over blocks to at most `side` rows and columns."""
    values = matrix.astype(np.float32)
    np.fill_diagonal(values, high)
    if len(values) > side:
        values = np.asarray(Image.fromarray(values).resize((side, side), Image.Resampling.BOX))
    scaled = np.clip((values - low) / (high - low), 0, 1)
    return np.round(scaled * (SHADES - 1)).astype(np.uint8)


def data_uri(shades: np.ndarray) -> str:
    """A palette PNG of shades."""
    image = Image.fromarray(shades)
    from matplotlib import colormaps

    colours = colormaps[SEQUENTIAL](np.linspace(0, 1, SHADES))[:, :3]
    image.putpalette(np.round(colours * 255).astype(np.uint8).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
