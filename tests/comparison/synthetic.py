"""Results of a comparison that never ran: models right or wrong on the same examples with chosen skill."""

import zlib
from collections.abc import Sequence

import numpy as np

LAYERS = ("encoder.block.3.layer.1.mlp", "decoder.block.1.layer.2.mlp", "decoder.block.3.layer.2.mlp")
BYTES_OF_EXPERT = 1_000_000
OTHER_BYTES = 3_000_000
NUM_EXPERTS = 16


def comparison(
    methods: Sequence[str] = ("alpha", "beta", "gamma"),
    *,
    experts: Sequence[float] = (8, 4),
    recover_steps: Sequence[int] = (0, 100),
    seeds: Sequence[int] = (0, 1),
    tasks: Sequence[str] = ("sms_spam", "topic"),
    loss_tasks: Sequence[str] = ("held_out",),
    num_examples: int = 300,
    references: Sequence[str] = ("full", "dense"),
    skill_step: float = 0.25,
    seed_deviation: float = 0.1,
    layer_loss: bool = True,
) -> dict:
    """Content of results.json. The first method is the best, each next one loses `skill_step` on the logit scale."""
    cells = [
        cell(
            method, size, seed, steps, tasks, loss_tasks, num_examples,
            skill=1.6 - skill_step * i - 2 / size + (0.4 if steps else 0) + seed_deviation * noise(method, size, seed),
            layers=layer_loss and steps == 0,
        )
        for i, method in enumerate(methods)
        for size in experts
        for steps in recover_steps
        for seed in seeds
    ]  # fmt: skip
    for name, size, skill in (("full", NUM_EXPERTS, 2.0), ("dense", 1, 0.4)):
        if name in references:
            cells.append(cell(name, size, 0, 0, tasks, loss_tasks, num_examples, skill=skill, layers=False))
    kinds = {name: ("merging", "pruning", "clustering")[i % 3] for i, name in enumerate(methods)}
    kinds |= dict.fromkeys(references, "reference")
    return {
        "format": "msmoe-comparison/1",
        "checkpoint": {
            "name": "checkpoint", "model_type": "switch_transformers", "fingerprint": "sha256:0",
            "num_parameters": 9_500_000, "bytes": stored_bytes(NUM_EXPERTS),
            "num_experts": dict.fromkeys(LAYERS, NUM_EXPERTS),
        },
        "calibration": {"source": "calibration.jsonl", "num_records": 256, "num_tokens": 9000,
                        "sha256": [str(seed) for seed in seeds]},
        "settings": {
            "methods": list(methods), "experts": list(experts), "recover_steps": list(recover_steps),
            "seeds": list(seeds), "kept_layers": [], "options": {}, "recovery": {},
        },
        "versions": {"msmoe": "0.1.0"},
        "methods": {name: {"summary": name, "source": "none", "kind": kind} for name, kind in kinds.items()},
        "tasks": {name: {"metric": "exact_match", "num_examples": num_examples, "majority_share": 0.5}
                  for name in tasks}
        | {name: {"metric": "loss", "num_examples": num_examples, "majority_share": None} for name in loss_tasks},
        "budgets": {f"{size:g}": stored_bytes(size) for size in experts},
        "cells": cells,
        "cost": {},
    }  # fmt: skip


def cell(
    method: str, experts: float, seed: int, recover_steps: int, tasks: Sequence[str], loss_tasks: Sequence[str],
    num_examples: int, *, skill: float, layers: bool,
) -> dict:  # fmt: skip
    """One cell: every example is answered from the same difficulty plus noise of the run."""
    measured = {}
    for task in tasks:
        difficulty = random("difficulty", task).logistic(size=num_examples)
        luck = random("luck", task, method, experts, seed, recover_steps).normal(size=num_examples)
        measured[task] = {"metrics": {}, "examples": ones_and_zeros(skill + 0.5 * luck > difficulty)}
    for task in loss_tasks:
        tokens = random("tokens", task).integers(5, 40, size=num_examples)
        losses = tokens * (random("loss", task).gamma(20, 0.2, size=num_examples) + 0.5 - 0.2 * skill)
        losses += random("luck", task, method, experts, seed, recover_steps).normal(size=num_examples)
        measured[task] = {"metrics": {}, "examples": [[float(a), int(b)] for a, b in zip(losses, tokens, strict=True)]}
    return {
        "method": method, "experts": float(experts), "seed": seed, "recover_steps": recover_steps,
        "kept": dict.fromkeys(LAYERS, experts), "average_kept": float(experts),
        "num_parameters": stored_bytes(experts) // 2, "bytes": stored_bytes(experts),
        "expert_bytes": stored_bytes(experts) - OTHER_BYTES, "tasks": measured,
        "layer_loss": {layer: 0.05 * (2.2 - skill) * (i + 1) / experts for i, layer in enumerate(LAYERS)} if layers
        else None,
        "notes": {}, "seconds": {"plan": 0.1, "apply": 0.1, "recover": 0.0, "evaluate": 1.0},
    }  # fmt: skip


def ones_and_zeros(right: np.ndarray) -> str:
    return "".join("1" if r else "0" for r in right)


def stored_bytes(experts: float) -> int:
    return round(OTHER_BYTES + experts * BYTES_OF_EXPERT)


def noise(*names: object) -> float:
    return float(random("noise", *names).normal())


def random(*names: object) -> np.random.Generator:
    """Generator of its own for every purpose."""
    return np.random.default_rng([zlib.crc32(str(name).encode()) for name in names])
