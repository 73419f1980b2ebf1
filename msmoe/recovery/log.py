"""Metrics of a run: JSON Lines, and TensorBoard events beside them."""

import json
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends one record per step or validation; a resumed run drops the records after the step it goes on from."""

    def __init__(self, folder: Path, *, resume_from: int | None):
        from torch.utils.tensorboard import SummaryWriter

        self.file = folder / "metrics.jsonl"
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        kept = [line for line in lines if resume_from is not None and _step(line) <= resume_from]
        self.file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        events = folder / "tensorboard"
        self.board: Any = SummaryWriter(str(events), purge_step=None if resume_from is None else resume_from + 1)

    def write(self, step: int, **values: float) -> None:
        """Record numbers of a step, counted from 1."""
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step} | values) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name.replace("validation_", "validation/"), value, step)

    def flush(self) -> None:
        """Bring everything to disk, before a state says that these steps are done."""
        self.board.flush()

    def close(self) -> None:
        self.board.close()


def _step(line: str) -> int:
    """Step of a record; a torn last line counts as beyond any."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 2**62
