"""The model card of a written checkpoint: metadata that the hub reads, and what was done, for people."""

from importlib.metadata import version
from pathlib import Path

from msmoe.planning.plan import Plan

INHERITED = ("license", "license_name", "license_link", "language", "datasets")
TAGS = ("msmoe", "mixture-of-experts", "model-compression")
TEXT_TO_TEXT = "text2text-generation"  # the hub's older name for what encoder-decoders do

STOCK_WARNING = """
> Do not load it with `SwitchTransformersForConditionalGeneration`: that class has no place for experts that are shared.
"""
DECODER_WARNING = """
> Load it with `trust_remote_code=True`: the family's own class has no place for experts that are shared, and stops.
"""


def model_card(provenance: dict, plan: Plan | None, inherited: dict, *, causal: bool = False) -> str:
    """Write the README of a checkpoint.

    Args:
        provenance: content of its `msmoe.json`.
        plan: what was merged or removed; None where experts stayed as they were.
        inherited: metadata of the checkpoint that it was made from, see `source_metadata`.
        causal: whether the model is decoder-only.
    """
    kind, source = provenance["export"], provenance["source"]
    counts, size = provenance["num_parameters"], provenance["bytes"]
    warning = "" if kind != "exact" else DECODER_WARNING if causal else STOCK_WARNING
    return f"""---
{metadata(inherited, causal=causal)}
---

# {"Compressed" if plan else "Fine-tuned"} Mixture-of-Experts checkpoint

Made from a `{source["model_type"]}` checkpoint (fingerprint `{source["fingerprint"]}`) by msmoe {version("msmoe")}
{f"with method `{plan.method}`, " if plan else "with "}export `{kind}`: {counts["source"]:,} -> {counts["written"]:,}
parameters, {size["source"]:,} -> {size["written"]:,} bytes of weights.

{load_snippet(trusted=kind == "exact", causal=causal)}{warning}{plan_section(plan)}\
{factor_section(provenance)}{recovery_section(provenance)}"""


def metadata(inherited: dict, *, causal: bool = False) -> str:
    """YAML block of a card, without its fences.

    `text-generation` is the hub's name for what encoder-decoders do as well; the older name is among their tags.
    """
    from huggingface_hub import ModelCardData

    tags = [*TAGS] if causal else [*TAGS, TEXT_TO_TEXT]
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags, **inherited)
    return data.to_yaml()


def source_metadata(folder: Path) -> dict:
    """What a card takes over from the checkpoint that its own was made from: licence, languages, data, base model.

    The base model is the source itself where the hub's cache holds it; for a checkpoint made by msmoe it is that one's.
    A source without a card, or whose metadata cannot be read, gives nothing: a card is not needed to compress.
    """
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    card = folder / "README.md"
    try:
        found = (metadata_load(card) if card.is_file() else None) or {}
    except (OSError, ValueError, YAMLError):
        found = {}
    base = hub_id(folder) or ((folder / "msmoe.json").is_file() and found.get("base_model"))
    kept = {key: found.get(key) for key in INHERITED} | {"base_model": base}
    return {key: value for key, value in kept.items() if is_text(value)}


def is_text(value: object) -> bool:
    """Whether a value is some text or a list of texts: all that the fields above may hold."""
    texts = value if isinstance(value, list) else [value]
    return all(isinstance(text, str) and text for text in texts) and bool(texts)


def hub_id(folder: Path) -> str | None:
    """`owner/name` of a checkpoint in the hub's cache (`models--owner--name/snapshots/COMMIT`), else None."""
    snapshots = folder.absolute().parent
    repository = snapshots.parent.name
    if snapshots.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/")


def load_snippet(*, trusted: bool, causal: bool = False) -> str:
    """Python that opens the checkpoint in plain transformers; runs as it stands in the checkpoint's folder."""
    trust = ", trust_remote_code=True" if trusted else ""
    kind = "AutoModelForCausalLM" if causal else "AutoModelForSeq2SeqLM"
    return f"""```python
from transformers import {kind}, AutoTokenizer

path = "./"  # this folder, or its name on the hub
model = {kind}.from_pretrained(path{trust})
tokenizer = AutoTokenizer.from_pretrained(path)
batch = tokenizer(["..."], return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**batch, max_new_tokens=20), skip_special_tokens=True))
```
"""


def plan_section(plan: Plan | None) -> str:
    """How many experts each layer had and has."""
    if plan is None:
        return ""
    rows = "\n".join(f"| `{name}` | {layer.num_experts} | {len(layer.groups)} |" for name, layer in plan.layers.items())
    return f"""
| layer | experts before | after |
|---|---|---|
{rows}

`plan.json` says which experts became one and with which weights, `msmoe.json` how it was done.
"""


def factor_section(provenance: dict) -> str:
    """What was factorised, one row per layer and matrix."""
    if "factors" not in provenance:
        return ""
    rows = {}
    for m in provenance["factors"]["matrices"]:
        shape = "dense" if m["rank"] is None else f"rank {m['rank']}, {m['num_rows']} rows"
        rows[m["layer"], m["matrix"]] = f"| `{m['layer']}` | {m['matrix']} | {shape} |"
    table = "\n".join(rows.values())
    return f"""
The matrices of the experts are low rank plus a few rows, W = U V + S:

| layer | matrix | stored as |
|---|---|---|
{table}
"""


def recovery_section(provenance: dict) -> str:
    """How the checkpoint was fine-tuned."""
    if "recovery" not in provenance:
        return ""
    recovery = provenance["recovery"]
    teacher = f"distilled from `{recovery['teacher']}`" if recovery["teacher"] else "fine-tuned on targets alone"
    return f"""
Weights ({recovery["train"]}) {teacher}: {recovery["steps"]} steps, the best on validation data being step
{recovery["best_step"]}.
"""
