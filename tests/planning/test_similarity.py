"""Similarity of experts: brute-force pair loops, hand-worked values, and what every basis promises."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.optimize import linear_sum_assignment

from msmoe.calibration.stats import LayerStats
from msmoe.errors import UserError
from msmoe.layer.expert import switch_expert
from msmoe.layer.routing import SoftmaxTop1
from msmoe.layer.tokens import TokenSample
from msmoe.planning.grouping import hierarchical
from msmoe.planning.similarity import BASES, LayerView, gram_similarity, similarity, standardise, vector_similarity

E, D, F, T = 5, 6, 8, 120


def make_view(*, seed: int = 0, dead: tuple[int, ...] = ()) -> LayerView:
    """A layer of random experts whose statistics are recounted from random tokens; `dead` experts get no token."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    router, inputs = randn(E, D), randn(T, D)
    experts = [switch_expert(randn(F, D), randn(D, F)) for _ in range(E)]
    logits = inputs @ router.T
    alive = logits.clone()
    alive[:, list(dead)] = -torch.inf
    gate, expert = alive.softmax(-1).max(-1)
    chosen = torch.nn.functional.one_hot(expert, E).double()
    gradients = randn(E, 30).double()
    keys = torch.arange(T)
    stats = LayerStats(
        routed=chosen.sum(0).long(),
        dispatched=chosen.sum(0).long(),
        gate_mass=gate.double() @ chosen,
        soft_mass=logits.softmax(-1).double().sum(0),
        router_logits_gram=logits.double().T @ logits.double(),
        input_sum=chosen.T @ inputs.double(),
        input_abs_sum=chosen.T @ inputs.abs().double(),
        input_square_sum=chosen.T @ inputs.square().double(),
        sequence_counts=chosen.sum(0, keepdim=True).int(),
        sample=TokenSample(inputs, expert[:, None], gate[:, None], keys, keys, keys, inputs[:, :0], inputs[:, :0]),
        sample_size=4096,
        gradient_gram=gradients @ gradients.T,
        weight_gradient_gram=gradients.abs() @ gradients.abs().T,
    )
    return LayerView(stats, SoftmaxTop1(router), lambda e: experts[e])


def permuted(view: LayerView, order: list[int]) -> LayerView:
    """The same layer with expert `order[i]` in place i."""
    stats, place = view.stats, torch.empty(E, dtype=torch.int64)
    place[order] = torch.arange(E)
    vectors = ("routed", "dispatched", "gate_mass", "soft_mass", "input_sum", "input_abs_sum", "input_square_sum")
    grams = ("router_logits_gram", "gradient_gram", "weight_gradient_gram")
    sample = replace(stats.tokens(), expert=place[stats.tokens().expert])
    moved = {name: getattr(stats, name)[order] for name in vectors}
    moved |= {name: getattr(stats, name)[order][:, order] for name in grams}
    stats = replace(stats, **moved, sample=sample)
    return LayerView(stats, view.router.keeping(order), lambda e: view.expert(order[e]))


@pytest.mark.parametrize("metric", ["cosine", "distance"])
@pytest.mark.parametrize("dead", [(), (2,)])
@pytest.mark.parametrize("base", BASES)
class TestEveryBasis:
    def test_is_symmetric_with_diagonal_one_and_within_zero_and_one(self, base, dead, metric):
        result = similarity(make_view(dead=dead), base=base, metric=metric)
        assert torch.equal(result, result.T)
        assert torch.equal(result.diagonal(), torch.ones(E, dtype=torch.float64))
        assert result.min() >= 0
        assert result.max() <= 1

    def test_permuting_the_experts_permutes_the_similarity(self, base, dead, metric):
        order, view = [3, 1, 4, 0, 2], make_view(dead=dead)
        if base == "random":  # drawn anew for a given seed, whatever the experts are
            order = list(range(E))
        moved = similarity(permuted(view, order), base=base, metric=metric)
        torch.testing.assert_close(
            moved, similarity(view, base=base, metric=metric)[order][:, order], rtol=1e-5, atol=1e-6
        )

    def test_is_the_same_when_asked_twice(self, base, dead, metric):
        view = make_view(dead=dead)
        assert torch.equal(similarity(view, base=base, metric=metric), similarity(view, base=base, metric=metric))


