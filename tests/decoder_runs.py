"""A tiny decoder with six experts on disk, texts and questions for it, and what the pipeline makes of it."""

import json
import random
from pathlib import Path

from tiny_decoder import build_decoder, byte_tokenizer

from msmoe.calibration.profile import profile
from msmoe.compression.apply import apply
from msmoe.planning.planner import plan

WORDS = ("red", "green", "blue", "sea", "sun", "moon", "tree", "stone")
EXPERTS, TOP_K = 6, 2


def save_decoder(folder: Path, kind: str = "qwen3_moe", *, seed: int = 0) -> Path:
    build_decoder(kind, seed=seed, num_local_experts=EXPERTS).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_lines(file: Path, records: list[dict]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def texts(count: int, *, seed: int = 0) -> list[dict]:
    draw = random.Random(seed)
    return [{"text": " ".join(draw.choices(WORDS, k=6))} for _ in range(count)]


def questions(count: int, *, seed: int = 0) -> list[dict]:
    draw = random.Random(seed)
    return [{"source": f"{draw.choice(WORDS)} {i} =>", "target": draw.choice(WORDS)} for i in range(count)]


def choices(count: int, *, seed: int = 0) -> list[dict]:
    draw = random.Random(seed)
    return [{"source": f"{i} =>", "choices": draw.sample(WORDS, 3), "answer": i % 3} for i in range(count)]


def compressed(source: Path, out: Path, *, export: str, method: str = "m-smoe", experts: int = 3, **options) -> Path:
    """A checkpoint made from a few texts."""
    stats = profile(source, write_lines(out.with_suffix(".jsonl"), texts(24)), token_sample=64)
    made = plan(source, stats, method=method, experts=experts, export=export, **options)
    apply(source, made, out, stats=stats, export=export, workers=1)
    return out
