"""How exact decoders open: by the code in the folder, by the package, and not by the family's own class."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from exact_decoders import FAMILIES, build, write_exact
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from msmoe.formats.modeling.dispatch import DecoderConfigOfFile, decoder_classes, stock_config
from msmoe.formats.modeling.modeling_msmoe_decoder import HOW_TO_LOAD, code
from msmoe.formats.registration import DECODERS

IDS = torch.arange(3, 19).view(2, 8)
WITHOUT_MSMOE = """
    import importlib.util, sys, torch
    from transformers import AutoModelForCausalLM
    sys.modules["msmoe"] = None  # importing it is an error
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
    ids = torch.arange(3, 19).view(2, 8)
    with torch.no_grad():
        torch.save(model(input_ids=ids, use_cache=False).logits, "logits")
    print(type(model).__module__, tuple(model.generate(ids, max_new_tokens=3, do_sample=False).shape))
    model.save_pretrained("saved")
"""


def run_python(code: str, *arguments, folder) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "hf")}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder, stdin=subprocess.DEVNULL
    )


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_without_msmoe_the_code_in_the_folder_computes_the_same(family, tmp_path):
    exact = write_exact(family, tmp_path / "exact", factors=(3, 2))
    result = run_python(WITHOUT_MSMOE, exact.path, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("transformers_modules.exact")
    assert "(2, 11)" in result.stdout
    expected = exact.expected(IDS)
    torch.testing.assert_close(
        torch.load(tmp_path / "logits"), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
    )
    assert (tmp_path / "saved" / "modeling_msmoe_decoder.py").exists()
    with torch.no_grad():  # the package opens what was saved without it
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(input_ids=IDS, use_cache=False).logits
    assert torch.equal(again, torch.load(tmp_path / "logits"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_familys_own_class_stops_and_says_how_to_load(family, tmp_path):
    exact = write_exact(family, tmp_path / "exact")
    with pytest.raises(ValueError, match="trust_remote_code=True") as caught:
        type(exact.original).from_pretrained(exact.path)
    assert HOW_TO_LOAD in str(caught.value)


def test_the_model_without_its_head_is_not_taken_for_the_stock_one(tmp_path):
    exact = write_exact("qwen3_moe", tmp_path / "exact")
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModel.from_pretrained(exact.path)


@pytest.mark.parametrize("order", [
    "import transformers, msmoe",
    "from transformers import AutoModelForCausalLM; import msmoe",
    "import msmoe; from transformers.models.qwen3_moe import modeling_qwen3_moe",
])  # fmt: skip
def test_the_auto_classes_know_exact_decoders_in_every_order_of_imports(order, tmp_path):
    exact = write_exact("qwen3_moe", tmp_path / "exact")
    result = run_python(
        f"""
        import sys
        {order}
        from transformers import AutoConfig, AutoModelForCausalLM
        config = AutoConfig.from_pretrained(sys.argv[1])
        print(type(config).__module__, type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__module__)
        """,
        exact.path,
        folder=tmp_path,
    )
    ours = "msmoe.formats.modeling.modeling_msmoe_decoder"
    assert result.stdout == f"{ours} {ours}\n", result.stderr


def test_no_family_is_imported_before_it_is_used(tmp_path):
    result = run_python(
        """
        import sys, msmoe
        from transformers import AutoModelForCausalLM
        assert not any(name.startswith("transformers.models.qwen3_moe") for name in sys.modules)
        """,
        folder=tmp_path,
    )
    assert result.returncode == 0, result.stderr


def test_other_code_in_a_folder_keeps_its_precedence_once_trusted(tmp_path):
    build("qwen3_moe").save_pretrained(tmp_path)
    (tmp_path / "theirs.py").write_text(
        "from transformers import Qwen3MoeConfig\nclass TheirConfig(Qwen3MoeConfig):\n    pass\n"
    )
    place = tmp_path / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"auto_map": {"AutoConfig": "theirs.TheirConfig"}}))
    assert type(AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)).__name__ == "TheirConfig"
    assert type(AutoConfig.from_pretrained(tmp_path)) is transformers.Qwen3MoeConfig


@pytest.mark.parametrize("model_type", DECODERS)
def test_the_stand_in_is_asked_for_the_stock_configuration(model_type):
    stands, stock = CONFIG_MAPPING[model_type], stock_config(model_type)
    assert isinstance(stands, DecoderConfigOfFile)
    assert (stands.__name__, stands.attribute_map) == (stock.__name__, stock.attribute_map)
    made = stands()
    assert type(made) is stock
    assert isinstance(made, stands)
    assert type(stands.from_dict({"model_type": model_type})) is stock


def test_the_code_of_a_folder_names_the_familys_classes(tmp_path):
    lines = code("MixtralForCausalLM", "MixtralConfig").splitlines()
    assert lines.count('BASE = "MixtralForCausalLM"') == lines.count('BASE_CONFIG = "MixtralConfig"') == 1
    config, model = decoder_classes("mixtral")
    assert issubclass(model, transformers.MixtralForCausalLM)
    assert issubclass(config, transformers.MixtralConfig)