def cosine(x, y) -> float:
    x, y = x.flatten().tolist(), y.flatten().tolist()
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    return (1 + dot / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))) / 2


def distance(x, y) -> float:
    x, y = x.flatten().tolist(), y.flatten().tolist()
    square = sum((a - b) ** 2 for a, b in zip(x, y, strict=True))
    return 1 / (1 + square / ((sum(a * a for a in x) + sum(b * b for b in y)) / 2))


def mean_of_routed(view, e, function=lambda x: x):
    sample = view.stats.tokens()
    return function(sample.inputs[sample.of(e)[0]]).mean(0)


FEATURES = {
    "router-logits": lambda view, e: view.stats.tokens().inputs @ view.router.rows[e],
    "router-weight": lambda view, e: view.router.rows[e],
    "feature": mean_of_routed,
    "feature.abs": lambda view, e: mean_of_routed(view, e, torch.abs),
    "weight-feature": lambda view, e: (
        view.expert(e).inputs["wi"] * view.stats.tokens().inputs[view.stats.tokens().expert == e].norm(dim=0)
    ),
    "router-weight-feature": lambda view, e: view.router.rows[e] * view.stats.tokens().inputs.norm(dim=0),
    "expert-output": lambda view, e: view.expert(e)(view.stats.tokens().inputs).mean(0),
}


@pytest.mark.parametrize("metric", [cosine, distance])
@pytest.mark.parametrize("base", FEATURES)
def test_vector_bases_equal_a_loop_over_pairs(base, metric):
    view = make_view()
    features = [FEATURES[base](view, e).double() for e in range(E)]
    naive = torch.tensor([[metric(x, y) for y in features] for x in features], dtype=torch.float64)
    torch.testing.assert_close(similarity(view, base=base, metric=metric.__name__), naive, rtol=1e-4, atol=1e-5)


def test_weight_similarity_is_that_of_the_best_matched_pair():
    view = make_view()
    a, b = view.expert(0), view.expert(2)
    products = (a.inputs["wi"] @ b.inputs["wi"].T + a.output.T @ b.output).double()
    rows, columns = linear_sum_assignment(products.numpy(), maximize=True)
    norms = [sum(float(w.double().square().sum()) for w in expert.tensors) for expert in (a, b)]
    expected = (1 + float(products[rows, columns].sum()) / math.sqrt(norms[0] * norms[1])) / 2
    assert float(similarity(view, base="weight")[0, 2]) == pytest.approx(expected, rel=1e-5)


def test_a_permuted_copy_has_weight_similarity_one():
    view = make_view()
    order = torch.randperm(len(view.expert(1).inputs["wi"]), generator=torch.Generator().manual_seed(0))
    copied = replace(view, expert=lambda e: view.expert(1).permuted(order) if e == 3 else view.expert(e))
    assert float(similarity(copied, base="weight")[1, 3]) == pytest.approx(1.0, abs=1e-6)


def test_mse_compares_the_average_of_a_pair_with_each_on_its_own_tokens():
    view = make_view()
    sample, result = view.stats.tokens(), similarity(view, base="mse")
    a, b = view.expert(1), view.expert(3)
    errors = []
    for e, expert in ((1, a), (3, b)):
        x = sample.inputs[sample.of(e)[0]]
        y = (x @ expert.inputs["wi"].T).relu() @ expert.output.T
        average = (x @ ((a.inputs["wi"] + b.inputs["wi"]) / 2).T).relu() @ ((a.output + b.output) / 2).T
        errors.append(float((average - y).square().sum() / y.square().sum()))
    assert result[1, 3].item() == pytest.approx(1 / (1 + sum(errors) / 2), rel=1e-5)


def hidden_correlation(view, i, j):
    x = view.stats.tokens().inputs
    hidden = [(x @ view.expert(e).inputs["wi"].T).relu() for e in (i, j)]
    return torch.corrcoef(torch.cat(hidden, 1).T)[:F, F:].nan_to_num()


