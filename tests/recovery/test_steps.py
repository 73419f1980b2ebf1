"""What a step sums up, against loops over single records, and that it does not depend on how the step is cut."""

import pytest
import torch
from tiny import batch_of, logits_of
from trials import check_same_weights, edited, loss_per_token, read_log, short, split_of, values_of

from msmoe.families.loading import load
from msmoe.recovery.data import BatchOrder


def first_distillation(student, teacher, data, out) -> float:
    report = short(student, out, data=data, teacher=teacher, ce_weight=0.0, kd_weight=1.0, steps=1)
    return values_of(report.log, "distillation")[1]


def test_the_teacher_runs_without_dropout(teacher, lessons, tmp_path):
    # the same weights on both sides, dropout in the teacher's configuration only: it says what the student says
    loud = edited(teacher, tmp_path / "loud", dropout_rate=0.5, router_jitter_noise=0.5)
    assert first_distillation(teacher, loud, lessons, tmp_path / "out") == pytest.approx(0, abs=1e-5)


def test_the_student_trains_with_dropout(teacher, lessons, tmp_path):
    loud = edited(teacher, tmp_path / "loud", dropout_rate=0.5)
    assert first_distillation(loud, teacher, lessons, tmp_path / "out") > 0.01


def test_validation_runs_without_dropout(student, teacher, lessons, tmp_path):
    loud = edited(student, tmp_path / "loud", dropout_rate=0.5, router_jitter_noise=0.5)
    report = short(loud, tmp_path / "out", data=lessons, teacher=None, steps=1)
    naive = loss_per_token(load(student), split_of(student, lessons)[1])
    assert report.validation_before == pytest.approx(naive, rel=1e-4)


def test_the_first_loss_is_the_weighted_sum_per_target_token_by_a_loop(student, teacher, lessons, tmp_path):
    report = short(student, tmp_path / "out", data=lessons, teacher=teacher, ce_weight=0.5, kd_weight=0.7, steps=1)
    train, _ = split_of(student, lessons)
    models, ce, kd, num_tokens = (load(student), load(teacher)), 0.0, 0.0, 0
    for i in BatchOrder(train, 8, seed=0).batch(0):
        ours, theirs = (logits_of(model, [vars(train[i])])[0].double() for model in models)
        ce -= float(ours.log_softmax(-1)[range(len(ours)), train[i].labels].sum())
        p, q = (theirs / 2).softmax(-1), (ours / 2).softmax(-1)
        kd += 4 * float((p * (p / q).log()).sum())
        num_tokens += len(ours)
    logged = next(r for r in read_log(report.log) if r["step"] == 1)
    assert logged["cross_entropy"] == pytest.approx(ce / num_tokens, rel=1e-4)
    assert logged["distillation"] == pytest.approx(kd / num_tokens, rel=1e-3)
    assert logged["loss"] == pytest.approx((0.5 * ce + 0.7 * kd) / num_tokens, rel=1e-4)


ONE_BATCH = {"learning_rate": 1e-3}
PARTS = {"learning_rate": 1e-3, "batch_size": 2, "accumulate": 4}


@pytest.fixture(scope="module")
def large_batch(student, teacher, lessons, tmp_path_factory):
    """Four steps of 8 records at once."""
    return short(student, tmp_path_factory.mktemp("large") / "out", data=lessons, teacher=teacher, **ONE_BATCH)


def test_small_batches_accumulated_are_one_large_batch(large_batch, student, teacher, lessons, tmp_path):
    report = short(student, tmp_path / "out", data=lessons, teacher=teacher, **PARTS)
    for name in ("loss", "gradient_norm", "validation_loss"):
        assert values_of(report.log, name) == pytest.approx(values_of(large_batch.log, name), rel=1e-4)
    check_same_weights(large_batch.out, report.out, student)


def test_experts_that_only_some_batches_use_move_as_in_one_large_batch(crowded, lessons, tmp_path):
    for name, choices in (("whole", ONE_BATCH), ("parts", PARTS)):
        short(crowded, tmp_path / name, data=lessons, teacher=None, **choices)
    check_same_weights(tmp_path / "whole", tmp_path / "parts", crowded)


def test_a_cached_teacher_teaches_what_the_live_one_teaches(large_batch, student, teacher, lessons, tmp_path):
    report = short(student, tmp_path / "out", data=lessons, teacher=teacher, cache_teacher=True, **ONE_BATCH)
    for name in ("loss", "distillation", "validation_loss"):
        assert values_of(report.log, name) == pytest.approx(values_of(large_batch.log, name), rel=1e-4)
    check_same_weights(large_batch.out, report.out, student)
    assert not (tmp_path / "out.training" / "teacher").exists()


HIDDEN = {"ce_weight": 0.0, "kd_weight": 0.0, "hidden_weight": 1.0, "learning_rate": 1e-3}


def test_the_hidden_loss_is_that_of_a_loop_over_tokens(student, teacher, lessons, tmp_path):
    report = short(student, tmp_path / "out", data=lessons, teacher=teacher, **HIDDEN | {"steps": 1})
    train, _ = split_of(student, lessons)
    models, distances = (load(student), load(teacher)), {}
    for i in BatchOrder(train, 8, seed=0).batch(0):
        states = []
        for model in models:
            with torch.no_grad():
                output = model(**batch_of([vars(train[i])]), output_hidden_states=True)
            states.append([*output.encoder_hidden_states[1:], *output.decoder_hidden_states[1:]])
        for block, (ours, theirs) in enumerate(zip(*states, strict=True)):
            for x, y in zip(ours[0], theirs[0], strict=True):
                distances.setdefault(block, []).append(float(((x - y) ** 2).sum() / (y**2).sum()))
    naive = sum(sum(d) / len(d) for d in distances.values()) / 4  # 2 + 2 blocks
    assert values_of(report.log, "loss")[1] == pytest.approx(naive, rel=1e-3)


def test_the_hidden_loss_does_not_depend_on_how_a_step_is_cut(student, teacher, lessons, tmp_path):
    whole, cut = (
        short(
            student,
            tmp_path / f"{size}",
            data=lessons,
            teacher=teacher,
            **HIDDEN,
            batch_size=size,
            accumulate=8 // size,
        )
        for size in (8, 2)
    )
    assert values_of(cut.log, "loss") == pytest.approx(values_of(whole.log, "loss"), rel=1e-4)
