"""Evaluation of decoder-only models against loops over single unpadded examples; divergence, perplexity, choices."""

import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tiny import batch_of, load_tensors, write_records
from tiny_decoder import BOS, EOS, build_decoder, byte_tokenizer, full_log_probabilities, log_likelihood
from transformers import SwitchTransformersForConditionalGeneration

from msmoe.calibration.records import DataError
from msmoe.cli.evaluate import command
from msmoe.demo import CHECKPOINT
from msmoe.errors import UserError
from msmoe.evaluation.metrics import Estimate, perplexity
from msmoe.evaluation.results import save_results
from msmoe.evaluation.run import evaluate

TOKENIZER = byte_tokenizer()
SOURCES = ["a question", "b", "what is it then?", "why", "a longer question than that", "no"]
CHOICES = [
    {"source": s, "choices": [" yes", " no", " perhaps not"][: 2 + i % 2], "answer": i % 2}
    for i, s in enumerate(SOURCES)
]


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False).input_ids


@torch.no_grad()
def written(model, prompt: list[int], count: int) -> str:
    """A greedy answer, one token at a time."""
    answer: list[int] = []
    while len(answer) < count and EOS not in answer:
        answer.append(int(full_log_probabilities(model, [*prompt, *answer])[-1].argmax()))
    return TOKENIZER.decode(answer, skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def model():
    """A model whose greedy answers end after a few tokens, each source's at its own length."""
    model = build_decoder("mixtral", seed=3)
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 3
    return model


@pytest.fixture(scope="module")
def pairs(model):
    """Half of the targets are what the model writes."""
    return [
        {"source": s, "target": (written(model, [BOS, *ids(s)], 8) or "x") if i % 2 else f"label {i}"}
        for i, s in enumerate(SOURCES)
    ]


def run(model, data, **options):
    return evaluate(model, data, **{"tokenizer": TOKENIZER, "count_flops": False, "batch_size": 4} | options)


def value(result, metric: str) -> float:
    return result.metrics[metric].value


# Loss and answers


def test_the_loss_of_a_pair_is_of_the_target_and_its_end_alone(model, pairs):
    expected = [-log_likelihood(model, [BOS, *ids(r["source"])], [*ids(r["target"]), EOS]) for r in pairs]
    result = run(model, pairs, metrics=["loss"])
    np.testing.assert_allclose([loss for loss, _ in result.losses], expected, rtol=1e-4)
    assert [count for _, count in result.losses] == [len(ids(r["target"])) + 1 for r in pairs]
    assert value(result, "loss") == pytest.approx(sum(expected) / sum(c for _, c in result.losses), rel=1e-4)


def test_the_loss_of_a_text_is_that_of_transformers(model):
    tokens = torch.tensor([TOKENIZER("some text").input_ids])
    with torch.no_grad():
        expected = float(model(input_ids=tokens, labels=tokens, use_cache=False).loss)
    result = run(model, [{"text": "some text"}])
    assert value(result, "loss") == pytest.approx(expected, rel=1e-5)
    assert list(result.metrics) == ["loss", "perplexity"]


def test_perplexity_is_the_exponential_of_the_loss(model, pairs):
    result = run(model, pairs, metrics=["loss", "perplexity"])
    loss, found = result.metrics["loss"], result.metrics["perplexity"]
    assert (found.value, found.low, found.high) == tuple(math.exp(x) for x in (loss.value, loss.low, loss.high))


def test_a_perplexity_beyond_all_numbers_is_null_in_results(model, pairs, tmp_path):
    assert perplexity(Estimate(1000.0, 1.0, 1000.0, 2)).value == math.inf
    result = run(model, pairs, metrics=["perplexity"])
    result.metrics["perplexity"] = perplexity(Estimate(1000.0, 0.0, 1000.0, 2))
    save_results([result], tmp_path / "results.json")
    [content] = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)["results"]
    assert content["metrics"]["perplexity"] == {"value": None, "ci95": [1.0, None], "num_examples": 2}


def test_answers_of_a_batch_are_those_of_single_prompts(model, pairs):
    result = run(model, pairs)
    most = max(count for _, count in result.losses) + 2
    single = [written(model, [BOS, *ids(r["source"])], most) for r in pairs]
    assert result.right == [int(a == r["target"].strip()) for a, r in zip(single, pairs, strict=True)]
    assert 0 < sum(result.right) < len(pairs)
    assert len({len(answer) for answer in single}) > 1


