"""Kinds of input, the commands that read them, and the damages done to them."""

from collections.abc import Sequence
from dataclasses import dataclass

import checkpoint_damages
import compressed_damages
import data_damages
import option_damages
import pickle_damages
import plan_damages
import results_damages
import safetensors_damages
import shard_damages
import stats_damages
import tensor_damages
from damage import Damage
from world import SMALL

TRAIN = ("--steps", "1", "--batch-size", "4", "--out", "out")
EVALUATE = ("--metrics", "loss,exact_match", "--out", "out.json")


@dataclass(frozen=True)
class Command:
    """A command line over artefacts of the world.

    Attributes:
        name: in tables and expectations; target: the artefact that is damaged; reads: those that must be there.
        writes: checkpoint, stats, json or text; output: its name.
    """

    name: str
    target: str
    argv: tuple[str, ...]
    reads: tuple[str, ...]
    writes: str
    output: str = ""


@dataclass(frozen=True)
class Kind:
    """Damages to one kind of input; `adopts` if statistics and plans must follow a damaged checkpoint."""

    damages: Sequence[Damage]
    commands: tuple[Command, ...]
    adopts: bool = False


def on_checkpoint(ck: str, *names: str) -> tuple[Command, ...]:
    """Commands that read a checkpoint, by name; all of them if none is named."""
    experts = () if ck in ("exact", "factorized") else ("--experts", "2")
    tokens = "tokens.jsonl"
    table = (
        Command("inspect", ck, ("inspect", ck, "--json"), (), "text"),
        Command("evaluate", ck, ("evaluate", ck, "--data", tokens, *EVALUATE), (tokens,), "json", "out.json"),
        Command("profile", ck, ("profile", ck, "--data", tokens, "--out", "out", *SMALL), (tokens,), "stats", "out"),
        Command("apply", ck, ("apply", ck, "--plan", "plan.json", "--stats", "stats", "--out", "out"),
                ("plan.json", "stats"), "checkpoint", "out"),
        Command("plan", ck, ("plan", ck, "--stats", "stats", *experts, "--out", "out.json"), ("stats",), "json",
                "out.json"),
        Command("factorize", ck, ("factorize", ck, "--rank", "2", "--out", "out"), (), "checkpoint", "out"),
        Command("recover", ck, ("recover", ck, "--teacher", "none", "--data", tokens, *TRAIN), (tokens,), "checkpoint",
                "out"),
        Command("teacher", ck, ("recover", "exact", "--teacher", ck, "--data", tokens, *TRAIN), (tokens, "exact"),
                "checkpoint", "out"),
        Command("compress", ck, ("compress", ck, "--data", tokens, *experts, "--out", "out", *SMALL), (tokens,),
                "checkpoint", "out"),
        Command("report", ck, ("report", ck, "stats", "--terminal"), ("stats",), "text"),
        Command("report alone", ck, ("report", ck, "--terminal"), (), "text"),
        Command("convert", ck, ("convert", ck, "--out", "out"), (), "checkpoint", "out"),
    )  # fmt: skip
    chosen = [c for c in table if not names or c.name in names]
    return tuple(Command(c.name, c.target, c.argv, (ck, *c.reads), c.writes, c.output) for c in chosen)


def on_data(file: str, *names: str) -> tuple[Command, ...]:
    """Commands that read records."""
    table = (
        Command("profile", file, ("profile", "ck", "--data", file, "--out", "out", *SMALL), (), "stats", "out"),
        Command("evaluate", file, ("evaluate", "ck", "--data", file, *EVALUATE), (), "json", "out.json"),
        Command("recover", file, ("recover", "exact", "--teacher", "ck", "--data", file, *TRAIN), ("exact",),
                "checkpoint", "out"),
        Command("compress", file, ("compress", "ck", "--data", file, "--experts", "2", "--out", "out", *SMALL), (),
                "checkpoint", "out"),
        Command("task", file, ("compare", "ck", "--data", "tokens.jsonl", "--tasks", file, "--methods", "m-smoe",
                "--experts", "2", "--seeds", "1", "--no-cost", "--out", "out", "--samples", "8", "--json"),
                ("tokens.jsonl",), "text"),
    )  # fmt: skip
    chosen = [c for c in table if not names or c.name in names]
    return tuple(Command(c.name, file, c.argv, ("ck", file, *c.reads), c.writes, c.output) for c in chosen)


