"""Proofs of the decoder demo: masks really keep experts out, zeroing silences them, likelihoods are of the answer."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "decoder_demo"))
import prove
from prove import Proofs, Sequence, batches, columns_led, masked, mean_loss, usage, zeroed

ROWS = [Sequence([3, 4, 5, 6, 7], 1), Sequence([8, 9, 10], 2), Sequence([11, 12, 13, 14], 1)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=40, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2,
        norm_topk_prob=True, initializer_range=0.3,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def test_every_token_that_counts_is_counted_once(model):
    expected = []
    for row in ROWS:
        logits = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        expected += [-logits[i - 1, row.ids[i]] for i in range(row.first, len(row.ids))]
    assert mean_loss(model, ROWS) == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


def test_batches_put_padding_right():
    ids, real, counted = next(batches(ROWS))
    assert ids.tolist() == [[8, 9, 10, 0, 0], [11, 12, 13, 14, 0], [3, 4, 5, 6, 7]]
    assert real.sum(1).tolist() == [3, 4, 5]
    assert counted.long().tolist() == [[0, 0, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 1]]


def test_masked_experts_are_never_chosen(model):
    absent = torch.tensor([[0, 2], [1, 3]])
    with masked(model, absent):
        shares = usage(model, ROWS)
    assert shares.tolist() == [[0, 0.5, 0, 0.5], [0.5, 0, 0.5, 0]]


def test_masking_nothing_changes_nothing(model):
    before = mean_loss(model, ROWS)
    with masked(model, torch.empty(2, 0, dtype=torch.long)):
        assert mean_loss(model, ROWS) == pytest.approx(before, rel=1e-5)
    assert mean_loss(model, ROWS) == before


def test_zeroed_experts_are_silent(model):
    before = mean_loss(model, ROWS)
    with zeroed(model):
        silent = mean_loss(model, ROWS)
    weights = [layer.mlp.experts.down_proj for layer in model.model.layers]
    kept = [w.detach().clone() for w in weights]
    for w in weights:
        w.data.zero_()
    assert silent == pytest.approx(mean_loss(model, ROWS), rel=1e-5)
    for w, old in zip(weights, kept, strict=True):
        w.data.copy_(old)
    assert mean_loss(model, ROWS) == before != silent


def test_choice_of_the_largest_likelihood_is_taken(model):
    class Letters:
        eos_token_id = 0

        def __call__(self, text, add_special_tokens):
            assert not add_special_tokens
            return type("Encoding", (), {"input_ids": [ord(c) - ord("a") + 1 for c in text]})

    def likelihood(source: str, target: str) -> float:
        ids = [*(ord(c) - ord("a") + 1 for c in source + target), 0]
        scores = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(scores[i - 1, ids[i]].item() for i in range(len(source), len(ids)))

    choices = ["a", "bcd", "ef", "g"]
    values = [likelihood("hij", c) for c in choices]
    best = values.index(max(values))
    records = [{"source": "hij", "choices": choices, "answer": i} for i in (best, (best + 1) % 4)]
    assert prove.choice_accuracy(model, Letters(), records) == 0.5


def test_rows_and_columns_led_are_counted():
    proofs = Proofs(
        domains=["a", "b"], full=[1.0, 1.0], zeroed=[2.0, 11.0], increase=[[0.5, 0.1], [0.9, 2.0]], usage=[], exact={},
        choices=0.0,
    )  # fmt: skip
    assert proofs.largest_of_row == 2
    assert proofs.largest_of_column == 1  # b loses more than a without the experts of a
    assert proofs.largest_share_of_column == 2  # .5 of 1, .09 of 10
    assert columns_led([[1.0, 0.0], [2.0, 3.0]]) == 1
