"""The embedded demos: small trained checkpoints, their calibration data and their held-out tasks."""

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Demo:
    """A trained checkpoint with its data, and how its story is told.

    Attributes:
        samples: calibration records.
        experts: kept per layer on average, by default; method: by which they are chosen, by default.
        export: form of the merged checkpoint.
        expert_share: of the bytes of the merged experts, for the factorised ones.
        metrics: of its tasks and texts.
    """

    folder: Path
    samples: int
    experts: int
    method: str
    export: str
    expert_share: float
    metrics: str

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def calibration(self) -> Path:
        return self.folder / "data" / "calibration.jsonl"

    @property
    def tasks(self) -> list[Path]:
        """Files of held-out tasks."""
        return sorted((self.folder / "data" / "tasks").glob("*.jsonl"))

    @property
    def held_out_text(self) -> Path:
        return self.folder / "data" / "heldout_text.jsonl"


DEMOS = {
    "switch": Demo(HERE, 512, 4, "m-smoe-refit", "exact", 0.3, "exact_match,macro_f1,loss"),
    "decoder": Demo(HERE / "decoder", 799, 12, "reap-refit", "native", 0.75, "exact_match,accuracy,loss"),
}

CHECKPOINT = DEMOS["switch"].checkpoint
CALIBRATION = DEMOS["switch"].calibration
TASKS = HERE / "data" / "tasks"
HELD_OUT_TEXT = DEMOS["switch"].held_out_text
