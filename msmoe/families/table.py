"""What can be done with each Mixture-of-Experts family of the installed transformers, read off its classes."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from msmoe.errors import UserError, explain_library_errors
from msmoe.families.axes import COUNT_FIELD
from msmoe.families.blocks import TOP_K_FIELD, Block, blocks_of
from msmoe.families.discovery import why_not_exact
from msmoe.families.loading import quiet_library
from msmoe.families.skeletons import config_class, skeleton
from msmoe.families.special import REFUSED

if TYPE_CHECKING:
    from torch import nn

SWITCH = "switch_transformers"  # has an adapter of its own
MOE_SWITCHES = ("enable_moe_block", "is_moe")  # fields that are off by default
PLACEHOLDER_COUNT, PLACEHOLDER_TOP_K = 8, 2  # where a class has no default
PLACEHOLDERS = {
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "n_shared_experts": 1, "head_dim": 64
}  # fmt: skip
NUM_LAYERS = 8  # of the model whose structure a row is read off, where so few show all kinds of layers
NEEDED: dict[str, dict[str, Any]] = {  # by types whose defaults build no model (transformers 5.24)
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", *["sparse"] * (NUM_LAYERS - 1)]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (NUM_LAYERS // 2)},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 64},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 64,
                       "indexer_compress_ratio": 4},
}  # fmt: skip


@dataclass(frozen=True)
class FamilyRow:
    """One family.

    Attributes:
        stored: `per expert` or `fused`, as transformers writes it.
        router: class of the router, and what it has beside a weight.
        works: of inspect, native, exact, factors and constants (mean outputs) in `exact`, merge, refit and router,
            what does.
        limits: why the others do not.
    """

    model_type: str
    model_class: str
    stored: str
    router: str
    works: tuple[str, ...]
    limits: str

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "works": list(self.works)}


def model_types() -> tuple[str, ...]:
    """Types whose own configuration counts experts, in alphabetical order; those that wrap one are left out."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return tuple(
        sorted(name for name in set(CONFIG_MAPPING) if counts_experts(config_class({"model_type": name}, name)))
    )


def counts_experts(kind: type) -> bool:
    """Whether a configuration class of transformers has a number of experts of its own."""
    if not kind.__module__.startswith("transformers."):
        return False
    fields = {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    fields |= set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "attribute_map", None) or {})
    return "ffn_config" in fields or any(COUNT_FIELD.fullmatch(name) for name in fields)


def rows(wanted: Sequence[str] = (), progress: Callable[[int, int], None] | None = None) -> list[FamilyRow]:
    """The table; of some types only where any are wanted.

    Raises:
        UserError: for a type that is unknown, or has no experts.
    """
    known = tuple(wanted) or model_types()
    for name in wanted:
        config_class({"model_type": name}, "msmoe families")
    found = []
    for count, name in enumerate(known, 1):
        with quiet_library():
            row = row_of(name)
        if row is not None:
            found.append(row)
        elif wanted:
            raise UserError(f"{name} is not a Mixture-of-Experts family")
        if progress:
            progress(count, len(known))
    return found


def row_of(model_type: str) -> FamilyRow | None:
    """The row of a type; None where its model has no experts."""
    if model_type == SWITCH:
        works = ("inspect", "native", "exact", "factors", "constants", "merge", "refit", "router")
        return FamilyRow(model_type, "SwitchTransformersForConditionalGeneration", "per expert",
                         "SwitchTransformersTop1Router, top 1, capacity", works, "")  # fmt: skip
    if model_type in REFUSED:
        return FamilyRow(model_type, "", "", "", (), REFUSED[model_type])
    with contextlib.suppress(UserError):  # a class may take no other number of layers
        config = default_config(model_type, NUM_LAYERS)
        return described(model_type, skeleton(config, model_type), blocks_of(config, model_type))
    try:
        config = default_config(model_type)
        blocks = blocks_of(config, model_type)
    except UserError as error:
        if "no Mixture-of-Experts model" in str(error):
            return None
        return FamilyRow(model_type, "", "", "", (), str(error).removeprefix(f"{model_type}: "))
    return described(model_type, skeleton(config, model_type), blocks)


