"""Sums over the tokens of a batch, from what an MoE layer was seen to do.

Where a token has one expert, sums are float64 products of masks. Where it has several, choices are sorted by expert and
added up in float32, at most `RUN` in a row, and the runs in float64: the same to rounding, in a tenth of the time.

Shapes: T valid tokens, K chosen experts of a token, C = T K choices, E experts, D d_model.
"""

import torch
from torch import Tensor, nn

from msmoe.layer.routing import Routed

RUN = 1024  # values that are added up in float32


def routing_sums(routed: Routed, num_experts: int) -> dict[str, Tensor]:
    """Statistics of choices, router and inputs: `routed` to `input_square_sum` of the table.

    Args:
        routed: of valid tokens.
    """
    experts_TK, weights_TK = routed.experts, routed.weights.float().double()
    counts_E = count(experts_TK, num_experts)
    taken_E = counts_E if routed.dispatched is None else count(experts_TK[routed.dispatched], num_experts)
    if experts_TK.shape[1] == 1:
        sums = masked_sums(routed, weights_TK[:, 0], num_experts)
    else:
        logits_TE, x_TD = routed.logits.float(), routed.inputs.float()
        gate_mass = torch.bincount(experts_TK.flatten(), weights_TK.flatten(), minlength=num_experts)
        gram = sum((some.T @ some).double() for some in logits_TE.split(RUN)) if len(logits_TE) else None
        tokens_C = experts_TK.flatten().argsort(stable=True) // experts_TK.shape[1]
        inputs = (run_sums(values, tokens_C, counts_E) for values in (x_TD, x_TD.abs(), x_TD.square()))
        sums = {
            "gate_mass": gate_mass,
            "soft_mass": logits_TE.softmax(-1).sum(0, dtype=torch.float64),
            "router_logits_gram": torch.zeros(2 * (num_experts,), dtype=torch.float64) if gram is None else gram,
            **dict(zip(("input_sum", "input_abs_sum", "input_square_sum"), inputs, strict=True)),
        }
    return {name: value.cpu() for name, value in ({"routed": counts_E, "dispatched": taken_E} | sums).items()}


def masked_sums(routed: Routed, weights: Tensor, num_experts: int) -> dict[str, Tensor]:
    """Sums over tokens with one expert.

    Args:
        weights: (T,) float64.
    """
    chosen_TE = nn.functional.one_hot(routed.experts[:, 0], num_experts).double()
    logits_TE, x_TD = routed.logits.double(), routed.inputs.float().double()
    return {
        "gate_mass": weights @ chosen_TE,
        "soft_mass": logits_TE.softmax(-1).sum(0),
        "router_logits_gram": logits_TE.T @ logits_TE,
        "input_sum": chosen_TE.T @ x_TD,
        "input_abs_sum": chosen_TE.T @ x_TD.abs(),
        "input_square_sum": chosen_TE.T @ x_TD.square(),
    }


def count(experts: Tensor, num_experts: int) -> Tensor:
    """(E,) int64 choices of each expert."""
    return torch.bincount(experts.flatten(), minlength=num_experts)


def run_sums(values: Tensor, places: Tensor, counts: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sums of rows, expert by expert.

    Args:
        values: (N, D) float32; places: (C,) rows of it, sorted by expert.
        counts: (E,) int64 places of each expert, C in all.
        weights: (C,) float32 that rows are multiplied by.

    Returns:
        (E, D) float64.
    """
    ends_E = counts.cumsum(0)
    starts = torch.cat([ends_E - counts, torch.arange(0, len(places), RUN, device=places.device)]).unique()
    starts = starts[starts < len(places)]
    total = torch.zeros(len(counts), values.shape[1], dtype=torch.float64, device=values.device)
    if not len(starts):
        return total
    runs = nn.functional.embedding_bag(places, values, starts, mode="sum", per_sample_weights=weights)
    return total.index_add_(0, torch.searchsorted(ends_E, starts, right=True), runs.double())


def layer_output_sums(routed: Routed, outputs: Tensor, num_experts: int) -> dict[str, Tensor]:
    """Statistics of the outputs of a layer that gives nothing but one expert's output times its weight.

    Args:
        routed: of valid tokens.
        outputs: (T, D) of the layer.
    """
    expert_T, gate_T = routed.experts[:, 0], routed.weights[:, 0].float()
    gated_TD = outputs.float()
    if routed.dispatched is not None:
        taken = routed.dispatched[:, 0]
        expert_T, gate_T, gated_TD = expert_T[taken], gate_T[taken], gated_TD[taken]
    gated_norm_T = gated_TD.norm(dim=1).double()
    gate_T = gate_T.double().clamp(min=torch.finfo(torch.float32).tiny)
    norm_T = gated_norm_T / gate_T
    sums = torch.zeros(3, num_experts, dtype=torch.float64)
    sums.index_add_(1, expert_T, torch.stack([norm_T, gated_norm_T, norm_T.square()]))
    total_ED = torch.zeros(num_experts, gated_TD.shape[1], dtype=torch.float64)
    total_ED.index_add_(0, expert_T, gated_TD.double() / gate_T[:, None])
    names = ("output_norm_sum", "gated_norm_sum", "output_square_sum")
    return {**dict(zip(names, sums, strict=True)), "output_sum": total_ED}


def choice_output_sums(gated: Tensor, gates: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """Statistics of the outputs of choices that are sorted by expert.

    Args:
        gated: (C, D) outputs of the experts times their weights.
        gates: (C,) these weights; the output behind a weight of 0 is not known and counts as 0.
        counts: (E,) choices of each expert, of which the first are sorted; those beyond are not counted.
    """
    counted = int(counts.sum())
    gated_CD, gates_C = gated[:counted].float(), gates[:counted].float()
    inverse_C = torch.where(gates_C == 0, 0.0, 1 / gates_C)
    gated_norm_C = torch.linalg.vector_norm(gated_CD, dim=1).double()
    norm_C = gated_norm_C * inverse_C.abs().double()
    experts_C = torch.repeat_interleave(counts)
    norms = torch.stack([norm_C, gated_norm_C, norm_C.square()])
    sums = torch.zeros(3, len(counts), dtype=torch.float64, device=gated.device).index_add_(1, experts_C, norms)
    total_ED = run_sums(gated_CD, torch.arange(counted, device=gated.device), counts, inverse_C)
    names = ("output_norm_sum", "gated_norm_sum", "output_square_sum")
    found = {**dict(zip(names, sums, strict=True)), "output_sum": total_ED}
    return {name: value.cpu() for name, value in found.items()}
