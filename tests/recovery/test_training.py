"""Whole recoveries of tiny checkpoints: what is learned, what moves, what is written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import (
    batch_of,
    bits,
    layer_plan,
    load_tensors,
    logits_of,
    plan_for,
    random_records,
    save_switch,
    write_records,
)
from transformers import SwitchTransformersForConditionalGeneration, T5ForConditionalGeneration
from trials import (
    LAYERS,
    QUIET,
    files_of,
    lesson,
    loss_per_token,
    read_log,
    short,
    split_of,
    started,
    values_of,
)

from msmoe.calibration.records import TokenRecord
from msmoe.checkpoint import Checkpoint
from msmoe.compression.apply import apply
from msmoe.families.loading import load
from msmoe.formats.modeling.modeling_msmoe import MsmoeSwitchForConditionalGeneration

BATCH = random_records(6, seed=21)


def moved(before, after) -> set[str]:
    """Names of the tensors of two folders that differ in a bit."""
    old, new = load_tensors(before), load_tensors(after)
    assert old.keys() == new.keys()
    return {name for name in old if bits(old[name]) != bits(new[name])}


# Distillation of an exact student, 40 steps


@pytest.fixture(scope="module")
def dictated(teacher, tmp_path_factory):
    """Records whose targets were drawn from what the teacher says: who comes closer to it has a lower loss on them."""
    # 300 records: a fifth of them tell a gain of a few hundredths per token from the chance of drawing
    records = lesson(300)
    batch = batch_of(records)
    torch.manual_seed(0)
    written = load(teacher).generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=10, min_new_tokens=10,
        do_sample=True, top_k=0,
    )  # fmt: skip
    for record, tokens in zip(records, written.tolist(), strict=True):
        record["labels"] = tokens[1:]
    return write_records(tmp_path_factory.mktemp("dictated") / "train.jsonl", records)


@pytest.fixture(scope="module")
def distilled(student, teacher, dictated, tmp_path_factory):
    """Report of a pure distillation, what its progress function was told, and the input files before and after."""
    out, calls = tmp_path_factory.mktemp("distilled") / "exact", []
    before = files_of(student), files_of(teacher)
    report = short(
        student, out, data=dictated, teacher=teacher, ce_weight=0.0, kd_weight=1.0, steps=40, evaluate_every=10,
        progress=lambda *call: calls.append(call),
    )  # fmt: skip
    return report, calls, before, (files_of(student), files_of(teacher))


def test_distillation_brings_the_student_closer_to_the_teacher(distilled):
    losses = list(values_of(distilled[0].log, "distillation").values())
    assert sum(losses[-6:]) < 0.7 * sum(losses[:6])


def test_the_written_student_is_closer_to_the_teacher_on_unseen_records(distilled, student, teacher, dictated):
    held_out = [vars(r) for r in split_of(student, dictated)[1]]
    mask = batch_of(held_out)["labels"] != -100
    said, before, after = (
        logits_of(load(path), held_out)[mask].log_softmax(-1) for path in (teacher, student, distilled[0].out)
    )
    distances = [float((said.exp() * (said - x)).sum(-1).mean()) for x in (before, after)]
    assert distances[1] < 0.7 * distances[0]
    assert distilled[0].validation_after < distilled[0].validation_before


def test_the_inputs_are_not_changed(distilled):
    assert distilled[2] == distilled[3]


def test_only_experts_move_and_all_of_them_do(distilled, student):
    assert moved(student, distilled[0].out) == {f"{layer}.experts.{m}" for layer in LAYERS for m in ("wi", "wo")}


def test_the_output_holds_the_same_files_and_the_log(distilled, student):
    names = {file.name for file in distilled[0].out.iterdir()}
    assert names == {file.name for file in student.iterdir()} | {"training_log.jsonl"}
    assert (distilled[0].out / "training_log.jsonl").read_bytes() == distilled[0].log.read_bytes()


def test_the_output_loads_as_the_packages_class(distilled):
    assert type(load(distilled[0].out)) is MsmoeSwitchForConditionalGeneration


def test_every_step_is_logged_once_and_validations_where_asked_for(distilled):
    records = read_log(distilled[0].log)
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 41))
    assert [r["step"] for r in records if "validation_loss" in r] == [0, 10, 20, 30, 40]


def test_the_logged_rate_is_that_of_the_schedule(distilled):
    # warm-up int(.1 * 40) = 4: 1/5 of the rate first, all of it in step 5, 1/36 in the last
    rates = values_of(distilled[0].log, "learning_rate")
    assert (rates[1], rates[5], rates[40]) == pytest.approx((1e-2 / 5, 1e-2, 1e-2 / 36))


def test_tensorboard_holds_the_scalars_of_the_log(distilled):
    log = distilled[0].log
    events = EventAccumulator(str(log.parent / "tensorboard")).Reload()
    for tag, name in (("loss", "loss"), ("distillation", "distillation"), ("validation/loss", "validation_loss")):
        scalars = {event.step: event.value for event in events.Scalars(tag)}
        assert scalars == pytest.approx(values_of(log, name), rel=1e-6)


def test_progress_is_told_every_step(distilled):
    calls = distilled[1]
    assert [call[:2] for call in calls] == [(step, 40) for step in range(1, 41)]
    loss = values_of(distilled[0].log, "loss")[40]
    assert calls[-1][2] == f"loss {loss:.3f}, validation {distilled[0].validation_after:.3f}"


def test_the_report_counts_what_is_in_the_folder(distilled):
    report = distilled[0]
    stored = load_tensors(report.out)
    assert report.num_bytes == sum(t.numel() * t.element_size() for t in stored.values())
    assert report.num_parameters == sum(p.numel() for p in load(report.out).parameters())


def test_provenance_says_how_it_was_recovered(distilled, student, teacher, dictated):
    report = distilled[0]
    provenance = json.loads((report.out / "msmoe.json").read_text())
    recovery, before = provenance["recovery"], json.loads((student / "msmoe.json").read_text())
    train, held_out = split_of(student, dictated)
    assert recovery["teacher"] == Checkpoint(teacher).fingerprint
    assert (recovery["steps"], recovery["best_step"]) == (40, report.best_step)
    assert recovery["num_records"] == {"train": len(train), "validation": len(held_out)}
    assert recovery["validation_loss"] == {"before": report.validation_before, "after": report.validation_after}
    assert (recovery["train"], recovery["kd_weight"], recovery["learning_rate"]) == ("experts", 1.0, 1e-2)
    assert {k: provenance[k] for k in ("source", "groups", "export")} == {
        k: before[k] for k in ("source", "groups", "export")
    }


def test_predicted_bytes_are_those_written(distilled):
    provenance = json.loads((distilled[0].out / "msmoe.json").read_text())
    size = sum(t.numel() * t.element_size() for t in load_tensors(distilled[0].out).values())
    assert provenance["bytes"]["predicted"] == provenance["bytes"]["written"] == size
    assert json.loads((distilled[0].out / "plan.json").read_text())["predicted"]["bytes"] == size


def test_the_states_of_a_finished_run_are_cleared_away(distilled):
    names = {file.name for file in distilled[0].log.parent.iterdir()}
    assert names - {".lock"} == {"metrics.jsonl", "run.json", "tensorboard"}


# Fine-tuning of a dense model, all of it


@pytest.fixture(scope="module")
def tuned(dense, lessons, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned") / "out"
    return short(dense, out, data=lessons, teacher=None, train="all", steps=40, learning_rate=3e-2)


def test_fine_tuning_without_teacher_lowers_the_loss_on_unseen_records(tuned):
    # targets use 8 of 64 tokens: their own distribution alone takes the loss from ln 64 = 4.2 to ln 8 = 2.1
    assert tuned.validation_before > 3.5
    assert tuned.validation_after < 2.5


def test_the_validation_losses_are_those_of_a_loop_over_single_records(tuned, dense, lessons):
    held_out = split_of(dense, lessons)[1]
    naive = [loss_per_token(load(path), held_out) for path in (dense, tuned.out)]
    assert [tuned.validation_before, tuned.validation_after] == pytest.approx(naive, rel=1e-4)


def test_without_teacher_the_loss_is_the_cross_entropy(tuned):
    assert values_of(tuned.log, "loss") == values_of(tuned.log, "cross_entropy")
    assert set(values_of(tuned.log, "distillation").values()) == {0.0}


def test_training_all_moves_norms_and_embeddings_too(tuned, dense):
    assert moved(dense, tuned.out) == set(load_tensors(dense))


def test_a_dense_student_stays_a_t5(tuned):
    assert type(T5ForConditionalGeneration.from_pretrained(tuned.out)) is T5ForConditionalGeneration
    assert "fine-tuned on targets alone: 40 steps" in (tuned.out / "README.md").read_text()


# Other students


def test_a_native_student_trains_its_routers_alone_and_stays_stock(teacher, lessons, tmp_path):
    plan = plan_for(Checkpoint(teacher), {name: layer_plan(4, [0, 2], [1, 3]) for name in LAYERS})
    apply(teacher, plan, tmp_path / "native", export="native", router="dominant")
    report = short(tmp_path / "native", tmp_path / "out", data=lessons, teacher=teacher, train="router")
    assert moved(tmp_path / "native", report.out) == {f"{layer}.router.classifier.weight" for layer in LAYERS}
    model = SwitchTransformersForConditionalGeneration.from_pretrained(report.out)
    assert torch.equal(logits_of(model.eval(), BATCH), logits_of(load(report.out), BATCH))


def test_an_original_can_be_fine_tuned_and_knows_of_no_plan(teacher, lessons, tmp_path):
    report = short(teacher, tmp_path / "out", data=lessons, teacher=None)
    assert moved(teacher, report.out) <= {name for name in load_tensors(teacher) if ".experts." in name}
    assert not (report.out / "plan.json").exists()
    assert json.loads((report.out / "msmoe.json").read_text())["bytes"]["source"] == Checkpoint(teacher).num_bytes


def test_a_factorised_student_stays_factorised_with_the_same_shapes(factorised, teacher, lessons, tmp_path):
    report = short(factorised, tmp_path / "out", data=lessons, teacher=teacher)
    before, after = load_tensors(factorised), load_tensors(report.out)
    assert {k: (t.shape, t.dtype) for k, t in after.items()} == {k: (t.shape, t.dtype) for k, t in before.items()}
    assert load(report.out).config.factors == load(factorised).config.factors
    expected = {f"{n}.experts.{m}.{part}" for n in LAYERS for m in ("wi", "wo") for part in "UVS"}
    assert moved(factorised, report.out) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_student_keeps_its_dtype_and_everything_frozen(dtype, lessons, tmp_path):
    source = save_switch(tmp_path / "half", dtype=dtype, **QUIET)
    report = short(source, tmp_path / "out", data=lessons, teacher=None, steps=2)
    assert {t.dtype for t in load_tensors(report.out).values()} == {dtype}
    assert moved(source, report.out) <= {name for name in load_tensors(source) if ".experts." in name}


def test_a_hopeless_rate_gives_the_student_back_bit_for_bit(student, teacher, dictated, tmp_path):
    report = short(student, tmp_path / "out", data=dictated, teacher=teacher, learning_rate=30.0)
    assert report.best_step == 0
    assert report.validation_after == report.validation_before
    assert all(loss > report.validation_before for loss in list(values_of(report.log, "validation_loss").values())[1:])
    assert moved(student, report.out) == set()


def test_the_best_step_on_validation_is_written_not_the_last(dense, tmp_path):
    # training knows of token 2 alone, validation asks for others as well: at some point token 2 becomes too sure
    records = lesson(24, seed=9)
    data = write_records(tmp_path / "data.jsonl", [r | {"labels": [2] * 6} for r in records[:12]])
    held_out = write_records(tmp_path / "validation.jsonl", [r | {"labels": [2, 3, 2, 4, 2]} for r in records[12:]])
    trainer = started(
        dense,
        tmp_path / "out",
        data=data,
        validation=held_out,
        train="all",
        steps=16,
        learning_rate=3e-2,
        evaluate_every=1,
    )
    logits = {}

    def keep(step, steps, note):
        logits[step] = logits_of(trainer.model, BATCH)

    trainer.run(keep)
    trainer.finish()
    losses = values_of(trainer.folder / "metrics.jsonl", "validation_loss")
    assert 0 < trainer.best_step == min(losses, key=losses.__getitem__) < 16
    assert torch.equal(logits_of(load(trainer.out), BATCH), logits[trainer.best_step])


def test_a_validation_file_chooses_the_best_step(dense, lessons, tmp_path):
    records = lesson(9, seed=77)
    report = short(
        dense, tmp_path / "out", data=lessons, validation=write_records(tmp_path / "v.jsonl", records), teacher=None,
        train="all",
    )  # fmt: skip
    naive = loss_per_token(load(report.out), [TokenRecord(r["input_ids"], r["labels"]) for r in records])
    assert (report.num_train, report.num_validation) == (48, 9)
    assert report.validation_after == pytest.approx(naive, rel=1e-4)


def test_epochs_are_passes_over_the_training_records(dense, lessons, tmp_path):
    # 48 records, of which the split trains on n: ceil(n / 16) steps per pass and two and a half passes
    num_train = len(split_of(dense, lessons)[0])
    report = short(
        dense, tmp_path / "out", data=lessons, teacher=None, train="all", steps=None, epochs=2.5, accumulate=2
    )
    assert report.steps == round(2.5 * -(-num_train // 16))
    assert len(values_of(report.log, "loss")) == report.steps


def test_provenance_counts_the_steps_of_epochs(dense, lessons, tmp_path):
    report = short(dense, tmp_path / "out", data=lessons, teacher=None, train="all", steps=None, epochs=1)
    assert json.loads((report.out / "msmoe.json").read_text())["recovery"]["steps"] == report.steps
    assert f"{report.steps} steps" in (report.out / "README.md").read_text()


def test_force_replaces_what_was_there(student, lessons, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("msmoe.json", "old"):
        (tmp_path / "out" / name).write_text("old")
    short(student, tmp_path / "out", data=lessons, teacher=None, steps=1, force=True)
    assert not (tmp_path / "out" / "old").exists()
    assert load(tmp_path / "out").config.num_experts == 4


@pytest.mark.parametrize("stored", ["beside each other", "under another name"])
def test_tied_embeddings_are_trained_however_they_are_stored(stored, teacher, lessons, tmp_path):
    copy = shutil.copytree(teacher, tmp_path / "ckpt")
    tensors = load_file(copy / "model.safetensors")
    names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]
    if stored == "under another name":
        tensors[names[0]] = tensors.pop("shared.weight")
    else:
        tensors |= {name: tensors["shared.weight"].clone() for name in names}
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    report = short(copy, tmp_path / "out", data=lessons, teacher=None, train="all")
    assert report.best_step > 0
    naive = loss_per_token(load(report.out), split_of(copy, lessons)[1])
    assert naive == pytest.approx(report.validation_after, rel=1e-4)


def test_an_exact_student_without_provenance_keeps_its_code(student, lessons, tmp_path):
    copy = shutil.copytree(student, tmp_path / "ckpt")
    (copy / "msmoe.json").unlink()
    short(copy, tmp_path / "out", data=lessons, teacher=None, steps=1)
    assert {"modeling_msmoe.py", "configuration_msmoe.py"} <= {file.name for file in (tmp_path / "out").iterdir()}
