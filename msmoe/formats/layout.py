"""Layout of the output: which tensors it holds and where each comes from, before anything is computed.

Shapes: E experts, G groups, D d_model, F d_ff.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from msmoe.checkpoint.reader import Checkpoint, TensorSpec, wider
from msmoe.layer.stored import Place, StoredPart

if TYPE_CHECKING:
    from msmoe.families.axes import SlicedTensor
    from msmoe.families.protocol import Family, MoELayer
    from msmoe.lowrank.shapes import LayerFactors


class Copy(NamedTuple):
    """A place in the output that is filled with unchanged bytes of a place in the input."""

    target: Place
    source: Place


class Cut(NamedTuple):
    """A tensor with an entry per expert, of which those of some experts of its layers stay, in the order given."""

    tensor: SlicedTensor
    kept: Mapping[str, tuple[int, ...]]


class Renumbered(NamedTuple):
    """A tensor that holds numbers of a layer's experts as values, after only some of them are left."""

    tensor: str
    layer: str
    kept: tuple[int, ...]


@dataclass
class Layout:
    """Layout of an output checkpoint.

    Attributes:
        kind: the export: `exact`, `native` or `dense`.
        config: content of `config.json`.
        tensors: every tensor of the output, in order.
        copies: places filled with unchanged bytes.
        merged: (layer, position in the plan's groups) -> where an expert to be computed goes.
        routers: layer -> tensor of the router rows to be computed (`native`).
        cut: tensors of routers, and what goes with them, that lose the entries of experts.
        renumbered: tensors that name experts by number.
        maps: layer -> tensor of the map from router rows to stored groups (`exact`).
        constants: layer -> tensor of the mean outputs (C, D) in place of experts (`exact`).
        indices: tensors that hold indices, not weights.
        dropped: input tensors that the output does without -> why.
    """

    kind: str
    config: dict
    tensors: list[TensorSpec] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    merged: dict[tuple[str, int], tuple[StoredPart, ...]] = field(default_factory=dict)
    routers: dict[str, str] = field(default_factory=dict)
    cut: list[Cut] = field(default_factory=list)
    renumbered: list[Renumbered] = field(default_factory=list)
    maps: dict[str, str] = field(default_factory=dict)
    constants: dict[str, str] = field(default_factory=dict)
    indices: set[str] = field(default_factory=set)
    dropped: dict[str, str] = field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        """Weights of the output; expert maps and row indices are no parameters."""
        return sum(spec.num_parameters for spec in self.tensors if spec.name not in self.indices)

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.tensors)

    @property
    def num_dropped(self) -> dict[str, int]:
        """Why input tensors are left out -> how many."""
        return dict(Counter(self.dropped.values()))

    def add_rest(
        self, checkpoint: Checkpoint, handled: set[str], *, rename: Callable[[str], str] = lambda name: name
    ) -> None:
        """Everything that belongs to no expert, and to no router that changes, as it is."""
        for name in checkpoint:
            if name not in handled and name not in self.dropped:
                spec = checkpoint.spec(name)
                self.tensors.append(TensorSpec(rename(name), spec.dtype, spec.shape))
                self.copies.append(Copy(Place(rename(name)), Place(name)))

    def add_cut(self, checkpoint: Checkpoint, tensor: SlicedTensor, kept: Mapping[str, tuple[int, ...]]) -> None:
        """A tensor with the entries of some experts."""
        spec = checkpoint.spec(tensor.name)
        shape = tensor.shape(spec.shape, {layer: len(experts) for layer, experts in kept.items()})
        self.tensors.append(TensorSpec(tensor.name, spec.dtype, shape))
        self.cut.append(Cut(tensor, {layer: kept[layer] for layer, _ in tensor.pieces}))

    def add_renumbered(self, checkpoint: Checkpoint, name: str, layer: str, kept: tuple[int, ...]) -> None:
        """A tensor of expert numbers that become others."""
        self.tensors.append(checkpoint.spec(name))
        self.renumbered.append(Renumbered(name, layer, kept))

    def add_map(self, name: str, layer: MoELayer, num_rows: int) -> None:
        """The map from router rows to stored groups."""
        self.maps[layer.name] = name
        self.indices.add(name)
        self.tensors.append(TensorSpec(name, "I64", (num_rows,)))

    def add_constants(self, name: str, layer: MoELayer, num_constants: int) -> None:
        """The mean outputs that stand in the place of experts."""
        self.constants[layer.name] = name
        self.tensors.append(TensorSpec(name, layer.dtype(layer.output), (num_constants, layer.d_model)))

    def add_experts(
        self,
        checkpoint: Checkpoint,
        family: Family,
        layer: MoELayer,
        parts: Sequence[tuple[StoredPart, ...]],
        sources: Sequence[Sequence[int]],
        factors: LayerFactors,
    ) -> None:
        """The tensors of a layer's experts, dense or factorised, one expert after the other.

        Args:
            parts: of each stored expert.
            sources: of each stored expert, the experts of the input that it comes from.
            factors: matrix -> shape of the factors in its place.
        """
        named: set[str] = set()
        matrix_of = {role: matrix for matrix, roles in layer.matrices.items() for role in roles}
        for index, group in enumerate(parts):
            for part in group:
                matrix = matrix_of.get(part.roles[0], "")
                if matrix in factors:
                    if matrix not in named:
                        self._add_factors(checkpoint, family, layer, matrix, len(parts), factors)
                        named.add(matrix)
                    continue
                for spec in specs_of(checkpoint, family, layer, part, sources[index], len(parts)):
                    if spec.name not in named:
                        self.tensors.append(spec)
                        named.add(spec.name)
        for target, source in family.behind(checkpoint, layer.name, len(parts)):
            for spec in specs_of(checkpoint, family, layer, target, sources[0], len(parts)):
                if spec.name not in named:
                    self.tensors.append(spec)
                    named.add(spec.name)
            self.copies.extend(map(Copy, target.places, source.places))

    def add_stored(
        self,
        checkpoint: Checkpoint,
        family: Family,
        layer: MoELayer,
        parts: Sequence[tuple[StoredPart, ...]],
        factors: LayerFactors,
    ) -> None:
        """The two matrices of the experts of an `exact` checkpoint: as they are stored there, or factorised."""
        for matrix, roles in layer.matrices.items():
            if matrix in factors:
                self._add_factors(checkpoint, family, layer, matrix, len(parts), factors)
                continue
            places = [
                place for group in parts for part in group if set(part.roles) <= set(roles) for place in part.places
            ]
            self.tensors.extend(checkpoint.spec(name) for name in dict.fromkeys(place.tensor for place in places))

    def _add_factors(
        self,
        checkpoint: Checkpoint,
        family: Family,
        layer: MoELayer,
        matrix: str,
        num_groups: int,
        factors: LayerFactors,
    ) -> None:
        """The four tensors of a factorised matrix of all stored experts."""
        (num_outputs, num_inputs), dtype = layer.shape(matrix), layer.dtype(matrix)
        rank, num_rows = factors[matrix]
        names = family.factor_keys(checkpoint, layer.name, matrix)
        self.tensors.append(TensorSpec(names.u, dtype, (num_groups, num_outputs, rank)))
        self.tensors.append(TensorSpec(names.v, dtype, (num_groups, rank, num_inputs)))
        self.tensors.append(TensorSpec(names.s, dtype, (num_groups, num_rows, num_inputs)))
        self.tensors.append(TensorSpec(names.rows, "I32", (num_groups, num_rows)))
        self.indices.add(names.rows)