@pytest.mark.parametrize("size", [1, 3])
def test_the_batch_size_changes_no_metric(size, model, pairs):
    whole, parts = run(model, pairs, batch_size=64), run(model, pairs, batch_size=size)
    assert parts.right == whole.right
    assert list(whole.metrics) == ["exact_match", "accuracy", "macro_f1", "loss", "perplexity"]
    for name in whole.metrics:
        assert value(parts, name) == pytest.approx(value(whole, name), rel=1e-4)


def test_accuracy_of_labels_takes_the_likeliest_by_brute_force(model):
    labelled = [{"source": s, "target": [" yes", " no", " maybe"][i % 3]} for i, s in enumerate(SOURCES)]
    likeliest = []
    for record in labelled:
        prompt = [BOS, *ids(record["source"])]
        scores = {t: log_likelihood(model, prompt, [*ids(t), EOS]) for t in (" yes", " no", " maybe")}
        likeliest.append(max(scores, key=scores.__getitem__))
    right = np.mean([a == r["target"] for a, r in zip(likeliest, labelled, strict=True)])
    assert value(run(model, labelled, metrics=["accuracy"]), "accuracy") == right


def test_generation_stops_at_every_end_of_sequence(model):
    ends = build_decoder("mixtral", seed=3, eos_token_id=[9, EOS])
    assert run(ends, [{"source": "a", "target": "b"}]).settings["generation"] == {
        "max_new_tokens": 4, "do_sample": False, "num_beams": 1, "pad_token_id": 9, "eos_token_id": [9, EOS],
    }  # fmt: skip


def test_a_conversation_is_scored_like_its_rendered_text(model):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    result = run(model, [{"messages": turns}], metrics=["loss", "accuracy"])
    expected = log_likelihood(model, ids("<|bos|><|user|>hi<|eos|>\n<|assistant|>"), [*ids("ho"), EOS])
    assert result.losses == [(pytest.approx(-expected, rel=1e-4), 3)]
    assert value(result, "accuracy") == 1  # there is one label


def test_a_conversation_without_chat_template_is_refused(model):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    with pytest.raises(DataError, match="record 1 is a conversation and the tokenizer has no chat template"):
        run(model, [{"messages": turns}], tokenizer=byte_tokenizer(chat_template=None))


def test_token_records_need_no_tokenizer(model):
    record = {"input_ids": [1, 50, 60, 70], "labels": [-100, -100, 60, 70]}
    [(loss, count)] = run(model, [record], tokenizer=None).losses
    assert (loss, count) == (pytest.approx(-log_likelihood(model, [1, 50], [60, 70]), rel=1e-4), 2)


# Operations


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_operations_are_those_of_the_matrices_that_a_token_meets(experts):
    model = build_decoder("mixtral", num_hidden_layers=1, attn_implementation="eager")
    model.set_experts_implementation(experts)
    found = run(model, [{"input_ids": [1, 50, 60, 70]}], tokenizer=None, count_flops=True).flops_per_token
    # of 4 tokens with D 32, F 48: q and o 32 x 32, k and v 32 x 16, the router 32 x 4, 2 experts of 3 x 32 x 48
    linear = 2 * 4 * (2 * 32 * 32 + 2 * 32 * 16 + 32 * 4 + 2 * 3 * 32 * 48)
    attention = 2 * 2 * 4 * 8 * 4 * 4  # queries with keys and weights with values: 4 heads of 8, 4 x 4 pairs
    head = 2 * 3 * 32 * model.config.vocab_size  # at the 3 targets
    assert found == (linear + attention + head) / 4


# Choices


@pytest.mark.parametrize("size", [1, 4])
def test_choices_are_taken_by_likelihood_as_by_brute_force(size, model):
    right, right_by_length = [], []
    for record in CHOICES:
        prompt = [BOS, *ids(record["source"])]
        scores = np.array([log_likelihood(model, prompt, ids(c)) for c in record["choices"]])
        lengths = np.array([len(ids(c)) for c in record["choices"]])
        right.append(scores.argmax() == record["answer"])
        right_by_length.append((scores / lengths).argmax() == record["answer"])
    result = run(model, CHOICES, batch_size=size)
    assert list(result.metrics) == ["accuracy", "loss", "perplexity", "accuracy_norm"]
    assert (value(result, "accuracy"), value(result, "accuracy_norm")) == (np.mean(right), np.mean(right_by_length))
    assert right != right_by_length


