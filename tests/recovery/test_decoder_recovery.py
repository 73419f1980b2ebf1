"""Recovery of decoders: trained weights under their names on disk, everything else as it was, no pruning of rows."""

import json

import pytest
import torch
from decoder_runs import compressed, save_decoder, texts, write_lines
from tiny_decoder import CLASSES
from transformers import AutoModelForCausalLM

from msmoe.checkpoint import Checkpoint
from msmoe.errors import UserError
from msmoe.evaluation.run import evaluate
from msmoe.families import find_family
from msmoe.families.loading import load
from msmoe.recovery.run import recover

OPTIONS = {"steps": 4, "batch_size": 8, "learning_rate": 1e-2, "validation_share": 0.2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("decoders")


@pytest.fixture(scope="module")
def data(folder):
    return write_lines(folder / "train.jsonl", texts(40, seed=1))


@pytest.fixture(scope="module")
def sources(folder):
    return {kind: save_decoder(folder / kind, kind) for kind in CLASSES}


@pytest.fixture(scope="module")
def students(folder, sources):
    made = {("native", kind): compressed(path, folder / f"native-{kind}", export="native")
            for kind, path in sources.items()}  # fmt: skip
    path = sources["qwen3_moe"]
    return made | {
        ("exact", "qwen3_moe"): compressed(path, folder / "exact", export="exact"),
        ("factors", "qwen3_moe"): compressed(
            path, folder / "factors", export="exact", method="mc-smoe", rank=4, keep_rows=0.1
        ),
    }


CASES = [("native", kind) for kind in CLASSES] + [("exact", "qwen3_moe"), ("factors", "qwen3_moe")]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_recovered_decoder_gives_in_transformers_the_loss_that_was_validated(case, students, sources, data, tmp_path):
    held_out = write_lines(tmp_path / "held.jsonl", texts(10, seed=2))
    report = recover(students[case], tmp_path / "out", data=data, validation=held_out, teacher=sources[case[1]],
                     train="all", **OPTIONS)  # fmt: skip
    assert report.best_step > 0
    assert report.validation_after < report.validation_before
    before = evaluate(students[case], held_out).metrics["loss"].value
    after = evaluate(tmp_path / "out", held_out).metrics["loss"].value
    assert before == pytest.approx(report.validation_before, rel=1e-4)
    assert after == pytest.approx(report.validation_after, rel=1e-4)
    trust = case[0] != "native"
    stock, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=trust, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.tensor([[1, 40, 50, 60]])
    with torch.inference_mode():
        torch.testing.assert_close(stock(ids).logits, load(tmp_path / "out")(ids).logits)


@pytest.mark.parametrize(("train", "part"), [("router", "routers"), ("experts", "experts")])
@pytest.mark.parametrize("case", [("native", "mixtral"), ("exact", "qwen3_moe")], ids="-".join)
def test_only_what_is_trained_changes_on_disk(train, part, case, students, data, tmp_path):
    recover(students[case], tmp_path / "out", data=data, teacher=None, train=train, **OPTIONS)
    before, after = Checkpoint(students[case]), Checkpoint(tmp_path / "out")
    assert set(before) == set(after)
    family = find_family(before)
    moved = {name for name in before if not torch.equal(before.read(name), after.read(name))}
    assert moved == {name for name in before if family.part(name) == part}
    assert {name: before.spec(name) for name in before} == {name: after.spec(name) for name in after}
    assert json.loads((tmp_path / "out" / "msmoe.json").read_text())["export"] == case[0]


def test_rows_of_a_decoder_are_not_pruned_while_it_trains(students, data, tmp_path):
    for options in ({"rank": 4, "keep_rows": 0.2}, {"keep_rows": 0.1}):
        with pytest.raises(
            UserError, match=r"prune encoder-decoders only, and .*exact is a decoder: .*msmoe factorize"
        ):
            recover(students["exact", "qwen3_moe"], tmp_path / "out", data=data, teacher=None, **OPTIONS, **options)
    assert not list(tmp_path.iterdir())


def test_a_quantised_decoder_is_refused_before_anything_is_read(sources, data, tmp_path):
    config = json.loads((sources["mixtral"] / "config.json").read_text())
    for file in sources["mixtral"].iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UserError, match="is quantised: recover a checkpoint with plain weights"):
        recover(tmp_path, tmp_path.parent / "never", data=data, teacher=None, **OPTIONS)


def test_a_tensor_with_nan_is_named_as_it_is_stored(students, data, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in students["native", "mixtral"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if ".experts.1." in name)
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"tensor {name} of .* holds NaN"):
        recover(tmp_path, tmp_path.parent / "never2", data=data, teacher=None, **OPTIONS)
