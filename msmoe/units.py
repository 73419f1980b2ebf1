"""Numbers for people."""


def human_bytes(count: float) -> str:
    """Bytes in decimal units, as disks count them."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
