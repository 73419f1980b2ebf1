"""Matrices as small PNG images, for layers whose cells are too many to be drawn one by one."""

import base64
import io
from collections.abc import Mapping

import numpy as np
from PIL import Image

SHADES = 32  # colours of an image
MAX_SIDE = 192  # pixels
CIVIDIS = (  # red, green, blue: coefficients of 1, t, t^2, ... as in d3-scale-chromatic
    (-4.54, -35.34, 2381.73, -6402.7, 7024.72, -2710.57),
    (32.49, 170.73, 52.82, -131.46, 176.58, -67.37),
    (81.24, 442.36, -2482.43, 6167.24, -6614.94, 2475.67),
)
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
    image.putpalette(cividis(np.linspace(0, 1, SHADES)).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def cividis(levels: np.ndarray) -> np.ndarray:
    """Colours (N, 3) uint8 of levels from 0 to 1: the polynomials by which the charts' scheme `cividis` is drawn."""
    channels = [np.polynomial.Polynomial(coefficients)(levels) for coefficients in CIVIDIS]
    return np.clip(np.round(channels), 0, 255).astype(np.uint8).T