def test_feature_correlation_lsa_is_the_best_one_to_one_match():
    view = make_view()
    correlation = hidden_correlation(view, 0, 4)
    matched = correlation[linear_sum_assignment(correlation, maximize=True)]
    assert similarity(view, base="feature-correlation.lsa")[0, 4].item() == pytest.approx(
        float((matched.mean() + 1) / 2), rel=1e-4
    )


def test_feature_correlation_max_averages_the_best_partners_of_both_sides():
    view = make_view()
    correlation = hidden_correlation(view, 0, 4)
    expected = (float((correlation.amax(0).mean() + 1) / 2) + float((correlation.amax(1).mean() + 1) / 2)) / 2
    assert similarity(view, base="feature-correlation.max")[0, 4].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("base", ["feature-correlation.lsa", "feature-correlation.max"])
def test_feature_correlation_sees_through_a_permutation_of_neurons(base):
    view = make_view()
    copy = view.expert(0).permuted(torch.randperm(F, generator=torch.Generator().manual_seed(1)))
    twin = LayerView(view.stats, view.router, lambda e: copy if e == 1 else view.expert(e))
    dead = float((view.expert(0).hidden(view.stats.tokens().inputs).amax(0) == 0).double().mean())
    assert dead == 0
    assert similarity(twin, base=base)[0, 1].item() == pytest.approx(1, abs=1e-5)


def test_cosine_of_hand_worked_vectors():
    result = vector_similarity(torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [1.0, 1.0]]))
    half = (1 + 1 / math.sqrt(2)) / 2  # 45 degrees
    expected = [[1, 0.5, 0, half], [0.5, 1, 0.5, half], [0, 0.5, 1, 1 - half], [half, half, 1 - half, 1]]
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64))


def test_distance_of_hand_worked_vectors():
    result = vector_similarity(torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]]), metric="distance")
    # (2, 0) and (0, 2): squared distance 8, mean squared norm 4, so 1 / (1 + 8 / 4)
    third = 1 / 3
    torch.testing.assert_close(
        result, torch.tensor([[1, third, 1], [third, 1, third], [1, third, 1]], dtype=torch.float64)
    )


@pytest.mark.parametrize("metric", ["cosine", "distance"])
def test_a_zero_vector_is_similar_to_nothing_but_itself(metric):
    result = vector_similarity(torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]), metric=metric)
    assert result[1].tolist() == [0, 1, 0]


@pytest.mark.parametrize("metric", ["cosine", "distance"])
def test_similarity_does_not_depend_on_the_scale_of_all_vectors(metric):
    vectors = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        vector_similarity(vectors * 1e4, metric=metric), vector_similarity(vectors, metric=metric)
    )


def test_distance_falls_as_vectors_move_apart():
    steps = torch.tensor([0.0, 0.01, 0.1, 0.5, 1.0, 2.0])
    vectors = torch.stack([steps.cos(), steps.sin()], dim=1)
    row = vector_similarity(vectors, metric="distance")[0]
    assert (row.diff() < 0).all()


def test_equal_router_rows_have_similarity_one():
    view = make_view()
    router = view.router.rows.clone()
    router[3] = router[0]
    assert similarity(replace(view, router=router), base="router-weight")[0, 3] == pytest.approx(1)


def test_an_expert_without_tokens_is_compared_by_its_router_row():
    view = make_view(dead=(2,))
    expected = similarity(view, base="router-weight")
    for base in ("feature", "feature.abs", "weight-feature", "mse"):
        torch.testing.assert_close(similarity(view, base=base)[2], expected[2])


def test_experts_of_opposite_direction_are_not_taken_for_undefined():
    view = make_view()
    gram = torch.eye(E, dtype=torch.float64)
    gram[0, :] = gram[:, 0] = -1.0
    gram[1:, 1:] = 1.0
    gram[0, 0] = 1.0  # expert 0 points away from all the others
    opposite = replace(view, stats=replace(view.stats, router_logits_gram=gram))
    assert similarity(opposite, base="router-logits")[0].tolist() == pytest.approx([1, 0, 0, 0, 0], abs=1e-12)


