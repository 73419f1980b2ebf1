"""One adapter for every decoder family of transformers: what it needs is read off the library and the file's headers.

Shapes: E experts, F d_ff, D d_model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from msmoe.checkpoint.reader import Checkpoint
from msmoe.errors import UserError
from msmoe.families.axes import SlicedTensor, with_count, without_predicted_layers
from msmoe.families.blocks import Block, blocks_of, fields_of
from msmoe.families.discovery import Discovery, original_config, why_not_exact
from msmoe.families.protocol import ExactShape, FactorKeys, MoELayer, read_expert
from msmoe.layer.stored import StoredPart

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from msmoe.layer.expert import Expert
    from msmoe.layer.routing import ExpertOutputs, Routed, Router

LEAST_PER_GROUP = 2  # a group's score is the sum of its two best
PREDICTING = re.compile(r"(^|\.)(mtp|nextn)\w*\.")
HOW_TO_LOAD = "msmoe: load with AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)"  # as modeling/
CODE = "modeling_msmoe_decoder"


class GenericFamily:
    """Adapter of every decoder family whose experts transformers calls with tokens, choices and weights."""

    exports = ("native", "exact")
    is_causal = True

    def __init__(self):
        self._known: WeakKeyDictionary[Checkpoint, Discovery] = WeakKeyDictionary()

    def owns(self, checkpoint: Checkpoint) -> bool:
        return not checkpoint.config.get("is_encoder_decoder") and checkpoint.model_type != "unknown"

    def is_exact(self, checkpoint: Checkpoint) -> bool:
        return "msmoe" in checkpoint.config

    def keeps_routing(self, checkpoint: Checkpoint) -> bool:
        blocks = checkpoint.config["msmoe"]["blocks"].values()
        return not any("rows" in block or "constants" in block for block in blocks)

    def discover(self, checkpoint: Checkpoint) -> Discovery:
        """What is known of a checkpoint from its configuration and headers; remembered as long as it is open.

        Raises:
            UserError: for a dense model, a family that is not supported, or weights that do not fit the model.
        """
        if checkpoint not in self._known:
            self._known[checkpoint] = Discovery(checkpoint)
        return self._known[checkpoint]

    def check(self, checkpoint: Checkpoint) -> None:
        self.discover(checkpoint)

    def layers(self, checkpoint: Checkpoint) -> tuple[MoELayer, ...]:
        return self.discover(checkpoint).layers(checkpoint)

    def stored_layers(self, checkpoint: Checkpoint) -> tuple[tuple[MoELayer, int], ...]:
        found = self.discover(checkpoint)
        counts = {block.name: found.count(block) for block in found.blocks}
        return tuple((layer, counts[layer.name]) for layer in self.layers(checkpoint))

    def part(self, name: str) -> str:
        if name.endswith(".rows"):
            return "row indices"
        if name.endswith(".expert_map"):
            return "expert maps"
        if re.search(r"(^|\.)shared_experts?\b", name) or "shared_mlp" in name:
            return "shared experts"
        if re.search(r"\.experts\.router\.", name):
            return "routers"
        if re.search(r"(^|\.)experts\.|\.(in|out)put_linear\.", name):
            return "experts"
        if re.search(r"\.(gate|router)(\.|$)|e_score_correction_bias|expert_bias", name):
            return "routers"
        if re.search(r"attn|attention|mixer|mamba|linear_attn|conv", name):
            return "attention"
        if re.search(r"embed|lm_head|wte", name):
            return "embeddings"
        return "norms" if "norm" in name else "dense feed-forward"

    def default_kept_layers(self, layers: tuple[MoELayer, ...]) -> tuple[str, ...]:
        return ()

    # experts and routers

    def parts(self, checkpoint: Checkpoint, layer: str, expert: int) -> tuple[StoredPart, ...]:
        return tuple(stack.part(expert) for stack in self.discover(checkpoint).stacks[layer])

    def parts_of(self, checkpoint: Checkpoint, layer: str, index: int, count: int) -> tuple[StoredPart, ...]:
        return tuple(stack.part_of(index, count) for stack in self.discover(checkpoint).stacks[layer])

    def exact_parts(self, checkpoint: Checkpoint, layer: str, index: int, count: int) -> tuple[StoredPart, ...]:
        return self.parts_of(checkpoint, layer, index, count)

    def memory_parts(self, checkpoint: Checkpoint, layer: str, expert: int) -> tuple[StoredPart, ...]:
        parameters = self.discover(checkpoint).block(layer).parameters
        rows = lambda p: p.axis.block if p.axis.block > 1 else 0
        return tuple(StoredPart(p.name, expert, *p.held, rows=rows(p)) for p in parameters)

    def behind(self, checkpoint: Checkpoint, layer: str, count: int) -> list[tuple[StoredPart, StoredPart]]:
        return [
            (stack.part_of(count + i, count), stack.part(stack.num_experts + i))
            for stack in self.discover(checkpoint).stacks[layer]
            for i in range(stack.entries - stack.num_experts)
        ]

    def load_expert(self, checkpoint: Checkpoint, layer: str, index: int) -> Expert:
        found = self.discover(checkpoint)
        block = found.block(layer)
        roles = {p.name.removeprefix(block.experts + "."): p.held.roles for p in block.parameters}
        factors = {matrix: self.factor_keys(checkpoint, layer, matrix) for matrix in found.factors(layer)}
        parts = self.parts(checkpoint, layer, index)
        return read_expert(checkpoint, parts, block.activation, factors=factors, roles=roles, index=index)

    def sliced(self, checkpoint: Checkpoint) -> tuple[SlicedTensor, ...]:
        return self.discover(checkpoint).sliced

    def numbers(self, checkpoint: Checkpoint) -> dict[str, str]:
        found = self.discover(checkpoint)
        return {key: block.name for block in found.blocks for key in found.names.keys(block.numbers)}

    def renumbered(self, checkpoint: Checkpoint, layer: str, table: Tensor, kept: Sequence[int]) -> Tensor:
        block = self.discover(checkpoint).block(layer)
        return block.special.renumbered(table, kept, block.num_experts)

    def router_key(self, checkpoint: Checkpoint, layer: str) -> str:
        found = self.discover(checkpoint)
        return found.names.origins[found.block(layer).router].sources[0].key

    def router(self, checkpoint: Checkpoint, layer: str) -> Router | None:
        from msmoe.families.routers import ModuleRouter

        found = self.discover(checkpoint)
        block = found.block(layer)
        if block.why_no_router:
            return None
        weights = found.router_weights(checkpoint, block)
        return ModuleRouter(block, weights, lambda count: found.skeleton(count))

    # exports

    def counts(self, checkpoint: Checkpoint, *, round_to: int = 1) -> tuple[int, ...]:
        """Numbers of experts that a `native` export can hold in every layer, the full one among them."""
        return possible_counts(self.discover(checkpoint).blocks[0], round_to)

    def check_export(self, checkpoint: Checkpoint, kind: str, kept: Mapping[str, Sequence[int]]) -> None:
        blocks = self.discover(checkpoint).blocks
        if kind == "exact" and (reason := why_not_exact(checkpoint.config["model_type"])):
            raise UserError(f"{checkpoint.config['model_type']} has no exact export: {reason}; choose --export native")
        for block in blocks:
            if kind == "exact" and len(kept[block.name]) < block.num_experts:
                check_rows(block, kept[block.name])
        if kind == "exact":
            return
        counts = {name: len(experts) for name, experts in kept.items()}
        if len(set(counts.values())) > 1:
            shown = ", ".join(f"{name} {count}" for name, count in list(counts.items())[:6])
            raise UserError(
                "--export native needs the same number of experts in every MoE layer: plan with "
                f"--budget uniform --keep-layer none, or choose --export exact (the plan has {shown})"
            )
        self.check_count(checkpoint, next(iter(counts.values())))
        for block in blocks:
            check_rows(block, kept[block.name])

    def check_count(self, checkpoint: Checkpoint, num_experts: int, *, round_to: int = 1) -> None:
        """Check that a `native` export can hold some number of experts in every layer.

        Args:
            round_to: the number must be a multiple of it, so that e.g. ranks share experts equally.

        Raises:
            UserError: naming the numbers that it can hold.
        """
        block = self.discover(checkpoint).blocks[0]
        possible = possible_counts(block, round_to)
        if num_experts not in possible:
            raise UserError(
                f"{checkpoint.config['model_type']} cannot hold {num_experts} experts in each layer: choose one of "
                f"{shown_counts(possible)} ({why_these(block, round_to)})"
            )

    def native_config(self, checkpoint: Checkpoint, num_groups: int) -> dict:
        config = checkpoint.config
        changed = with_count(config, fields_of(config, "config.json"), num_groups)
        return without_predicted_layers(changed) if self.dropped(checkpoint) else changed

    def exact_config(self, checkpoint: Checkpoint, shape: ExactShape) -> dict:
        found = self.discover(checkpoint)
        config = found.config
        blocks: dict[str, Any] = {}
        for block in found.blocks:
            experts = block.experts.removeprefix(block.name).removeprefix(".")
            entry: dict[str, Any] = {"experts": experts, "groups": shape.num_groups[block.name]}
            if rows := (shape.num_rows or {}).get(block.name, 0):
                entry["rows"] = rows
                entry["router"] = {
                    name.removeprefix(block.name + "."): [axis.dim, rows * axis.block + axis.tail]
                    for name, axis in block.per_expert.items()
                }
            if factors := shape.factors.get(block.name):
                entry["factors"] = {matrix: list(sizes) for matrix, sizes in factors.items()}
            if constants := (shape.num_constants or {}).get(block.name):
                entry["constants"] = constants
            check_stored(found.model, block, entry)
            blocks[block.name] = entry
        base, base_config = type(found.model).__name__, type(found.model.config).__name__
        dropped = bool(self.dropped(checkpoint))
        return (without_predicted_layers(config) if dropped else dict(config)) | {
            "compressed_model_type": f"msmoe_{config['model_type']}",
            "experts_implementation": HOW_TO_LOAD,
            "architectures": ["MsmoeForCausalLM"],
            "auto_map": {"AutoConfig": f"{CODE}.MsmoeConfig", "AutoModelForCausalLM": f"{CODE}.MsmoeForCausalLM"},
            "msmoe": {"base": [base, base_config], "blocks": blocks},
        }

    def dropped(self, checkpoint: Checkpoint) -> dict[str, str]:
        found = self.discover(checkpoint)
        ours = {numbered_layer(source.key) for origin in found.names.origins.values() for source in origin.sources}
        return {
            key: "a layer for multi-token prediction"
            for key in found.names.unknown
            if PREDICTING.search(key) or (numbered_layer(key) and numbered_layer(key) not in ours)
        }

    def factor_keys(self, checkpoint: Checkpoint, layer: str, matrix: str) -> FactorKeys:
        experts = self.discover(checkpoint).block(layer).experts
        return FactorKeys(*(f"{experts}.{matrix}.{part}" for part in FACTOR_PARTS))

    def expert_map_key(self, checkpoint: Checkpoint, layer: str) -> str:
        return f"{self.discover(checkpoint).block(layer).experts}.expert_map"

    def constants_key(self, checkpoint: Checkpoint, layer: str) -> str:
        return f"{self.discover(checkpoint).block(layer).experts}.constants"

    def code_files(self, checkpoint: Checkpoint) -> dict[str, str]:
        from msmoe.formats.modeling.modeling_msmoe_decoder import code

        model = self.discover(checkpoint).model
        return {f"{CODE}.py": code(type(model).__name__, type(model.config).__name__)}

    # the model

    def load_model(self, path: Path, *, dtype: torch.dtype) -> Any:
        from msmoe.families.loading import load

        return load(path, dtype=dtype)

    def forward(self, model: Any, batch: dict[str, Tensor]) -> Iterator[Tensor]:
        yield batch["attention_mask"].bool()
        model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    def listen(self, model: nn.Module, hear: Callable[[str, Routed], None]) -> ExitStack:
        from msmoe.families.listening import listen_to

        return listen_to(model, blocks_in(model), hear)

    def expert_outputs(self, model: nn.Module) -> ExpertOutputs:
        """Nowhere in families that call experts neither with their choices nor with every token."""
        from msmoe.layer.routing import ExpertOutputs

        seen = [block for block in blocks_in(model) if not block.why_unseen]
        repeats = {block.name: block.num_experts for block in seen if block.special.repeats}
        modules = {block.name: model.get_submodule(block.experts) for block in seen}
        calls = {name: module for name, module in modules.items() if name not in repeats}
        return ExpertOutputs(calls, {name: modules[name] for name in repeats}, repeats)

    def layer_output(self, outputs: Any) -> Tensor:
        return outputs[0] if isinstance(outputs, tuple) else outputs

    def with_layer_output(self, outputs: Any, given: Tensor) -> Any:
        return (given, *outputs[1:]) if isinstance(outputs, tuple) else given


FACTOR_PARTS = ("U", "V", "S", "rows")


def blocks_in(model: Any) -> tuple[Block, ...]:
    """MoE blocks of a model in memory, found by its configuration."""
    config = original_config(json.loads(json.dumps(model.config.to_dict(), default=str)))
    return blocks_of(config | {"architectures": [type(model).__name__]})


def check_stored(model: nn.Module, block: Block, entry: dict) -> None:
    """Raise `UserError` for factors or mean outputs that the experts of a block cannot have in an `exact` export."""
    from msmoe.formats.modeling.modeling_msmoe_decoder import kind_of

    try:
        kind_of(model.get_submodule(block.experts), entry)
    except ValueError as error:
        raise UserError(f"--export exact: {error}") from None


def check_rows(block: Block, kept: Sequence[int]) -> None:
    """Raise `UserError` unless a group-limited router keeps as many rows in each of its groups, two or more."""
    size = block.num_experts // block.num_groups
    per_group = [sum(row // size == g for row in kept) for g in range(block.num_groups)]
    if len(set(per_group)) > 1 or (block.num_groups > 1 and per_group[0] < LEAST_PER_GROUP):
        raise UserError(
            f"{block.name} keeps {per_group} experts of its {block.num_groups} groups: its router needs the same "
            f"number in each, at least {LEAST_PER_GROUP}"
        )
    if len(kept) < block.top_k:
        raise UserError(f"{block.name} keeps {len(kept)} router rows: each token goes to {block.top_k} experts")


def numbered_layer(key: str) -> str:
    """The beginning of a name up to its first number, `model.layers.3` of all tensors of that layer; "" without one."""
    match = re.match(r"(.*?\.\d+)(\.|$)", key)
    return match[1] if match else ""


def possible_counts(block: Block, round_to: int) -> tuple[int, ...]:
    """Numbers of experts that a block can hold."""
    least = max(block.top_k, LEAST_PER_GROUP * block.num_groups if block.num_groups > 1 else 1)
    fitting = (n for n in range(least, block.num_experts + 1) if n % block.num_groups == 0 and n % round_to == 0)
    return tuple(fitting) or (block.num_experts,)


def shown_counts(counts: Sequence[int]) -> str:
    """Numbers in words: all of a few, else the first, the second and the last."""
    if len(counts) <= 8:
        return ", ".join(map(str, counts))
    return f"{counts[0]}, {counts[1]}, ... {counts[-1]}"


def why_these(block: Block, round_to: int) -> str:
    reasons = [f"each token goes to {block.top_k}"]
    if block.num_groups > 1:
        reasons.append(f"the router has {block.num_groups} groups, equally large, of at least {LEAST_PER_GROUP}")
    if round_to > 1:
        reasons.append(f"rounded to {round_to}")
    return ", ".join(reasons)


GENERIC = GenericFamily()
