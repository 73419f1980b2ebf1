"""What importing msmoe does to transformers' Auto classes, in fresh processes."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import batch_of, random_records

from msmoe.loading import load
from msmoe.registration import is_command, register

WITH_MSMOE = """
    import sys, msmoe
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForSeq2SeqLM
    source, batch, logits = sys.argv[1:]
    assert type(AutoConfig.from_pretrained(source)).__module__ == "msmoe.modeling.configuration_msmoe"
    model = AutoModelForSeq2SeqLM.from_pretrained(source, attn_implementation="eager").eval()
    assert type(model).__module__ == "msmoe.modeling.modeling_msmoe"
    save_file({"logits": model(**load_file(batch)).logits.detach()}, logits)
"""


def run_python(code: str, *arguments, folder) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "hf")}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_after_import_auto_classes_open_an_exact_checkpoint_without_trusting_its_code(exact, tmp_path):
    batch = batch_of(random_records(5, seed=41))
    save_file(batch, tmp_path / "batch")
    run_python(WITH_MSMOE, exact, tmp_path / "batch", tmp_path / "logits", folder=tmp_path)
    with torch.inference_mode():
        expected = load(exact)(**batch).logits
    assert torch.equal(load_file(tmp_path / "logits")["logits"], expected)


def test_the_command_line_does_not_import_transformers_where_no_model_runs(exact, tmp_path):
    code = """
        import sys
        sys.argv = ["msmoe", "inspect", sys.argv[1]]
        from msmoe.cli import main
        try:
            main()
        except SystemExit as stop:
            assert stop.code == 0
        assert "transformers" not in sys.modules
    """
    assert "msmoe_switch_transformers" in run_python(code, exact, folder=tmp_path)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [("/opt/bin/msmoe", True), ("msmoe.exe", True), ("train.py", False), ("/opt/msmoe/train.py", False), ("", False)],
)
def test_only_the_command_itself_registers_late(argument, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", [argument])
    assert is_command() is expected


def test_registering_twice_is_harmless(exact):
    from transformers import AutoModelForSeq2SeqLM

    register()
    register()
    model = AutoModelForSeq2SeqLM.from_pretrained(exact)
    assert type(model).__module__ == "msmoe.modeling.modeling_msmoe"
