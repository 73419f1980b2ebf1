"""Layout of the output: which tensors it holds and where each comes from, before anything is computed.

`exact` keeps the original router and a map from experts to stored groups; `native` is a stock checkpoint with fewer
experts; `dense` folds single experts into a plain feed-forward model.

Shapes: E experts, G groups, D d_model, F d_ff.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from msmoe.checkpoint.reader import Checkpoint, TensorSpec, wider
from msmoe.errors import UserError
from msmoe.families import ExpertKeys, Family, MoELayer
from msmoe.families.protocol import MATRICES
from msmoe.lowrank.shapes import LayerFactors
from msmoe.planning.plan import LayerPlan, Plan, Routes

EXPORTS = ("exact", "native", "dense")


class Slot(NamedTuple):
    """A tensor of the output, or the slice `index` of its leading axis."""

    tensor: str
    index: int | None = None


class GroupSlots(NamedTuple):
    """Where a merged expert goes."""

    wi: Slot
    wo: Slot


@dataclass
class Export:
    """Layout of an output checkpoint.

    Attributes:
        tensors: every tensor of the output, in order.
        copies: (slot, input tensor) pairs filled with unchanged bytes.
        merged: (layer, position in the plan's groups) -> slots of an expert to be computed.
        routers: layer -> tensor of G router rows to be computed (`native`).
        router_rows: (output tensor, input tensor, experts whose rows stay) of the routers that lose rows.
        maps: layer -> tensor of the map from router rows to stored groups (`exact`).
        constants: layer -> tensor of the mean outputs (C, D) in place of experts (`exact`).
        indices: tensors that hold indices, not weights.
        config: content of `config.json`.
    """

    kind: str
    config: dict
    tensors: list[TensorSpec] = field(default_factory=list)
    copies: list[tuple[Slot, str]] = field(default_factory=list)
    merged: dict[tuple[str, int], GroupSlots] = field(default_factory=dict)
    routers: dict[str, str] = field(default_factory=dict)
    router_rows: list[tuple[str, str, tuple[int, ...]]] = field(default_factory=list)
    maps: dict[str, str] = field(default_factory=dict)
    constants: dict[str, str] = field(default_factory=dict)
    indices: set[str] = field(default_factory=set)

    @property
    def num_parameters(self) -> int:
        """Weights of the output; expert maps and row indices are no parameters."""
        return sum(spec.num_parameters for spec in self.tensors if spec.name not in self.indices)

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.tensors)

    def add_copy(self, source: TensorSpec, name: str) -> None:
        self.tensors.append(TensorSpec(name, source.dtype, source.shape))
        self.copies.append((Slot(name), source.name))

    def add_expert(self, names: ExpertKeys, layer: MoELayer, dtypes: ExpertKeys) -> None:
        """One expert in tensors of its own."""
        self.tensors.append(TensorSpec(names.wi, dtypes.wi, layer.shape("wi")))
        self.tensors.append(TensorSpec(names.wo, dtypes.wo, layer.shape("wo")))

    def add_stacked(self, family: Family, layer: MoELayer, num_groups: int, factors: LayerFactors) -> None:
        """The experts of a layer as the `exact` export stores them, dense or factorised."""
        for matrix, name in zip(MATRICES, family.stacked_keys(layer.name), strict=True):
            num_outputs, num_inputs = layer.shape(matrix)
            if matrix not in factors:
                self.tensors.append(TensorSpec(name, layer.dtype(matrix), (num_groups, num_outputs, num_inputs)))
                continue
            rank, num_rows = factors[matrix]
            names = family.factor_keys(layer.name, matrix)
            self.tensors.append(TensorSpec(names.u, layer.dtype(matrix), (num_groups, num_outputs, rank)))
            self.tensors.append(TensorSpec(names.v, layer.dtype(matrix), (num_groups, rank, num_inputs)))
            self.tensors.append(TensorSpec(names.s, layer.dtype(matrix), (num_groups, num_rows, num_inputs)))
            self.tensors.append(TensorSpec(names.rows, "I32", (num_groups, num_rows)))
            self.indices.add(names.rows)

    def add_map(self, family: Family, layer: MoELayer, num_rows: int) -> None:
        """The map from router rows to stored groups."""
        self.maps[layer.name] = family.expert_map_key(layer.name)
        self.indices.add(self.maps[layer.name])
        self.tensors.append(TensorSpec(self.maps[layer.name], "I64", (num_rows,)))

    def add_constants(self, family: Family, layer: MoELayer, num_constants: int) -> None:
        """The mean outputs that stand in the place of experts."""
        self.constants[layer.name] = family.constants_key(layer.name)
        self.tensors.append(TensorSpec(self.constants[layer.name], layer.dtype("wo"), (num_constants, layer.d_model)))

    def add_router_rows(self, source: TensorSpec, rows: tuple[int, ...]) -> None:
        """A router's weight or bias with some of its rows."""
        self.tensors.append(TensorSpec(source.name, source.dtype, (len(rows), *source.shape[1:])))
        self.router_rows.append((source.name, source.name, rows))


def build_export(
    kind: str, family: Family, checkpoint: Checkpoint, plan: Plan, *, factors: dict[str, LayerFactors] | None = None
) -> Export:
    """Lay out the output of a plan.

    Args:
        factors: per layer of an `exact` export, the matrices that will be factorised and their shapes.

    Raises:
        UserError: for an unknown export, or a plan that the export cannot store.
    """
    if kind not in EXPORTS:
        raise UserError(f"unknown export {kind!r}; choose one of {', '.join(EXPORTS)}")
    layers = family.layers(checkpoint)
    plans = {layer.name: plan.layers.get(layer.name) or LayerPlan.identity(layer.num_experts) for layer in layers}
    num_groups = {name: len(layer_plan.groups) for name, layer_plan in plans.items()}
    routes = {name: layer_plan.routes(plan.parameters) for name, layer_plan in plans.items()}
    sliced = {n.name for n in layers if len(routes[n.name].rows) < n.num_experts}
    _check_storable(kind, family, checkpoint, num_groups)
    if kind != "exact" and any(route.constants for route in routes.values()):
        raise UserError(f"--export {kind} cannot store mean outputs in place of experts: choose exact")
    if kind == "exact":
        num_rows = {name: len(routes[name].rows) for name in num_groups if name in sliced}
        num_constants = {name: len(route.constants) for name, route in routes.items() if route.constants}
        config = family.exact_config(
            checkpoint.config, num_groups, factors or {}, num_rows=num_rows, num_constants=num_constants
        )
        export = Export(kind, config)
    elif kind == "native":
        export = Export(kind, family.native_config(checkpoint.config, next(iter(num_groups.values()))))
    else:
        export = Export(kind, family.dense_config(checkpoint.config))

    handled = {key for layer in layers for e in range(layer.num_experts) for key in family.expert_keys(layer.name, e)}
    if kind != "dense":
        handled |= {key for name in sliced for key in (family.router_key(name), family.router_bias_key(name))}
    if kind == "native":
        handled |= {family.router_key(layer.name) for layer in layers if num_groups[layer.name] < layer.num_experts}
    elif kind == "dense":
        handled |= {
            key for layer in layers for key in (family.router_key(layer.name), family.router_bias_key(layer.name))
        }
    for name in checkpoint:
        if name not in handled:
            export.add_copy(checkpoint.spec(name), family.dense_name(name) if kind == "dense" else name)
    copied = plan.parameters.refit == "none"
    for layer in layers:
        if layer.name in sliced and kind != "dense":
            for key in (family.router_key(layer.name), family.router_bias_key(layer.name)):
                if key in checkpoint:
                    export.add_router_rows(checkpoint.spec(key), routes[layer.name].rows)
        shapes = (factors or {}).get(layer.name, {})
        _add_layer(export, family, checkpoint, layer, plans[layer.name], routes[layer.name], shapes, copy_sole=copied)
    return export


def _check_storable(kind: str, family: Family, checkpoint: Checkpoint, num_groups: dict[str, int]) -> None:
    if kind == "exact":
        return
    if kind == "dense" and set(num_groups.values()) != {1}:
        raise UserError("--export dense needs one expert in every MoE layer: plan with --experts 1 --keep-layer none")
    if len(set(num_groups.values())) > 1:
        shown = ", ".join(f"{name} {count}" for name, count in num_groups.items())
        raise UserError(
            "--export native needs the same number of experts in every MoE layer: plan with "
            f"--budget uniform --keep-layer none (the plan has {shown})"
        )
    if kind == "native" and any(family.router_bias_key(name) in checkpoint for name in num_groups):
        raise UserError("--export native does not support router biases: use --export exact")


def expert_dtypes(family: Family, checkpoint: Checkpoint, layer: MoELayer, members: tuple[int, ...]) -> ExpertKeys:
    """Dtypes of an expert that some members become: theirs, or one that holds the values of all."""
    keys = [family.expert_keys(layer.name, e) for e in members]
    return ExpertKeys(*(wider(*(checkpoint.spec(name).dtype for name in names)) for names in zip(*keys, strict=True)))


def _add_layer(
    export: Export,
    family: Family,
    checkpoint: Checkpoint,
    layer: MoELayer,
    plan: LayerPlan,
    routes: Routes,
    factors: LayerFactors,
    *,
    copy_sole: bool,
) -> None:
    """Experts, map and constants of a layer; a group in which one member has all the weight is copied."""
    count = len(plan.groups)
    stacked = family.stacked_keys(layer.name)
    if export.kind == "exact":
        export.add_stacked(family, layer, count, factors)
        export.add_map(family, layer, len(routes.rows))
        if routes.constants:
            export.add_constants(family, layer, len(routes.constants))
    elif export.kind == "native" and count < len(routes.rows):
        router = checkpoint.spec(family.router_key(layer.name))
        export.routers[layer.name] = router.name
        export.tensors.append(TensorSpec(router.name, router.dtype, (count, layer.d_model)))

    for index, g in enumerate(plan.stored_order):
        if export.kind == "exact":
            slots = GroupSlots(Slot(stacked.wi, index), Slot(stacked.wo, index))
        else:
            names = family.expert_keys(layer.name, index) if export.kind == "native" else family.dense_keys(layer.name)
            export.add_expert(names, layer, expert_dtypes(family, checkpoint, layer, plan.groups[g].members))
            slots = GroupSlots(Slot(names.wi), Slot(names.wo))
        group = plan.groups[g]
        if export.kind != "dense" and group.sole is not None and (copy_sole or len(group.members) == 1):
            export.copies.extend(zip(slots, family.expert_keys(layer.name, group.sole), strict=True))
        else:
            export.merged[layer.name, g] = slots