def default_config(model_type: str, num_layers: int | None = None) -> dict:
    """Content of the default configuration of a type, with its experts on; with another number of layers if given."""
    kind = config_class({"model_type": model_type}, model_type)
    given = NEEDED.get(model_type, {}) | ({} if num_layers is None else {"num_hidden_layers": num_layers})
    with explain_library_errors(f"{model_type} has no default configuration"):
        content = json.loads(json.dumps(kind(**given).to_dict(), default=str))
    fields = {
        **dict.fromkeys(MOE_SWITCHES, True),
        **{name: PLACEHOLDER_COUNT for name in content if COUNT_FIELD.fullmatch(name)},
        **{name: PLACEHOLDER_TOP_K for name in content if TOP_K_FIELD.fullmatch(name)},
        **PLACEHOLDERS,
    }
    missing = {name: value for name, value in fields.items() if name in content and content[name] in (None, False)}
    if isinstance(content.get("attn_config"), dict):  # DBRX of transformers 5.24 builds no model without
        content["attn_config"].setdefault("rope_theta", 10_000.0)
    return content | missing


def described(model_type: str, model: nn.Module, blocks: Sequence[Block]) -> FamilyRow:
    """The row of a model with its blocks."""
    first = blocks[0]
    works, limits = ["inspect", "native"], []
    attention = [block for block in blocks if not block.special.activates(model.get_submodule(block.experts))]
    for what, reason in exact_limits(model_type, model, blocks).items():
        works += [] if reason else [what]
        limits += [f"{what}: {reason}"] if reason else []
    works.append("merge")
    if attention:
        limits.append("merge: experts of its attention can be pruned only")
    if first.normed:
        limits.append("refit: a norm follows each expert")
    else:
        works.append("refit")
    reasons = {block.why_no_router for block in blocks} - {""}
    if not reasons:
        works.append("router")
    limits += [f"router: {reason}" for reason in sorted(reasons)]
    kind = type(model).__name__
    return FamilyRow(
        model_type, kind, stored_how(model, first), router_words(model, first), tuple(works), "; ".join(limits)
    )


def exact_limits(model_type: str, model: nn.Module, blocks: Sequence[Block]) -> dict[str, str]:
    """What an `exact` export can hold -> "", or why it cannot: the export at all, factors, and constants."""
    from msmoe.formats.modeling.modeling_msmoe_decoder import kind_of

    if reason := why_not_exact(model_type):
        return {"exact": reason}
    found = {"exact": ""}
    for what in ("factors", "constants"):
        found[what] = ""
        for block in blocks:
            experts = model.get_submodule(block.experts)
            try:
                if block.experts == block.name:
                    raise ValueError(f"not supported for {type(experts).__name__}")
                kind_of(experts, {what: {"down_proj": [1, 0]} if what == "factors" else 1})
            except ValueError as error:
                found[what] = str(error)
    return found


def stored_how(model: nn.Module, block: Block) -> str:
    """How transformers writes the experts: one tensor for each, or for all."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    for rule in get_model_conversion_mapping(model, add_legacy=False):
        makes = [target.replace("\\", "") for target in rule.target_patterns]
        numbered = any(re.search(r"experts\.\*", source) for source in rule.source_patterns)
        if numbered and any(target in parameter.name for target in makes for parameter in block.parameters):
            return "per expert"
    return "fused"


def router_words(model: nn.Module, block: Block) -> str:
    """Class of the router and what it has beside its weight."""
    inner = block.router.removeprefix(block.name + ".").partition(".")[0]
    kind = type(model.get_submodule(f"{block.name}.{inner}")).__name__
    beside = sorted(name.rpartition(".")[2] for name in block.per_expert if name != block.router)
    others = max((axis.tail for axis in block.per_expert.values()), default=0)
    words = [kind, f"top {block.top_k}", *beside]
    words += [f"{block.num_groups} groups"] if block.num_groups > 1 else []
    words += [f"{others} rows of no expert"] if others else []
    return ", ".join(words)
