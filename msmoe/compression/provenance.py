"""What travels with the weights: configuration, plan, provenance (`msmoe.json`), model card, modelling code."""

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from msmoe.calibration.stats import Stats
from msmoe.calibration.tokenizer import is_causal
from msmoe.checkpoint import Checkpoint
from msmoe.checkpoint.writer import CheckpointWriter
from msmoe.compression.card import model_card, source_metadata
from msmoe.compression.group import Sources
from msmoe.compression.provenance_checks import check_provenance
from msmoe.compression.router import RouterFit
from msmoe.errors import UserError
from msmoe.families import Family
from msmoe.formats.layout import Layout
from msmoe.planning.plan import Plan
from msmoe.strict_json import parse, read_text, without_nan

OWN_FILES = ("config.json", "plan.json", "msmoe.json", "README.md", "model.safetensors.index.json")
KEPT_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".vocab")  # tokenizer and generation settings
MAX_FILE_BYTES = 100 * 2**20
FORMAT = "msmoe-checkpoint/1"


def capacity_drop_rates(
    layout: Layout, plan: Plan, stats: Stats | None, source: Checkpoint
) -> dict[str, tuple[float, float]]:
    """Share of calibration tokens over capacity before and after, if routing follows the plan.

    Layers whose router loses rows are left out: where their tokens go is not in the counts.
    """
    if stats is None or is_causal(source.config):
        return {}
    before = source.config.get("expert_capacity", 64)
    rates = {}
    for name, layer_plan in plan.layers.items():
        layer = stats.layers[name]
        if len(layer_plan.routes(plan.parameters).rows) < layer.num_experts:
            continue
        identity = torch.arange(layer.num_experts)
        mapping = identity if layout.kind == "exact" else torch.tensor(layer_plan.expert_map)
        after = layout.config.get("expert_capacity", layer.num_tokens or 1)
        rates[name] = layer.drop_rate(identity, before), layer.drop_rate(mapping, after)
    return rates


def write_metadata(
    writer: CheckpointWriter,
    layout: Layout,
    sources: Sources,
    groups: list[dict],
    router: str,
    routers: dict[str, RouterFit],
    drop_rates: dict[str, tuple[float, float]],
) -> None:
    """Configuration, plan, provenance, model card, modelling code, and every small file of the source."""
    plan, source = sources.plan, sources.checkpoint
    provenance = {
        "format": FORMAT,
        "export": layout.kind,
        "versions": versions(),
        "seed": plan.seed,
        "source": {"model_type": source.model_type, "fingerprint": source.fingerprint},
        "stats": plan.stats,
        **sizes(source, layout, plan),
        "groups": groups,
        "router": router,
        "routers": {name: {"agreement": fit.agreement, "gate_error": fit.gate_error} for name, fit in routers.items()},
        "drop_rates": {name: {"before": rate[0], "after": rate[1]} for name, rate in drop_rates.items()},
        **({"dropped": layout.num_dropped} if layout.dropped else {}),
    }
    write_files(writer, layout, sources.family, source, plan, provenance)


def write_factor_metadata(
    writer: CheckpointWriter,
    layout: Layout,
    source: Checkpoint,
    family: Family,
    plan: Plan,
    *,
    options: dict,
    matrices: list[dict],
    stats: Stats | None,
) -> None:
    """The same for a factorised checkpoint; what its input says of its own making is kept."""
    before = read_provenance(source)
    provenance = {
        "format": FORMAT,
        "seed": 0,
        "source": {"model_type": source.model_type, "fingerprint": source.fingerprint},
        "stats": stats.reference if stats else {},
        **before,
        **sizes(source, layout, plan, before),
        "export": layout.kind,
        "versions": versions(),
        "factors": {"options": options, "matrices": matrices, "stats": stats.reference if stats else {}},
        **({"dropped": layout.num_dropped} if layout.dropped else {}),
    }
    write_files(writer, layout, family, source, plan, provenance)


