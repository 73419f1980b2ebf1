"""What is known of a decoder checkpoint before any weight is read: its MoE blocks, and where everything lies.

Shapes: E experts, F d_ff, D d_model.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from msmoe.checkpoint.reader import FLOATS, Checkpoint, wider
from msmoe.errors import UserError
from msmoe.families.axes import Axis, SlicedTensor, with_count
from msmoe.families.blocks import Block, blocks_of, fields_of
from msmoe.families.names import DiskNames, StoredStack
from msmoe.families.protocol import MoELayer
from msmoe.families.quantised import why_unwritten
from msmoe.families.skeletons import skeleton
from msmoe.families.special import REFUSED

if TYPE_CHECKING:
    from torch import Tensor

UNQUANTISED = "BF16"  # in which values of quantised weights are stored where they are no longer quantised


class Discovery:
    """What is known of a checkpoint before any weight is read.

    Attributes:
        blocks: MoE blocks in the order of the model's modules.
        names: names on disk by parameter.
        stacks: block -> how its experts are stored.
    """

    def __init__(self, checkpoint: Checkpoint):
        config, place = original_config(checkpoint.config), str(checkpoint.path / "config.json")
        refuse(config, place)
        self.config, self.place = config, place
        self.exact: dict[str, dict] = checkpoint.config.get("msmoe", {}).get("blocks", {})
        self.blocks = blocks_of(config, place)
        self.model = skeleton(config, place)
        self.names = DiskNames(self.model, checkpoint)
        self.stacks: dict[str, tuple[StoredStack, ...]] = {}
        for block in self.blocks:
            found: list[StoredStack] = []
            for p in block.parameters:
                if p.name.removeprefix(block.experts + ".") not in self.factors(block.name):
                    found += self.names.stacks(p.name, p.axis, p.held, checkpoint, self.count(block), p.shape)
            self.stacks[block.name] = tuple(found)

    def count(self, block: Block) -> int:
        """Stored experts of a block."""
        return self.exact[block.name]["groups"] if block.name in self.exact else block.num_experts

    def factors(self, block: str) -> dict[str, list[int]]:
        """Matrices of a block that are stored as factors -> rank and kept rows."""
        return self.exact.get(block, {}).get("factors", {})

    def block(self, name: str) -> Block:
        try:
            return next(block for block in self.blocks if block.name == name)
        except StopIteration:
            raise UserError(f"{self.place} describes no MoE block {name}") from None

    def skeleton(self, num_experts: int) -> Any:
        """The model with another number of experts, on the meta device."""
        return skeleton(with_count(self.config, fields_of(self.config, self.place), num_experts), self.place)

    def layers(self, checkpoint: Checkpoint) -> tuple[MoELayer, ...]:
        return tuple(self._layer(checkpoint, block) for block in self.blocks)

    def _layer(self, checkpoint: Checkpoint, block: Block) -> MoELayer:
        dtypes: dict[str, str] = {}
        for stack in self.stacks[block.name]:
            found = {checkpoint.spec(key).dtype for key in stack.keys}
            dtypes |= dict.fromkeys(stack.held.roles, wider(*found) if found <= set(FLOATS) else UNQUANTISED)
        for p in block.parameters:
            if p.held.roles[0] not in dtypes and (factor := f"{p.name}.U") in checkpoint:
                dtypes |= dict.fromkeys(p.held.roles, checkpoint.spec(factor).dtype)
        (output,) = (p for p in block.parameters if p.held.roles == ("output",))
        shape = output.shape[1:] if output.axis.block == 1 else (output.axis.block, output.shape[1])
        d_model, d_ff = reversed(shape) if output.held.transposed else shape
        inputs = [role for role in dtypes if not role.startswith("output")]
        attention = not block.special.activates(self.model.get_submodule(block.experts))
        reasons = (why_unwritten(checkpoint, stack.part(0)) for stack in self.stacks[block.name])
        alone = "experts of an attention can be pruned only" if attention else next(filter(None, reasons), "")
        return MoELayer(
            block.name,
            self.exact.get(block.name, {}).get("rows", block.num_experts),
            d_model,
            d_ff,
            dtypes,
            (*inputs, *(role for role in dtypes if role not in inputs)),
            top_k=block.top_k,
            num_groups=block.num_groups,
            merges=alone,
            refits=alone or ("a norm follows each expert" if block.normed else ""),
            unseen=block.why_unseen,
            unasked=block.why_no_router,
        )

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

    def router_weights(self, checkpoint: Checkpoint, block: Block) -> dict[str, Tensor]:
        """Parameter or buffer of a block that decides its routing -> its values; zeros for what the file lacks."""
        weights = {}
        for name, tensor in self.model.get_submodule(block.name).state_dict(prefix=block.name + ".").items():
            if needs(name.removeprefix(block.name + "."), block):
                value = self.read_parameter(checkpoint, name)
                weights[name] = tensor.new_zeros(tensor.shape, device="cpu") if value is None else value
        return weights

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


def why_not_exact(model_type: str) -> str:
    """Why a family has no `exact` export; "" where it has one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return "" if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else "it has no causal language model of its own"


def needs(inner: str, block: Block) -> bool:
    """Whether a tensor, named within its block, decides the routing: no experts, and nothing shared beside them."""
    experts = block.experts.removeprefix(block.name).removeprefix(".")
    if experts:
        return not inner.startswith(experts + ".") and "shared" not in inner.partition(".")[0]
    return inner.startswith("router.")


def original_config(config: dict) -> dict:
    """The configuration that an `exact` export was made from, as far as the family's own classes read it."""
    left_out = ("msmoe", "auto_map", "compressed_model_type", "experts_implementation")
    if "msmoe" not in config:
        return config
    return {name: value for name, value in config.items() if name not in left_out} | config["msmoe"].get("original", {})
