"""Dominant experts, budgets over layers and group labels.

Every ranking has a total order: value, then layer order, then expert index. The published code thresholds with a
strict comparison (ties lose groups) and walks raw indices in its uniform mode; neither happens here.

Shapes: L layers, E experts, G groups.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

import numpy as np

from msmoe.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Budget = Literal["adaptive", "uniform"]
REAM_CAPACITY = 16


def group_counts(usage: Sequence[np.ndarray], average: float, *, budget: Budget = "adaptive") -> list[int]:
    """How many experts each layer keeps.

    `uniform` gives every layer the same number. `adaptive` is the global rule of M-SMoE (arXiv 2310.01334): every
    layer keeps its most used expert, the rest of the budget goes to the most used experts of all layers by usage
    frequency. The total is `round(average * L)` exactly, ties included. Where that is no multiple of L, `uniform`
    gives one more to the layers whose next expert is used most.

    Args:
        usage: per layer, usage frequencies (E,), or other scores as shares of their sum.
        average: experts kept per layer, on average.

    Raises:
        UserError: if the average is below 1 or above a layer's number of experts.
    """
    smallest = min(len(u) for u in usage)
    if not 1 <= average <= (smallest if budget == "uniform" else np.mean([len(u) for u in usage])):
        raise UserError(f"--experts must be between 1 and {smallest}, got {average:g}")
    total = round(Fraction(average) * len(usage))
    if budget == "uniform":
        least, extra = divmod(total, len(usage))
        following = [float(np.sort(u)[::-1][least]) if least < len(u) else -1.0 for u in usage]
        counts = [least] * len(usage)
        for layer in np.lexsort((np.arange(len(usage)), -np.array(following)))[:extra]:
            counts[layer] += 1
        return counts
    ranked = [
        (-frequency, layer, expert)
        for layer, frequencies in enumerate(usage)
        for expert, frequency in enumerate(frequencies.tolist())
        if expert != dominant_experts(frequencies, 1)[0]
    ]
    counts = [1] * len(usage)
    for _, layer, _ in sorted(ranked)[: total - len(usage)]:
        counts[layer] += 1
    return counts


def dominant_experts(usage: np.ndarray, count: int) -> list[int]:
    """The `count` most used experts, most used first, ties by lower index."""
    return np.lexsort((np.arange(len(usage)), -usage))[:count].tolist()


def assign_to_dominant(
    usage: np.ndarray, similarity: np.ndarray, count: int, *, capacity: int | None = None, seed: int = 0
) -> np.ndarray:
    """Give every expert to the most similar of the `count` dominant experts.

    Equal similarity goes to the more used one. With a capacity, experts are placed in the order of their usage and
    a full group takes no more.

    Args:
        usage: (E,) usage frequencies.
        similarity: (E, E).
        capacity: most members of a group, its dominant expert included.

    Returns:
        labels (E,), 0 for the group of the most used expert.

    Raises:
        UserError: if `count * capacity` is less than E.
    """
    num_experts = len(usage)
    if capacity is not None and count * capacity < num_experts:
        raise UserError(
            f"{count} groups of at most {capacity} cannot hold {num_experts} experts: raise --group-capacity"
        )
    ranked = dominant_experts(usage, num_experts)
    labels = np.full(num_experts, -1)
    labels[ranked[:count]] = np.arange(count)
    room = np.full(count, np.inf if capacity is None else capacity) - 1
    for expert in ranked[count:]:
        candidates = np.where(room > 0, similarity[expert, ranked[:count]], -np.inf)
        labels[expert] = candidates.argmax()
        room[labels[expert]] -= 1
    return labels


def assign_to_kept(usage: np.ndarray, similarity: np.ndarray, kept: Sequence[int]) -> np.ndarray:
    """Give every expert to the most similar of the kept ones; equal similarity goes to the more used one.

    Returns:
        labels (E,), the positions in `kept`.
    """
    ranked = sorted(range(len(kept)), key=lambda i: (-usage[kept[i]], kept[i]))
    labels = np.array(ranked)[similarity[:, [kept[i] for i in ranked]].argmax(1)]
    labels[list(kept)] = np.arange(len(kept))
    return labels


def centroids_first(
    usage: np.ndarray, similarity: np.ndarray, count: int, *, capacity: int | None = None, seed: int = 0
) -> np.ndarray:
    """REAM's grouping (arXiv 2604.04356): in the order of their scores, each centroid takes its nearest free experts.

    A centroid fills its group before the next one chooses, so the last ones may stay alone.

    Args:
        usage: (E,) scores; the `count` highest are the centroids.
        capacity: most members of a group, its centroid included; 16 by default.

    Raises:
        UserError: if `count * capacity` is less than E.
    """
    num_experts, capacity = len(usage), REAM_CAPACITY if capacity is None else capacity
    if count * capacity < num_experts:
        raise UserError(
            f"{count} groups of at most {capacity} cannot hold {num_experts} experts: raise --group-capacity"
        )
    ranked = dominant_experts(usage, num_experts)
    labels = np.full(num_experts, -1)
    labels[ranked[:count]] = np.arange(count)
    for label, centroid in enumerate(ranked[:count]):
        free = np.flatnonzero(labels < 0)
        nearest = free[np.lexsort((free, -similarity[centroid, free]))][: capacity - 1]
        labels[nearest] = label
    return labels


def hierarchical(
    usage: np.ndarray, similarity: np.ndarray, count: int, *, capacity: int | None = None, seed: int = 0
) -> np.ndarray:
    """Agglomerative clustering of 1 - similarity with average linkage, cut into `count` clusters, labels (E,)."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    if len(usage) == 1:
        return np.zeros(1, dtype=int)
    distance = squareform(np.clip(1 - similarity, 0, None), checks=False)
    tree = linkage(distance, method="average")
    labels = fcluster(tree, count, criterion="maxclust") - 1
    return cut_tree(tree, len(usage), count) if labels.max() + 1 != count else labels


