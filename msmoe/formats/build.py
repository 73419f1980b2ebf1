"""Lay out an export of a plan: `exact`, `native` or `dense`.

`exact` keeps the original router and a map from experts to stored groups; `native` is a stock checkpoint with fewer
experts; `dense` folds single experts into a plain feed-forward model.
"""

from dataclasses import dataclass

from msmoe.checkpoint.reader import Checkpoint
from msmoe.errors import UserError
from msmoe.families.axes import Axis, SlicedTensor
from msmoe.families.protocol import ExactShape, Family, MoELayer
from msmoe.formats.layout import Layout, copies_between, expert_tensors
from msmoe.layer.stored import StoredPart
from msmoe.lowrank.shapes import LayerFactors
from msmoe.planning.parameters import Parameters
from msmoe.planning.plan import LayerPlan, Plan, Routes

EXPORTS = ("exact", "native", "dense")


@dataclass(frozen=True)
class Request:
    """What an export is made of.

    Attributes:
        plans, routes: of every MoE layer; one that the plan does not name keeps its experts.
        factors: per layer of an `exact` export, the matrices that will be factorised and their shapes.
        refits: whether the output matrices of experts that meet other tokens, or gates, are solved for again.
    """

    family: Family
    checkpoint: Checkpoint
    layers: tuple[MoELayer, ...]
    plans: dict[str, LayerPlan]
    routes: dict[str, Routes]
    factors: dict[str, LayerFactors]
    refits: bool

    @property
    def num_groups(self) -> dict[str, int]:
        return {name: len(plan.groups) for name, plan in self.plans.items()}

    @property
    def dominant(self) -> dict[str, tuple[int, ...]]:
        """Of every layer, the dominant expert of each stored group."""
        return {name: tuple(plan.groups[g].dominant for g in plan.stored_order) for name, plan in self.plans.items()}

    @property
    def rows(self) -> dict[str, tuple[int, ...]]:
        """Of every layer, the experts whose router rows stay whatever the export."""
        return {name: route.rows for name, route in self.routes.items()}


def build_export(
    kind: str, family: Family, checkpoint: Checkpoint, plan: Plan, *, factors: dict[str, LayerFactors] | None = None
) -> Layout:
    """Lay out the output of a plan.

    Args:
        factors: per layer of an `exact` export, the matrices that will be factorised and their shapes.

    Raises:
        UserError: for an unknown export, or a plan that the export cannot store.
    """
    if kind not in family.exports:
        raise UserError(f"unknown export {kind!r}; choose one of {', '.join(family.exports)}")
    layers = family.layers(checkpoint)
    plans = {layer.name: plan.layers.get(layer.name) or LayerPlan.identity(layer.num_experts) for layer in layers}
    routes = {name: layer_plan.routes(plan.parameters) for name, layer_plan in plans.items()}
    refits = plan.parameters.refit != "none"
    request = Request(family, checkpoint, layers, plans, routes, factors or {}, refits)
    family.check_export(checkpoint, kind, request.rows if kind == "exact" else request.dominant)
    if kind != "exact" and any(route.constants for route in routes.values()):
        raise UserError(f"--export {kind} cannot store mean outputs in place of experts: choose exact")
    return {"exact": exact, "native": native, "dense": dense}[kind](request)


def identity_export(family: Family, checkpoint: Checkpoint, *, factors: dict[str, LayerFactors]) -> Layout:
    """Lay out an export that keeps every expert of an original checkpoint, some matrices of them factorised."""
    layers = family.layers(checkpoint)
    plans = {layer.name: LayerPlan.identity(layer.num_experts) for layer in layers}
    routes = {name: plan.routes(Parameters()) for name, plan in plans.items()}
    return exact(Request(family, checkpoint, layers, plans, routes, factors, refits=False))


def exact(request: Request) -> Layout:
    """Original router rows, or those that pruning leaves, and a map from them to the stored experts."""
    family, checkpoint = request.family, request.checkpoint
    losing = {layer.name for layer in request.layers if len(request.rows[layer.name]) < layer.num_experts}
    shape = ExactShape(
        num_groups=request.num_groups,
        factors=request.factors,
        num_rows={name: len(request.rows[name]) for name in request.rows if name in losing},
        num_constants={name: len(route.constants) for name, route in request.routes.items() if route.constants},
    )
    layout = Layout("exact", family.exact_config(checkpoint, shape), dropped=family.dropped(checkpoint))
    add_rest(layout, request, losing)
    for layer in request.layers:
        routes, plan = request.routes[layer.name], request.plans[layer.name]
        if layer.name in losing:
            cut_routers(layout, request, layer, request.rows)
        groups = [plan.groups[g] for g in plan.stored_order]
        parts = [family.exact_parts(checkpoint, layer.name, index, len(groups)) for index in range(len(groups))]
        factors = request.factors.get(layer.name, {})
        layout.add_experts(checkpoint, family, layer, parts, [g.members for g in groups], factors)
        layout.add_map(family.expert_map_key(checkpoint, layer.name), layer, len(routes.rows))
        if routes.constants:
            layout.add_constants(family.constants_key(checkpoint, layer.name), layer, len(routes.constants))
        fill(layout, request, layer, parts)
    return layout


