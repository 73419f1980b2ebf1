"""Recovery of decoder-only models: logits that stand where their labels do, distillation and hidden states."""

from dataclasses import replace

import pytest
import torch
from tiny_decoder import CLASSES, EOS, VOCAB, build_decoder, byte_tokenizer
from torch.nn import functional

from msmoe.calibration.batches import collate
from msmoe.calibration.causal import answered, wanted
from msmoe.checkpoint import Checkpoint
from msmoe.errors import UserError
from msmoe.recovery.data import num_targets, tokens_of
from msmoe.recovery.loss import cross_entropy, distillation, hidden_distance
from msmoe.recovery.options import RecoverOptions
from msmoe.recovery.student import check_same_blocks, forward, tokens_per_block
from msmoe.recovery.teacher import CachedTeacher, LiveTeacher, fill_cache

RECORDS = [
    wanted([1, 40, 50, 60, 70], [1, 40, -100, 60, 70]),
    answered([1, 30, 31, 32], [90, 91, 2]),
    answered([1, 100], [2]),
]  # 3 + 3 + 1 targets in 5 + 7 + 3 tokens
BATCH = collate(RECORDS, pad_id=0)


@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_the_loss_of_a_step_is_that_of_transformers(kind):
    model = build_decoder(kind)
    logits, _ = forward(model, BATCH, hidden=False)
    expected = float(model(**BATCH, use_cache=False).loss) * num_targets(RECORDS)
    assert float(cross_entropy(logits, BATCH["labels"])) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_logits_stand_at_the_labels_that_they_predict():
    model = build_decoder("granitemoe")
    logits, _ = forward(model, BATCH, hidden=False)
    own = model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"], use_cache=False).logits
    torch.testing.assert_close(logits[:, 1:], own[:, :-1])
    assert logits.shape == own.shape
    again = model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"], use_cache=False).logits
    assert torch.equal(again, own)  # the model is left as it was


def test_gradients_are_those_of_the_loss_of_transformers():
    model = build_decoder()
    weight = model.model.layers[1].mlp.gate.weight
    logits, _ = forward(model, BATCH, hidden=False)
    [found] = torch.autograd.grad(cross_entropy(logits, BATCH["labels"]) / num_targets(RECORDS), weight)
    [expected] = torch.autograd.grad(model(**BATCH, use_cache=False).loss, weight)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)


@torch.no_grad()
def test_distillation_is_the_divergence_at_the_positions_before_the_targets():
    student, teacher = build_decoder(seed=1), build_decoder("mixtral", seed=2)
    said = LiveTeacher(teacher, forward, temperature=2.0, hidden=False)([0, 1, 2], BATCH)
    logits, _ = forward(student, BATCH, hidden=False)
    inputs = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
    valid = BATCH["labels"][:, 1:] != -100
    q, p = ((m(**inputs, use_cache=False).logits[:, :-1][valid] / 2).log_softmax(-1) for m in (student, teacher))
    expected = 4 * functional.kl_div(q, p, reduction="sum", log_target=True)
    torch.testing.assert_close(distillation(logits, BATCH["labels"], said, 2.0), expected)


@torch.no_grad()
def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    model = build_decoder()
    said = LiveTeacher(model, forward, temperature=1.0, hidden=True)([0, 1, 2], BATCH)
    logits, hidden = forward(model, BATCH, hidden=True)
    assert float(distillation(logits, BATCH["labels"], said, 1.0)) == pytest.approx(0, abs=1e-6)
    assert float(hidden_distance(hidden, said.hidden, tokens_per_block(model.config, 15, 7))) == 0


@torch.no_grad()
def test_hidden_states_are_of_every_valid_token_of_every_block():
    model = build_decoder()
    _, hidden = forward(model, BATCH, hidden=True)
    assert [len(states) for states in hidden] == tokens_per_block(model.config, 15, 7) == [15, 15]


@torch.no_grad()
def test_a_cache_gives_the_loss_of_the_live_teacher_cut_to_what_is_kept(tmp_path):
    live = LiveTeacher(build_decoder("mixtral", seed=2), forward, temperature=2.0, hidden=False)
    fill_cache(tmp_path / "teacher", {}, lambda: live, RECORDS, batch_size=2, pad_id=0, device=torch.device("cpu"))
    cached = CachedTeacher(tmp_path / "teacher", RECORDS)
    chosen = [2, 0]
    batch = collate([RECORDS[i] for i in chosen], pad_id=0)
    full, kept = live(chosen, batch).log_probabilities, cached(chosen, batch)
    torch.testing.assert_close(full.gather(-1, kept.tokens), kept.log_probabilities[:, :-1])
    torch.testing.assert_close(kept.log_probabilities.exp().sum(-1), torch.ones(len(full)))


@pytest.fixture
def folder(tmp_path):
    build_decoder().save_pretrained(tmp_path / "decoder")
    byte_tokenizer().save_pretrained(tmp_path / "decoder")
    return tmp_path / "decoder"


def test_records_of_a_decoder_are_read_by_its_configuration(folder):
    options = RecoverOptions(steps=1)
    [record] = tokens_of(Checkpoint(folder), [{"source": "a", "target": "b"}], options)
    a, b = byte_tokenizer()("ab").input_ids[1:]
    assert (record.input_ids, record.labels) == ([1, a, b, EOS], [-100, -100, b, EOS])
    assert max(record.input_ids) < VOCAB


def test_blocks_of_decoders_are_compared_by_their_own_names(folder, tmp_path):
    build_decoder(num_hidden_layers=3).save_pretrained(tmp_path / "deeper")
    student, teacher = Checkpoint(folder), Checkpoint(tmp_path / "deeper")
    check_same_blocks(student, Checkpoint(folder))
    with pytest.raises(UserError, match=r"has num_hidden_layers 2, .*deeper has 3"):
        check_same_blocks(student, teacher)


def test_a_decoder_and_an_encoder_decoder_have_no_blocks_in_common(folder, switch):
    with pytest.raises(UserError, match="--hidden-weight compares block by block"):
        check_same_blocks(Checkpoint(folder), Checkpoint(switch))


def test_a_shorter_limit_cuts_the_start_of_a_prompt(folder):
    options = replace(RecoverOptions(steps=1), max_source_length=2)
    with pytest.warns(UserWarning, match="1 of 1 sources were cut to 2 tokens"):
        [record] = tokens_of(Checkpoint(folder), [{"source": "ab", "target": "c"}], options)
    assert record.input_ids[:2] == [1, byte_tokenizer()("b").input_ids[1]]
