"""The embedded demo: a small trained Switch Transformer, its calibration data and its held-out tasks."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
CALIBRATION = Path(__file__).parent / "data" / "calibration.jsonl"
TASKS = Path(__file__).parent / "data" / "tasks"
HELD_OUT_TEXT = Path(__file__).parent / "data" / "heldout_text.jsonl"
