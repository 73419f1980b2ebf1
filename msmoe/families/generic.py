"""One adapter for every decoder family of transformers: what it needs is read off the library and the file's headers.

Shapes: E experts, F d_ff, D d_model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from msmoe.checkpoint.reader import DTYPES, Checkpoint, wider
from msmoe.errors import UserError
from msmoe.families.axes import Axis, with_count, without_predicted_layers
from msmoe.families.blocks import Block, blocks_of, fields_of
from msmoe.families.names import DiskNames, StoredStack
from msmoe.families.quantised import read_values
from msmoe.families.skeletons import skeleton
from msmoe.families.special import REFUSED
from msmoe.layer.expert import Expert
from msmoe.layer.stored import StoredPart

if TYPE_CHECKING:
    from torch import Tensor, nn

    from msmoe.layer.routing import ExpertOutputs, Routed, Router

LEAST_PER_GROUP = 2  # a group's score is the sum of its two best


@dataclass(frozen=True)
class GenericLayer:
    """One MoE block of a checkpoint, named by its path in the model.

    Attributes:
        d_model: inputs of an expert; d_ff: its hidden neurons.
        roles: of an expert's weights, in the order of `Expert.tensors`.
        dtypes: role -> safetensors dtype of its values in the file; of the stored codes where they are quantised.
        num_groups: groups in which a group-limited router keeps the same number of experts; else 1.
        merges: "" where experts can be merged, else why not.
        refits: "" where an expert's output can be refitted linearly, else why not.
    """

    name: str
    num_experts: int
    top_k: int
    d_model: int
    d_ff: int
    roles: tuple[str, ...]
    dtypes: Mapping[str, str] = field(hash=False)
    num_groups: int = 1
    merges: str = ""
    refits: str = ""

    def dtype(self, role: str) -> str:
        return self.dtypes[role]

    def itemsize(self, role: str) -> int:
        """Bytes of a value of a role."""
        return DTYPES[self.dtypes[role]].itemsize

    def shape(self, role: str) -> tuple[int, ...]:
        """Shape of a role's weight, outputs first."""
        if role.endswith("_bias"):
            return (self.d_model if role == "output_bias" else self.d_ff,)
        return (self.d_model, self.d_ff) if role == "output" else (self.d_ff, self.d_model)


@dataclass(frozen=True)
class SlicedTensor:
    """A stored tensor that loses entries with experts, which one or more blocks share.

    Attributes:
        name: on disk.
        pieces: block and axis of each of the equal pieces along `dim` that the tensor is made of; one in nearly all.
    """

    name: str
    pieces: tuple[tuple[str, Axis], ...]
    dim: int = 0


