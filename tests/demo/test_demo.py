"""The embedded demo: its data are held out, its checkpoint is worth compressing, its command tells the whole story."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import compress
from torch import nn

from msmoe.calibration.profile import profile
from msmoe.demo import CALIBRATION, CHECKPOINT, HELD_OUT_TEXT, TASKS
from msmoe.evaluation.run import evaluate
from msmoe.families.inspection import inspect
from msmoe.families.loading import load

FILES = sorted(TASKS.glob("*.jsonl"))
NUM_TEXTS = 80


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def normalise(text: str) -> str:
    """Lower case, words only."""
    return " ".join(re.findall(r"\w+", text.lower()))


def without_prefix(source: str) -> str:
    return source.partition(": ")[2]


def calibration_texts() -> list[str]:
    return [normalise(r["text"] if "text" in r else without_prefix(r["source"])) for r in read(CALIBRATION)]


@pytest.fixture(scope="module")
def demo_stats():
    return profile(CHECKPOINT, CALIBRATION, samples=512, token_sample=16384)


@pytest.fixture(scope="module")
def demo_model():
    return load(CHECKPOINT)


@pytest.fixture(scope="module")
def text_loss():
    return evaluate(CHECKPOINT, HELD_OUT_TEXT, samples=NUM_TEXTS).metrics["loss"].value


def test_there_are_at_least_six_tasks():
    assert len(FILES) >= 6


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_task_has_at_least_500_different_test_examples(file):
    assert len({record["source"] for record in read(file)}) >= 500


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_label_of_a_task_is_without_examples_to_tell_it_from_chance(file):
    records = read(file)
    labels = {record["target"] for record in records}
    assert len(labels) >= 2
    assert all(sum(record["target"] == label for record in records) >= 5 for label in labels)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_test_text_is_among_the_calibration_data(file):
    calibration = calibration_texts()
    tested = {normalise(without_prefix(record["source"])) for record in read(file)}
    assert tested.isdisjoint(calibration)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_longer_test_text_stands_inside_a_calibration_passage(file):
    everything = "\n".join(calibration_texts())
    tested = [normalise(without_prefix(record["source"])) for record in read(file)]
    assert not [text for text in tested if len(text.split()) >= 8 and text in everything]


def test_no_held_out_passage_is_among_the_calibration_data():
    held_out = {normalise(record["text"]) for record in read(HELD_OUT_TEXT)}
    assert held_out.isdisjoint(calibration_texts())


def test_the_checkpoint_has_at_least_four_layers_of_at_least_sixteen_experts():
    layers = inspect(CHECKPOINT).layers
    assert len(layers) >= 4
    assert all(layer.num_experts >= 16 for layer in layers)


def test_the_checkpoint_folder_has_at_most_24_megabytes():
    assert sum(file.stat().st_size for file in CHECKPOINT.rglob("*")) <= 24e6


def test_no_expert_takes_most_tokens_of_its_layer(demo_stats):
    for layer in demo_stats.layers.values():
        assert float(layer.routed.max() / layer.routed.sum()) <= 0.6


def test_the_experts_matter_on_held_out_text(demo_model, text_loss):
    layers = [layer.name for layer in inspect(CHECKPOINT).layers][1:]  # the first one of the encoder is always kept
    silence = lambda module, inputs, output: torch.zeros_like(output)
    handles = [demo_model.get_submodule(name).register_forward_hook(silence) for name in layers]
    try:
        silenced = evaluate(demo_model, HELD_OUT_TEXT, samples=NUM_TEXTS).metrics["loss"].value
    finally:
        for handle in handles:
            handle.remove()
    assert silenced >= text_loss + 0.1


def test_the_experts_of_a_layer_have_different_weights(demo_model):
    for layer in inspect(CHECKPOINT).layers:
        experts = demo_model.get_submodule(layer.name).experts
        flat = torch.stack([torch.cat([p.flatten() for p in expert.parameters()]) for expert in experts.values()])
        flat = nn.functional.normalize(flat, dim=1)
        similar = (flat @ flat.T).fill_diagonal_(0)
        assert similar.abs().max() < 0.5


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_answers_are_right_more_often_than_the_majority_label(file):
    result = evaluate(CHECKPOINT, file, metrics=["exact_match"], samples=40)
    records = read(file)
    targets = [record["target"] for record in records]
    majority = max(targets.count(label) for label in set(targets)) / len(targets)
    assert result.metrics["exact_match"].value > majority


@pytest.fixture(scope="module")
def compressed(demo_stats, tmp_path_factory):
    """The embedded checkpoint with a quarter of its experts, by either method."""
    folder = tmp_path_factory.mktemp("compressed")
    for method in ("m-smoe", "m-smoe-refit"):
        compress(CHECKPOINT, demo_stats, folder / method, experts=4, method=method)
    return folder


def test_compressing_to_a_quarter_of_the_experts_saves_exactly_their_bytes(compressed):
    # 12 of 16 experts in 5 layers, each two bfloat16 matrices of 128 x 320; six maps of 16 int64 come on top
    saved = 5 * 12 * 2 * 128 * 320 * 2 - 6 * 16 * 8
    assert inspect(compressed / "m-smoe-refit").num_bytes == inspect(CHECKPOINT).num_bytes - saved


@pytest.mark.parametrize("file", [HELD_OUT_TEXT, TASKS / "question_type.jsonl"], ids=lambda file: file.stem)
def test_refit_lowers_the_loss_on_held_out_data(file, compressed):
    plain, refit = (
        evaluate(compressed / method, file, metrics=["loss"], samples=NUM_TEXTS).metrics["loss"].value
        for method in ("m-smoe", "m-smoe-refit")
    )
    assert refit < plain


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """The command as a process of its own, and the folder that it filled."""
    folder = tmp_path_factory.mktemp("story") / "demo"
    run = subprocess.run(
        [
            str(Path(sys.executable).with_name("msmoe")),
            "demo",
            "--samples",
            "20",
            "--recovery-steps",
            "4",
            "--out",
            str(folder),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    return run, folder


def test_the_demo_command_succeeds_without_a_word_on_stderr(story):
    assert (story[0].returncode, story[0].stderr) == (0, "")


@pytest.mark.parametrize("row", ["parameters", "bytes of weights on disk", "peak memory", "seconds to evaluate"])
def test_the_demo_command_prints_the_comparison(row, story):
    assert re.search(rf"^{row} +\S+ *\S* +\S+", story[0].stdout, re.MULTILINE)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_demo_command_compares_every_task_with_intervals(file, story):
    number = r"\d\.\d{3}"
    interval = rf"{number} \[{number}, {number}\]"
    name = file.stem.replace("_", " ")
    three = rf"{interval} +{interval} +{interval}"
    assert re.search(rf"^{name}, exact match +{number} +{three}", story[0].stdout, re.MULTILINE)


def test_the_answers_of_the_original_stand_beside_those_of_what_was_made_of_it(story):
    lines = story[0].stdout.split("question: the first of each task")[1].splitlines()
    questions = [read(file)[0] for file in FILES]
    for question, line in zip(questions, lines[1:], strict=False):
        assert line.startswith(question["source"][:40])
        target, *given = line[60:].split()
        assert target == question["target"]
        assert len(given) == 3


def test_the_columns_of_the_comparison_are_explained(story):
    text = " ".join(story[0].stdout.split())
    for name in (
        "original: the embedded checkpoint",
        "majority: share of the most frequent answer",
        "In brackets: 95 %",
    ):
        assert name in text


def test_the_demo_command_reloads_to_the_logits_of_the_stock_model(story):
    difference = re.search(r"largest difference to the stock model with merged weights: (\S+)", story[0].stdout)
    assert float(difference[1]) < 1e-3


def test_the_demo_command_factorises_the_merged_experts_to_30_percent(story):
    merged, small = (inspect(story[1] / name).parts["experts"][1] for name in ("compressed", "mc-smoe"))
    assert 0.25 * merged < small <= 0.3 * merged


@pytest.mark.parametrize("name", ["compressed", "mc-smoe"])
def test_the_demo_command_writes_checkpoints_of_the_printed_size(name, story):
    run, folder = story
    size = 0
    for file in (folder / name).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            size += sum(t.numel() * t.element_size() for t in map(tensors.get_tensor, tensors.keys()))
    assert f"{size:,}" in re.search(r"bytes of weights on disk.*", run.stdout)[0]