def native(request: Request) -> Layout:
    """The stock model with as many experts as there are groups; routers are cut, or computed where groups merge."""
    family, checkpoint = request.family, request.checkpoint
    count = next(iter(request.num_groups.values()))
    reduced = {layer.name for layer in request.layers if count < layer.num_experts}
    dropped = family.dropped(checkpoint) if reduced else {}
    layout = Layout("native", family.native_config(checkpoint, count), dropped=dropped)
    add_rest(layout, request, reduced)
    for layer in request.layers:
        plan = request.plans[layer.name]
        groups = [plan.groups[g] for g in plan.stored_order]
        if layer.name in reduced:
            cut_routers(layout, request, layer, request.dominant)
            if count < len(request.rows[layer.name]) and (name := computed_router(request, layer.name)):
                layout.routers[layer.name] = name
        parts = [family.parts_of(checkpoint, layer.name, index, count) for index in range(count)]
        layout.add_experts(checkpoint, family, layer, parts, [g.members for g in groups], {})
        fill(layout, request, layer, parts)
    return layout


def computed_router(request: Request, layer: str) -> str | None:
    """Tensor of the router rows of a layer, where they can be computed: rows of experts alone, and nothing else."""
    name = request.family.router_key(request.checkpoint, layer)
    plain = SlicedTensor(name, ((layer, Axis(0, 1)),))
    asked = request.family.router(request.checkpoint, layer)
    return name if plain in request.family.sliced(request.checkpoint) and asked is not None else None


def dense(request: Request) -> Layout:
    """A plain feed-forward model: the one expert of each layer in the place of the layer, its gate folded in."""
    family, checkpoint = request.family, request.checkpoint
    layout = Layout("dense", family.dense_config(checkpoint))
    routers = {tensor.name for tensor in family.sliced(checkpoint)}
    handled = expert_tensors(checkpoint, family, request.layers) | routers
    layout.add_rest(checkpoint, handled, rename=family.dense_name)
    for layer in request.layers:
        plan, parts = request.plans[layer.name], family.dense_parts(layer.name)
        layout.add_experts(checkpoint, family, layer, [parts], [plan.groups[0].members], {})
        layout.merged[layer.name, 0] = parts
    return layout


def add_rest(layout: Layout, request: Request, changed: set[str]) -> None:
    """Everything but the experts, and the routers of some layers, as it is."""
    family, checkpoint = request.family, request.checkpoint
    handled = expert_tensors(checkpoint, family, request.layers)
    handled |= {
        tensor.name for tensor in family.sliced(checkpoint) if any(name in changed for name, _ in tensor.pieces)
    }
    handled |= {name for name, layer in family.numbers(checkpoint).items() if layer in changed}
    layout.add_rest(checkpoint, handled)


def cut_routers(layout: Layout, request: Request, layer: MoELayer, kept: dict[str, tuple[int, ...]]) -> None:
    """The tensors of a layer that have an entry per expert, with those that stay; one of several layers only once."""
    family, checkpoint = request.family, request.checkpoint
    for tensor in family.sliced(checkpoint):
        if tensor.pieces[0][0] == layer.name:
            layout.add_cut(checkpoint, tensor, kept)
    for name, owner in family.numbers(checkpoint).items():
        if owner == layer.name:
            layout.add_renumbered(checkpoint, name, layer.name, kept[layer.name])


def fill(layout: Layout, request: Request, layer: MoELayer, parts: list[tuple[StoredPart, ...]]) -> None:
    """Say of every stored expert of a layer whether it is copied or computed.

    A group in which one member has all the weight is copied, unless a refit changes it: where it stands for other
    experts too, or the router gives other gate values.
    """
    plan, rows = request.plans[layer.name], len(request.rows[layer.name])
    is_rerouted = rows < layer.num_experts or (layout.kind == "native" and len(parts) < rows)
    for index, g in enumerate(plan.stored_order):
        group = plan.groups[g]
        changes = request.refits and (is_rerouted or len(group.members) > 1)
        if group.sole is not None and not changes:
            source = request.family.parts(request.checkpoint, layer.name, group.sole)
            layout.copies.extend(copies_between(source, parts[index]))
        else:
            layout.merged[layer.name, g] = parts[index]
