"""The token sample: which tokens it holds, and that parts merge into the whole."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msmoe.layer.tokens import TokenSample, sample_mask, token_keys


def sample_of(keys, expert) -> TokenSample:
    keys, expert = torch.tensor(keys), torch.tensor(expert)
    inputs = keys.float()[:, None]
    return TokenSample(inputs, expert, torch.ones(len(keys)), keys * 7, torch.zeros_like(keys), keys, inputs[:, :0])


tokens = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(0, 3)), min_size=1, max_size=60, unique_by=lambda t: t[0]
)


@given(st.integers(0, 10**6), st.integers(1, 120), st.integers(0, 12), st.integers(1, 60))
def test_the_sample_of_parts_is_the_sample_of_the_whole(seed, num_first, num_second, size):
    rng = np.random.default_rng(seed)
    num_tokens = num_first + num_second
    whole = sample_of(rng.permutation(1000)[:num_tokens].tolist(), rng.integers(4, size=num_tokens).tolist())
    parts = [whole.select(torch.arange(num_first)), whole.select(torch.arange(num_first, num_tokens))]
    merged = TokenSample.concatenate([part.drawn(size, 4) for part in parts]).drawn(size, 4)
    assert merged.key.tolist() == whole.drawn(size, 4).key.tolist()


@given(tokens, st.integers(1, 40))
def test_a_sample_never_exceeds_its_size(pairs, size):
    keys, expert = (np.array(column) for column in zip(*pairs, strict=True))
    assert sample_mask(keys, expert, 4, size).sum() <= size


@given(tokens, st.integers(8, 40))
def test_the_smallest_keys_of_every_expert_are_in_the_sample(pairs, size):
    keys, expert = (np.array(column) for column in zip(*pairs, strict=True))
    mask = sample_mask(keys, expert, 4, size)
    for e in range(4):
        share = size // 2 // 4  # half of the places, in equal shares
        assert mask[np.isin(keys, np.sort(keys[expert == e])[:share])].all()


def test_everything_is_kept_if_it_fits():
    assert sample_mask(np.array([5, 1, 9]), np.array([0, 0, 1]), 2, 3).all()


def test_a_rare_expert_is_represented_among_many_tokens_of_another():
    keys = np.arange(100)  # the rare expert's two tokens have the largest keys
    expert = np.array([0] * 98 + [1] * 2)
    assert sample_mask(keys, expert, 2, 8)[98:].all()  # 8 // 2 // 2 = 2 places for each expert


def test_weights_undo_the_stratification():
    sample = sample_of([1, 2, 3, 4, 5], [0, 0, 1, 0, 1])
    # 3 sampled tokens stand for 12, 2 for 5
    assert sample.weights(torch.tensor([12, 5])).tolist() == [4.0, 4.0, 2.5, 4.0, 2.5]


def test_the_weights_of_recorded_samples_sum_to_the_dispatched_tokens(dropping_stats):
    for layer in dropping_stats.layers.values():
        sample = layer.tokens()
        total = torch.zeros(layer.num_experts, dtype=torch.float64).index_add_(
            0, sample.expert, sample.weights(layer.dispatched)
        )
        torch.testing.assert_close(total, layer.dispatched.double())


def test_dropped_tokens_are_not_sampled(dropping_stats):
    for layer in dropping_stats.layers.values():
        assert torch.bincount(layer.tokens().expert, minlength=6).tolist() == layer.dispatched.tolist()


def test_tokens_of_a_record_are_held_out_together(stats):
    for layer in stats.layers.values():
        sample = layer.tokens()
        for record in sample.record.unique():
            assert len(sample.held_out[sample.record == record].unique()) == 1


def test_about_half_of_many_records_is_held_out():
    records = torch.arange(4000) * 12345
    zeros = torch.zeros(4000, dtype=torch.int64)
    sample = TokenSample(torch.zeros(4000, 1), zeros, torch.ones(4000), records, zeros, zeros, torch.empty(4000, 0))
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
