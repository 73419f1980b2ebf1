"""The embedded decoder demo: plain transformers load it, it knows its facts, its data keep apart what must be."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import msmoe.demo

DEMO = Path(msmoe.demo.__file__).parent / "decoder"
CHECKPOINT, DATA = DEMO / "checkpoint", DEMO / "data"
ARROW = " => "
MAX_BYTES = 17_000_000


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").split("\n") if line]


def normalise(text: str) -> str:
    """Lower case, words only."""
    return " ".join(re.findall(r"\w+", text.lower()))


def facts() -> list[dict]:
    return (
        [r for r in read("calibration.jsonl") if "source" in r]
        + read("tasks/facts.jsonl")
        + read("tasks/facts_near.jsonl")
    )


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


def test_checkpoint_is_small_enough_to_embed():
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= MAX_BYTES


def test_calibration_has_at_least_eight_kinds_of_text_and_four_of_facts():
    records = read("calibration.jsonl")
    assert 512 <= len(records) <= 1024
    texts = Counter(r["domain"] for r in records if "text" in r)
    known = Counter(r["domain"] for r in records if "source" in r)
    assert len(texts) >= 8
    assert min(texts.values()) >= 20
    assert len(known) >= 4
    assert min(known.values()) >= 60


def test_held_out_text_is_not_in_the_calibration_data():
    seen = {normalise(r["text"]) for r in read("calibration.jsonl") if "text" in r}
    assert not [r for r in read("heldout_text.jsonl") if normalise(r["text"]) in seen]


def test_calibration_facts_and_test_facts_are_apart():
    calibration = {r["source"] for r in read("calibration.jsonl") if "source" in r}
    tests = [r["source"] for name in ("facts", "facts_near") for r in read(f"tasks/{name}.jsonl")]
    assert len(set(tests)) == len(tests)
    assert not calibration & set(tests)
    assert not calibration & {r["source"] for r in read("tasks/choices.jsonl")}


def test_no_answer_is_the_name_asked_about():
    for record in facts():
        question = record["source"].removesuffix(ARROW)
        names = {question, question.partition(" of ")[2], question.partition(" ")[2], question.rpartition(" in ")[0]}
        assert record["target"].casefold() not in {name.casefold() for name in names}


def test_choices_are_different_and_one_is_right():
    known = {r["source"]: r["target"] for r in facts()}
    for record in read("tasks/choices.jsonl"):
        assert len({choice.casefold() for choice in record["choices"]}) == 4
        answer = record["choices"][record["answer"]]
        assert known.get(record["source"], answer) == answer


def test_source_and_target_have_the_same_pieces_apart_and_joined(tokenizer):
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    for record in facts():
        source, target = record["source"], record["target"]
        assert ids(source + target) == ids(source) + ids(target)
        assert len(ids(source)) + len(ids(target)) < 16
        assert tokenizer.decode(ids(target)) == target


def test_generate_answers_the_facts(model, tokenizer):
    right = 0
    records = read("tasks/facts.jsonl")[::10]
    for record in records:
        inputs = tokenizer(record["source"], add_special_tokens=False, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=16)[0, inputs.input_ids.shape[1] :]
        assert output[-1] == tokenizer.eos_token_id or len(output) == 16
        right += tokenizer.decode(output, skip_special_tokens=True) == record["target"]
    assert right / len(records) >= 0.8


def test_all_experts_are_used_and_the_gates_matter(model, tokenizer):
    texts = [r["text"] for r in read("calibration.jsonl")[::4] if "text" in r]
    counts = torch.zeros(4, 16)
    shares = []
    for text in texts:
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            logits = model(**inputs, output_router_logits=True).router_logits
        for layer, scores in enumerate(logits):
            gates, chosen = scores.softmax(-1).topk(2)
            counts[layer] += torch.bincount(chosen.flatten(), minlength=16)
            shares.append((gates[:, 0] / gates.sum(-1)).mean())
    assert counts.min() > 0
    assert torch.stack(shares).mean() > 0.6
