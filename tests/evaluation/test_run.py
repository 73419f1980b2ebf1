"""Evaluation on the embedded checkpoint and on tiny ones, against loops over single unpadded examples."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from sklearn.metrics import f1_score
from tiny import batch_of, load_tensors, with_merged_experts, write_records
from torch import nn
from transformers import AutoTokenizer, SwitchTransformersForConditionalGeneration

from msmoe.demo import CHECKPOINT, HELD_OUT_TEXT, TASKS
from msmoe.errors import UserError
from msmoe.evaluation.results import results_frame, save_results
from msmoe.evaluation.run import evaluate

NUM_EXAMPLES = 24


@pytest.fixture(scope="module")
def stock():
    """The embedded model as transformers loads it, with its tokenizer."""
    model = SwitchTransformersForConditionalGeneration.from_pretrained(
        CHECKPOINT, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval(), AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The first examples of a task: their file and their records."""
    lines = (TASKS / "question_type.jsonl").read_text(encoding="utf-8").split("\n")[:NUM_EXAMPLES]
    records = [json.loads(line) for line in lines]
    return write_records(tmp_path_factory.mktemp("task") / "question_type.jsonl", records), records


@pytest.fixture(scope="module")
def result(task):
    return evaluate(CHECKPOINT, task[0], batch_size=8)


@torch.inference_mode()
def summed_loss(model, input_ids: list[int], labels: list[int]) -> float:
    """Cross-entropy of one unpadded target, by the model's own forward pass."""
    inputs, targets = torch.tensor([input_ids]), torch.tensor([labels])
    logits = model(input_ids=inputs, labels=targets).logits[0]
    return float(nn.functional.cross_entropy(logits, targets[0], reduction="sum"))


@torch.inference_mode()
def answers_of(model, tokenizer, records) -> list[str]:
    answers = []
    for record in records:
        inputs = torch.tensor([tokenizer(record["source"]).input_ids])
        written = model.generate(input_ids=inputs, max_new_tokens=20, do_sample=False)
        answers.append(tokenizer.decode(written[0], skip_special_tokens=True).strip())
    return answers


@pytest.fixture(scope="module")
def naive_answers(stock, task):
    return answers_of(*stock, task[1])


def test_the_loss_is_that_of_a_loop_over_single_examples(stock, task, result):
    model, tokenizer = stock
    total, num_tokens = 0.0, 0
    for record in task[1]:
        labels = tokenizer(record["target"]).input_ids
        total += summed_loss(model, tokenizer(record["source"]).input_ids, labels)
        num_tokens += len(labels)
    assert result.metrics["loss"].value == pytest.approx(total / num_tokens, rel=1e-4)


def test_exact_match_is_that_of_generating_one_unpadded_example_at_a_time(task, result, naive_answers):
    right = sum(answer == record["target"] for answer, record in zip(naive_answers, task[1], strict=True))
    assert right > 0
    assert result.metrics["exact_match"].value == right / NUM_EXAMPLES


def test_macro_f1_is_of_the_generated_answers(task, result, naive_answers):
    gold = [record["target"] for record in task[1]]
    expected = f1_score(gold, naive_answers, labels=sorted(set(gold)), average="macro", zero_division=0)
    assert result.metrics["macro_f1"].value == pytest.approx(expected)


def test_accuracy_takes_the_likeliest_label_by_brute_force(stock, task, result):
    model, tokenizer = stock
    labels = sorted({record["target"] for record in task[1]})
    right = 0
    for record in task[1]:
        source = tokenizer(record["source"]).input_ids
        losses = {label: summed_loss(model, source, tokenizer(label).input_ids) for label in labels}
        right += min(losses, key=losses.__getitem__) == record["target"]
    assert result.metrics["accuracy"].value == right / NUM_EXAMPLES


def test_the_batch_size_changes_nothing(task, result):
    other = evaluate(CHECKPOINT, task[0], batch_size=7)
    for name in result.metrics:
        assert other.metrics[name].value == pytest.approx(result.metrics[name].value, rel=1e-4)


def test_the_majority_share_is_that_of_the_most_frequent_target(task, result):
    (_, count), *_ = Counter(record["target"] for record in task[1]).most_common(1)
    assert result.majority_share == count / NUM_EXAMPLES


def test_a_result_names_checkpoint_and_task_and_their_size(task, result):
    stored = load_tensors(CHECKPOINT).values()
    assert (result.checkpoint, result.task) == (CHECKPOINT.name, task[0].stem)
    assert result.num_parameters == sum(t.numel() for t in stored)
    assert result.num_bytes == sum(t.numel() * t.element_size() for t in stored)


def test_a_model_in_memory_scores_like_its_folder(stock, task, result):
    model, tokenizer = stock
    assert evaluate(model, task[0], tokenizer=tokenizer).metrics["exact_match"] == result.metrics["exact_match"]


def test_text_is_scored_by_its_loss_alone():
    result = evaluate(CHECKPOINT, HELD_OUT_TEXT, samples=8)
    assert list(result.metrics) == ["loss"]
    assert result.majority_share is None


def test_samples_are_a_seeded_choice(switch, data):
    results = [evaluate(switch, data, samples=5, seed=seed) for seed in (0, 0, 1)]
    losses = [result.metrics["loss"] for result in results]
    assert losses[0] == losses[1] != losses[2]
    assert losses[0].num_examples == 5


def test_only_the_metrics_asked_for_are_measured():
    result = evaluate(CHECKPOINT, TASKS / "sms_spam.jsonl", metrics=["loss", "exact_match"], samples=4)
    assert list(result.metrics) == ["exact_match", "loss"]


