"""Expert scores: recounted token by token with the experts run by hand, hand-worked values, and refusals."""

from dataclasses import replace

import pytest
import torch
from tiny import LAYERS, load_tensors, profile_small

from msmoe.errors import UserError
from msmoe.planning.scores import SCORES, mean_output, score_experts, shares

LAYER = LAYERS[1]


@pytest.fixture(scope="module")
def dispatched(dropping_switch, dropping_stats):
    """Per expert of a layer that drops tokens: outputs (T, D) and gate values (T,) of its dispatched tokens."""
    tensors, sample = load_tensors(dropping_switch), dropping_stats.layers[LAYER].tokens()
    seen = []
    for e in range(6):
        wi, wo = (tensors[f"{LAYER}.experts.expert_{e}.{part}.weight"].double() for part in ("wi", "wo"))
        rows, gate = sample.of(e)
        x = sample.inputs[rows].double()
        seen.append(((x @ wi.T).relu() @ wo.T, gate.double()))
    return seen


EXPECTED = {
    "ean-sum": lambda f, g, share: f.norm(dim=1).sum(),
    "ean-mean": lambda f, g, share: f.norm(dim=1).mean(),
    "weighted-ean": lambda f, g, share: (g * f.norm(dim=1)).sum(),
    "reap": lambda f, g, share: (g * f.norm(dim=1)).mean(),
    "mone": lambda f, g, share: share * f.var(dim=0, correction=0).sum(),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_score_is_its_formula_over_dispatched_tokens(name, dispatched, dropping_stats):
    stats = dropping_stats.layers[LAYER]
    assert stats.dropped > 0
    assert len(stats.tokens()) == int(stats.dispatched.sum())  # the sample holds every dispatched token
    expected = [EXPECTED[name](f, g, share) for (f, g), share in zip(dispatched, stats.usage_frequency, strict=True)]
    torch.testing.assert_close(score_experts(name, stats), torch.stack(expected), rtol=1e-4, atol=1e-7)


def test_the_mean_output_of_an_expert_is_over_its_own_dispatched_tokens(dispatched, dropping_stats):
    expected = torch.stack([f.mean(0) for f, _ in dispatched])
    torch.testing.assert_close(mean_output(dropping_stats.layers[LAYER]), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(SCORES) - {"random"}))
def test_scores_do_not_depend_on_the_batches(name, switch, data, stats):
    other = profile_small(switch, data, batch_size=3)
    for layer in LAYERS:
        torch.testing.assert_close(
            score_experts(name, other.layers[layer]), score_experts(name, stats.layers[layer]), rtol=1e-5, atol=1e-9
        )


@pytest.mark.parametrize("name", sorted(set(SCORES) - {"random", "ean-mean", "reap", "mone", "usage"}))
def test_summed_scores_of_two_halves_add_up(name, stats):
    twice = stats.layers[LAYER] + stats.layers[LAYER]
    torch.testing.assert_close(score_experts(name, twice), 2 * score_experts(name, stats.layers[LAYER]))


def test_mean_scores_of_the_same_data_twice_are_the_same(stats):
    twice = stats.layers[LAYER] + stats.layers[LAYER]
    for name in ("ean-mean", "reap", "mone"):
        torch.testing.assert_close(score_experts(name, twice), score_experts(name, stats.layers[LAYER]))


def test_an_expert_that_saw_no_token_scores_zero(stats):
    layer = stats.layers[LAYER]
    unused = {
        name: torch.cat([torch.zeros_like(value[:1]), value[1:]])
        for name in ("routed", "dispatched", "gate_mass", "output_norm_sum", "gated_norm_sum", "output_square_sum",
                     "output_sum")
        for value in [getattr(layer, name)]
    }  # fmt: skip
    for name in set(SCORES) - {"random"}:
        scores = score_experts(name, replace(layer, **unused))
        assert scores[0] == 0
        assert scores.isfinite().all()


def test_random_scores_follow_the_seed(stats):
    first, again, other = (score_experts("random", stats.layers[LAYER], seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_older_statistics_without_expert_outputs_say_what_to_do(stats):
    with pytest.raises(UserError, match="no expert outputs: make them again with this version's `msmoe profile`"):
        score_experts("reap", replace(stats.layers[LAYER], gated_norm_sum=None))


def test_shares_sum_to_one_and_are_even_where_every_score_is_zero():
    assert shares(torch.tensor([1.0, 3.0])).tolist() == [0.25, 0.75]
    assert shares(torch.zeros(4)).tolist() == [0.25] * 4
