"""What an architecture must say about itself: where its MoE layers are, how they route, how they are stored.

Shapes: B batch, S sequence, T tokens, E experts, D d_model, F d_ff.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from msmoe.checkpoint.reader import DTYPES, Checkpoint, wider
from msmoe.layer.stored import BIAS, StoredPart
from msmoe.lowrank.shapes import FactorShape

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from msmoe.families.axes import SlicedTensor
    from msmoe.layer.expert import Activation, Expert
    from msmoe.layer.routing import ExpertOutputs, Routed, Router, SoftmaxTop1


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer of a checkpoint, named by its module path.

    An expert has two matrices, its front, all input matrices one below the other, and its output.

    Attributes:
        roles: of an expert's weights, as `Expert.weights` names and orders them.
        dtypes: role -> safetensors dtype in which a stack of the experts holds every value.
        top_k: experts of a token.
        num_groups: groups in which a group-limited router keeps the same number of experts; else 1.
        merges: "" where experts can be merged, else why not.
        refits: "" where an expert's output can be solved for, else why not.
        unseen: "" where the outputs of the experts can be recorded, else why not.
        unasked: "" where the router can be asked about tokens without the model, else why not.
    """

    name: str
    num_experts: int
    d_model: int
    d_ff: int
    dtypes: Mapping[str, str] = field(hash=False)
    roles: tuple[str, ...] = ("wi", "output")
    top_k: int = 1
    num_groups: int = 1
    merges: str = ""
    refits: str = ""
    unseen: str = ""
    unasked: str = ""

    @property
    def front(self) -> str:
        """Name of an expert's front."""
        if "wi" in self.roles:
            return "wi"
        return "gate_up_proj" if "gate" in self.roles else "up_proj"

    @property
    def output(self) -> str:
        """Name of an expert's output matrix."""
        return "wo" if "wi" in self.roles else "down_proj"

    @property
    def matrices(self) -> dict[str, tuple[str, ...]]:
        """The two matrices by name, and the roles of which each consists."""
        inputs = tuple(role for role in self.roles if role != "output" and not role.endswith(BIAS))
        return {self.front: inputs, self.output: ("output",)}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight by role, outputs first."""
        wide, narrow = {"output": (self.d_model, self.d_ff)}, {"output" + BIAS: (self.d_model,)}
        return {
            role: narrow.get(role, (self.d_ff,)) if role.endswith(BIAS) else wide.get(role, (self.d_ff, self.d_model))
            for role in self.roles
        }

    def dtype(self, matrix: str) -> str:
        """Safetensors dtype in which a stack of the experts' front or output holds every value."""
        return wider(*(self.dtypes[role] for role in self.matrices[matrix]))

    def itemsize(self, matrix: str) -> int:
        """Bytes of a value of the front or the output."""
        return DTYPES[self.dtype(matrix)].itemsize

    def shape(self, matrix: str) -> tuple[int, int]:
        """Outputs and inputs of the front or the output."""
        if matrix == self.output:
            return self.d_model, self.d_ff
        return len(self.matrices[matrix]) * self.d_ff, self.d_model


class FactorKeys(NamedTuple):
    """Names of the four tensors of a layer's factorised matrices."""

    u: str
    v: str
    s: str
    rows: str


@dataclass(frozen=True)
class ExactShape:
    """What an `exact` export stores, for its configuration.

    Attributes:
        num_groups: of every MoE layer.
        factors: layer -> matrix -> shape of the factors, for every factorised matrix.
        num_rows: of every layer whose router lost rows; num_constants: of every layer with mean outputs. None leaves
            what the configuration says.
    """

    num_groups: Mapping[str, int]
    factors: Mapping[str, Mapping[str, FactorShape]]
    num_rows: Mapping[str, int] | None = None
    num_constants: Mapping[str, int] | None = None


class Routing(NamedTuple):
    """What a router did with a batch."""

    inputs: Tensor  # (B, S, D)
    logits: Tensor  # (B, S, E) raw
    gate: Tensor  # (B, S) softmax probability of the routed expert
    dispatched: Tensor  # (B, S) bool, False where the expert was over capacity


