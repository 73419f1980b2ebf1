"""What a checkpoint holds, from its headers alone: MoE layers, experts, parameters and bytes per part."""

from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from msmoe.checkpoint import Checkpoint
from msmoe.families import inspectable_family_of

OF_EXPERTS = ("experts", "row indices")
INDICES = ("expert maps", "row indices")  # parts that are no parameters


@dataclass(frozen=True)
class LayerSummary:
    """One MoE layer: router rows, stored experts, their weights."""

    name: str
    num_experts: int
    num_stored: int
    d_model: int
    d_ff: int
    num_parameters: int
    num_bytes: int


@dataclass(frozen=True)
class Summary:
    """A checkpoint in numbers; `parts` maps embeddings, attention, ... to (parameters, bytes)."""

    path: str
    model_type: str
    dtypes: tuple[str, ...]
    expert_capacity: int | None
    num_parameters: int
    num_bytes: int
    parts: dict[str, tuple[int, int]]
    layers: tuple[LayerSummary, ...]

    def to_dict(self) -> dict:
        return asdict(self)

    def to_frame(self):
        """A pandas DataFrame, one row per MoE layer, in forward order.

        Columns:
            name: module path of the layer.
            num_experts: rows of the router.
            num_stored: experts stored, at most `num_experts`; fewer in a compressed checkpoint.
            d_model, d_ff: width of the model and of an expert, in neurons.
            num_parameters: parameters of the stored experts, indices not counted.
            num_bytes: bytes of the stored experts on disk.
        """
        import pandas as pd

        columns = [f.name for f in fields(LayerSummary)]
        frame = pd.DataFrame([asdict(layer) for layer in self.layers], columns=pd.Index(columns))
        return frame.astype(dict.fromkeys(columns[1:], "int64"))


def inspect(checkpoint: str | Path | Checkpoint) -> Summary:
    """Summarise an original or compressed checkpoint without reading a weight.

    Raises:
        UserError: if the folder is damaged or of an unknown architecture.
    """
    source = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint, headers_only=True)
    family = inspectable_family_of(source)
    parts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    experts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    stored = family.stored_layers(source)
    for name in source:
        spec, part = source.spec(name), family.part(name)
        inside = part in OF_EXPERTS
        owners = [experts[layer.name] for layer, _ in stored if inside and name.startswith(layer.name + ".")]
        for totals in [parts[part], *owners]:
            totals[0] += 0 if part in INDICES else spec.num_parameters
            totals[1] += spec.num_bytes
    layers = tuple(
        LayerSummary(layer.name, layer.num_experts, num_stored, layer.d_model, layer.d_ff, *experts[layer.name])
        for layer, num_stored in stored
    )
    return Summary(
        path=source.name,
        model_type=source.model_type,
        dtypes=tuple(sorted({source.spec(name).dtype for name in source if family.part(name) not in INDICES})),
        expert_capacity=source.config.get("expert_capacity"),
        num_parameters=sum(count for count, _ in parts.values()),
        num_bytes=source.num_bytes,
        parts={part: (count, size) for part, (count, size) in sorted(parts.items(), key=lambda p: -p[1][1])},
        layers=layers,
    )