def write_recovery_metadata(
    writer: CheckpointWriter,
    layout: Layout,
    source: Checkpoint,
    family: Family | None,
    plan: Plan | None,
    *,
    recovery: dict,
    log: Path,
) -> None:
    """The same for a fine-tuned checkpoint; `log` is copied beside the weights."""
    before = read_provenance(source)
    if plan is not None:
        plan = replace(plan, predicted={"num_parameters": layout.num_parameters, "bytes": layout.num_bytes})
    provenance = {
        "format": FORMAT,
        "source": {"model_type": source.model_type, "fingerprint": source.fingerprint},
        **before,
        **sizes(source, layout, plan, before),
        "export": layout.kind,
        "versions": versions(),
        "recovery": recovery,
    }
    if "factors" in before:  # rows may have been pruned
        shapes = layout.config.get("factors") or {}
        matrices = [with_shape(matrix, shapes) for matrix in before["factors"]["matrices"]]
        provenance["factors"] = before["factors"] | {"matrices": matrices, "measured": "before recovery"}
    write_files(writer, layout, family, source, plan, provenance)
    writer.write_text("training_log.jsonl", log.read_text(encoding="utf-8"))


def with_shape(matrix: dict, shapes: dict) -> dict:
    """The report of a matrix with the rank and rows that the configuration states."""
    shape = shapes.get(matrix["layer"], {}).get(matrix["matrix"])
    return matrix if shape is None else matrix | dict(zip(("rank", "num_rows"), shape, strict=True))


def read_provenance(source: Checkpoint) -> dict:
    """Content of a checkpoint's `msmoe.json`; empty for one that has none, or one of another format.

    Raises:
        UserError: if it is damaged.
    """
    file = source.path / "msmoe.json"
    if not file.exists():
        return {}
    complaint = f"{file} is not a checkpoint's provenance"
    content = parse(read_text(file, "a checkpoint's provenance"), complaint, nan_is_null=True)
    if not isinstance(content, dict):
        raise UserError(f"{complaint}: it must hold a JSON object")
    if content.get("format") != FORMAT:
        return {}
    check_provenance(content, str(file))
    return content


def original_fingerprint(source: Checkpoint) -> str:
    """Fingerprint of the checkpoint that a compressed or fine-tuned one was made from, or of an original itself."""
    return read_provenance(source).get("source", {}).get("fingerprint") or source.fingerprint


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("msmoe", "torch", "transformers")}


def sizes(source: Checkpoint, layout: Layout, plan: Plan | None, before: dict | None = None) -> dict:
    """Parameters and bytes of the original, as predicted, and as written."""
    original = {"num_parameters": source.num_parameters, "bytes": source.num_bytes}
    if before:
        original = {key: before[key]["source"] for key in original}
    written = {"num_parameters": layout.num_parameters, "bytes": layout.num_bytes}
    predicted = plan.predicted if plan else written
    return {
        key: {"source": original[key], "predicted": predicted.get(key), "written": written[key]} for key in original
    }


def write_files(
    writer: CheckpointWriter,
    layout: Layout,
    family: Family | None,
    source: Checkpoint,
    plan: Plan | None,
    provenance: dict,
) -> None:
    """Everything of a checkpoint that is not weights."""
    for file in sorted(source.path.iterdir()):
        small = file.is_file() and file.stat().st_size <= MAX_FILE_BYTES
        if small and file.name not in OWN_FILES and (file.suffix in KEPT_SUFFIXES or file.name.startswith("LICENSE")):
            writer.copy_file(file)
    if layout.kind == "exact" and family is not None:
        for name, text in family.code_files(source).items():
            writer.write_text(name, text)
    writer.write_text("config.json", json.dumps(layout.config, indent=2) + "\n")
    if plan is not None:
        writer.write_text("plan.json", plan.to_json())
    writer.write_text("msmoe.json", json.dumps(without_nan(provenance), indent=1, allow_nan=False) + "\n")
    card = model_card(provenance, plan, source_metadata(source.path), causal=is_causal(source.config))
    writer.write_text("README.md", card)
