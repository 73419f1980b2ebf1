"""Hear how the MoE blocks of a running model route: hooks where the experts are called, and at the router's weight.

The call of the experts comes after scores, groups, biases, normalising and scaling, whatever the router, and before
transformers chooses between its implementations (eager, grouped and batched products).

Shapes: T tokens, K chosen experts of a token, E experts, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from msmoe.families.blocks import Block
from msmoe.layer.routing import Routed

if TYPE_CHECKING:
    from torch import Tensor, nn

Hear = Callable[[str, Routed], None]


def listen_to(model: nn.Module, blocks: Sequence[Block], hear: Hear) -> ExitStack:
    """Call `hear` with a block's name and its routing whenever its experts run, until the returned stack is closed.

    Everything that is handed on is detached.
    """
    stack = ExitStack()
    for block in blocks:
        stack.enter_context(listen_to_block(model, block, hear))
    return stack


def listen_to_block(model: nn.Module, block: Block, hear: Hear) -> ExitStack:
    """The hooks of one block."""
    seen: dict[str, Tensor] = {}
    owner = model.get_submodule(block.router.rpartition(".")[0]) if block.router else None

    def remember(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        seen["inputs"] = flat(given.detach())

    def tell(module: nn.Module, args: tuple, kwargs: dict, output: Any = None) -> None:
        choice = block.special.choice(module, args, kwargs, output)
        inputs, experts, weights = (tensor.detach() for tensor in choice)
        router_inputs = seen.pop("inputs", inputs)
        experts, dispatched = real_choices(experts.long(), weights, block)
        weights = weights if dispatched is None else weights * dispatched
        logits = raw_logits(router_inputs, owner, block)
        hear(block.name, Routed(flat(inputs), experts, weights, logits, router_inputs, dispatched))

    stack = ExitStack()
    remembered = [model.get_submodule(block.name), *([owner] if owner is not None else [])]
    for module in remembered:
        stack.callback(module.register_forward_pre_hook(remember, with_kwargs=True).remove)
    if block.special.hears_router:
        router = model.get_submodule(f"{block.name}.router")
        stack.callback(router.register_forward_hook(tell, with_kwargs=True).remove)
    else:
        experts = model.get_submodule(block.experts)
        stack.callback(experts.register_forward_pre_hook(tell, with_kwargs=True).remove)
    return stack


def flat(tensor: Tensor) -> Tensor:
    """Tokens (T, D) of a batch (..., D)."""
    return tensor.reshape(-1, tensor.shape[-1])


def raw_logits(router_inputs: Tensor, owner: nn.Module | None, block: Block) -> Tensor:
    """Scores (T, E) float32 before softmax, sigmoid and selection biases; (T, 0) where no weight makes them."""
    if owner is None:
        return router_inputs.new_zeros(len(router_inputs), 0).float()
    logits = router_inputs.float() @ owner.weight.detach().float().T
    bias = getattr(owner, "bias", None)
    return (logits if bias is None else logits + bias.detach().float())[:, : block.num_experts]


def real_choices(experts: Tensor, weights: Tensor, block: Block) -> tuple[Tensor, Tensor | None]:
    """Choices (T, K) with an expert for every one, and which of them are experts; None where all always are.

    Routers with rows that are no experts (identities, skips) choose these too. In their place stand experts that the
    token did not choose, lowest first, so that a token's choices still differ.
    """
    import torch

    if not any(axis.tail for axis in block.per_expert.values()):
        return experts, None
    real = (experts < block.num_experts) & (weights != 0)
    if bool(real.all()):
        return experts, real
    taken = torch.zeros(len(experts), block.num_experts + 1, dtype=torch.bool, device=experts.device)
    taken.scatter_(1, torch.where(real, experts, block.num_experts), True)
    free = taken[:, :-1].int().argsort(-1, stable=True)
    return torch.where(real, experts, free.gather(1, (~real).cumsum(-1).sub(1).clamp_min(0))), real