class Discovery:
    """What is known of a checkpoint before any weight is read.

    Attributes:
        blocks: MoE blocks in the order of the model's modules.
        names: names on disk by parameter.
        stacks: block -> how its experts are stored.
    """

    def __init__(self, checkpoint: Checkpoint):
        config, place = checkpoint.config, str(checkpoint.path / "config.json")
        refuse(config, place)
        self.config, self.place = config, place
        self.blocks = blocks_of(config, place)
        self.model = skeleton(config, place)
        self.names = DiskNames(self.model, checkpoint)
        self.stacks: dict[str, tuple[StoredStack, ...]] = {}
        for block in self.blocks:
            found: list[StoredStack] = []
            for p in block.parameters:
                found += self.names.stacks(p.name, p.axis, p.held, checkpoint, block.num_experts, p.shape)
            self.stacks[block.name] = tuple(found)

    def block(self, name: str) -> Block:
        try:
            return next(block for block in self.blocks if block.name == name)
        except StopIteration:
            raise UserError(f"{self.place} describes no MoE block {name}") from None

    def skeleton(self, num_experts: int) -> Any:
        """The model with another number of experts, on the meta device."""
        return skeleton(with_count(self.config, fields_of(self.config, self.place), num_experts), self.place)

    def layers(self, checkpoint: Checkpoint) -> tuple[GenericLayer, ...]:
        return tuple(self._layer(checkpoint, block) for block in self.blocks)

    def _layer(self, checkpoint: Checkpoint, block: Block) -> GenericLayer:
        roles, dtypes = [], {}
        for stack in self.stacks[block.name]:
            found = {checkpoint.spec(key).dtype for key in stack.keys}
            dtype = wider(*found) if len(found) > 1 else found.pop()
            roles += stack.held.roles
            dtypes |= dict.fromkeys(stack.held.roles, dtype)
        (output,) = (p for p in block.parameters if p.held.roles == ("output",))
        shape = output.shape[1:] if output.axis.block == 1 else (output.axis.block, output.shape[1])
        d_model, d_ff = reversed(shape) if output.held.transposed else shape
        inputs = [role for role in roles if not role.startswith("output")]
        attention = type(self.model.get_submodule(block.experts)).__name__ == "JetMoeMoA"
        return GenericLayer(
            block.name, block.num_experts, block.top_k, d_model, d_ff,
            (*inputs, *(role for role in roles if role not in inputs)), dtypes, block.num_groups,
            merges="experts of an attention can be pruned only" if attention else "",
            refits="experts of an attention can be pruned only" if attention
            else "a norm follows each expert" if block.normed
            else "",
        )  # fmt: skip

    @cached_property
    def sliced(self) -> tuple[SlicedTensor, ...]:
        """Stored tensors with entries per expert that are no weights of experts."""
        pieces: dict[str, dict[int, tuple[str, Axis]]] = {}
        dims = {}
        for block in self.blocks:
            for name, axis in block.per_expert.items():
                if name not in self.names.origins:
                    if name == block.router:
                        raise UserError(f"{self.place}: the weights lack the router {name}")
                    continue  # a buffer that keeps its default
                origin, dim = self.names.origins[name], 0
                for operation in origin.rule.operations if origin.rule else ():
                    kind = type(operation).__name__
                    if kind == "Transpose":
                        swapped = {operation.dim0: operation.dim1, operation.dim1: operation.dim0}
                        axis = axis._replace(dim=swapped.get(axis.dim, axis.dim))
                    elif kind == "Chunk" and operation.dim != axis.dim:
                        dim = operation.dim
                    else:
                        raise UserError(f"{self.place}: {name} is stored by a rule that is not understood: {kind}")
                key = origin.sources[0].key
                pieces.setdefault(key, {})[origin.target] = (block.name, axis)
                dims[key] = dim
        return tuple(
            SlicedTensor(key, tuple(found[i] for i in sorted(found)), dims[key]) for key, found in pieces.items()
        )

    def read_parameter(self, checkpoint: Checkpoint, name: str) -> Tensor | None:
        """A parameter or buffer in memory; None where the file lacks it."""
        if name not in self.names.origins:
            return None
        origin = self.names.origins[name]
        value = checkpoint.read(origin.sources[0].key)
        for operation in origin.rule.operations if origin.rule else ():
            kind = type(operation).__name__
            if kind == "Transpose":
                value = value.transpose(operation.dim0, operation.dim1)
            elif kind == "Chunk":
                value = value.chunk(origin.num_targets, operation.dim)[origin.target]
            else:
                raise UserError(f"{self.place}: {name} is stored by a rule that is not understood: {kind}")
        return value


def refuse(config: dict, place: str) -> None:
    """Raise `UserError` for a family that is not supported, or a quantisation of which the names are not known."""
    kind = config.get("model_type")
    if kind in REFUSED:
        raise UserError(f"{place}: {kind} is not supported: {REFUSED[kind]}")


def needs(inner: str, block: Block) -> bool:
    """Whether a tensor, named within its block, decides the routing: no experts, and nothing shared beside them."""
    experts = block.experts.removeprefix(block.name).removeprefix(".")
    if experts:
        return not inner.startswith(experts + ".") and "shared" not in inner.partition(".")[0]
    return inner.startswith("router.")


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


