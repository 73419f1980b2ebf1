"""What checkpoints answer to the same questions, to be read side by side."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig

from msmoe.calibration.records import read_records
from msmoe.calibration.tokenization import special_tokens_of, tokenize_for
from msmoe.calibration.tokenizer import load_tokenizer
from msmoe.checkpoint import Checkpoint
from msmoe.evaluation.batch import batch_of
from msmoe.families.loading import load

NEW_TOKENS = 16


def first_questions(tasks: Sequence[Path]) -> list[dict]:
    """The first record of every task file whose answer is written: source and target."""
    return [record for record in (read_records(file)[0] for file in tasks) if "target" in record]


def answers(checkpoint: Path, questions: Sequence[dict]) -> list[str]:
    """The text that a checkpoint writes for the source of each question, the likeliest token at a time."""
    source = Checkpoint(checkpoint)
    special = special_tokens_of(source)
    records = tokenize_for(source, questions, seed=0, max_source_length=None, max_target_length=None)
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1, pad_token_id=special.pad_id,
        eos_token_id=list(special.eos_ids), decoder_start_token_id=special.start_id,
    )  # fmt: skip
    with torch.inference_mode():
        written = batch_of(load(checkpoint), records, pad_id=special.pad_id).write(settings)
    return load_tokenizer(checkpoint).batch_decode(written, skip_special_tokens=True)
