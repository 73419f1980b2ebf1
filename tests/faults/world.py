"""A small world of good artefacts, one of every kind that a command reads; trials damage copies of it."""

import gzip
import importlib
import json
import os
import pkgutil
import shutil
import sys
from contextlib import chdir
from pathlib import Path

import torch
from tiny import random_records, save_switch, write_records
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "</s>", "<unk>", *[f"<extra_id_{i}>" for i in range(6)]]
WORDS = [f"w{i}" for i in range(64 - len(SPECIAL))]
SHAPE = {"num_decoder_layers": 2, "num_sparse_decoder_layers": 1, "num_experts": 4}
SMALL = ("--samples", "16", "--batch-size", "4", "--token-sample", "64")


def build(world: Path) -> None:
    """Write every artefact into the new folder `world`."""
    world.mkdir(parents=True)
    save_switch(world / "ck", **SHAPE)
    save_switch(world / "sharded", max_shard_size="40KB", **SHAPE)
    for name in ("ck", "sharded"):
        save_tokenizer(world / name)
    write_pickled(world / "ck", world / "bin")
    write_data(world)
    with chdir(world):
        for line in COMMANDS:
            call(*line)


COMMANDS = (
    ("profile", "ck", "--data", "tokens.jsonl", "--out", "stats", *SMALL),
    ("plan", "ck", "--stats", "stats", "--experts", "2", "--method", "m-smoe", "--out", "plan.json"),
    ("plan", "ck", "--stats", "stats", "--experts", "2", "--out", "refit.json"),
    ("apply", "ck", "--plan", "refit.json", "--stats", "stats", "--out", "exact"),
    ("plan", "ck", "--stats", "stats", "--experts", "2", "--method", "m-smoe", "--budget", "uniform", "--keep-layer",
     "none", "--export", "native", "--out", "uniform.json"),
    ("apply", "ck", "--plan", "uniform.json", "--stats", "stats", "--export", "native", "--out", "native"),
    ("factorize", "exact", "--rank", "2", "--out", "factorized"),
    ("evaluate", "ck", "--data", "tokens.jsonl", "--out", "results.json"),
    ("compare", "ck", "--data", "tokens.jsonl", "--tasks", "task.jsonl", "--methods", "m-smoe", "--experts", "2",
     "--seeds", "1", "--samples", "12", "--token-sample", "64", "--no-cost", "--out", "cmp"),
)  # fmt: skip


def call(*arguments: str) -> None:
    """Run the command of a user in this process; an exit code other than 0 is an error."""
    from msmoe.cli import main

    sys.argv = ["msmoe", *arguments]
    try:
        main()
    except SystemExit as done:
        if done.code:
            raise RuntimeError(f"msmoe {' '.join(arguments)} ended with {done.code}") from done


def save_tokenizer(folder: Path, extra: int = 0) -> None:
    """A tokenizer of whole words, as many as the model has embeddings, and `extra` more."""
    words = [*SPECIAL, *WORDS, *[f"more{i}" for i in range(extra)]]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    core.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=SPECIAL[3:],
    )  # fmt: skip
    tokenizer.save_pretrained(folder)


def write_pickled(source: Path, folder: Path) -> None:
    """The same checkpoint as `pytorch_model.bin`."""
    from tiny import load_tensors

    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_tensors(source), folder / "pytorch_model.bin")


def write_data(world: Path) -> None:
    """Tokenised records, text pairs and plain text."""
    records = [r | {"labels": r["labels"][:6]} for r in random_records(16, longest=9)]
    write_records(world / "tokens.jsonl", records)
    write_records(world / "task.jsonl", records[:8])
    texts = [{name: " ".join(WORDS[i - 9 if i > 8 else i] for i in r[key]) for name, key in PAIR} for r in records]
    write_records(world / "pairs.jsonl", texts)
    write_records(world / "text.jsonl", [{"text": f"{t['source']} {t['target']} {t['source']}"} for t in texts])
    (world / "tokens.jsonl.gz").write_bytes(gzip.compress((world / "tokens.jsonl").read_bytes()))


PAIR = (("source", "input_ids"), ("target", "labels"))


HEAVY = ("accelerate", "sklearn.cluster", "transformers.models.switch_transformers.modeling_switch_transformers")


def warm_up() -> None:
    """Import everything that a command may need, so that forks start with it."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}
    torch.set_num_threads(1)
    import msmoe.analysis

    ours = [m.name for p in (msmoe, msmoe.analysis) for m in pkgutil.walk_packages(p.__path__, f"{p.__name__}.")]
    for module in (*HEAVY, *ours):
        if not module.endswith(("__main__", "demo.reload")):  # programs
            importlib.import_module(module)


def adopt(checkpoint: Path, root: Path) -> None:
    """Let the statistics and plans of `root` speak of a damaged checkpoint, so that its damage is what they meet."""
    from msmoe.calibration.stats import Stats
    from msmoe.checkpoint import Checkpoint

    fingerprint = Checkpoint(checkpoint).fingerprint
    stats = root / "stats"
    if stats.exists():
        set_fingerprint(stats / "stats.json", fingerprint)
    for plan in (root / "plan.json", root / "refit.json"):
        if plan.exists():
            set_fingerprint(plan, fingerprint, stats=Stats.load(stats).reference if stats.exists() else None)


def set_fingerprint(file: Path, fingerprint: str, stats: dict | None = None) -> None:
    content = json.loads(file.read_text())
    content["checkpoint"]["fingerprint"] = fingerprint
    if stats:
        content["stats"] = stats
    file.write_text(json.dumps(content, indent=1))