class Family(Protocol):
    """Adapter of one architecture, or of many that are alike.

    Attributes:
        exports: what can be written, the default first.
        is_causal: whether the models are decoders that predict the next token.
    """

    exports: tuple[str, ...]
    is_causal: bool

    def owns(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint, original or `exact`, is of this architecture."""
        ...

    def is_exact(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is an `exact` export."""
        ...

    def keeps_routing(self, checkpoint: Checkpoint) -> bool:
        """Whether the routers of an `exact` export have all their rows, and lead to experts alone."""
        ...

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise `UserError` for a configuration or shapes that no model can have; reads headers and maps only."""
        ...

    def layers(self, checkpoint: Checkpoint) -> tuple[MoELayer, ...]:
        """MoE layers in forward order, of an original checkpoint."""
        ...

    def stored_layers(self, checkpoint: Checkpoint) -> tuple[tuple[MoELayer, int], ...]:
        """MoE layers of an original or `exact` checkpoint, each with its number of stored experts."""
        ...

    def part(self, name: str) -> str:
        """What a tensor belongs to: experts, routers, attention, embeddings, ..."""
        ...

    def default_kept_layers(self, layers: tuple[MoELayer, ...]) -> tuple[str, ...]:
        """Layers left as they are unless the user says otherwise."""
        ...

    # experts and routers of a checkpoint, original, `native` or `exact`

    def parts(self, checkpoint: Checkpoint, layer: str, expert: int) -> tuple[StoredPart, ...]:
        """Where the weights of an expert of an original or `native` checkpoint lie."""
        ...

    def parts_of(self, checkpoint: Checkpoint, layer: str, index: int, count: int) -> tuple[StoredPart, ...]:
        """Where the expert `index` of `count` lies in a `native` export of the checkpoint."""
        ...

    def exact_parts(self, checkpoint: Checkpoint, layer: str, index: int, count: int) -> tuple[StoredPart, ...]:
        """Where the stored expert `index` of `count` lies in an `exact` export of the checkpoint, or in one itself."""
        ...

    def behind(self, checkpoint: Checkpoint, layer: str, count: int) -> list[tuple[StoredPart, StoredPart]]:
        """What lies behind the experts in their tensors: where it goes behind `count` of them, and where it lies."""
        ...

    def memory_parts(self, checkpoint: Checkpoint, layer: str, expert: int) -> tuple[StoredPart, ...]:
        """Where the weights of an expert lie among the parameters of the loaded model."""
        ...

    def load_expert(self, checkpoint: Checkpoint, layer: str, index: int) -> Expert:
        """A stored expert, float32; factors are multiplied out.

        Raises:
            UserError: for NaN and infinite values, naming the tensor.
        """
        ...

    def sliced(self, checkpoint: Checkpoint) -> tuple[SlicedTensor, ...]:
        """Every stored tensor with an entry per expert beside their weights: router rows, biases, selection biases."""
        ...

    def numbers(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Tensors that hold numbers of experts as values -> their layer."""
        ...

    def renumbered(self, checkpoint: Checkpoint, layer: str, table: Tensor, kept: Sequence[int]) -> Tensor:
        """Such a tensor after only some experts are left."""
        ...

    def router_key(self, checkpoint: Checkpoint, layer: str) -> str:
        """Tensor name of the router rows (E, D)."""
        ...

    def router(self, checkpoint: Checkpoint, layer: str) -> Router | None:
        """The router of a layer; None where it needs more than hidden states."""
        ...

    # exports

    def check_export(self, checkpoint: Checkpoint, kind: str, kept: Mapping[str, Sequence[int]]) -> None:
        """Raise `UserError` if an export cannot store a plan.

        Args:
            kept: of every MoE layer, the experts whose router rows stay.
        """
        ...

    def exact_config(self, checkpoint: Checkpoint, shape: ExactShape) -> dict:
        """`config.json` of the `exact` export."""
        ...

    def native_config(self, checkpoint: Checkpoint, num_groups: int) -> dict:
        """`config.json` of the `native` export."""
        ...

    def dense_config(self, checkpoint: Checkpoint) -> dict:
        """`config.json` of the `dense` export."""
        ...

    def dense_parts(self, layer: str) -> tuple[StoredPart, ...]:
        """Where the one expert that a layer keeps lies in the `dense` export."""
        ...

    def dense_name(self, name: str) -> str:
        """Name of any other tensor in the `dense` export."""
        ...

    def dropped(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Tensors that no export of the checkpoint takes over -> why."""
        ...

    def factor_keys(self, checkpoint: Checkpoint, layer: str, matrix: str) -> FactorKeys:
        """Tensor names that take the place of a `matrix` of all stored experts once it is factorised."""
        ...

    def expert_map_key(self, checkpoint: Checkpoint, layer: str) -> str:
        """Tensor name of the map from router rows to stored groups (E,) in the `exact` export."""
        ...

    def constants_key(self, checkpoint: Checkpoint, layer: str) -> str:
        """Tensor name of the mean outputs (C, D) in place of experts in the `exact` export."""
        ...

    def code_files(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Name -> content of the modelling files that travel with an `exact` export."""
        ...

    # the model

    def load_model(self, path: Path, *, dtype: torch.dtype) -> Any:
        """The transformers model in evaluation mode."""
        ...

    def forward(self, model: Any, batch: dict[str, Tensor]) -> Iterator[Tensor]:
        """Run the stacks of a model over a batch.

        Yields, before each stack runs, the mask (B, S) of the valid tokens of the routers inside it.
        """
        ...

    def narrow_router(
        self, model: nn.Module, layer: str, experts: Sequence[int], router: SoftmaxTop1, *, config: dict
    ) -> None:
        """Let a router of a model choose among some experts alone.

        Args:
            experts: in the order of the rows of `router`; the others are never chosen again.
            config: configuration of the export that routes like this, for the capacity of its experts.
        """
        ...

    def listen(self, model: nn.Module, hear: Callable[[str, Routed], None]) -> ExitStack:
        """Hear the routing of every MoE layer of a model until the returned stack is closed."""
        ...

    def expert_outputs(self, model: nn.Module) -> ExpertOutputs:
        """Where the outputs of the experts can be seen."""
        ...

    def layer_output(self, outputs: Any) -> Tensor:
        """Read the forward hook of an MoE layer: gate-weighted expert outputs (B, S, D), zero for dropped tokens."""
        ...

    def with_layer_output(self, outputs: Any, given: Tensor) -> Any:
        """What the hook of an MoE layer returns to hand on `given` (B, S, D) in place of the layer's output."""
        ...


def read_expert(
    checkpoint: Checkpoint,
    parts: Sequence[StoredPart],
    activation: Activation,
    *,
    factors: Mapping[str, FactorKeys] | None = None,
    roles: Mapping[str, Sequence[str]] | None = None,
    index: int = 0,
) -> Expert:
    """Read an expert from its parts, float32; a matrix that is not there is multiplied out from its factors.

    Args:
        factors: matrix -> names of its factors, and `roles` of which it consists; `index` of the expert in them.

    Raises:
        UserError: for NaN and infinite values, naming the tensor.
    """
    from msmoe.families.quantised import read_values
    from msmoe.layer.expert import Expert

    weights: dict[str, Tensor] = {}
    for part in parts:
        if part.key in checkpoint or not factors:
            weights |= part.split(read_values(checkpoint, part))
    for matrix, (*names, rows) in (factors or {}).items():
        if roles[matrix][0] not in weights:
            u, v, s = (checkpoint.read_finite(name, index=index) for name in names)
            dense = (u @ v).index_add(0, checkpoint.read(rows, index=index).long(), s)
            weights |= dict(zip(roles[matrix], dense.chunk(len(roles[matrix])), strict=True))
    output, bias = weights.pop("output"), weights.pop("output" + BIAS, None)
    return Expert(weights, output, bias, activation)


def load_expert(family: Family, checkpoint: Checkpoint, layer: str, expert: int) -> Expert:
    return family.load_expert(checkpoint, layer, expert)


load_stored_expert = load_expert
