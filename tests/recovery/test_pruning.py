"""Gradual pruning of kept rows: the schedule, the scores, and that compact rows are the masked function."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import batch_of, logits_of, random_records
from trials import LAYERS, SHORT, short, split_of, stop_after

from msmoe.families.loading import load
from msmoe.formats.modeling.modeling_msmoe import FactorizedWeight
from msmoe.lowrank.shapes import FactorShape
from msmoe.recovery.data import BatchOrder
from msmoe.recovery.pruning import RowPruner, factorize_in_place, factorized_weights, rows_kept
from msmoe.recovery.state import load_tensors

BATCH = random_records(6, seed=21)
PUBLISHED = {"steps": 10_000, "start": 1.0, "final": 0.1, "warmup": 400, "cooldown": 1600}


@pytest.mark.parametrize(
    ("step", "kept"),
    [
        (0, 1.0),
        (400, 1.0),
        (4400, 0.1 + 0.9 * 0.125),  # half-way from 400 to 8400: (1 - 4000/8000)^3 = 1/8
        (6400, 0.1 + 0.9 / 64),  # three quarters of the way: (1/4)^3
        (8400, 0.1),
        (10_000, 0.1),
    ],
)
def test_the_published_schedule_by_hand(step, kept):
    assert rows_kept(step, **PUBLISHED) == pytest.approx(kept, rel=1e-12)


@given(
    st.integers(1, 300), st.integers(0, 300), st.integers(1, 300), st.integers(0, 40), st.integers(0, 40)
)  # any warm-up and cool-down, also longer than the run
def test_the_number_of_rows_never_rises_and_ends_at_the_final_one(steps, warmup, cooldown, final, more):
    start = final + more
    kept = [
        rows_kept(t, steps=steps, start=start, final=final, warmup=warmup, cooldown=cooldown) for t in range(steps + 1)
    ]
    assert all(a >= b for a, b in pairwise(kept))
    assert all(final <= k <= start for k in kept)
    assert kept[-1] == final


S = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [0.0, 1.0], [2.0, 2.0]]])
GRADIENT = torch.tensor([[[1.0, 1.0], [-1.0, 0.5], [2.0, 2.0], [0.0, 0.0]]])


def pruner_of(s: torch.Tensor, *, final: int, score: str = "sensitivity", beta: float = 0.85) -> RowPruner:
    """A pruner of rows S (G, K, I) of matrices with K outputs and rank 1."""
    num_groups, num_rows, num_inputs = s.shape
    weight = FactorizedWeight(num_groups, num_rows, num_inputs, 1, num_rows, 0.5)
    with torch.no_grad():
        weight.S.copy_(s)
    return RowPruner(weight, final=final, score=score, beta=beta)


def observe(pruner: RowPruner, gradient: torch.Tensor, step: int) -> torch.Tensor:
    pruner.weight.S.grad = gradient.clone()
    pruner.observe(step)
    return pruner.scores


def test_sensitivity_is_the_mean_of_weight_times_gradient_by_hand():
    # rows: (1 + 2)/2 = 1.5, (3 + 2)/2 = 2.5, (0 + 2)/2 = 1, 0; their mean is 1.25
    scores = observe(pruner_of(S, final=2), GRADIENT, 1)
    torch.testing.assert_close(scores, torch.tensor([[1.2, 2.0, 0.8, 0.0]]))


def test_scores_are_smoothed_over_steps_by_hand():
    pruner = pruner_of(S, final=2, beta=0.75)
    observe(pruner, GRADIENT, 1)
    # second gradient: rows (0, 0, 1, 3) with mean 1; 3/4 (1.2, 2, .8, 0) + 1/4 (0, 0, 1, 3)
    scores = observe(pruner, torch.tensor([[[0.0, 0.0], [0.0, 0.0], [9.0, 2.0], [1.0, 2.0]]]), 2)
    torch.testing.assert_close(scores, torch.tensor([[0.9, 1.5, 0.85, 0.75]]))


def test_matrices_with_gradients_of_any_size_have_scores_of_the_same_size():
    scores = observe(pruner_of(S.repeat(2, 1, 1), final=2), torch.cat([GRADIENT, 1e-6 * GRADIENT]), 1)
    torch.testing.assert_close(scores[0], scores[1])


def test_magnitude_is_the_norm_of_the_row_by_hand():
    pruner = pruner_of(S, final=2, score="magnitude")
    pruner.observe(1)
    torch.testing.assert_close(pruner.scores, torch.tensor([[5.0**0.5, 5.0, 1.0, 8.0**0.5]]))


def test_the_least_important_rows_become_zero_and_the_others_stay():
    pruner = pruner_of(S, final=2)
    observe(pruner, GRADIENT, 1)  # 1.2, 2, 0.8, 0
    pruner.prune(2)
    assert pruner.weight.S.tolist() == [[[1, 2], [3, 4], [0, 0], [0, 0]]]


def test_ties_go_to_the_lower_row():
    pruner = pruner_of(torch.ones(1, 5, 3), final=2)
    observe(pruner, torch.ones(1, 5, 3), 1)
    pruner.prune(2)
    assert pruner.kept.tolist() == [[True, True, False, False, False]]


def test_pruned_rows_stay_pruned_and_zero_whatever_their_later_score():
    pruner = pruner_of(S, final=2, beta=0.0)
    observe(pruner, GRADIENT, 1)
    pruner.prune(2)
    with torch.no_grad():
        pruner.weight.S.add_(7.0)  # as an optimiser that has moments for them would
    observe(pruner, torch.tensor([[[0.0, 0.0], [0.0, 0.0], [1e3, 1e3], [1e3, 1e3]]]), 2)
    pruner.prune(2)
    assert pruner.kept.tolist() == [[True, True, False, False]]
    assert pruner.weight.S.tolist() == [[[8, 9], [10, 11], [0, 0], [0, 0]]]


def test_every_matrix_of_a_stack_keeps_its_own_rows():
    pruner = pruner_of(S.repeat(2, 1, 1), final=1)
    observe(pruner, torch.cat([GRADIENT, GRADIENT.flip(1)]), 1)
    pruner.prune(2)  # second matrix: 0, (6 + 8)/2 = 7, (0 + 0.5)/2 = 0.25, (2 + 2)/2 = 2
    assert pruner.kept.tolist() == [[True, True, False, False], [False, True, False, True]]


def test_compact_rows_give_the_function_of_the_masked_matrix():
    generator = torch.Generator().manual_seed(3)
    full = FactorizedWeight(2, 9, 5, 2, 6, 0.5)
    full.rows.copy_(torch.tensor([[0, 2, 3, 5, 7, 8], [1, 2, 4, 5, 6, 8]]))  # of a student factorised before
    pruner = RowPruner(full, final=3, score="sensitivity", beta=0.85)
    observe(pruner, torch.randn(2, 6, 5, generator=generator), 1)
    pruner.prune(3)
    s, rows = pruner.compact(full.S.detach())
    small = FactorizedWeight(2, 9, 5, 2, 3, 0.5)
    small.load_state_dict({"U": full.U, "V": full.V, "S": s, "rows": rows})
    tokens = torch.randn(4, 5, generator=generator)
    for g in range(2):
        dense = full.U[g] @ full.V[g]
        for k in range(6):
            if pruner.kept[g, k]:
                dense[full.rows[g, k]] += full.S[g, k]
        torch.testing.assert_close(small.linear(tokens, g), tokens @ dense.T, rtol=1e-5, atol=1e-6)


def test_compact_rows_are_stored_in_ascending_order():
    pruner = pruner_of(S, final=2, score="magnitude")
    pruner.observe(1)  # row 1 is better than row 3
    pruner.prune(2)
    s, rows = pruner.compact(pruner.weight.S.detach())
    assert (rows.tolist(), rows.dtype) == ([[1, 3]], torch.int32)
    assert s.tolist() == [[[3, 4], [2, 2]]]


def test_factors_in_memory_leave_the_logits_as_they_were(student):
    model = load(student)
    before = logits_of(model, BATCH)
    factorize_in_place(model, 3, 0.25, skip=[], itemsize=4)
    assert len(list(factorized_weights(model))) == 4
    torch.testing.assert_close(logits_of(model, BATCH), before, rtol=1e-4, atol=1e-4)


def test_factors_in_memory_state_the_rows_that_will_be_left(student):
    # a quarter of the 24 rows of wi and of the 16 rows of wo
    shapes = factorize_in_place(load(student), 3, 0.25, skip=[], itemsize=4)
    assert shapes == {name: {"wi": [3, 6], "wo": [3, 4]} for name in LAYERS}


def test_skipped_layers_stay_dense(student):
    model = load(student)
    shapes = factorize_in_place(model, 3, 0.25, skip=[LAYERS[0]], itemsize=4)
    assert list(shapes) == [LAYERS[1]]
    assert all(name.startswith(LAYERS[1]) for name, _ in factorized_weights(model))


def test_a_stack_that_would_not_shrink_stays_dense(student):
    # rank 6 needs 6 * 40 = 240 numbers; rows: wi round(.35 * 24) = 8 of 16, wo round(.35 * 16) = 6 of 24 numbers;
    # bytes with row indices: wi 4 (240 + 128) + 32 = 1504, wo 4 (240 + 144) + 24 = 1560; dense 4 * 384 = 1536
    shapes = factorize_in_place(load(student), 6, 0.35, skip=[], itemsize=4)
    assert shapes == {name: {"wi": [6, 8]} for name in LAYERS}


def scores_after_one_step(checkpoint, out, **options) -> dict[str, torch.Tensor]:
    with pytest.raises(KeyboardInterrupt):
        short(checkpoint, out, keep_rows=0.25, save_every=1, progress=stop_after(1), **options)
    tensors, _ = load_tensors(out.with_name(f"{out.name}.training") / "state-00000001.safetensors")
    return {k.removeprefix("scores/"): t for k, t in tensors.items() if k.startswith("scores/")}


def test_a_run_scores_rows_by_the_weights_and_gradients_before_the_step(factorised, lessons, tmp_path):
    # a warm-up of nothing and a huge rate: after the step every weight is another one
    options = {"data": lessons, "teacher": None, "learning_rate": 0.5, "warmup": 0.0}
    scores = scores_after_one_step(factorised, tmp_path / "out", **options)
    train, _ = split_of(factorised, lessons)
    records = [vars(train[i]) for i in BatchOrder(train, SHORT["batch_size"], seed=0).batch(0)]
    model = load(factorised)
    model(**batch_of(records)).loss.backward()
    assert len(scores) == 4
    for name, weight in factorized_weights(model):
        naive = torch.stack([torch.stack([(s * g).abs().mean() for s, g in zip(*pair, strict=True)])
                             for pair in zip(weight.S, weight.S.grad, strict=True)])  # fmt: skip
        naive = (naive / naive.mean(-1, keepdim=True).clamp(min=1e-30)).detach()
        torch.testing.assert_close(scores[name], naive, rtol=1e-3, atol=1e-3)


def row_counts(folder) -> list[tuple[int, list[int]]]:
    """(rows left, non-zero rows of S) of every matrix in the last state of a run."""
    tensors, _ = load_tensors(next(folder.glob("state-*.safetensors")))
    return [
        (int(kept.sum()), int(s.any(-1).sum()))
        for name in tensors
        if name.startswith("kept/")
        for kept, s in zip(tensors[name], tensors["weight/" + name.removeprefix("kept/") + ".S"], strict=True)
    ]


def test_rows_fall_step_by_step_as_the_schedule_says(factorised, lessons, tmp_path):
    # 20 steps, warm-up int(.1 * 20) = 2, cool-down int(.4 * 20) = 8: after step 6 (6 - 2)/(20 - 10) = .4 of the way,
    # (1 - .4)^3 = .216: wi round(6 + 6 * .216) = 7 of 12 rows, wo round(4 + 4 * .216) = 5 of 8
    with pytest.raises(KeyboardInterrupt):
        short(
            factorised, tmp_path / "out", data=lessons, teacher=None, keep_rows=0.25, prune_warmup=0.1, prune_final=0.4,
            steps=20, save_every=6, progress=stop_after(6),
        )  # fmt: skip
    assert sorted(row_counts(tmp_path / "out.training")) == sorted([(7, 7)] * 4 + [(5, 5)] * 4)


def test_a_run_too_short_for_its_warm_up_prunes_in_its_first_step(factorised, lessons, tmp_path):
    report = short(
        factorised, tmp_path / "out", data=lessons, teacher=None, keep_rows=0.25, prune_warmup=0.5, prune_final=0.4,
        steps=1,
    )  # fmt: skip
    assert report.best_step == 1
    shapes = {name: FactorShape(*shape) for name, shape in load(report.out).config.factors[LAYERS[0]].items()}
    assert shapes == {"wi": FactorShape(4, 6), "wo": FactorShape(4, 4)}
