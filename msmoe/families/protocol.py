"""What an architecture must say about itself: where its MoE layers are, how they route, how they are stored.

Shapes: B batch, S sequence, T tokens, E experts, D d_model, F d_ff.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from msmoe.checkpoint.reader import DTYPES, Checkpoint
from msmoe.layer.stored import BIAS
from msmoe.lowrank.shapes import FactorShape

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from msmoe.layer.expert import Expert
    from msmoe.layer.routing import ExpertOutputs, Routed, Router


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer of a checkpoint, named by its module path.

    An expert has two matrices, its front, all input matrices one below the other, and its output.

    Attributes:
        dtypes: safetensors names of the dtypes of front and output; where the experts differ, of one that holds all.
        roles: of an expert's weights, as `Expert.inputs` names them, and `output`, `output_bias`.
        top_k: experts of a token.
    """

    name: str
    num_experts: int
    d_model: int
    d_ff: int
    dtypes: ExpertKeys
    roles: tuple[str, ...] = ("wi", "output")
    top_k: int = 1

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
    def matrices(self) -> tuple[str, str]:
        return self.front, self.output

    def dtype(self, matrix: str) -> str:
        """Safetensors dtype in which a stack of the experts' front or output holds every value."""
        return self.dtypes[self.matrices.index(matrix)]

    def itemsize(self, matrix: str) -> int:
        """Bytes of a value of the front or the output."""
        return DTYPES[self.dtype(matrix)].itemsize

    def shape(self, matrix: str) -> tuple[int, int]:
        """Outputs and inputs of the front or the output."""
        if matrix == self.output:
            return self.d_model, self.d_ff
        num_inputs = sum(role != "output" and not role.endswith(BIAS) for role in self.roles)
        return num_inputs * self.d_ff, self.d_model


class ExpertKeys(NamedTuple):
    """Names of an expert's two tensors, or something else that there is one of for each."""

    wi: str
    wo: str


class FactorKeys(NamedTuple):
    """Names of the four tensors of a layer's factorised matrices."""

    u: str
    v: str
    s: str
    rows: str


class Routing(NamedTuple):
    """What a router did with a batch."""

    inputs: Tensor  # (B, S, D)
    logits: Tensor  # (B, S, E) raw
    gate: Tensor  # (B, S) softmax probability of the routed expert
    dispatched: Tensor  # (B, S) bool, False where the expert was over capacity


class Family(Protocol):
    """Adapter of one architecture."""

    model_type: str
    compressed_model_type: str  # of the `exact` export

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise `UserError` for a configuration or shapes that no model can have; reads headers and maps only."""
        ...

    def layers(self, checkpoint: Checkpoint) -> tuple[MoELayer, ...]:
        """MoE layers in forward order, read from tensor names."""
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

    def expert_keys(self, layer: str, expert: int) -> ExpertKeys:
        """Tensor names of one expert."""
        ...

    def router(self, checkpoint: Checkpoint, layer: str) -> Router | None:
        """The router of a layer of any checkpoint, float32; None for one that cannot be asked without the model."""
        ...

    def router_key(self, layer: str) -> str:
        """Tensor name of the router rows (E, D)."""
        ...

    def router_bias_key(self, layer: str) -> str:
        """Tensor name of the router biases (E,), stored by few checkpoints."""
        ...

    def stacked_keys(self, layer: str) -> ExpertKeys:
        """Tensor names of a layer's experts in the `exact` export: wi (G, F, D), wo (G, D, F)."""
        ...

    def factor_keys(self, layer: str, matrix: str) -> FactorKeys:
        """Tensor names that take the place of the stacked `matrix`, `wi` or `wo`, once it is factorised."""
        ...

    def expert_map_key(self, layer: str) -> str:
        """Tensor name of the map from experts to stored groups (E,) in the `exact` export."""
        ...

    def constants_key(self, layer: str) -> str:
        """Tensor name of the mean outputs (C, D) in place of experts in the `exact` export."""
        ...

    def dense_keys(self, layer: str) -> ExpertKeys:
        """Tensor names of the one expert that a layer keeps in the `dense` export."""
        ...

    def dense_name(self, name: str) -> str:
        """Name of any other tensor in the `dense` export."""
        ...

    def exact_config(
        self,
        config: dict,
        num_groups: dict[str, int],
        factors: dict[str, dict[str, FactorShape]],
        *,
        num_rows: dict[str, int] | None = None,
        num_constants: dict[str, int] | None = None,
    ) -> dict:
        """`config.json` of the `exact` export.

        Args:
            num_groups: of every MoE layer.
            factors: layer -> `wi`, `wo` -> shape of the factors, for every factorised matrix.
            num_rows: of every layer whose router lost rows; num_constants: of every layer with mean outputs. None
                leaves what the configuration says.
        """
        ...

    def native_config(self, config: dict, num_groups: int) -> dict:
        """`config.json` of the `native` export."""
        ...

    def dense_config(self, config: dict) -> dict:
        """`config.json` of the `dense` export."""
        ...

    def code_files(self) -> tuple[Path, ...]:
        """Modelling files that travel with an `exact` checkpoint."""
        ...

    def load_model(self, path: Path, *, dtype: torch.dtype) -> Any:
        """The transformers model in evaluation mode."""
        ...

    def forward(self, model: Any, batch: dict[str, Tensor]) -> Iterator[Tensor]:
        """Run the stacks of a model over a batch of `input_ids` (B, S) and `labels` (B, S').

        Yields, before each stack runs, the mask (B, S) of the valid tokens of the routers inside it.
        """
        ...

    def routers(self, model: nn.Module) -> dict[str, nn.Module]:
        """Layer name -> router module."""
        ...

    def routing(self, inputs: tuple, outputs: tuple) -> Routing:
        """Read a router's forward hook."""
        ...

    def listen(self, model: nn.Module, hear: Callable[[str, Routed], None]) -> ExitStack:
        """Call `hear` with a layer's name and its routing whenever it runs, until the returned stack is closed."""
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


MATRICES = ExpertKeys._fields  # wi, wo


def load_stored_expert(family: Family, checkpoint: Checkpoint, layer: str, index: int) -> Expert:
    """The expert stored at `index` of a layer, float32; factors are multiplied out.

    Args:
        checkpoint: an original, `native` or `exact` checkpoint.

    Raises:
        UserError: for NaN and infinite values, naming the tensor.
    """
    from msmoe.layer.expert import switch_expert

    if checkpoint.model_type != family.compressed_model_type:
        return load_expert(family, checkpoint, layer, index)
    matrices = []
    for matrix, key in zip(MATRICES, family.stacked_keys(layer), strict=True):
        if key in checkpoint:
            matrices.append(checkpoint.read_finite(key, index=index))
            continue
        *factors, rows = family.factor_keys(layer, matrix)
        u, v, s = (checkpoint.read_finite(name, index=index) for name in factors)
        matrices.append((u @ v).index_add(0, checkpoint.read(rows, index=index).long(), s))
    return switch_expert(*matrices)


def load_expert(family: Family, checkpoint: Checkpoint, layer: str, expert: int) -> Expert:
    """One expert's weights in float32; NaN and infinite values raise `UserError` naming the tensor."""
    from msmoe.layer.expert import switch_expert

    keys = family.expert_keys(layer, expert)
    return switch_expert(checkpoint.read_finite(keys.wi), checkpoint.read_finite(keys.wo))
