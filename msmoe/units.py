"""Numbers for people, written and read."""

import math
import re

from msmoe.errors import UserError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)
}


def human_bytes(count: float) -> str:
    """Bytes in decimal units, as disks count them."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def parse_bytes(text: str, what: str) -> int:
    """Bytes of `5GB`, `200 MB`, `1.5GiB`, `1000`.

    Args:
        what: the option that has the value, for the error.

    Raises:
        UserError: if it is no size, or not above 0.
    """
    match = re.fullmatch(r"\s*([0-9][0-9_,]*(?:\.[0-9]+)?|\.[0-9]+)\s*([a-zA-Z]*)\s*", text)
    if match and match.group(2).upper() in UNITS:
        number = float(match.group(1).replace(",", "").replace("_", "")) * UNITS[match.group(2).upper()]
        if 1 <= number < math.inf:
            return int(number)
    raise UserError(f"{what} must look like 5GB or 200MB, got {text!r}")


def parse_share(text: str, what: str) -> float:
    """0.25 of `25%`.

    Raises:
        UserError: if it is no percentage above 0 and at most 100.
    """
    try:
        share = float(text.strip().removesuffix("%")) / 100
    except ValueError:
        share = math.nan
    if not text.strip().endswith("%") or not 0 < share <= 1:
        raise UserError(f"{what} must be above 0% and at most 100%, got {text!r}")
    return share
