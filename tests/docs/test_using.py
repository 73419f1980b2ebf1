"""Using the result: the README's lines for transformers, peft and lm-evaluation-harness, and a model card's own."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
from documents import README, bash_lines, blocks, environment, run_here, use_commands, working_folder
from tiny import batch_of, compress, size_of
from transformers import AutoModelForSeq2SeqLM, Seq2SeqTrainer, Seq2SeqTrainingArguments

from msmoe.calibration.profile import profile
from msmoe.demo import CALIBRATION, CHECKPOINT, TASKS
from msmoe.families.loading import load

NEEDS_PEFT = pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="peft is not installed")
NEEDS_LM_EVAL = pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="lm_eval is not installed")
MY_TASK = """
task: my_task
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/task.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{source}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["</s>"], max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def read(file, count: int) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:count]]


def run_fresh(arguments: list[str], folder) -> str:
    """What a fresh Python prints; nobody answers its questions."""
    command, settings = [sys.executable, *arguments], environment(folder) | {"HF_HOME": str(folder / ".cache")}
    run = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert run.returncode == 0, run.stderr
    return run.stdout


def run_python(code: str, folder, *arguments) -> str:
    return run_fresh(["-c", code, *arguments], folder)


# The demo's checkpoint, by the commands of the README


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    """The folder that the README's commands filled from the embedded checkpoint."""
    folder = tmp_path_factory.mktemp("demo")
    working_folder(folder, CHECKPOINT, read(CALIBRATION, 64), read(TASKS / "question_type.jsonl", 16))
    for line in use_commands():
        if line[1] not in ("compress", "compare", "report", "methods"):  # on the tiny checkpoint
            code, _, err = run_here(folder, line)
            assert (code, err) == (0, "")
    (folder / "tasks" / "my_task.yaml").write_text(MY_TASK)
    return folder


def test_the_commands_of_the_readme_compress_the_embedded_checkpoint(demo_run):
    sizes = [size_of(demo_run / name) for name in ("switch-tiny", "switch-small", "switch-base-8")]
    assert sizes[0] < sizes[1] < sizes[2] / 2
    assert sizes[2] == size_of(CHECKPOINT)
    assert size_of(demo_run / "switch-final") == sizes[0]
    assert json.loads((demo_run / "results.json").read_text())["results"][0]["task"] == "task"


def test_the_readmes_lines_generate_in_plain_transformers(demo_run):
    code = blocks(README, "python")[1]
    assert "msmoe" not in code
    assert eval(run_python(code, demo_run)) == [answer(demo_run / "switch-small", code)]


def answer(folder, code: str) -> str:
    """What msmoe's own model says to the question in the code."""
    from transformers import AutoTokenizer

    question = re.search(r'\["(.+)"\]', code)[1]
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    written = load(folder, dtype="auto").generate(**tokenizer([question], return_tensors="pt"), max_new_tokens=20)
    return tokenizer.decode(written[0], skip_special_tokens=True)


@NEEDS_PEFT
def test_the_readmes_lines_for_peft_adapt_the_experts_and_nothing_else(demo_run):
    count = """
names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
layers = {name.split(".mlp.")[0] for name in names}
print(len(layers), len(names), all(".experts." in name for name in names))
"""
    code = blocks(README, "python")[1] + blocks(README, "python")[2] + count
    assert run_python(code, demo_run).splitlines()[-1] == "6 24 True"  # A and B of two stacks in 6 layers


@NEEDS_LM_EVAL
@pytest.mark.parametrize("backend", ["backend=seq2seq,", ""], ids=["as it stands", "without naming the backend"])
def test_the_readmes_line_for_lm_eval_scores_what_evaluate_scores(backend, demo_run):
    line = next(line for line in bash_lines(README) if line.startswith("lm_eval"))
    words = shlex.split(line.replace("backend=seq2seq,", backend))[1:]
    run_fresh(["-m", "lm_eval", *words, "--output_path", "scores"], demo_run)
    newest = max((demo_run / "scores").rglob("results_*.json"), key=lambda file: file.stat().st_mtime)
    found = json.loads(newest.read_text())["results"]["my_task"]["exact_match,none"]
    code, out, _ = run_here(demo_run, ["msmoe", "evaluate", "switch-small", "--data", "task.jsonl", "--json"])
    assert code == 0
    assert found == pytest.approx(json.loads(out)[0]["metrics"]["exact_match"]["value"])