def test_random_similarity_follows_the_seed():
    view = make_view()
    first = similarity(replace(view, seed=1), base="random")
    assert torch.equal(first, similarity(replace(view, seed=1), base="random"))
    assert not torch.equal(first, similarity(replace(view, seed=2), base="random"))


def test_gradient_bases_ask_for_gradients():
    view = make_view()
    with pytest.raises(UserError, match="--gradients"):
        similarity(replace(view, stats=replace(view.stats, gradient_gram=None)), base="gradient")


def test_rounding_never_leaves_the_range():
    gram = torch.tensor([[1.0, 1.0 + 1e-9], [1.0 + 1e-9, 1.0]], dtype=torch.float64)
    assert gram_similarity(gram)[0, 1] == 1


def test_a_constant_hidden_unit_correlates_with_nothing():
    hidden = torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    result = standardise(hidden)
    assert result[:, 1].abs().sum() == 0
    torch.testing.assert_close(result[:, 0], torch.tensor([-1.0, 0.0, 1.0]) / math.sqrt(2))


def test_euclidean_similarity_is_linear_in_the_distance():
    vectors = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])  # distances 5, 10, 5
    expected = [[1.0, 0.5, 0.0], [0.5, 1.0, 0.5], [0.0, 0.5, 1.0]]
    torch.testing.assert_close(
        vector_similarity(vectors, metric="euclidean"), torch.tensor(expected, dtype=torch.float64)
    )


def test_equal_vectors_are_entirely_similar_under_the_euclidean_metric():
    assert vector_similarity(torch.ones(3, 2), metric="euclidean").tolist() == [[1.0] * 3] * 3


def test_hierarchical_clusters_of_the_euclidean_metric_are_those_of_the_distances():
    rng = np.random.default_rng(0)
    for _ in range(10):
        points = rng.normal(size=(9, 3))
        ours = hierarchical(np.ones(9), vector_similarity(torch.from_numpy(points), metric="euclidean").numpy(), 4)
        theirs = fcluster(linkage(points, method="average"), 4, criterion="maxclust")
        assert (np.equal.outer(ours, ours) == np.equal.outer(theirs, theirs)).all()


def test_token_similarity_is_the_mean_cosine_of_outputs_at_the_same_token():
    view = make_view()
    sample = view.stats.tokens()
    outputs = [view.expert(e)(sample.inputs) for e in range(E)]
    matrix = similarity(view, base="expert-output-token")
    for i in range(E):
        for j in range(i):
            cosine = torch.nn.functional.cosine_similarity(outputs[i], outputs[j], dim=1).mean()
            assert float(matrix[i, j]) == pytest.approx((1 + float(cosine)) / 2, abs=1e-5)


def test_ream_similarity_is_the_mean_of_its_two_halves():
    view = make_view()
    sample = view.stats.tokens()
    probability = (sample.inputs @ view.router.rows.T).softmax(-1)
    gated = [(probability[:, e, None] * view.expert(e)(sample.inputs)).mean(0) for e in range(E)]
    logits = (sample.inputs @ view.router.rows.T).double()
    unit = logits / logits.norm(dim=0)
    largest = torch.cdist(unit.T, unit.T).max()
    matrix = similarity(view, base="ream")
    for i in range(E):
        for j in range(i):
            first = (1 + float(torch.nn.functional.cosine_similarity(gated[i], gated[j], dim=0))) / 2
            second = 1 - float((unit[:, i] - unit[:, j]).norm() / largest)
            assert float(matrix[i, j]) == pytest.approx((first + second) / 2, abs=1e-5)


def test_input_weight_similarity_sees_no_permutation():
    view = make_view()
    expert = view.expert(0)
    order = torch.randperm(F, generator=torch.Generator().manual_seed(3))
    moved = LayerView(view.stats, view.router, lambda e: expert.permuted(order) if e == 1 else view.expert(e))
    value = float(similarity(moved, base="input-weight")[0, 1])
    cosine = float((expert.inputs["wi"] * expert.inputs["wi"][order]).sum() / expert.inputs["wi"].square().sum())
    assert value == pytest.approx((1 + cosine) / 2, abs=1e-6)
    assert value < 0.99
