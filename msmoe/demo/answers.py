"""What checkpoints answer to the same questions, to be read side by side."""

from collections.abc import Sequence
from pathlib import Path

import torch

from msmoe.calibration.profile import load_tokenizer
from msmoe.calibration.records import read_records
from msmoe.families.loading import load

NEW_TOKENS = 16


def first_questions(tasks: Sequence[Path]) -> list[dict]:
    """The first record of every task file: source and target."""
    return [read_records(file)[0] for file in tasks]


def answers(checkpoint: Path, questions: Sequence[dict]) -> list[str]:
    """The text that a checkpoint writes for the source of each question, the likeliest token at a time."""
    model, tokenizer = load(checkpoint), load_tokenizer(checkpoint)
    batch = tokenizer([question["source"] for question in questions], return_tensors="pt", padding=True)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        written = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1)
    return tokenizer.batch_decode(written, skip_special_tokens=True)