def test_progress_reaches_the_number_of_examples(switch, data, records):
    calls = []
    evaluate(switch, data, batch_size=16, progress=lambda *call: calls.append(call))
    assert calls == [(16, len(records)), (32, len(records)), (40, len(records))]


def test_the_loss_of_an_exact_checkpoint_is_that_of_the_stock_model_with_merged_experts(switch, exact, data, records):
    model = with_merged_experts(switch, exact)
    total = sum(summed_loss(model, r["input_ids"], r["labels"]) for r in records)
    expected = total / sum(len(r["labels"]) for r in records)
    assert evaluate(exact, data).metrics["loss"].value == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_a_native_checkpoint_is_that_of_the_stock_class(native, data, records):
    model = SwitchTransformersForConditionalGeneration.from_pretrained(native).eval()
    total = sum(summed_loss(model, r["input_ids"], r["labels"]) for r in records)
    expected = total / sum(len(r["labels"]) for r in records)
    assert evaluate(native, data).metrics["loss"].value == pytest.approx(expected, rel=1e-5)


def test_merging_keeps_the_operations_of_a_token(switch, exact, data):
    before, after = (evaluate(path, data).flops_per_token for path in (switch, exact))
    assert after == before > 0


def test_masked_labels_count_for_nothing(switch, tmp_path):
    plain = {"input_ids": [5, 9, 1], "labels": [7, 8, 1]}
    masked = {"input_ids": [5, 9, 1], "labels": [7, -100, 1]}
    with torch.inference_mode():
        model = SwitchTransformersForConditionalGeneration.from_pretrained(switch).eval()
        logits = [model(**batch_of([record])).logits[0].log_softmax(-1) for record in (plain, masked)]
    data = write_records(tmp_path / "d.jsonl", [plain, masked])
    # three tokens of the first record and two of the second
    total = sum(float(logits[0][i, label]) for i, label in enumerate([7, 8, 1]))
    total += float(logits[1][0, 7] + logits[1][2, 1])
    assert evaluate(switch, data).metrics["loss"].value == pytest.approx(-total / 5, rel=1e-5)


def test_an_unknown_metric_is_refused_with_the_choices(switch, data):
    with pytest.raises(UserError, match="unknown metric 'bleu'; choose from exact_match, accuracy, macro_f1, loss"):
        evaluate(switch, data, metrics=["loss", "bleu"])


@pytest.mark.parametrize("name", ["exact_match", "accuracy", "macro_f1"])
def test_a_metric_of_answers_needs_texts(name, switch, data):
    with pytest.raises(UserError, match=f"{name} needs records with source .*calibration.jsonl has others"):
        evaluate(switch, data, metrics=[name])


def test_label_metrics_need_few_different_targets(tmp_path):
    data = write_records(tmp_path / "d.jsonl", [{"source": "x", "target": f"answer {i}"} for i in range(65)])
    with pytest.raises(UserError, match="accuracy needs records with source and at most 64 different targets"):
        evaluate(CHECKPOINT, data, metrics=["accuracy"])


def test_text_without_tokenizer_is_refused(switch, tmp_path):
    data = write_records(tmp_path / "d.jsonl", [{"source": "a", "target": "b"}])
    with pytest.raises(UserError, match=r"d\.jsonl, line 1 is text and the checkpoint has no tokenizer"):
        evaluate(switch, data)


def test_results_json_holds_every_number_with_its_interval(result, tmp_path):
    other = replace(result, task="other")
    save_results([result, other], tmp_path / "results.json")
    content = json.loads((tmp_path / "results.json").read_text())
    first, second = content["results"]
    assert content["format"] == "msmoe-results/1"
    assert second["task"] == "other"
    for name, estimate in result.metrics.items():
        assert first["metrics"][name] == {
            "value": estimate.value, "ci95": [estimate.low, estimate.high], "num_examples": NUM_EXAMPLES
        }  # fmt: skip
    assert (first["bytes"], first["num_parameters"]) == (result.num_bytes, result.num_parameters)


def test_the_data_frame_has_a_row_per_task_and_metric(result):
    in_memory = replace(result, task="other", num_bytes=None, majority_share=None)
    frame = results_frame([result, in_memory])
    assert list(zip(frame.task, frame.metric, strict=True)) == [
        (task, metric) for task in (result.task, "other") for metric in result.metrics
    ]
    for row, estimate in zip(frame.itertuples(), list(result.metrics.values()) * 2, strict=True):
        assert (row.value, row.low, row.high) == (estimate.value, estimate.low, estimate.high)
        assert row.num_examples == NUM_EXAMPLES
        assert (row.num_parameters, row.peak_memory) == (result.num_parameters, result.peak_memory)
    missing = frame.task == "other"
    assert frame.num_bytes.isna().tolist() == missing.tolist()
    assert frame.majority_share.isna().tolist() == missing.tolist()
    assert set(frame.num_bytes.dropna()) == {result.num_bytes}


def test_the_data_frame_of_no_result_has_columns_and_no_row():
    frame = results_frame([])
    assert list(frame.columns[:3]) == ["checkpoint", "task", "metric"]
    assert len(frame) == 0


def test_existing_results_are_not_overwritten(result, tmp_path):
    (tmp_path / "results.json").write_text("precious")
    with pytest.raises(UserError, match=r"results\.json exists; use --force to replace it"):
        save_results([result], tmp_path / "results.json")
    assert (tmp_path / "results.json").read_text() == "precious"


def test_force_overwrites_results(result, tmp_path):
    (tmp_path / "results.json").write_text("old")
    save_results([result], tmp_path / "results.json", force=True)
    assert json.loads((tmp_path / "results.json").read_text())["results"][0]["task"] == result.task


def test_results_that_cannot_be_written_are_refused(result, tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*results\.json: no folder .*nowhere"):
        save_results([result], tmp_path / "nowhere" / "results.json")