def cut_tree(tree: np.ndarray, num_experts: int, count: int) -> np.ndarray:
    """Exactly `count` clusters of a linkage (ties make `fcluster` return fewer): undo its last merges."""
    clusters: dict[int, list[int]] = {e: [e] for e in range(num_experts)}
    for step, (a, b, *_) in enumerate(tree[: num_experts - count]):
        clusters[num_experts + step] = clusters.pop(int(a)) + clusters.pop(int(b))
    labels = np.empty(num_experts, dtype=int)
    for label, members in enumerate(clusters.values()):
        labels[members] = label
    return labels


def kmeans(
    usage: np.ndarray, similarity: np.ndarray, count: int, *, capacity: int | None = None, seed: int = 0
) -> np.ndarray:
    """k-means on the rows of the similarity matrix, labels (E,)."""
    from sklearn.cluster import KMeans

    labels = KMeans(count, n_init="auto", random_state=seed).fit_predict(similarity)
    return fill_empty(labels, usage, count)


def spectral(
    usage: np.ndarray, similarity: np.ndarray, count: int, *, capacity: int | None = None, seed: int = 0
) -> np.ndarray:
    """Spectral clustering with the similarity as affinity, labels (E,)."""
    if count >= len(usage) - 1:  # the eigenvector solver needs more experts than clusters
        return hierarchical(usage, similarity, count)
    from sklearn.cluster import SpectralClustering

    labels = SpectralClustering(count, affinity="precomputed", random_state=seed).fit_predict(similarity)
    return fill_empty(labels, usage, count)


def random(
    usage: np.ndarray, similarity: np.ndarray, count: int, *, capacity: int | None = None, seed: int = 0
) -> np.ndarray:
    """Random labels (E,), no group empty."""
    rng = np.random.default_rng([seed, len(usage), count])
    labels = np.concatenate([np.arange(count), rng.integers(count, size=len(usage) - count)])
    return rng.permutation(labels)


def fill_empty(labels: np.ndarray, usage: np.ndarray, count: int) -> np.ndarray:
    """Give each empty label the least used member of the largest cluster (identical experts leave labels empty)."""
    labels = labels.copy()
    for label in range(count):
        if not (labels == label).any():
            largest = np.bincount(labels, minlength=count).argmax()
            members = np.flatnonzero(labels == largest)
            labels[members[usage[members].argmin()]] = label
    return labels


Grouping = Callable[..., np.ndarray]
GROUPINGS: dict[str, Grouping] = {
    "dominant": assign_to_dominant,
    "hierarchical": hierarchical,
    "kmeans": kmeans,
    "spectral": spectral,
    "random": random,
    "centroids-first": centroids_first,
}


def group_experts(
    usage: "Tensor",
    similarity: "Tensor",
    count: int,
    *,
    grouping: str = "dominant",
    capacity: int | None = None,
    seed: int = 0,
) -> list[tuple[int, list[int]]]:
    """Partition the experts of a layer.

    Args:
        usage: (E,) usage frequencies.
        similarity: (E, E).
        count: number of groups.
        grouping: a key of `GROUPINGS`.
        capacity: most members of a group (`dominant` and `centroids-first` only).
        seed: for the seeded groupings.

    Returns:
        (dominant expert, members ascending) per group, by the usage of the dominant expert, ties by lower index.
        The dominant expert of a group is its most used member.

    Raises:
        UserError: if the similarity holds NaN, or the capacity is too small.
    """
    usage_E, similarity_EE = usage.numpy(), similarity.numpy()
    if not np.isfinite(similarity_EE).all():
        raise UserError("the similarity of the experts is not finite")
    labels = GROUPINGS[grouping](usage_E, similarity_EE, count, capacity=capacity, seed=seed)
    groups = []
    for label in range(count):
        members = np.flatnonzero(labels == label)
        groups.append((int(members[dominant_experts(usage_E[members], 1)[0]]), members.tolist()))
    return sorted(groups, key=lambda group: (-usage_E[group[0]], group[0]))
