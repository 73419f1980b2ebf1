"""ZipIt (arXiv 2305.03053): join the most correlated hidden units of several experts until one expert is left.

Unlike an alignment it may join two units of the same expert. With the n F units of the members in clusters,
wi* = M [wi_1; ...; wi_n] averages the rows of a cluster, the rows of M sum to 1, and
wo* = [w_1 wo_1 | ... | w_n wo_n] U adds its columns up: equal units joined anywhere keep sum_i w_i f_i exactly.
Of gated experts all input matrices are averaged so, and biases likewise.
(Averaging the columns too would halve the output of two equal units of one expert.)

Shapes: T tokens, F d_ff, D d_model, n members, N = n F units, K clusters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from msmoe.layer.expert import Expert

BLOCK = 512
MAX_UNITS = 12288  # joined at once: their similarities take 600 MB
MAX_MEMBERS = 62  # owners of a cluster are bits of an int64
CONSTANT = 1e-12  # a variance below this share of the mean square is rounding


@dataclass(frozen=True)
class Zipped:
    """How units were joined.

    Attributes:
        enough_tokens: False with fewer than two tokens: the member of largest weight was returned.
        num_joined: units that gave up their place to another one.
        num_joined_within: those among them whose cluster holds another unit of their own expert.
        largest_cluster: units in the largest cluster.
    """

    enough_tokens: bool
    num_joined: int
    num_joined_within: int
    largest_cluster: int


def zip_experts(
    members: Sequence[Expert],
    weights: Sequence[float],
    inputs: Tensor,
    token_weights: Tensor | None = None,
    *,
    within: bool = True,
    damping: float = 0.3,
) -> tuple[Expert, Zipped]:
    """Zip the hidden units of several experts into one expert.

    Similar are units with correlated activations; see `similarities` for units that are constant on the tokens, and
    `join_most_similar` for the order of joins. Members of weight 0 are left out. All members are zipped at once if
    they have at most 12288 units; more are zipped in consecutive parts that fit, and the results likewise.
    Correlation ignores the scale of a unit, the average of rows does not: see `align.canonical_scale`.

    Args:
        members: experts of one shape, in any neuron order.
        weights: their weights, summing to 1.
        inputs: (T, D) tokens.
        token_weights: (T,) tokens that each one stands for, 1 by default.
        within: allow units of one expert to join. If not, members are zipped two by two, in the order given, and a
            cluster holds exactly one unit of each.
        damping: factor in [0, 1] for positive similarities of joined units, against clusters that swallow everything.

    Returns:
        The zipped expert in the members' dtype, and how it came about. A single member is returned as it is.

    Raises:
        ValueError: if `damping` is outside [0, 1].
    """
    if not 0 <= damping <= 1:
        raise ValueError(f"damping must be in [0, 1], got {damping}")
    counts = torch.ones(len(inputs), dtype=torch.float64) if token_weights is None else token_weights.double()
    used = [i for i, weight in enumerate(weights) if weight > 0]
    members, weights = [members[i] for i in used], [weights[i] for i in used]
    enough_tokens = int((counts > 0).sum()) >= 2
    if len(members) == 1 or not enough_tokens:
        return members[weights.index(max(weights))], Zipped(enough_tokens, 0, 0, 1)

    clusters = zip_units(members, weights, inputs, counts, within=within, damping=damping)
    num_units = members[0].num_neurons
    distinct = sum(len(part.unique()) for part in clusters.split(num_units))
    report = Zipped(True, len(clusters) - num_units, len(clusters) - distinct, int(clusters.bincount().max()))
    return assemble(members, weights, clusters), report


def assemble(members: Sequence[Expert], weights: Sequence[float], clusters: Tensor) -> Expert:
    """Build the expert whose unit k stands for the units of cluster k.

    Args:
        weights: positive, of any sum s: the result is one expert for sum_i (w_i / s) f_i.
        clusters: (N,) int64 of all members' units, each in 0..K-1.
    """
    first, num_clusters = members[0], int(clusters.max()) + 1
    num_units, width = first.num_neurons, len(first.output)
    empty = lambda *shape: torch.zeros(shape, dtype=torch.float64)
    inputs = {role: empty(num_clusters, *tensor.shape[1:]) for role, tensor in first.inputs.items()}
    output_KD, share_K, bias = empty(num_clusters, width), empty(num_clusters), empty(width)
    for expert, weight, part in zip(members, weights, clusters.split(num_units), strict=True):
        share = weight / sum(weights)
        share_K += share * part.bincount(minlength=num_clusters).double()
        for role, tensor in expert.inputs.items():
            inputs[role].index_add_(0, part, tensor.double(), alpha=share)
        output_KD.index_add_(0, part, expert.output.T.double(), alpha=share)
        if expert.output_bias is not None:
            bias.add_(expert.output_bias, alpha=share)
    averaged = [t / (share_K[:, None] if t.ndim == 2 else share_K) for t in inputs.values()]
    joined = [*averaged, output_KD.T, bias][: len(first.tensors)]
    return first.like([t.to(w.dtype).contiguous() for t, w in zip(joined, first.tensors, strict=True)])


def zip_units(
    members: Sequence[Expert], weights: Sequence[float], inputs: Tensor, counts: Tensor, *, within: bool, damping: float
) -> Tensor:
    """Join all units (N,) into F clusters, numbered in the order of their first units; parts compose."""
    num_units = members[0].num_neurons
    if len(members) == 1:
        return torch.arange(num_units)
    at_once = min(MAX_MEMBERS, max(2, MAX_UNITS // num_units)) if within else 2
    if len(members) <= at_once:
        owners = torch.arange(len(members)).repeat_interleave(num_units)
        similarity = similarities(members, inputs, counts)
        if not within:
            similarity.masked_fill_(owners == owners[:, None], -torch.inf)
        return join_most_similar(similarity, owners, num_units, damping=damping)

    options = {"within": within, "damping": damping}
    parts, zipped, sums = [], [], []
    for start in range(0, len(members), at_once):
        chunk, chunk_weights = members[start : start + at_once], weights[start : start + at_once]
        parts.append(zip_units(chunk, chunk_weights, inputs, counts, **options))
        zipped.append(assemble(chunk, chunk_weights, parts[-1]))
        sums.append(sum(chunk_weights))
    outer = zip_units(zipped, sums, inputs, counts, **options)
    return torch.cat([labels[part] for labels, part in zip(outer.split(num_units), parts, strict=True)])


def similarities(members: Sequence[Expert], inputs: Tensor, counts: Tensor) -> Tensor:
    """Similarity (N, N) of all units, float32: the correlation of their activations over the tokens.

    A unit that is constant on the tokens has no correlation. Two of them compare by the cosine of their weights, the
    mean of those of the rows of each input matrix and of the output columns; one of them and a unit that varies are
    placed 3 below the cosine, so that they join when nothing else is left to join.
    """
    all_units = joined_units(members)
    num_units = all_units.num_neurons
    share = counts / counts.sum()
    blocks = list(zip(inputs.split(BLOCK), share.split(BLOCK), strict=True))
    mean, square = (torch.zeros(num_units, dtype=torch.float64) for _ in range(2))
    for x_TD, share_T in blocks:
        h_TN = all_units.hidden(x_TD).double()
        mean += share_T @ h_TN
        square += share_T @ h_TN.square_()
    variance = square - mean.square()
    constant = variance <= CONSTANT * square
    scale = torch.where(constant, 0.0, variance.clamp(min=0).rsqrt()).float()

    similarity = torch.zeros(num_units, num_units)
    for x_TD, share_T in blocks:
        h_TN = all_units.hidden(x_TD).sub_(mean.float()).mul_(scale).mul_(share_T.sqrt().float()[:, None])
        similarity.addmm_(h_TN.T, h_TN)
    features = all_units.features
    direction = torch.cat([torch.nn.functional.normalize(rows, dim=1) for rows in features], dim=1)
    direction /= len(features) ** 0.5
    for units in constant.nonzero().flatten().split(BLOCK):
        cosine = direction[units] @ direction.T
        cosine[:, ~constant] -= 3.0
        similarity[units] = cosine
        similarity[:, units] = cosine.T
    return similarity


def joined_units(members: Sequence[Expert]) -> Expert:
    """The units (N,) of all members side by side, as one expert without output bias."""
    inputs = {role: torch.cat([member.inputs[role] for member in members]) for role in members[0].inputs}
    output = torch.cat([member.output.T for member in members]).T
    return replace(members[0], inputs=inputs, output=output, output_bias=None)


def join_most_similar(similarity: Tensor, owners: Tensor, num_clusters: int, *, damping: float) -> Tensor:
    """Join the two most similar clusters until `num_clusters` remain.

    A cluster is as similar to another one as the less similar of the two that it was joined from (complete linkage,
    as in the paper's code). The new similarity, if positive, is multiplied by `damping` when the two hold units of
    the same expert. (The paper's code damps all joined units, of any expert: then n > 2 copies of one expert would
    not find one another.) Either way similarities only fall, so a best partner found earlier is an upper bound, and is
    searched again only when it comes up and no longer holds.

    Args:
        similarity: (N, N) float32, symmetric; overwritten.
        owners: (N,) member of each unit, below 62.

    Returns:
        Clusters (N,) int64, numbered in the order of their first units; ties go to the lowest units.
    """
    matrix = similarity.numpy()
    np.fill_diagonal(matrix, -np.inf)
    held = np.left_shift(1, owners.numpy())  # a bit for each expert that has a unit in the cluster
    into = np.arange(len(matrix))
    partner = matrix.argmax(1)
    best = matrix[into, partner]
    for _ in range(len(matrix) - num_clusters):
        while matrix[i := best.argmax(), partner[i]] != best[i]:
            partner[i] = matrix[i].argmax()
            best[i] = matrix[i, partner[i]]
        kept, gone = min(i, partner[i]), max(i, partner[i])
        row = np.minimum(matrix[kept], matrix[gone])
        held[kept] |= held[gone]
        row[(row > 0) & (held & held[kept] != 0)] *= damping
        matrix[kept] = matrix[:, kept] = row
        matrix[gone] = matrix[:, gone] = best[gone] = -np.inf
        partner[kept] = row.argmax()
        best[kept] = row[partner[kept]]
        into[gone] = kept
    while (into != into[into]).any():
        into = into[into]
    return torch.from_numpy(into).unique(return_inverse=True)[1]