class GenericFamily:
    """Adapter of every decoder family whose experts transformers calls with tokens, choices and weights."""

    def __init__(self):
        self._known: WeakKeyDictionary[Checkpoint, Discovery] = WeakKeyDictionary()

    def discover(self, checkpoint: Checkpoint) -> Discovery:
        """What is known of a checkpoint from its configuration and headers; remembered as long as it is open.

        Raises:
            UserError: for a dense model, a family that is not supported, or weights that do not fit the model.
        """
        if checkpoint not in self._known:
            self._known[checkpoint] = Discovery(checkpoint)
        return self._known[checkpoint]

    def layers(self, checkpoint: Checkpoint) -> tuple[GenericLayer, ...]:
        """MoE layers in the order of the model's modules."""
        return self.discover(checkpoint).layers(checkpoint)

    def parts(self, checkpoint: Checkpoint, layer: str, expert: int) -> tuple[StoredPart, ...]:
        """Where an expert's weights lie."""
        return tuple(stack.part(expert) for stack in self.discover(checkpoint).stacks[layer])

    def parts_of(self, checkpoint: Checkpoint, layer: str, position: int, count: int) -> tuple[StoredPart, ...]:
        """Where the weights of the expert at a position lie in a checkpoint like this one with `count` experts."""
        return tuple(stack.part_of(position, count) for stack in self.discover(checkpoint).stacks[layer])

    def load_expert(self, checkpoint: Checkpoint, layer: str, expert: int) -> Expert:
        """One expert in float32, read alone.

        Raises:
            UserError: for NaN and infinite values, or a quantisation that is not read; the tensor is named.
        """
        weights = {}
        for part in self.parts(checkpoint, layer, expert):
            weights |= part.split(read_values(checkpoint, part))
        output, bias = weights.pop("output"), weights.pop("output_bias", None)
        return Expert(weights, output, bias, self.discover(checkpoint).block(layer).activation)

    def per_expert(self, checkpoint: Checkpoint, layer: str) -> dict[str, Axis]:
        """Stored tensor -> its axis, of the router and all else that has an entry per expert beside their weights.

        Of a tensor that blocks share, e.g. text and vision experts, the axis is that of this block's piece.
        """
        sliced = self.discover(checkpoint).sliced
        return {tensor.name: axis for tensor in sliced for name, axis in tensor.pieces if name == layer}

    def router(self, checkpoint: Checkpoint, layer: str) -> Router | None:
        """The layer's router, from the checkpoint; None where it needs more than the tokens' hidden states."""
        from msmoe.families.routers import ModuleRouter

        found = self.discover(checkpoint)
        block = found.block(layer)
        if block.why_no_router or not block.router:
            return None
        state = found.model.get_submodule(block.name).state_dict(prefix=block.name + ".")
        weights = {}
        for name, tensor in state.items():
            inner = name.removeprefix(block.name + ".")
            if not needs(inner, block):
                continue
            value = found.read_parameter(checkpoint, name)
            weights[name] = tensor.new_zeros(tensor.shape, device="cpu") if value is None else value
        return ModuleRouter(block, weights, lambda count: found.skeleton(count))

    def counts(self, config: dict, *, round_to: int = 1) -> tuple[int, ...]:
        """Numbers of experts that the family can hold, the full one among them."""
        return possible_counts(blocks_of(config)[0], round_to)

    def check_count(
        self, config: dict, num_experts: int, *, kept: Mapping[str, Sequence[int]] | None = None, round_to: int = 1
    ) -> None:
        """Check that a model of the family can hold some number of experts in every layer.

        Args:
            kept: layer -> experts whose router rows stay; those of each group of a group-limited router must be as many.
            round_to: the number must be a multiple of it, so that e.g. ranks share experts equally.

        Raises:
            UserError: naming the numbers that it can hold.
        """
        blocks = blocks_of(config)
        possible = possible_counts(blocks[0], round_to)
        if num_experts not in possible:
            raise UserError(
                f"{config['model_type']} cannot hold {num_experts} experts in each layer: choose one of "
                f"{shown_counts(possible)} ({why_these(blocks[0], round_to)})"
            )
        for block in blocks:
            rows = (kept or {}).get(block.name)
            if rows is None:
                continue
            if len(rows) != num_experts:
                raise UserError(f"{block.name} keeps {len(rows)} experts, others {num_experts}: all must keep the same")
            size = block.num_experts // block.num_groups
            per_group = [sum(row // size == g for row in rows) for g in range(block.num_groups)]
            if len(set(per_group)) > 1:
                raise UserError(
                    f"{block.name} keeps {per_group} experts of its {block.num_groups} groups: its router needs the "
                    f"same number of each, {num_experts // block.num_groups}"
                )

    def reduced_config(self, config: dict, num_experts: int, *, drops_predicted: bool = False) -> dict:
        """`config.json` of a checkpoint with `num_experts` in every layer: every field that counts them is changed.

        Args:
            drops_predicted: also say that there are no layers for multi-token prediction.
        """
        changed = with_count(config, fields_of(config, "config.json"), num_experts)
        return without_predicted_layers(changed) if drops_predicted else changed

    def listen(self, model: nn.Module, hear: Callable[[str, Routed], None]) -> ExitStack:
        """Hear the routing of every MoE layer of a model until the returned stack is closed."""
        from msmoe.families.listening import listen_to

        return listen_to(model, model_blocks(model), hear)

    def expert_outputs(self, model: nn.Module) -> ExpertOutputs:
        """Where outputs of experts can be seen; nowhere in families that do not call experts with their choices."""
        from msmoe.layer.routing import ExpertOutputs

        heard = [block for block in model_blocks(model) if not block.special.hears_router]
        return ExpertOutputs(calls={block.name: model.get_submodule(block.experts) for block in heard})

    def forward(self, model: Any, batch: dict[str, Tensor]) -> Iterator[Tensor]:
        """Run the stack of a model over `input_ids` (B, S); yields its valid tokens (B, S) before."""
        yield batch["attention_mask"].bool()
        model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)


def model_blocks(model: Any) -> tuple[Block, ...]:
    """MoE blocks of a model in memory."""
    config = json.loads(json.dumps(model.config.to_dict(), default=str)) | {"architectures": [type(model).__name__]}
    return blocks_of(config)


GENERIC = GenericFamily()
