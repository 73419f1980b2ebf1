"""MergeMoE (arXiv 2510.14436): the output matrix of a merged expert from least squares.

Given the merged wi*, find the wo that comes closest to the weighted sum of the members' outputs on all tokens, every
token through every member with equal gates:

    sum_t c_t |wo h_t - sum_i w_i f_i(x_t)|^2 + ridge m |wo - wo_0|^2,    h = relu(wi* x),

where c_t are token weights, wo_0 is the weighted average of the members' wo and m the mean diagonal of
H^T diag(c) H. The paper has no ridge and collapses on few tokens; here they leave wo_0 unchanged in the directions
that they do not reach. `refit.py` solves the problem of a routed group: each token through its own expert.

Shapes: T tokens, F d_ff, D d_model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from msmoe.layer.expert import Expert
from msmoe.merge.fisher import weighted_average
from msmoe.merge.refit import solve_shifted


def least_squares_output(
    merged: Expert,
    members: Sequence[Expert],
    weights: Sequence[float],
    inputs: Tensor,
    token_weights: Tensor | None = None,
    *,
    ridge: float = 1e-6,
) -> Tensor:
    """Solve for the output matrix behind the merged inputs of an expert.

    All in float64: the ridge is below the rounding of a float32 Gram matrix. Solves in the space of tokens or of
    neurons, whichever is smaller.

    Args:
        merged: its inputs and its output bias, the members' average, are kept; its output matrix is not read.
        members: experts in the neuron order of `merged`.
        weights: their weights, summing to 1.
        inputs: (T, D) tokens.
        token_weights: (T,) tokens that each one stands for, 1 by default.
        ridge: pull to the members' averaged wo, relative to the mean square of a hidden unit.

    Returns:
        the output matrix (D, F) in the members' dtype; the weighted average of the members' if there is no token.

    Raises:
        ValueError: if `ridge` is not positive.
    """
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge}: without it fewer tokens than neurons have no solution")
    average_DF = weighted_average([member.output for member in members], weights)
    scale_T1 = torch.ones(len(inputs), 1) if token_weights is None else token_weights.sqrt()[:, None]
    x_TD = inputs.double()
    merged = merged.map(Tensor.double)
    h_TF = merged.hidden(x_TD) * scale_T1
    residual_TD = -(h_TF @ average_DF.T)
    if merged.output_bias is not None:
        residual_TD -= scale_T1 * merged.output_bias
    for member, weight in zip(members, weights, strict=True):
        residual_TD += member.map(Tensor.double)(x_TD) * (weight * scale_T1)

    shift = ridge * float(h_TF.square().sum()) / merged.num_neurons
    if len(h_TF) <= merged.num_neurons:
        change_DF = solve_shifted(h_TF @ h_TF.T, shift, residual_TD).T @ h_TF
    else:
        change_DF = solve_shifted(h_TF.T @ h_TF, shift, h_TF.T @ residual_TD).T
    return (average_DF + change_DF).to(members[0].output.dtype)
