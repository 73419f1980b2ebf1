"""Similarity matrices of all layers, and what clustering makes of them.

Shapes: E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from msmoe.analysis.report.artefacts import Artefacts, CheckpointFolder, LabelledPlan
from msmoe.analysis.report.document import shorten

from msmoe.errors import UserError

if TYPE_CHECKING:
    from msmoe.calibration.stats import LayerStats
    from msmoe.planning.plan import LayerPlan
    from msmoe.planning.similarity import LayerView

DEFAULT = ("router-logits", "cosine")
FROM_STATISTICS = ("router-logits", "feature", "feature.abs", "gradient", "weight-gradient")
FROM_ROUTER = ("router-weight", "router-weight-feature")
FROM_OUTPUTS = ("expert-output", "expert-output-token", "ream")
PAIRWISE = ("weight", "mse", "feature-correlation.lsa", "feature-correlation.max")
MAX_WORK = 2e10  # multiply-adds over all layers: about a second
MAX_OPTIMAL = 64  # experts whose leaves are put in the best order, which takes E^3 steps


@dataclass(frozen=True)
class Similarities:
    """Similarities (E, E) of the experts of every layer, in [0, 1]; `note` says why another base was wanted."""

    base: str
    metric: str
    matrices: dict[str, np.ndarray]
    note: str = ""


@dataclass(frozen=True)
class Clustering:
    """Average linkage of 1 - similarity.

    Attributes:
        order: (E,) experts as the leaves stand.
        joins: (E - 1, 5) x of the one branch, its height, x of the other one, its height, height of the join; x in
            leaves from the left, heights as 1 - similarity.
    """

    order: np.ndarray
    joins: np.ndarray


def find_similarities(artefacts: Artefacts, say: Callable[[str], None]) -> Similarities | None:
    """By the base and metric of the plan where that can be had, else by router logits; None without statistics."""
    if artefacts.calibration is None:
        return None
    base, metric = wanted(artefacts.plan)
    reason = obstacle(base, metric, artefacts)
    if not reason:
        try:
            return Similarities(base, metric, compute(artefacts, base, metric, say))
        except UserError as error:
            reason = shorten(str(error), 300)
    note = (
        f"The plan groups by {shorten(base)}, {shorten(metric)}; shown is {', '.join(DEFAULT)} in its place: {reason}."
    )
    return Similarities(*DEFAULT, compute(artefacts, *DEFAULT, say), note)


def wanted(plan: LabelledPlan | None) -> tuple[str, str]:
    """Base and metric that the plan names."""
    return (plan.plan.parameters.similarity, plan.plan.parameters.metric) if plan else DEFAULT


def obstacle(base: str, metric: str, artefacts: Artefacts) -> str:
    """Why a similarity is not shown, empty if it can be."""
    if (base, metric) == DEFAULT:
        return ""
    from msmoe.planning.parameters import CHOICES
    from msmoe.planning.similarity import BASES

    if base not in BASES or metric not in CHOICES["metric"]:
        return "this version does not know it"
    if base == "random":
        return "random numbers show nothing"
    if base in FROM_STATISTICS:
        return ""
    if artefacts.original is None:
        return "it needs weights, give the original checkpoint beside the statistics"
    if work(base, artefacts.original) > MAX_WORK and not artefacts.is_thorough:
        return "it would take long; --thorough computes it"
    return ""


def work(base: str, original: CheckpointFolder) -> float:
    """Multiply-adds of a base over all layers, roughly."""
    from msmoe.planning.outputs import MAX_TOKENS

    total = 0.0
    for layer in original.summary.layers:
        expert = 2 * layer.d_model * layer.d_ff
        if base in FROM_ROUTER:
            total += layer.num_experts**2 * layer.d_model
        elif base in FROM_OUTPUTS:
            total += layer.num_experts * MAX_TOKENS * (expert + layer.num_experts * layer.d_model)
        elif base in PAIRWISE:
            total += layer.num_experts**2 * max(layer.d_ff, MAX_TOKENS) * expert / 2
        else:
            total += layer.num_experts**2 * expert
    return total


def compute(artefacts: Artefacts, base: str, metric: str, say: Callable[[str], None]) -> dict[str, np.ndarray]:
    """Matrices by layer, of layers that saw tokens; experts without a vector are similar to none.

    Raises:
        UserError: if statistics that the base reads were not recorded, or weights cannot be read.
    """
    assert artefacts.calibration is not None
    matrices = {}
    for done, (name, layer) in enumerate(artefacts.calibration.layers.items(), start=1):
        if layer.num_tokens == 0:
            continue
        say(f"similarities of layer {done} of {len(artefacts.calibration.layers)}")
        if artefacts.planner is None and (base, metric) == DEFAULT:
            matrices[name] = logit_similarity(layer.array("router_logits_gram"))
            continue
        from msmoe.planning.similarity import similarity

        view = artefacts.planner.view(name) if artefacts.planner else without_weights(layer)
        matrices[name] = np.nan_to_num(similarity(view, base=base, metric=metric).numpy())  # pyright: ignore
    return matrices


def logit_similarity(gram_EE: np.ndarray) -> np.ndarray:
    """(1 + cosine) / 2 of the experts' router logits (E, E) from their Gram matrix; 0 for logits of zero."""
    norms = np.sqrt(np.diagonal(gram_EE))
    products = np.outer(norms, norms)
    cosines = np.divide(gram_EE, products, out=np.full_like(gram_EE, -1.0), where=products > 0)
    result = np.clip((1 + cosines) / 2, 0, 1)
    np.fill_diagonal(result, 1.0)
    return result


def without_weights(layer: "LayerStats") -> "LayerView":
    import torch

    from msmoe.layer.routing import SoftmaxTop1
    from msmoe.planning.similarity import LayerView

    def expert(index: int):
        raise UserError("the weights of the experts are not there")

    return LayerView(layer, router=SoftmaxTop1(torch.zeros(layer.num_experts, 1)), expert=expert)


def cluster(matrix: np.ndarray) -> Clustering:
    """Order experts so that similar ones are side by side."""
    count = len(matrix)
    if count < 2:
        return Clustering(np.arange(count), np.empty((0, 5)))
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    distance = squareform(np.clip(1 - matrix, 0, None), checks=False)
    tree = linkage(distance, method="average", optimal_ordering=count <= MAX_OPTIMAL)
    order = leaves_list(tree)
    x, height = np.empty(2 * count - 1), np.zeros(2 * count - 1)
    x[order] = np.arange(count) + 0.5
    joins = np.empty((count - 1, 5))
    for step, (a, b, joined, _) in enumerate(tree):
        left, right = int(a), int(b)
        joins[step] = x[left], height[left], x[right], height[right], joined
        x[count + step], height[count + step] = (x[left] + x[right]) / 2, joined
    return Clustering(order, joins)


def off_diagonal(matrix: np.ndarray) -> np.ndarray:
    """Values of all pairs (E (E - 1) / 2,)."""
    return matrix[np.triu_indices(len(matrix), 1)]


def group_labels(layer: "LayerPlan") -> np.ndarray:
    """The dominant expert of the group of each expert (E,); -1 for a removed one."""
    labels = np.full(layer.num_experts, -1)
    for group in layer.groups:
        labels[list(group.members)] = group.dominant
    return labels


def same_group(labels: np.ndarray) -> np.ndarray:
    """Whether two experts are of one group (E, E); removed experts are of none."""
    return (labels[:, None] == labels[None, :]) & (labels[:, None] >= 0)
