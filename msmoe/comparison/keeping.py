"""Small files that a comparison keeps between runs, with a digest of what they hold: a damaged one is known as such."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from msmoe.files import write_whole
from msmoe.strict_json import read_text


def keep(file: Path, content: Any) -> None:
    """Write JSON with its digest.

    Raises:
        UserError: if it cannot be written.
        ValueError: for NaN or an infinity, which JSON does not have.
    """
    text = json.dumps(content, allow_nan=False)
    write_whole(file, f'{{"sha256": "{digest(text)}",\n"content": {text}}}\n')


def kept(file: Path) -> Any:
    """What `keep` wrote; None for a file that is missing, damaged or of another sort."""
    try:
        found = json.loads(read_text(file, "a kept file"))
        content = found["content"]
        return content if found["sha256"] == digest(json.dumps(content)) else None
    except (ValueError, RecursionError, KeyError, TypeError):
        return None


def digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()