@torch.inference_mode()
def test_an_encoder_decoder_chooses_by_likelihood_too():
    model = SwitchTransformersForConditionalGeneration.from_pretrained(CHECKPOINT, attn_implementation="eager").eval()
    from transformers import AutoTokenizer

    tokenizer, right = AutoTokenizer.from_pretrained(CHECKPOINT), []
    for record in CHOICES:
        source = tokenizer(record["source"], return_tensors="pt").input_ids
        losses = []
        for choice in record["choices"]:
            labels = tokenizer(choice, return_tensors="pt").input_ids
            losses.append(float(model(input_ids=source, labels=labels).loss) * labels.shape[1])
        right.append(np.argmin(losses) == record["answer"])
    result = evaluate(CHECKPOINT, CHOICES, count_flops=False)
    assert list(result.metrics) == ["accuracy", "loss", "accuracy_norm"]
    assert value(result, "accuracy") == np.mean(right)


def test_metrics_of_choices_need_choices(model, pairs):
    with pytest.raises(UserError, match="accuracy_norm needs records with choices; records has others"):
        run(model, pairs, metrics=["accuracy_norm"])
    with pytest.raises(UserError, match="exact_match needs records with source"):
        run(model, CHOICES, metrics=["exact_match"])


# Divergence


def test_the_divergence_is_per_target_token_of_all_examples(model, pairs):
    other = build_decoder("mixtral", seed=4)
    result = run(model, pairs, reference=other, metrics=["kl"])
    total, count = 0.0, 0
    for record in pairs:
        prompt, answer = [BOS, *ids(record["source"])], [*ids(record["target"]), EOS]
        q, p = (full_log_probabilities(m, [*prompt, *answer])[len(prompt) - 1 : -1] for m in (model, other))
        total += float((p.exp() * (p - q)).sum())
        count += len(answer)
    assert value(result, "kl") == pytest.approx(total / count, rel=1e-3)
    assert result.settings["reference"] == "model"


def test_the_divergence_from_itself_is_nothing(model, pairs):
    found = run(model, pairs, reference=model).metrics["kl"]
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_a_divergence_needs_a_reference_of_the_same_kind_and_vocabulary(model, pairs, switch):
    with pytest.raises(UserError, match="kl compares with another model: give it by --reference"):
        run(model, pairs, metrics=["kl"])
    with pytest.raises(UserError, match="one of the two is decoder-only"):
        run(model, pairs, reference=switch)
    with pytest.raises(UserError, match="the model has 261 tokens, the reference 300"):
        run(model, pairs, reference=build_decoder(vocab_size=300))


@torch.inference_mode()
def test_the_command_measures_the_divergence_of_a_compressed_checkpoint(switch, native, data, tmp_path):
    arguments = [str(native), "--data", str(data), "--reference", str(switch), "--out", str(tmp_path / "r.json")]
    outcome = CliRunner().invoke(command, [*arguments, "--metrics", "loss,kl"], catch_exceptions=False)
    assert outcome.exit_code == 0
    [content] = json.loads((tmp_path / "r.json").read_text())["results"]
    models = [SwitchTransformersForConditionalGeneration.from_pretrained(path).eval() for path in (native, switch)]
    total, count = 0.0, 0
    for line in data.read_text().splitlines():
        record = json.loads(line)
        q, p = (m(**batch_of([record])).logits[0].log_softmax(-1) for m in models)
        total += float((p.exp() * (p - q)).sum())
        count += len(p)
    assert content["metrics"]["kl"]["value"] == pytest.approx(total / count, rel=1e-3)
    assert content["settings"]["reference"] == switch.name


def test_the_command_refuses_a_divergence_without_reference(switch, data):
    with pytest.raises(UserError, match="give it by --reference"):
        CliRunner().invoke(
            command,
            [str(switch), "--data", str(data), "--metrics", "kl"],
            catch_exceptions=False,
            standalone_mode=False,
        )


def test_a_decoder_loaded_from_a_folder_is_measured_with_its_own_tokenizer(model, tmp_path):
    folder = tmp_path / "decoder"
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder).eval()
    assert len(load_tensors(folder)) > 0
    data = write_records(tmp_path / "d.jsonl", [{"text": "some text"}])
    assert evaluate(loaded, data, count_flops=False).losses == run(model, data).losses
