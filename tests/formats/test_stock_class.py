"""What plain transformers makes of an `exact` export, in fresh processes without msmoe."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tiny import compress, load_tensors, logits_of, random_records

import msmoe.demo
from msmoe.checkpoint import Checkpoint
from msmoe.families import switch_checks
from msmoe.families.loading import load
from msmoe.formats.modeling import configuration_msmoe

DEMO = Path(msmoe.demo.__file__).parent / "checkpoint"


def run_python(code: str, *arguments, folder) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "hf")}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder, stdin=subprocess.DEVNULL
    )


@pytest.fixture
def with_tokenizer(exact, tmp_path):
    folder = shutil.copytree(exact, tmp_path / "exact")
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize(
    "name", ["SwitchTransformersForConditionalGeneration", "SwitchTransformersModel", "SwitchTransformersEncoderModel",
             "AutoModelForSeq2SeqLM", "AutoModel"],
)  # fmt: skip
def test_the_stock_class_stops_and_says_how_to_load(name, exact, tmp_path):
    result = run_python(
        f"import sys, transformers; transformers.{name}.from_pretrained(sys.argv[1])", exact, folder=tmp_path
    )
    assert result.returncode != 0
    assert "AutoModelForSeq2SeqLM.from_pretrained(path, trust_remote_code=True)" in result.stderr.splitlines()[-1]


def test_the_tokenizer_opens_without_asking_to_run_code(with_tokenizer, tmp_path):
    code = """
        import sys
        from transformers import AutoTokenizer
        print(AutoTokenizer.from_pretrained(sys.argv[1])("hello").input_ids[-1])
    """
    result = run_python(code, with_tokenizer, folder=tmp_path)
    assert (result.returncode, result.stdout) == (0, "1\n"), result.stderr
    assert "custom code" not in result.stderr


def test_the_model_without_its_head_resolves(exact, tmp_path):
    code = """
        import sys, torch
        from transformers import AutoModel
        model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, attn_implementation="eager").eval()
        ids = torch.arange(2, 10).view(2, 4)
        torch.save(model(input_ids=ids, decoder_input_ids=ids).last_hidden_state.detach(), "hidden")
    """
    result = run_python(code, exact, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    ids = torch.arange(2, 10).view(2, 4)
    with torch.inference_mode():
        output = load(exact)(input_ids=ids, decoder_input_ids=ids, output_hidden_states=True)
    assert torch.allclose(torch.load(tmp_path / "hidden"), output.decoder_hidden_states[-1], atol=1e-6)


def test_saved_and_loaded_again_it_is_the_same_model(exact, tmp_path):
    model = load(exact)
    model.save_pretrained(tmp_path / "saved")
    assert Checkpoint(tmp_path / "saved").model_type == "msmoe_switch_transformers"
    records = random_records(3)
    assert torch.equal(logits_of(load(tmp_path / "saved"), records), logits_of(model, records))


def test_an_export_whose_type_was_its_own_still_loads(exact, tmp_path):
    folder = shutil.copytree(exact, tmp_path / "earlier")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": config.pop("compressed_model_type"), "dense_act_fn": "relu"}
    (folder / "config.json").write_text(json.dumps(config))
    records = random_records(3)
    assert torch.equal(logits_of(load(folder), records), logits_of(load(exact), records))


def test_router_losses_of_layers_with_other_numbers_of_rows_are_those_of_removed_experts(switch, stats, tmp_path):
    """A lost row is one with logit minus infinity: the stock model with such logits has the same losses."""
    compress(switch, stats, tmp_path / "out", experts=3, method="frequency", budget="adaptive")
    model = load(tmp_path / "out")
    assert len({t.shape[0] for n, t in load_tensors(tmp_path / "out").items() if n.endswith("classifier.weight")}) > 1
    ids = torch.arange(2, 18).view(2, 8)
    output = model(input_ids=ids, labels=ids, output_router_logits=True)
    logits = output.encoder_router_logits
    z_loss = sum(float(x.logsumexp(-1).square().sum()) for x in logits) / sum(x.shape[0] * x.shape[1] for x in logits)
    assert float(output.encoder_z_loss) == pytest.approx(z_loss, rel=1e-5)
    assert output.loss.isfinite()


def test_the_line_is_the_same_where_it_is_written_and_where_it_is_read():
    assert switch_checks.HOW_TO_LOAD == configuration_msmoe.HOW_TO_LOAD
