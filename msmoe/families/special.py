"""What the few decoder families do otherwise that do not call an experts module with tokens, choices and weights.

`Calls` serves all others.

Shapes: T tokens, K chosen experts of a token, E experts, D d_model.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

GATE_UP, OUTPUT = ("gate", "up"), ("output",)


class Held(NamedTuple):
    """What a parameter of an experts module holds: roles, and how they lie; see `StoredPart`."""

    roles: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False


class Choice(NamedTuple):
    """What a listener hears: inputs (T, D) of the experts, experts (T, K), weights (T, K)."""

    inputs: Tensor
    experts: Tensor
    weights: Tensor


class Calls:
    """Families whose experts module is called as `experts(hidden_states, chosen, weights)`.

    Attributes:
        hears_router: whether the choice is heard at the output of the router module, in place of the experts' call.
        repeats: whether the experts are called with every token once for each of them, the weights in the inputs.
        why_no_router: why a router cannot be asked about tokens alone; "" where it can.
    """

    hears_router = False
    repeats = False
    why_no_router = ""

    def is_experts(self, module: nn.Module) -> bool:
        """Whether a module holds the experts of a block."""
        if hasattr(module, "is_concatenated") and hasattr(module, "_apply_gate"):  # @use_experts_implementation
            return True
        return (
            type(module).__name__.endswith("Experts") and len(inspect.signature(type(module).forward).parameters) == 4
        )

    def block(self, experts: str) -> str:
        """Path of the block around an experts module."""
        return experts.rpartition(".")[0]

    def held(self, experts: nn.Module) -> dict[str, Held]:
        """Parameter of an experts module -> what it holds."""
        transposed = getattr(experts, "is_transposed", False)
        interleaved = not getattr(experts, "is_concatenated", True)
        front = (("up_proj", ("up",)),) if not getattr(experts, "has_gate", True) else (("gate_up_proj", GATE_UP),)
        held = {}
        for name, roles in (*front, ("down_proj", OUTPUT)):
            between = interleaved and len(roles) > 1
            held[name] = Held(roles, transposed, between)
            held[name + "_bias"] = Held(tuple(role + "_bias" for role in roles), False, between)
        return held

    def activate(self, experts: nn.Module, *pre_activations: Tensor) -> Tensor:
        """Hidden activations (T, F) of an experts module, of pre-activations (T, F) by role."""
        import torch

        if len(pre_activations) == 1:
            return experts.act_fn(*pre_activations)
        gate, up = pre_activations
        if not hasattr(experts, "_apply_gate"):
            return experts.act_fn(gate) * up
        between = not getattr(experts, "is_concatenated", True)
        return experts._apply_gate(torch.stack([gate, up], -1).flatten(-2) if between else torch.cat([gate, up], -1))

    def activates(self, experts: nn.Module) -> bool:
        """Whether an expert is a feed-forward network: a hidden activation stands between its matrices."""
        return True

    def choice(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Choice:
        """Read the call of an experts module, or of a router if `hears_router`."""
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).args
        return Choice(bound[1], bound[2], bound[3])

    def renumbered(self, table: Tensor, kept: Sequence[int], num_experts: int) -> Tensor:
        """A tensor of expert numbers after only some experts are left."""
        raise NotImplementedError


class Dbrx(Calls):
    """DBRX: the experts lie one below the other in matrices (E F, D)."""

    def held(self, experts: nn.Module) -> dict[str, Held]:
        return {"mlp.w1": Held(("gate",)), "mlp.v1": Held(("up",)), "mlp.w2": Held(OUTPUT, transposed=True)}

    def activate(self, experts: nn.Module, *pre_activations: Tensor) -> Tensor:
        gate, up = pre_activations
        return experts.mlp.activation_fn(gate) * up


class Llama4(Calls):
    """Llama 4: the experts get all tokens E times over, scaled by a score that is 0 off the chosen expert."""

    hears_router = True
    repeats = True
    why_no_router = "its weights multiply what goes into the experts"

    def is_experts(self, module: nn.Module) -> bool:
        return type(module).__name__ == "Llama4TextExperts"

    def held(self, experts: nn.Module) -> dict[str, Held]:
        return {"gate_up_proj": Held(GATE_UP, transposed=True), "down_proj": Held(OUTPUT, transposed=True)}

    def choice(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Choice:
        import torch

        scores, chosen = output[0].topk(module.top_k, dim=-1)
        return Choice(args[0].reshape(-1, args[0].shape[-1]) * scores, chosen, torch.ones_like(scores))


class JetMoe(Calls):
    """JetMoe: no experts module, but two stacks of matrices beside their router, also in the attention.

    The experts of the attention have nothing between their two matrices but the attention itself.
    """

    hears_router = True

    def is_experts(self, module: nn.Module) -> bool:
        return type(module).__name__ in ("JetMoeMoE", "JetMoeMoA")

    def block(self, experts: str) -> str:
        return experts

    def held(self, experts: nn.Module) -> dict[str, Held]:
        front = GATE_UP if self.activates(experts) else ("up",)
        return {"input_linear.weight": Held(front), "output_linear.weight": Held(OUTPUT)}

    def activates(self, experts: nn.Module) -> bool:
        return type(experts).__name__ == "JetMoeMoE"

    def activate(self, experts: nn.Module, *pre_activations: Tensor) -> Tensor:
        if not self.activates(experts):
            raise ValueError("experts of an attention have no hidden activation of their own")
        gate, up = pre_activations
        return experts.activation(gate) * up

    def choice(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Choice:
        top, chosen = output[-1].topk(module.top_k, dim=-1)
        return Choice(args[0], chosen, top.softmax(-1))


class DeepseekV4(Calls):
    """DeepSeek-V4: layers that choose by a table token -> K numbers of experts."""

    def renumbered(self, table: Tensor, kept: Sequence[int], num_experts: int) -> Tensor:
        """The new numbers; in the place of one that is gone, the first kept expert that the token does not have yet."""
        import torch

        new = torch.full((num_experts,), -1, dtype=table.dtype)
        new[torch.tensor(kept)] = torch.arange(len(kept), dtype=table.dtype)
        numbers = new[table.long()]
        for column in range(numbers.shape[1]):
            taken = torch.zeros(len(numbers), len(kept) + 1, dtype=torch.bool).scatter_(
                1, numbers.long() % (len(kept) + 1), True
            )
            free = (~taken[:, :-1]).int().argmax(-1).to(table.dtype)
            numbers[:, column] = torch.where(numbers[:, column] < 0, free, numbers[:, column])
        return numbers


SPECIAL: Mapping[str, Calls] = {
    "DbrxExperts": Dbrx(), "Llama4TextExperts": Llama4(), "JetMoeMoE": JetMoe(), "DeepseekV4Experts": DeepseekV4()
}  # fmt: skip
EXPERT_NUMBERS = "tid2eid"  # buffers that hold numbers of experts as values

REFUSED = {
    "nllb-moe": "transformers 5.24 hands the one-hot choice to experts that make it one-hot again, so that experts 0 "
    "and 1 get all tokens: nothing that it computes can be trusted",
    "doge": "it has no router over tokens: single neurons are looked up by product keys",
    "vitpose_backbone": "it has no router over tokens: the data set chooses the expert",
}


def special_of(model: nn.Module) -> Calls:
    """What a model does otherwise, found by the classes in it."""
    kinds = {type(module).__name__ for module in model.modules()}
    return next((special for kind, special in SPECIAL.items() if kind in kinds), Calls())
