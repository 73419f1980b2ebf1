"""`msmoe demo --family decoder`: the whole story on the embedded decoder, as a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from msmoe.demo import DEMOS
from msmoe.families.inspection import inspect

DEMO = DEMOS["decoder"]
NUMBER = r"\d+\.\d{3}"
INTERVAL = rf"{NUMBER} \[{NUMBER}, {NUMBER}\]"


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    folder = tmp_path_factory.mktemp("story") / "demo"
    command = [Path(sys.executable).with_name("msmoe"), "demo", "--family", "decoder", "--samples", "20"]
    run = subprocess.run(
        [*map(str, command), "--recovery-steps", "4", "--out", str(folder)],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    return run, folder


def test_it_succeeds_without_a_word_on_stderr(story):
    assert (story[0].returncode, story[0].stderr) == (0, "")


@pytest.mark.parametrize("name", ["facts, exact match", "facts near, exact match", "choices, accuracy"])
def test_every_task_is_compared_with_intervals(name, story):
    three = rf"{INTERVAL} +{INTERVAL} +{INTERVAL}"
    assert re.search(rf"^{name}.* {three}", story[0].stdout, re.MULTILINE)


def test_plain_transformers_compute_the_same_logits(story):
    difference = re.search(r"largest difference to .*: (\S+) on logits", story[0].stdout)
    assert float(difference[1]) < 1e-3


def test_the_merged_checkpoint_is_of_the_stock_class_with_twelve_experts(story):
    merged = inspect(story[1] / "compressed")
    assert [layer.num_stored for layer in merged.layers] == [12] * 4
    assert merged.num_bytes < inspect(DEMO.checkpoint).num_bytes
    assert '"Qwen3MoeForCausalLM"' in (story[1] / "compressed" / "config.json").read_text()


def test_the_factorised_experts_take_at_most_their_share(story):
    merged, small = (inspect(story[1] / name).parts["experts"][1] for name in ("compressed", "mc-smoe"))
    assert small <= DEMO.expert_share * merged


@pytest.mark.parametrize("name", ["compressed", "mc-smoe"])
def test_the_printed_sizes_are_those_on_disk(name, story):
    run, folder = story
    size = 0
    for file in (folder / name).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            size += sum(t.numel() * t.element_size() for t in map(tensors.get_tensor, tensors.keys()))
    assert f"{size:,}" in re.search(r"bytes of weights on disk.*", run.stdout)[0]


def test_it_ends_with_a_report(story):
    assert (story[1] / "report.html").stat().st_size > 10_000
