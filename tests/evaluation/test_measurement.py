"""What a measurement may not depend on: stored generation settings, padding, white space, the sample, the batch."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from tiny import build_switch, write_records
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import msmoe
from msmoe.calibration import targets
from msmoe.calibration.batches import collate
from msmoe.calibration.records import DataWarning
from msmoe.calibration.spans import TokenRecord
from msmoe.checkpoint import Checkpoint
from msmoe.demo import CHECKPOINT, TASKS
from msmoe.errors import UserError
from msmoe.evaluation.answers import canonical, decode
from msmoe.evaluation.batch import batch_of
from msmoe.evaluation.metrics import macro_f1
from msmoe.evaluation.results import save_results
from msmoe.evaluation.run import evaluate

NUM_EXAMPLES = 12
STORED = {
    "min_length": 15, "forced_bos_token_id": 9, "forced_eos_token_id": 9, "num_return_sequences": 2, "num_beams": 2,
    "return_dict_in_generate": True, "penalty_alpha": 0.6, "top_k": 4, "do_sample": True, "temperature": 9.0,
    "suppress_tokens": list(range(2, 400)), "begin_suppress_tokens": list(range(2, 400)), "bad_words_ids": [[20], [21]],
    "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "max_length": 2, "max_time": 1e-9, "eos_token_id": 7,
    "decoder_start_token_id": 9, "exponential_decay_length_penalty": [0, 9.0], "use_cache": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def records():
    lines = (TASKS / "question_type.jsonl").read_text(encoding="utf-8").split("\n")[:NUM_EXAMPLES]
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def model():
    return msmoe.load(CHECKPOINT)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def result(model, records):
    return evaluate(model, records, count_flops=False)


def metrics_of(result) -> dict:
    return {name: estimate.value for name, estimate in result.metrics.items()}


# Generation


@pytest.mark.parametrize("name", STORED)
def test_stored_generation_settings_change_no_answer(name, model, records, result):
    own, model.generation_config = model.generation_config, copy.deepcopy(model.generation_config)
    setattr(model.generation_config, name, STORED[name])
    try:
        assert evaluate(model, records, metrics=["exact_match"], count_flops=False).right == result.right
    finally:
        model.generation_config = own


def test_a_file_of_stored_settings_changes_no_answer_and_is_kept(records, result, tmp_path):
    folder = shutil.copytree(CHECKPOINT, tmp_path / "ckpt")
    settings = json.loads((folder / "generation_config.json").read_text()) | {"min_length": 15, "num_beams": 3}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    model = msmoe.load(folder)
    assert evaluate(model, records, count_flops=False).right == result.right
    assert (model.generation_config.min_length, model.generation_config.num_beams) == (15, 3)


def test_results_hold_the_settings_that_they_depend_on(result, records, tmp_path):
    save_results([result], tmp_path / "results.json")
    [content] = json.loads((tmp_path / "results.json").read_text())["results"]
    assert content["settings"] == {
        "generation": {
            "max_new_tokens": result.settings["generation"]["max_new_tokens"], "do_sample": False, "num_beams": 1,
            "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
        },
        "dtype": "float32", "samples": None, "seed": 0, "max_source_length": None, "max_target_length": None,
        "num_cut": {"sources": 0, "targets": 0}, "num_skipped": 0,
    }  # fmt: skip


# Cuts and texts


def test_nothing_is_cut_unless_asked_for(model, records, result):
    filler = "this is of no importance whatever " * 200
    [long] = evaluate(model, [{"source": filler, "target": filler}], metrics=["loss"], count_flops=False).losses
    assert long[1] > 1000  # tokens of the target


def test_cuts_are_counted_and_said(model, records):
    with pytest.warns(DataWarning, match=f"{NUM_EXAMPLES} of {NUM_EXAMPLES} sources were cut to 4 tokens"):
        cut = evaluate(model, records, metrics=["loss"], count_flops=False, max_source_length=4)
    assert cut.settings["num_cut"] == {"sources": NUM_EXAMPLES, "targets": 0}
    assert cut.settings["max_source_length"] == 4


@pytest.mark.filterwarnings("ignore::msmoe.calibration.records.DataWarning")
def test_answers_are_compared_with_the_whole_target(model, records, result):
    cut = evaluate(model, records, count_flops=False, max_target_length=1)
    assert sum(result.right) > 0
    assert cut.right == result.right
    assert {count for _, count in cut.losses} == {1}


def test_white_space_around_targets_changes_no_comparison(model, records, result):
    padded = [r | {"target": f" \n{r['target']}\t "} for r in records]
    compared = metrics_of(evaluate(model, padded, count_flops=False))
    assert compared | {"loss": 0} == metrics_of(result) | {"loss": 0}  # the loss is of the tokens that are there


def test_what_the_tokenizer_drops_from_answers_is_dropped_from_targets():
    core = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert canonical(words, " a \n  b", "here") == decode(words, [[1, 2]])[0] == "a b"


def test_a_target_of_unknown_characters_is_never_an_answer(model, records):
    unknown = [r | {"target": "\U00012000"} for r in records]
    assert evaluate(model, unknown, metrics=["exact_match"], count_flops=False).metrics["exact_match"].value == 0


def test_conversations_are_scored_like_the_pairs_that_they_are(model, records, result):
    chats = [
        {"messages": [{"role": "user", "content": r["source"]}, {"role": "assistant", "content": r["target"]}]}
        for r in records
    ]
    assert metrics_of(evaluate(model, chats, count_flops=False)) == metrics_of(result)


def test_columns_say_where_the_texts_are(model, records, result):
    renamed = [{"question": r["source"], "answer": r["target"]} for r in records]
    scored = evaluate(
        model, renamed, columns={"source": "question", "target": "answer"}, metrics=["loss"], count_flops=False
    )
    assert scored.losses == result.losses


def test_blank_records_are_left_out_and_counted(model, records, result):
    with pytest.warns(DataWarning, match="blank"):
        scored = evaluate(model, [*records, {"source": "x", "target": " "}], count_flops=False)
    assert metrics_of(scored) == metrics_of(result)
    assert scored.settings["num_skipped"] == 1


# Properties of the task


def test_labels_and_majority_share_are_those_of_the_whole_file(model, records, result):
    sampled = evaluate(model, records, samples=1, metrics=["accuracy"], count_flops=False)
    assert sampled.majority_share == result.majority_share
    # with the labels of the sample alone, of which there is one, every answer would be right
    seeds = (evaluate(model, records, samples=1, seed=s, metrics=["accuracy"], count_flops=False) for s in range(8))
    assert {s.metrics["accuracy"].value for s in seeds} == {0.0, 1.0}


def test_a_predicted_label_that_no_example_has_counts_as_zero():
    # a: 2 of 2 found, but one a too few: precision 1, recall 1/2: F1 2/3; b is predicted once and never right: 0
    assert macro_f1(["a", "b"], ["a", "a"], ["a", "b", "c"]).value == pytest.approx((2 / 3 + 0) / 2)


def test_a_label_of_the_task_that_nobody_speaks_of_does_not_count():
    assert macro_f1(["a", "a"], ["a", "a"], ["a", "b", "c"]).value == 1.0


# Padding


PLAIN = {"input_ids": [5, 9, 11, 1], "labels": [7, 8, 1]}
PADDED = [
    {"input_ids": [5, 9, 11, 1, 0, 0], "labels": [7, 8, 1, 0, 0]},
    {"input_ids": [0, 0, 5, 9, 11, 1], "labels": [-100, -100, 7, 8, 1]},
    {"input_ids": [3, 5, 9, 11, 1, 3], "attention_mask": [0, 1, 1, 1, 1, 0], "labels": [7, 8, 1, -100]},
    {"input_ids": [5, 9, 11, 1], "labels": [4, 7, 8, 1, 4], "decoder_attention_mask": [0, 1, 1, 1, 0]},
]


@pytest.mark.parametrize("padded", PADDED)
def test_padding_changes_no_loss_however_it_is_given(padded, switch):
    assert evaluate(switch, [padded], count_flops=False).losses == evaluate(switch, [PLAIN], count_flops=False).losses


def test_padding_that_is_the_end_of_sequence_ends_the_target_once(records):
    model = build_switch(pad_token_id=1, eos_token_id=1)
    padded = {"input_ids": [5, 9, 1, 1, 1], "labels": [7, 8, 1, 1]}
    plain = evaluate(model, [{"input_ids": [5, 9, 1], "labels": [7, 8, 1]}], count_flops=False)
    assert evaluate(model, [padded], count_flops=False).losses == plain.losses
    assert plain.losses[0][1] == 3


# Slices


@pytest.fixture
def scored(switch):
    """A tiny model and a batch of targets with holes."""
    model = msmoe.load(switch)
    records = [TokenRecord([5, 9, 1], [7, 8, -100, 9, 1]), TokenRecord([6, 1], [3]), TokenRecord([4, 5], [-100, 2, 1])]
    return model, records


@torch.inference_mode()
def losses(model, records) -> np.ndarray:
    found = batch_of(model, records, pad_id=0).targets()
    return -found.by_record(targets.log_probabilities(found))


def test_losses_by_slices_are_those_of_the_full_logits(scored):
    model, records = scored
    batch = collate(records, pad_id=0)
    with torch.inference_mode():
        logits = model(**batch).logits.double()
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none").sum(1)
    np.testing.assert_allclose(losses(model, records), expected, rtol=1e-6)


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_never_more_logits_than_a_slice_are_there_at_once(tokens, scored, monkeypatch):
    model, records = scored
    whole, seen = losses(model, records), []
    monkeypatch.setattr(targets, "SLICE", tokens * model.config.vocab_size)
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.numel()))
    np.testing.assert_allclose(losses(model, records), whole, rtol=1e-6)
    assert max(seen) == tokens * model.config.vocab_size
    assert sum(seen) == 7 * model.config.vocab_size  # 4 + 1 + 2 targets that count


# What is not finite, and where it runs


def test_a_tensor_that_is_not_finite_is_named(switch):
    model = msmoe.load(switch)
    with torch.no_grad():
        model.decoder.final_layer_norm.weight[3] = float("inf")
    with pytest.raises(
        UserError, match=r"no finite loss: its tensor decoder\.final_layer_norm\.weight holds NaN or inf"
    ):
        evaluate(model, [PLAIN], count_flops=False)


def test_an_overflow_of_finite_weights_is_named_with_its_record(switch):
    model = msmoe.load(switch)
    with torch.no_grad():
        model.decoder.final_layer_norm.weight.fill_(3e38)
    with pytest.raises(UserError, match=r"the loss of record 1 is nan though every weight is finite: .* in float32"):
        evaluate(model, [PLAIN], count_flops=False)


def test_uncounted_operations_are_null_in_results(switch, tmp_path):
    save_results([evaluate(switch, [PLAIN], count_flops=False)], tmp_path / "results.json")
    [content] = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)["results"]
    assert content["flops_per_token"] is None


def test_the_dtype_asked_for_is_the_one_it_runs_in(switch):
    measured = evaluate(switch, [PLAIN], dtype="bfloat16", count_flops=False)
    exact = evaluate(switch, [PLAIN], count_flops=False)
    assert measured.settings["dtype"] == "bfloat16"
    assert measured.metrics["loss"].value != exact.metrics["loss"].value
    assert measured.metrics["loss"].value == pytest.approx(exact.metrics["loss"].value, rel=0.05)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [({"device": "abacus"}, "device 'abacus' cannot be used"), ({"device": "meta"}, "device 'meta' cannot be used"),
     ({"dtype": "int3"}, "unknown --dtype 'int3'; choose from auto, float32, bfloat16, float16")],
)  # fmt: skip
def test_a_device_or_dtype_that_is_not_there_is_refused(options, complaint, switch):
    with pytest.raises(UserError, match=complaint):
        evaluate(switch, [PLAIN], **options)


def test_a_data_file_that_the_tokenizer_does_not_fit_is_refused(records, tmp_path):
    model = build_switch(vocab_size=100)
    with pytest.raises(UserError, match=r"d\.jsonl, line 1: token id \d+ is outside the vocabulary of 100"):
        evaluate(
            model, write_records(tmp_path / "d.jsonl", records), tokenizer=AutoTokenizer.from_pretrained(CHECKPOINT)
        )


def test_labels_of_special_tokens_alone_stay_apart(model, records):
    labelled = [r | {"target": f"<extra_id_{i % 2}>"} for i, r in enumerate(records)]
    assert evaluate(model, labelled, count_flops=False).majority_share == 0.5
    assert evaluate(model, labelled, metrics=["exact_match"], count_flops=False).metrics["exact_match"].value == 0


def test_a_model_changed_in_memory_is_not_taken_for_its_folder(records):
    model = msmoe.load(CHECKPOINT)
    assert evaluate(model, records[:4], count_flops=False).num_bytes == Checkpoint(CHECKPOINT).num_bytes
    with torch.no_grad():
        model.shared.weight[5] += 1
    changed = evaluate(model, records[:4], count_flops=False)
    assert (changed.checkpoint, changed.num_bytes, changed.source) == ("model", None, None)
