"""The plan: what will be done to each layer. A small JSON file that a person can read, edit and diff."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msmoe import strict_json
from msmoe.errors import UserError
from msmoe.planning.parameters import Parameters
from msmoe.strict_json import finite, items, members, text, whole
from msmoe.tables import html_table
from msmoe.units import human_bytes

if TYPE_CHECKING:
    from msmoe.checkpoint import Checkpoint
    from msmoe.families import MoELayer

FORMAT = "msmoe-plan/1"
WEIGHT_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Group:
    """Experts that become one: `members` ascending, `weights` in the same order, summing to 1."""

    dominant: int
    members: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def sole(self) -> int | None:
        """The member that alone has weight, if there is one."""
        return next((m for m, w in zip(self.members, self.weights, strict=True) if w == 1), None)

    def __str__(self) -> str:
        others = ",".join(str(m) for m in self.members if m != self.dominant)
        return f"{self.dominant}<{others}" if others else str(self.dominant)


@dataclass(frozen=True)
class Routes:
    """Routing of a compressed layer.

    Attributes:
        rows: experts whose router rows stay, ascending.
        targets: of each row, the stored group, or the number of groups plus a position in `constants`.
        constants: experts in whose place their mean output is stored.
    """

    rows: tuple[int, ...]
    targets: tuple[int, ...]
    constants: tuple[int, ...]


@dataclass(frozen=True)
class LayerPlan:
    """Groups of one layer, ordered by the usage of their dominant expert; `removed` experts belong to none."""

    num_experts: int
    groups: tuple[Group, ...]
    removed: tuple[int, ...] = ()

    @classmethod
    def identity(cls, num_experts: int) -> "LayerPlan":
        """Every expert alone in its group."""
        return cls(num_experts, tuple(Group(e, (e,), (1.0,)) for e in range(num_experts)))

    @property
    def stored_order(self) -> list[int]:
        """Positions of the groups in the order in which they are stored: by the index of their dominant expert.

        Keeping every expert thus stores the experts in their original order.
        """
        return sorted(range(len(self.groups)), key=lambda g: self.groups[g].dominant)

    def routes(self, parameters: Parameters) -> Routes:
        """What the router of the compressed layer chooses among, and where its choices lead.

        Args:
            parameters: of the plan; `others` and `routing` decide.
        """
        mapping = self.expert_map
        if parameters.routing == "dominant":
            rows = sorted(group.dominant for group in self.groups)
            return Routes(tuple(rows), tuple(mapping[e] for e in rows), ())
        if parameters.others == "mean-output":
            places = {e: len(self.groups) + i for i, e in enumerate(self.removed)}
            rows = range(self.num_experts)
            return Routes(tuple(rows), tuple(places.get(e, mapping[e]) for e in rows), self.removed)
        rows = [e for e in range(self.num_experts) if mapping[e] >= 0]
        return Routes(tuple(rows), tuple(mapping[e] for e in rows), ())

    @property
    def expert_map(self) -> list[int]:
        """Expert -> index of its group as stored (E,); -1 for a removed expert."""
        mapping = [-1] * self.num_experts
        for index, g in enumerate(self.stored_order):
            for member in self.groups[g].members:
                mapping[member] = index
        return mapping


@dataclass(frozen=True)
class Plan:
    """What will be done to a checkpoint. Layers not named are copied.

    `notes` say how a layer's plan was found, `kept` what the experts of the layers left as they are take, in bytes.
    """

    method: str
    parameters: Parameters
    seed: int
    checkpoint: dict[str, str]
    stats: dict[str, Any]
    layers: dict[str, LayerPlan]
    predicted: dict[str, int] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        content = {
            "format": FORMAT,
            "method": self.method,
            "parameters": self.parameters.to_dict(),
            "seed": self.seed,
            "checkpoint": self.checkpoint,
            "stats": self.stats,
            "layers": {
                name: {
                    "num_experts": layer.num_experts,
                    "groups": [
                        {"dominant": g.dominant, "members": list(g.members), "weights": list(g.weights)}
                        for g in layer.groups
                    ],
                    "removed": list(layer.removed),
                }
                for name, layer in self.layers.items()
            },
            "predicted": self.predicted,
            **({"notes": self.notes} if self.notes else {}),
            **({"kept": self.kept} if self.kept else {}),
        }
        return json.dumps(content, indent=2) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the plan file, complete or not at all.

        Raises:
            UserError: if it cannot be written.
        """
        from msmoe.files import write_whole

        write_whole(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan file.

        Raises:
            UserError: if the file is missing, is no plan, or one of its layers contradicts itself.
        """
        content = strict_json.read_object(Path(path), "a plan file")
        if content.get("format") != FORMAT:
            raise UserError(f"{path} is not a plan of format {FORMAT}, got {strict_json.shown(content.get('format'))}")
        part = lambda name: members(content.get(name, {}), f"{path}: {name}")
        layers = members(strict_json.field(content, "layers", str(path)), f"{path}: layers")
        plan = cls(
            method=text(strict_json.field(content, "method", str(path)), f"{path}: method"),
            parameters=Parameters.from_dict(part("parameters"), f"{path}: parameters"),
            seed=whole(content.get("seed", 0), f"{path}: seed"),
            checkpoint=_parse_texts(strict_json.field(content, "checkpoint", str(path)), f"{path}: checkpoint"),
            stats=_parse_reference(part("stats"), f"{path}: stats"),
            layers={name: _parse_layer(entry, f"{path}: layers.{name}") for name, entry in layers.items()},
            predicted={name: whole(n, f"{path}: predicted.{name}") for name, n in part("predicted").items()},
            notes=_parse_texts(part("notes"), f"{path}: notes"),
            kept={name: whole(n, f"{path}: kept.{name}") for name, n in part("kept").items()},
        )
        strict_json.field(plan.checkpoint, "fingerprint", f"{path}: checkpoint")
        for name, layer in plan.layers.items():
            check_layer(name, layer)
        return plan

    def to_frame(self):
        """A pandas DataFrame, one row per (layer, expert), layers in the plan's order.

        Columns:
            layer: name of the MoE layer.
            expert: index, 0 to E - 1.
            group: dominant expert of the expert's group, 0 to E - 1 (Int64, missing for a removed expert).
            weight: of the expert in its group, 0 to 1; sums to 1 over a group, 0 for a removed expert.
            is_dominant: whether the expert is the dominant one of its group.
            removed: whether the plan takes the expert out.
        """
        import pandas as pd

        rows = []
        for name, layer in self.layers.items():
            places = {m: (g.dominant, w) for g in layer.groups for m, w in zip(g.members, g.weights, strict=True)}
            for e in range(layer.num_experts):
                group, weight = places.get(e, (None, 0.0))
                rows.append((name, e, group, weight, group == e, e in layer.removed))
        columns = ["layer", "expert", "group", "weight", "is_dominant", "removed"]
        types = {"expert": "int64", "group": "Int64", "weight": "float64", "is_dominant": "bool", "removed": "bool"}
        return pd.DataFrame(rows, columns=pd.Index(columns)).astype(types)

    def check_against(self, checkpoint: "Checkpoint", layers: "Sequence[MoELayer]") -> None:
        """Refuse a plan that was made for another checkpoint.

        Raises:
            UserError: if the fingerprint, a layer name or a number of experts differs.
        """
        if self.checkpoint.get("fingerprint") != checkpoint.fingerprint:
            raise UserError(f"the plan was made for another checkpoint than {checkpoint.path} (fingerprints differ)")
        known = {layer.name: layer.num_experts for layer in layers}
        for name, layer in self.layers.items():
            check_layer(name, layer)
            if name not in known:
                raise UserError(f"the plan names {name!r}, which is not an MoE layer of {checkpoint.path}")
            if layer.num_experts != known[name]:
                raise UserError(f"the plan counts {layer.num_experts} experts in {name}, it has {known[name]}")

    @property
    def remarks(self) -> list[str]:
        """What a print says below the layers: those kept as they are and their cost, the size, what was chosen."""
        size = self.predicted.get("bytes")
        lines = []
        for name, cost in self.kept.items():
            share = f", {cost / size:.1%} of the output" if size else ""
            lines.append(f"kept as it is: {name}, its experts take {cost:,} bytes ({human_bytes(cost)}{share})")
        target, rank = self.parameters.target_size, self.parameters.rank
        if target:
            chosen = f"rank {rank}" if rank else f"{self.parameters.experts:.4g} experts per layer on average"
            lines.append(f"the most that fits into {target:,} bytes: {chosen}")
        if size is None:
            at_most = ", at most the target where one is given"
            return [*lines, f"predicted: known once the merged experts are decomposed{at_most}"]
        return [*lines, f"predicted: {self.predicted['num_parameters']:,} parameters, {size:,} bytes "
                        f"({human_bytes(size)})"]  # fmt: skip

    def __str__(self) -> str:
        width = max((len(name) for name in self.layers), default=0)
        lines = [self.method]
        for name, layer in self.layers.items():
            groups = "  ".join(map(str, layer.groups))
            removed = f"  without {','.join(map(str, layer.removed))}" if layer.removed else ""
            lines.append(f"{name:<{width}}  {layer.num_experts:>3} -> {len(layer.groups):>3}  {groups}{removed}")
        return "\n".join([*lines, *self.remarks])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """A short table for notebooks."""
        rows = [
            (name, layer.num_experts, len(layer.groups), "  ".join(map(str, layer.groups)))
            for name, layer in self.layers.items()
        ]
        head = ("layer", "experts", "kept", "groups (dominant < members)")
        return html_table(f"Plan: {self.method}", head, rows, self.remarks)


def _parse_texts(entries: Any, where: str) -> dict[str, str]:
    return {name: text(value, f"{where}.{name}") for name, value in members(entries, where).items()}


def _parse_reference(entries: dict[str, Any], where: str) -> dict[str, Any]:
    """How the plan names its statistics."""
    for name, value in entries.items():
        if name == "parts":
            items(value, f"{where}.parts", text)
        elif value is not None:
            text(value, f"{where}.{name}")
    return entries


def _parse_layer(entry: Any, where: str) -> LayerPlan:
    content = members(entry, where)
    groups = strict_json.field(content, "groups", where)
    return LayerPlan(
        whole(strict_json.field(content, "num_experts", where), f"{where}.num_experts", least=1),
        tuple(items(groups, f"{where}.groups", _parse_group)),
        tuple(items(content.get("removed", []), f"{where}.removed", whole)),
    )


def _parse_group(entry: Any, where: str) -> Group:
    content = members(entry, where)
    dominant, named, weights = (strict_json.field(content, name, where) for name in ("dominant", "members", "weights"))
    return Group(
        whole(dominant, f"{where}.dominant"),
        tuple(items(named, f"{where}.members", whole)),
        tuple(items(weights, f"{where}.weights", finite, least=0)),
    )


def check_layer(name: str, layer: LayerPlan) -> None:
    """Check that the groups of a layer are a partition of its experts with weights that sum to 1.

    Raises:
        UserError: naming the layer and the expert or the sum that is wrong.
    """
    if not name or any(part in name for part in ("/", "\\", "..")) or not name.isprintable():
        raise UserError(f"{name!r} is not a layer name")
    seen: set[int] = set()
    if not layer.groups:
        raise UserError(f"{name}: no expert is left")
    for group in layer.groups:
        if not group.members or len(group.members) != len(group.weights):
            raise UserError(f"{name}: group of expert {group.dominant} has {len(group.members)} members and "
                            f"{len(group.weights)} weights")  # fmt: skip
        if group.dominant not in group.members:
            raise UserError(f"{name}: dominant expert {group.dominant} is not a member of its group")
        total = math.fsum(min(w, 2.0) for w in group.weights)  # no weight may be above 1; a huge one would overflow
        if not all(w >= 0 for w in group.weights) or not abs(total - 1) <= WEIGHT_TOLERANCE:
            raise UserError(f"{name}: weights of the group of expert {group.dominant} sum to {total}, not to 1")
    for e in [*(m for g in layer.groups for m in g.members), *layer.removed]:
        if not 0 <= e < layer.num_experts:
            raise UserError(f"{name}: expert {e} is out of range, experts are 0 to {layer.num_experts - 1}")
        if e in seen:
            raise UserError(f"{name}: expert {e} is named twice")
        seen.add(e)
    if len(seen) < layer.num_experts:  # never a list of all of them: the number may be anything
        missing = next(e for e in range(layer.num_experts) if e not in seen)
        raise UserError(f"{name}: expert {missing} is in no group and not removed")
