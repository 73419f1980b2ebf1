"""What importing msmoe does to transformers' Auto classes, in fresh processes."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import batch_of, random_records

from msmoe.families.loading import load
from msmoe.formats.registration import register

WITH_MSMOE = """
    import sys, msmoe
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForSeq2SeqLM
    source, batch, logits = sys.argv[1:]
    assert type(AutoConfig.from_pretrained(source)).__module__ == "msmoe.formats.modeling.configuration_msmoe"
    model = AutoModelForSeq2SeqLM.from_pretrained(source, attn_implementation="eager").eval()
    assert type(model).__module__ == "msmoe.formats.modeling.modeling_msmoe"
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


ORDERS = (
    "import transformers, msmoe",
    "from transformers import AutoModelForSeq2SeqLM; import msmoe",
    "import msmoe; from transformers.models.switch_transformers import modeling_switch_transformers",
)


@pytest.mark.parametrize("order", ORDERS)
def test_the_auto_classes_know_the_model_in_every_order_of_imports(order, exact, tmp_path):
    code = f"""
        import sys
        {order}
        from transformers import AutoConfig, AutoModelForSeq2SeqLM
        config = AutoConfig.from_pretrained(sys.argv[1])
        print(type(config).__module__, type(AutoModelForSeq2SeqLM.from_config(config)).__module__)
    """
    expected = "msmoe.formats.modeling.configuration_msmoe msmoe.formats.modeling.modeling_msmoe\n"
    assert run_python(code, exact, folder=tmp_path) == expected


def test_the_package_waits_for_transformers_and_then_leaves_its_imports_alone(tmp_path):
    code = """
        import sys, msmoe
        assert "transformers" not in sys.modules
        from transformers import AutoModelForSeq2SeqLM
        assert not any(type(finder).__module__ == "msmoe.formats.imports" for finder in sys.meta_path)
    """
    run_python(code, folder=tmp_path)


def test_registering_twice_is_harmless(exact):
    from transformers import AutoModelForSeq2SeqLM

    register()
    register()
    model = AutoModelForSeq2SeqLM.from_pretrained(exact)
    assert type(model).__module__ == "msmoe.formats.modeling.modeling_msmoe"


@pytest.mark.parametrize(
    "first", ["msmoe.recovery.trainer", "msmoe.formats.modeling.modeling_msmoe", "msmoe.formats.modeling.dispatch"]
)
def test_the_modules_of_the_model_may_be_imported_first(first, tmp_path):
    code = f"""
        import {first}
        from transformers import AutoConfig, AutoModelForSeq2SeqLM
        small = {{"d_model": 8, "d_ff": 8, "d_kv": 4, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 2}}
        config = AutoConfig.for_model("switch_transformers", vocab_size=16, num_experts=2, **small)
        print(type(config).__name__, type(AutoModelForSeq2SeqLM.from_config(config)).__name__)
    """
    expected = "SwitchTransformersConfig SwitchTransformersForConditionalGeneration"
    assert run_python(code, folder=tmp_path).strip() == expected
