"""The token sample: which tokens it holds, and that parts merge into the whole."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msmoe.layer.tokens import TokenSample, sample_mask, token_keys


def sample_of(keys, expert) -> TokenSample:
    """Tokens of one expert each, or of several."""
    keys = torch.tensor(keys)
    expert = torch.tensor(expert).reshape(len(keys), -1)
    inputs = keys.float()[:, None]
    gate, none = torch.rand(expert.shape, generator=torch.Generator().manual_seed(0)), inputs[:, :0]
    return TokenSample(inputs, expert, gate, keys * 7, torch.zeros_like(keys), keys, none, none)


def random_choices(rng: np.random.Generator, count: int, top_k: int, num_experts: int = 4) -> list[list[int]]:
    """Different experts for each token, low numbers far more often."""
    share = 1 / 4.0 ** np.arange(num_experts)
    return [rng.choice(num_experts, top_k, replace=False, p=share / share.sum()).tolist() for _ in range(count)]


tokens = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(0, 3)), min_size=1, max_size=60, unique_by=lambda t: t[0]
)


@given(st.integers(0, 10**6), st.integers(1, 120), st.integers(0, 12), st.integers(1, 60), st.integers(1, 4))
def test_the_sample_of_parts_is_the_sample_of_the_whole(seed, num_first, num_second, size, top_k):
    rng = np.random.default_rng(seed)
    num_tokens = num_first + num_second
    whole = sample_of(rng.permutation(1000)[:num_tokens].tolist(), random_choices(rng, num_tokens, top_k))
    parts = [whole.select(torch.arange(num_first)), whole.select(torch.arange(num_first, num_tokens))]
    merged = TokenSample.concatenate([part.drawn(size, 4) for part in parts]).drawn(size, 4)
    assert merged.key.tolist() == whole.drawn(size, 4).key.tolist()
    assert merged.chance.tolist() == whole.drawn(size, 4).chance.tolist()


@given(tokens, st.integers(1, 40))
def test_a_sample_never_exceeds_its_size(pairs, size):
    keys, expert = (np.array(column) for column in zip(*pairs, strict=True))
    assert sample_mask(keys, expert[:, None], 4, size).sum() <= size


@given(st.integers(0, 10**6), st.integers(1, 120), st.integers(2, 4), st.integers(8, 60))
def test_tokens_of_several_experts_are_sampled_for_each_of_them_within_the_size(seed, num_tokens, top_k, size):
    rng = np.random.default_rng(seed)
    keys, expert = rng.permutation(1000)[:num_tokens], np.array(random_choices(rng, num_tokens, top_k))
    mask = sample_mask(keys, expert, 4, size)
    assert mask.sum() <= size
    for e in range(4):
        mine = (expert == e).any(1)
        assert mask[np.isin(keys, np.sort(keys[mine])[: size // 2 // 4])].all()


@given(tokens, st.integers(8, 40))
def test_the_smallest_keys_of_every_expert_are_in_the_sample(pairs, size):
    keys, expert = (np.array(column) for column in zip(*pairs, strict=True))
    mask = sample_mask(keys, expert[:, None], 4, size)
    for e in range(4):
        share = size // 2 // 4  # half of the places, in equal shares
        assert mask[np.isin(keys, np.sort(keys[expert == e])[:share])].all()


def test_everything_is_kept_if_it_fits():
    assert sample_mask(np.array([5, 1, 9]), np.array([[0], [0], [1]]), 2, 3).all()


def test_a_rare_expert_is_represented_among_many_tokens_of_another():
    keys = np.arange(100)  # the rare expert's two tokens have the largest keys
    expert = np.array([0] * 98 + [1] * 2)
    assert sample_mask(keys, expert[:, None], 2, 8)[98:].all()  # 8 // 2 // 2 = 2 places for each expert


def test_weights_undo_the_stratification():
    sample = sample_of([1, 2, 3, 4, 5], [0, 0, 1, 0, 1])
    # 3 sampled tokens stand for 12, 2 for 5
    assert sample.weights(torch.tensor([12, 5])).tolist() == [4.0, 4.0, 2.5, 4.0, 2.5]


def test_the_weights_of_recorded_samples_sum_to_the_dispatched_tokens(dropping_stats):
    for layer in dropping_stats.layers.values():
        sample = layer.tokens()
        total = torch.zeros(layer.num_experts, dtype=torch.float64).index_add_(
            0, sample.expert[:, 0], sample.weights(layer.dispatched)
        )
        torch.testing.assert_close(total, layer.dispatched.double())


def population(top_k: int, *, num_tokens: int = 20000, num_experts: int = 16, seed: int = 0):
    """Choices (T, K) of tokens among experts of very different use, in which some pairs go together."""
    rng = np.random.default_rng(seed)
    preference = np.linspace(0, 5, num_experts) + rng.gumbel(size=(num_tokens, num_experts))
    preference[:, 1] += 2 * (preference[:, 0] > np.quantile(preference[:, 0], 0.9))
    return np.argsort(-preference, axis=1)[:, :top_k], rng


@pytest.mark.parametrize("top_k", [2, 4, 8])
def test_the_weights_of_tokens_with_several_experts_stand_for_all_tokens_of_each(top_k):
    expert, rng = population(top_k)
    dispatched = torch.from_numpy(np.bincount(expert.reshape(-1), minlength=16))
    sample = sample_of(rng.integers(2**63, size=len(expert)).tolist(), expert.tolist())
    drawn = sample.drawn(1024, 16)
    for part in (drawn, drawn.select(torch.arange(len(drawn)) % 2 == 0), drawn.drawn(512, 16)):
        weights = part.weights(dispatched)
        totals = torch.bincount(part.expert.flatten(), weights.repeat_interleave(top_k), minlength=16)
        torch.testing.assert_close(totals, dispatched.double(), rtol=0.5, atol=50)  # of one draw; on average: below
        assert float(weights.sum()) == pytest.approx(len(expert))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_weighted_sums_over_samples_are_those_of_all_tokens_on_average(top_k):
    expert, rng = population(top_k, num_tokens=4000)
    counts = np.bincount(expert.reshape(-1), minlength=16)
    value = (expert * rng.random(16)[expert] + 1).prod(1)  # of the combination, not a sum over experts
    found = []
    for _ in range(80):
        keys = rng.integers(2**63, size=len(expert))
        sample = sample_of(keys.tolist(), expert.tolist())
        sample = replace(sample, inputs=torch.from_numpy(value)[:, None]).drawn(512, 16)
        weights = sample.weights(torch.from_numpy(counts))
        totals = torch.bincount(sample.expert.flatten(), weights.repeat_interleave(top_k), minlength=16)
        found.append(torch.cat([totals, weights @ sample.inputs]).numpy())
    mean, error = np.mean(found, axis=0), np.std(found, axis=0) / np.sqrt(len(found))
    assert (abs(mean - np.append(counts, value.sum())) < 4 * error + 0.01 * np.append(counts, value.sum())).all()


def test_all_tokens_in_the_sample_stand_for_themselves():
    expert, rng = population(3, num_tokens=400)
    sample = sample_of(rng.integers(2**63, size=400).tolist(), expert.tolist())
    weights = sample.weights(torch.bincount(sample.expert.flatten(), minlength=16))
    torch.testing.assert_close(weights, torch.ones(400).double())


def test_the_tokens_of_an_expert_and_the_gates_of_a_group_are_those_of_a_loop():
    expert, rng = population(4, num_tokens=50)
    sample, group = sample_of(rng.integers(2**63, size=50).tolist(), expert.tolist()), torch.tensor([3, 9, 15])
    routed, gates = sample.among(group)
    for t in range(50):
        for i, e in enumerate(group.tolist()):
            at = [k for k in range(4) if sample.expert[t, k] == e]
            assert bool(routed[t, i]) == bool(at)
            assert float(gates[t, i]) == (float(sample.gate[t, at[0]]) if at else 0.0)
    rows, gate = sample.of(9)
    assert rows.tolist() == routed[:, 1].nonzero().flatten().tolist()
    assert torch.equal(gate, gates[rows, 1])


@pytest.mark.parametrize("top_k", [1, 3])
def test_a_sample_is_the_same_after_it_was_stored(top_k):
    expert, rng = population(top_k, num_tokens=20)
    sample = sample_of(rng.integers(2**63, size=20).tolist(), expert.tolist())
    sample = replace(sample, router_inputs=torch.rand(20, 5 * (top_k > 1)))
    stored = sample.stored()
    assert ("router_inputs" in stored) == (top_k > 1)
    assert stored["expert"].shape == ((20,) if top_k == 1 else (20, 3))
    restored = TokenSample.from_stored(stored)
    assert all(torch.equal(a, b) for a, b in zip(vars(sample).values(), vars(restored).values(), strict=True))


def test_dropped_tokens_are_not_sampled(dropping_stats):
    for layer in dropping_stats.layers.values():
        assert torch.bincount(layer.tokens().expert[:, 0], minlength=6).tolist() == layer.dispatched.tolist()


def test_tokens_of_a_record_are_held_out_together(stats):
    for layer in stats.layers.values():
        sample = layer.tokens()
        for record in sample.record.unique():
            assert len(sample.held_out[sample.record == record].unique()) == 1


def test_about_half_of_many_records_is_held_out():
    sample = replace(sample_of([0] * 4000, [0] * 4000), record=torch.arange(4000) * 12345)
    assert 0.47 < sample.held_out.double().mean() < 0.53  # 4 standard deviations are 0.03


@pytest.mark.parametrize("seed", [0, 1, 2, 12345, -1])
def test_keys_are_uniform_and_distinct_for_every_seed(seed):
    records, positions = np.repeat(np.arange(200), 20), np.tile(np.arange(20), 200)
    keys = token_keys(records, positions, seed=seed)
    assert len(np.unique(keys)) == 4000
    assert (keys >= 0).all()
    assert (
        abs(keys.astype(float).mean() / 2**63 - 0.5) < 0.02
    )  # standard deviation of the mean: 0.29 / sqrt(4000) = 0.005


def test_another_seed_gives_other_keys():
    records, positions = np.arange(50), np.zeros(50, dtype=np.int64)
    assert not (token_keys(records, positions, seed=0) == token_keys(records, positions, seed=1)).any()
