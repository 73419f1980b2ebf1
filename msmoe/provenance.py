"""What travels with the weights: configuration, plan, provenance (`msmoe.json`), model card, modelling code."""

import json
from importlib.metadata import version

import torch

from msmoe.calibration.stats import Stats
from msmoe.checkpoint import Checkpoint, CheckpointWriter
from msmoe.export import Export
from msmoe.merging import Sources
from msmoe.plan import Plan
from msmoe.router import RouterFit

OWN_FILES = ("config.json", "plan.json", "msmoe.json", "README.md", "model.safetensors.index.json")
KEPT_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".vocab")  # tokenizer and generation settings
MAX_FILE_BYTES = 100 * 2**20


def capacity_drop_rates(
    layout: Export, plan: Plan, stats: Stats | None, source: Checkpoint
) -> dict[str, tuple[float, float]]:
    """Share of calibration tokens over capacity before and after, if routing follows the plan."""
    if stats is None:
        return {}
    before = source.config.get("expert_capacity", 64)
    rates = {}
    for name, layer_plan in plan.layers.items():
        layer = stats.layers[name]
        identity = torch.arange(layer.num_experts)
        mapping = identity if layout.kind == "exact" else torch.tensor(layer_plan.expert_map)
        after = layout.config.get("expert_capacity", layer.num_tokens or 1)
        rates[name] = layer.drop_rate(identity, before), layer.drop_rate(mapping, after)
    return rates


def write_metadata(
    writer: CheckpointWriter,
    layout: Export,
    sources: Sources,
    groups: list[dict],
    routers: dict[str, RouterFit],
    drop_rates: dict[str, tuple[float, float]],
) -> None:
    """Configuration, plan, provenance, model card, modelling code, and every small file of the source."""
    plan, source = sources.plan, sources.checkpoint
    for file in sorted(source.path.iterdir()):
        small = file.is_file() and file.stat().st_size <= MAX_FILE_BYTES
        if small and file.name not in OWN_FILES and (file.suffix in KEPT_SUFFIXES or file.name.startswith("LICENSE")):
            writer.copy_file(file)
    if layout.kind == "exact":
        for file in sources.family.code_files():
            writer.copy_file(file)
    provenance = {
        "format": "msmoe-checkpoint/1",
        "export": layout.kind,
        "versions": {name: version(name) for name in ("msmoe", "torch", "transformers")},
        "seed": plan.seed,
        "source": {"model_type": source.model_type, "fingerprint": source.fingerprint},
        "stats": plan.stats,
        "num_parameters": {
            "source": source.num_parameters,
            "predicted": plan.predicted.get("num_parameters"),
            "written": layout.num_parameters,
        },
        "bytes": {"source": source.num_bytes, "predicted": plan.predicted.get("bytes"), "written": layout.num_bytes},
        "groups": groups,
        "routers": {name: {"agreement": fit.agreement, "gate_error": fit.gate_error} for name, fit in routers.items()},
        "drop_rates": {name: {"before": rate[0], "after": rate[1]} for name, rate in drop_rates.items()},
    }
    writer.write_text("config.json", json.dumps(layout.config, indent=2) + "\n")
    writer.write_text("plan.json", plan.to_json())
    writer.write_text("msmoe.json", json.dumps(provenance, indent=1) + "\n")
    writer.write_text("README.md", model_card(layout, plan, source))


def model_card(layout: Export, plan: Plan, source: Checkpoint) -> str:
    """README of the compressed checkpoint."""
    load = {
        "exact": 'AutoModelForSeq2SeqLM.from_pretrained(path, trust_remote_code=True, attn_implementation="eager")',
        "native": 'AutoModelForSeq2SeqLM.from_pretrained(path, attn_implementation="eager")',
        "dense": "AutoModelForSeq2SeqLM.from_pretrained(path)",
    }[layout.kind]
    trust = ", trust_remote_code=True" if layout.kind == "exact" else ""
    rows = "\n".join(f"| `{name}` | {layer.num_experts} | {len(layer.groups)} |" for name, layer in plan.layers.items())
    return f"""---
library_name: transformers
tags: [msmoe, mixture-of-experts, model-compression]
---

# Compressed Mixture-of-Experts checkpoint

Made from a `{source.model_type}` checkpoint (fingerprint `{source.fingerprint}`) by msmoe {version("msmoe")}
with method `{plan.method}`, export `{layout.kind}`: {source.num_parameters:,} -> {layout.num_parameters:,} parameters,
{source.num_bytes:,} -> {layout.num_bytes:,} bytes of weights.

```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
model = {load}
tokenizer = AutoTokenizer.from_pretrained(path{trust})
```

| layer | experts before | after |
|---|---|---|
{rows}

`plan.json` says which experts became one and with which weights, `msmoe.json` how it was done.
"""