def on_stats() -> tuple[Command, ...]:
    plan = ("plan", "ck", "--stats", "stats", "--experts", "2", "--out", "out.json")
    table = (
        ("plan", plan, ("ck",), "json", "out.json"),
        ("plan outputs", (*plan, "--similarity", "expert-output"), ("ck",), "json", "out.json"),
        ("apply", ("apply", "ck", "--plan", "refit.json", "--stats", "stats", "--out", "out"), ("ck", "refit.json"),
         "checkpoint", "out"),
        ("report", ("report", "stats", "--terminal"), (), "text", ""),
        ("report page", ("report", "stats", "--out", "out.html"), (), "page", ""),
        ("factorize", ("factorize", "exact", "--stats", "stats", "--rank", "2", "--out", "out"), ("exact",),
         "checkpoint", "out"),
    )  # fmt: skip
    return tuple(Command(name, "stats", argv, ("stats", *reads), *rest) for name, argv, reads, *rest in table)


def on_plan() -> tuple[Command, ...]:
    apply = ("apply", "ck", "--plan", "plan.json", "--out", "out")
    return (
        Command("apply", "plan.json", apply, ("ck", "plan.json"), "checkpoint", "out"),
        Command("report", "plan.json", ("report", "plan.json", "--terminal"), ("plan.json",), "text"),
        Command("report page", "plan.json", ("report", "ck", "plan.json", "--out", "out.html"), ("ck", "plan.json"),
                "page"),
    )  # fmt: skip


def on_results() -> tuple[Command, ...]:
    return (
        Command("report", "results.json", ("report", "results.json", "--terminal"), ("results.json",), "text"),
        Command("page", "results.json", ("report", "results.json", "--out", "out.html"), ("results.json",), "page"),
    )


def on_comparison() -> tuple[Command, ...]:
    again = ("compare", "ck", "--data", "tokens.jsonl", "--tasks", "task.jsonl", "--methods", "m-smoe", "--experts",
             "2", "--seeds", "1", "--samples", "12", "--token-sample", "64", "--no-cost", "--resume",
             "--json")  # fmt: skip
    reads = ("ck", "tokens.jsonl", "task.jsonl", "cmp")
    return (
        Command("report", "cmp", ("report", "cmp", "--terminal"), ("cmp",), "text"),
        Command("report file", "cmp", ("report", "cmp/results.json", "--out", "out.html"), ("cmp",), "page"),
        Command("resume", "cmp", (*again, "--out", "cmp"), reads, "text", "cmp"),
    )


def on_anything() -> tuple[Command, ...]:
    """Every command once, for options and surroundings."""
    stats = {c.name: c for c in on_stats()}
    return (
        *on_checkpoint("ck", "inspect", "evaluate", "profile", "plan", "recover", "compress", "report"),
        stats["apply"], stats["factorize"], on_results()[0], *on_data("tokens.jsonl", "task"),
    )  # fmt: skip


KINDS = {
    "config": Kind(checkpoint_damages.CONFIG, on_checkpoint("ck"), adopts=True),
    "generation": Kind(
        checkpoint_damages.GENERATION, (*on_data("pairs.jsonl", "evaluate"), *on_checkpoint("ck", "apply", "recover"))
    ),
    "tokenizer": Kind(
        checkpoint_damages.TOKENIZER,
        tuple(
            Command(f"{c.name} {c.target}", "ck", c.argv, c.reads, c.writes, c.output)
            for c in (*on_data("pairs.jsonl", "profile", "evaluate", "recover"), *on_data("text.jsonl", "profile"))
        ),
    ),
    "weights": Kind(safetensors_damages.WEIGHTS, on_checkpoint("ck"), adopts=True),
    "tensors": Kind(tensor_damages.TENSORS, on_checkpoint("ck"), adopts=True),
    "shards": Kind(shard_damages.SHARDS, on_checkpoint("sharded"), adopts=True),
    "pickle": Kind(pickle_damages.PICKLE, on_checkpoint("bin"), adopts=True),
    "data": Kind(data_damages.TOKENS, on_data("tokens.jsonl")),
    "text": Kind(data_damages.PAIRS, on_data("pairs.jsonl")),
    "stats": Kind(stats_damages.STATS, on_stats()),
    "plan": Kind(plan_damages.PLAN, on_plan()),
    "exact": Kind(compressed_damages.EXACT, on_checkpoint("exact", *compressed_damages.READERS)),
    "native": Kind(compressed_damages.NATIVE, on_checkpoint("native", *compressed_damages.READERS)),
    "factors": Kind(
        compressed_damages.FACTORS, on_checkpoint("factorized", "inspect", "evaluate", "recover", "report", "convert")
    ),
    "results": Kind(results_damages.RESULTS, on_results()),
    "comparison": Kind(results_damages.COMPARISON, on_comparison()),
    "options": Kind(option_damages.OPTIONS, on_anything()),
    "surroundings": Kind(option_damages.SURROUNDINGS, on_anything()),
}