@pytest.fixture(scope="module")
def demo_exports(demo_run):
    """Every export of the embedded checkpoint, by name."""
    stats = profile(CHECKPOINT, CALIBRATION, samples=24, token_sample=1024)
    for export, experts in (("native", 4), ("dense", 1)):
        compress(CHECKPOINT, stats, demo_run / export, experts=experts, export=export)
    folders = {"exact": "switch-small", "factorised": "switch-tiny", "recovered": "switch-final"}
    return {name: demo_run / folders.get(name, name) for name in (*folders, "native", "dense")}


def by_export(body: str, exports: dict, folder) -> dict:
    """Export -> what `found(path)`, defined by `body`, gives for its folder; one fresh process for all of them."""
    last = "print(json.dumps({name: found(path) for name, path in json.loads(sys.argv[1]).items()}))"
    paths = json.dumps({name: str(path) for name, path in exports.items()})
    return json.loads(run_python(f"import json, sys\n{body}\n{last}", folder, paths))


def test_the_lines_of_a_model_card_run_in_its_folder(demo_exports, demo_run):
    body = """
import os, re
def found(path):
    os.chdir(path)
    code = re.search(r"```python\\n(.*?)```", open("README.md", encoding="utf-8").read(), re.DOTALL)[1]
    names = {"print": lambda written: names.update(written=written)}
    exec(code, names)
    return names["written"]
"""
    written = by_export(body, demo_exports, demo_run)
    assert written.keys() == demo_exports.keys()
    assert all(len(texts) == 1 and isinstance(texts[0], str) for texts in written.values())


def test_the_tokenizer_of_an_export_opens_without_a_question(demo_exports, demo_run):
    body = """
from transformers import AutoTokenizer
def found(path):
    return len(AutoTokenizer.from_pretrained(path))
"""
    assert by_export(body, demo_exports, demo_run) == dict.fromkeys(demo_exports, 8192)  # a question would be printed


def test_the_bare_model_of_an_export_gives_the_hidden_states_of_the_whole_one(demo_exports, demo_run):
    body = """
import torch
from transformers import AutoModel, AutoModelForSeq2SeqLM
ids = torch.arange(40, 60)[None]
def load(kind, path):
    return kind.from_pretrained(path, trust_remote_code=True, dtype=torch.float32).eval()
def found(path):
    bare, whole = load(AutoModel, path), load(AutoModelForSeq2SeqLM, path)
    with torch.inference_mode():
        states = bare(input_ids=ids, decoder_input_ids=ids).last_hidden_state
        expected = whole(input_ids=ids, decoder_input_ids=ids, output_hidden_states=True).decoder_hidden_states[-1]
    return torch.equal(states, expected)
"""
    assert by_export(body, demo_exports, demo_run) == dict.fromkeys(demo_exports, True)


def test_the_stock_class_refuses_an_exact_export_and_says_how_to_load_it(demo_run):
    code = """
from transformers import SwitchTransformersForConditionalGeneration
try:
    SwitchTransformersForConditionalGeneration.from_pretrained("switch-small")
except Exception as error:
    print(error)
"""
    assert "trust_remote_code=True" in run_python(code, demo_run)


# Training, on the tiny checkpoints


def train(model, records: list[dict], out) -> None:
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(out), max_steps=8, per_device_train_batch_size=20, learning_rate=1e-2,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Seq2SeqTrainer(model=model, args=arguments, train_dataset=records, data_collator=batch_of)
    trainer.train()
    trainer.save_model(str(out))


def loss(model, records: list[dict]) -> float:
    with torch.inference_mode():
        return float(model.eval()(**batch_of(records)).loss)


def logits(model, records: list[dict]) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(**batch_of(records[:6])).logits


@pytest.mark.parametrize("export", ["exact", "native", "factorized"])
def test_the_trainer_trains_an_export_and_saves_what_loads_again(export, records, tmp_path, request):
    folder = request.getfixturevalue(export)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
    before = loss(model, records)
    train(model, records, tmp_path)
    assert loss(model, records) < before
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.allclose(logits(again, records), logits(model, records), atol=1e-5)


@NEEDS_PEFT
@pytest.mark.parametrize(
    ("export", "target"),
    [
        ("exact", {"target_modules": [], "target_parameters": ["experts.wi", "experts.wo"]}),
        ("native", {"target_modules": ["wi", "wo"]}),
    ],
)
def test_an_adapter_learns_is_saved_apart_and_merges(export, target, records, tmp_path, request):
    from peft import LoraConfig, PeftModel, get_peft_model

    folder = request.getfixturevalue(export)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
    before = loss(model, records)
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, **target))
    train(adapted, records, tmp_path)
    assert loss(adapted, records) < before
    again = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
    merged = PeftModel.from_pretrained(again, tmp_path).merge_and_unload()
    assert torch.allclose(logits(merged, records), logits(adapted, records), atol=1e-4)
