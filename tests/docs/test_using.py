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
from msmoe.loading import load

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


def run_python(code: str, folder, *arguments) -> str:
    command = [sys.executable, "-c", code, *arguments]
    run = subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


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
    command = [sys.executable, "-m", "lm_eval", *words, "--output_path", "scores"]
    cache = {"HF_HOME": str(demo_run / ".cache")}
    run = subprocess.run(
        command,
        cwd=demo_run,
        env=environment(demo_run) | cache,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert run.returncode == 0, run.stderr
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
    names = {"exact": "switch-small", "factorised": "switch-tiny", "recovered": "switch-final"}
    return {name: demo_run / folder for name, folder in names.items()} | {
        name: demo_run / name for name in ("native", "dense")
    }


@pytest.mark.parametrize("name", ["exact", "factorised", "recovered", "native", "dense"])
def test_the_lines_of_a_model_card_run_in_its_folder(name, demo_exports):
    folder = demo_exports[name]
    code = blocks(folder / "README.md", "python")[0]
    written = eval(run_python(code, folder))
    assert len(written) == 1
    assert isinstance(written[0], str)


@pytest.mark.parametrize("name", ["exact", "native", "dense"])
def test_the_tokenizer_of_an_export_opens_without_a_question(name, demo_exports):
    code = """
import sys
from transformers import AutoTokenizer
print(AutoTokenizer.from_pretrained(sys.argv[1]).vocab_size)
"""
    assert run_python(code, demo_exports[name].parent, demo_exports[name].name).strip() == "8192"


@pytest.mark.parametrize("name", ["exact", "native", "dense"])
def test_the_bare_model_of_an_export_gives_the_hidden_states_of_the_whole_one(name, demo_exports):
    code = """
import sys, torch
from transformers import AutoModel, AutoModelForSeq2SeqLM
ids = torch.arange(40, 60)[None]
bare, whole = (kind.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32).eval()
               for kind in (AutoModel, AutoModelForSeq2SeqLM))
with torch.inference_mode():
    found = bare(input_ids=ids, decoder_input_ids=ids).last_hidden_state
    expected = whole(input_ids=ids, decoder_input_ids=ids, output_hidden_states=True).decoder_hidden_states[-1]
print(torch.equal(found, expected))
"""
    assert run_python(code, demo_exports[name].parent, demo_exports[name].name).strip() == "True"


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


class Recorded(torch.utils.data.Dataset):
    """Tokenised records, for the Trainer."""

    def __init__(self, records: list[dict]):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        return self.records[index]


def train(model, records: list[dict], out) -> Seq2SeqTrainer:
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(out), max_steps=8, per_device_train_batch_size=20, learning_rate=1e-2, logging_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Seq2SeqTrainer(model=model, args=arguments, train_dataset=Recorded(records), data_collator=batch_of)
    trainer.train()
    trainer.save_model(str(out))
    return trainer


def losses(trainer: Seq2SeqTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logits(model, records: list[dict]) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(**batch_of(records[:6])).logits


@pytest.mark.parametrize("export", ["exact", "native", "factorized"])
def test_the_trainer_trains_an_export_and_saves_what_loads_again(export, records, tmp_path, request):
    folder = request.getfixturevalue(export)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
    trainer = train(model, records, tmp_path)
    assert losses(trainer)[-1] < losses(trainer)[0]
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
    before = logits(model, records)
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, **target))
    trainer = train(adapted, records, tmp_path)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert not torch.allclose(logits(adapted, records), before, atol=1e-3)
    again = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
    merged = PeftModel.from_pretrained(again, tmp_path).merge_and_unload()
    assert torch.allclose(logits(merged, records), logits(adapted, records), atol=1e-4)