def copies_between(source: Sequence[StoredPart], target: Sequence[StoredPart]) -> list[Copy]:
    """Byte copies of an expert from one place to another of the same form."""
    by_roles = {part.roles: part for part in source}
    return [copy for part in target for copy in map(Copy, part.places, by_roles[part.roles].places)]


def specs_of(
    checkpoint: Checkpoint, family: Family, layer: MoELayer, part: StoredPart, experts: Sequence[int], count: int
) -> list[TensorSpec]:
    """The output's tensors that a part of a stored expert lies in.

    A stack has the dtype that holds the values of all experts of the layer; a tensor of one expert that of its members.

    Args:
        experts: of the input, that the stored expert comes from; count: stored experts of the layer.
    """
    given = [next(p for p in family.parts(checkpoint, layer.name, e) if p.roles == part.roles) for e in experts]
    entries = count + part.behind
    if part.encoding != "plain" or part.companions or part.rows:
        specs = []
        for target, source in zip(part.places, given[0].places, strict=True):
            spec = checkpoint.spec(source.tensor)
            leading = entries * max(target.rows, 1)
            shape = spec.shape if target.index is None else (leading, *spec.shape[1:])
            specs.append(TensorSpec(target.tensor, spec.dtype, shape))
        return specs
    shape = part.shape(layer.shapes)
    if part.index is not None:
        return [TensorSpec(part.key, wider(*(layer.dtypes[role] for role in part.roles)), (entries, *shape))]
    return [TensorSpec(part.key, wider(*(checkpoint.spec(p.key).dtype for p in given)), shape)]


def expert_tensors(checkpoint: Checkpoint, family: Family, layers: Iterable[MoELayer]) -> set[str]:
    """Names of all input tensors that hold experts, and what travels with them."""
    found: set[str] = set()
    for layer in layers:
        parts = [part for e in range(layer.num_experts) for part in family.parts(checkpoint, layer.name, e)]
        parts += [source for _, source in family.behind(checkpoint, layer.name, layer.num_experts)]
        found |= {place.tensor for part in parts for place in part.places}
    return found
