"""The loss: hand-worked numbers, and what must not change it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msmoe.recovery.loss import TeacherOutput, cross_entropy, distillation, hidden_distance

LABELS = torch.tensor([[3, 1, 4, 1, -100], [2, -100, -100, -100, -100], [0, 5, 5, 2, 2], [1, 1, -100, -100, -100]])
NUM_VALID = 12


def logits_at(probabilities: list[float], temperature: float = 1.0) -> torch.Tensor:
    """(1, 1, V) logits whose softmax at a temperature is given."""
    return temperature * torch.tensor(probabilities).log().reshape(1, 1, -1)


def teacher_of(logits: torch.Tensor, labels: torch.Tensor, temperature: float, *, kept: int | None = None):
    """What a teacher with these logits says; cut to its likeliest tokens where asked for, in float64 on the way."""
    full = (logits[labels != -100].double() / temperature).log_softmax(-1)
    if kept is None:
        return TeacherOutput(full.float())
    order = full.argsort(dim=-1, descending=True)
    best, others = full.gather(-1, order[:, :kept]), full.gather(-1, order[:, kept:])
    rest = [others.logsumexp(-1, keepdim=True)] if kept < full.shape[-1] else []
    return TeacherOutput(torch.cat([best, *rest], -1).float(), order[:, :kept])


def random_logits(seed: int, *, size: int = 6, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(*LABELS.shape, size, generator=torch.Generator().manual_seed(seed))


def test_cross_entropy_is_the_sum_over_target_tokens_by_hand():
    # -ln 1/2 at label 0 and -ln 1/8 at label 2: ln 2 + 3 ln 2; the padded position would add thousands
    logits = torch.cat([logits_at([0.5, 0.25, 0.25]), logits_at([0.5, 0.375, 0.125]), torch.tensor([[[9e3, 0, 0]]])], 1)
    loss = cross_entropy(logits, torch.tensor([[0, 2, -100]]))
    assert float(loss) == pytest.approx(4 * math.log(2), rel=1e-6)


def test_the_divergence_is_of_the_teacher_to_the_student_by_hand():
    # teacher (1/2, 1/2), student (3/4, 1/4): 1/2 ln(2/3) + 1/2 ln 2 = 1/2 ln(4/3) = 0.1438
    # the other way round it would be 3/4 ln(3/2) + 1/4 ln(1/2) = 0.1308
    labels = torch.tensor([[1]])
    loss = distillation(logits_at([0.75, 0.25]), labels, teacher_of(torch.zeros(1, 1, 2), labels, 1.0), 1.0)
    assert float(loss) == pytest.approx(0.5 * math.log(4 / 3), rel=1e-5)


def test_the_divergence_at_temperature_two_counts_four_times_by_hand():
    # logits 2 ln p have softmax p at temperature 2, so T^2 KL = 4 * 1/2 ln(4/3)
    labels = torch.tensor([[0]])
    loss = distillation(logits_at([0.75, 0.25], 2.0), labels, teacher_of(torch.zeros(1, 1, 2), labels, 2.0), 2.0)
    assert float(loss) == pytest.approx(2 * math.log(4 / 3), rel=1e-5)


def test_a_teacher_cut_to_one_token_is_compared_on_it_and_on_the_mass_of_the_others_by_hand():
    # teacher (1/2, 1/4, 1/8, 1/8) cut to (1/2 | 1/2), student uniform: (1/4 | 3/4)
    # 1/2 ln 2 + 1/2 ln(2/3) = 1/2 ln(4/3)
    labels = torch.tensor([[2]])
    said = teacher_of(logits_at([0.5, 0.25, 0.125, 0.125]), labels, 1.0, kept=1)
    loss = distillation(torch.zeros(1, 1, 4), labels, said, 1.0)
    assert float(loss) == pytest.approx(0.5 * math.log(4 / 3), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("kept", [None, 2])
def test_a_student_that_says_what_the_teacher_says_has_no_loss_and_no_gradient(temperature, kept):
    logits = random_logits(0).requires_grad_()
    said = teacher_of(logits.detach(), LABELS, temperature, kept=kept)
    loss = distillation(logits, LABELS, said, temperature)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [2.0, 4.0, 8.0])
def test_gradients_at_any_temperature_have_the_size_of_the_logit_difference(temperature):
    # arXiv 1503.02531, section 2.1: for logits small against T, T^2 d KL / d z tends to (z - v) / V, both centred;
    # without T^2 it would be that over T^2
    student, teacher = (0.05 * random_logits(seed) for seed in (1, 2))
    student, teacher = (z - z.mean(-1, keepdim=True) for z in (student, teacher))
    student.requires_grad_()
    distillation(student, LABELS, teacher_of(teacher, LABELS, temperature), temperature).backward()
    expected = ((student - teacher) / 6).detach() * (LABELS != -100)[..., None]
    assert float((student.grad - expected).norm() / expected.norm()) < 0.1


def both_losses(logits, labels, teacher_logits, kept=None) -> tuple[float, float]:
    said = teacher_of(teacher_logits, labels, 2.0, kept=kept)
    return float(cross_entropy(logits, labels)), float(distillation(logits, labels, said, 2.0))


@pytest.mark.parametrize("kept", [None, 3])
def test_padding_changes_no_loss(kept):
    student, teacher = random_logits(1), random_logits(2)
    widen = lambda t, value: torch.cat([t, torch.full((4, 7, *t.shape[2:]), value, dtype=t.dtype)], 1)
    padded = widen(student, 55.0), widen(LABELS, -100), widen(teacher, -3.0)
    assert both_losses(*padded, kept) == pytest.approx(both_losses(student, LABELS, teacher, kept), rel=1e-6)


@pytest.mark.parametrize("kept", [None, 3])
def test_the_losses_of_parts_add_up_to_that_of_the_batch(kept):
    student, teacher = random_logits(1), random_logits(2)
    parts = [both_losses(student[rows], LABELS[rows], teacher[rows], kept) for rows in ([0, 2], [1], [3])]
    whole = both_losses(student, LABELS, teacher, kept)
    assert tuple(map(sum, zip(*parts, strict=True))) == pytest.approx(whole, rel=1e-5)


def test_a_batch_of_equal_tokens_costs_their_number_times_one():
    one = random_logits(1)[:1, :1]
    labels = torch.where(LABELS == -100, -100, 3)
    said = teacher_of(torch.zeros(4, 5, 6), labels, 2.0)
    single = distillation(one, torch.tensor([[3]]), teacher_of(torch.zeros(1, 1, 6), torch.tensor([[3]]), 2.0), 2.0)
    batch = distillation(one.expand(4, 5, 6), labels, said, 2.0)
    assert float(batch) == pytest.approx(NUM_VALID * float(single), rel=1e-5)


def test_keeping_the_whole_vocabulary_gives_the_full_divergence():
    student, teacher = random_logits(1), random_logits(2)
    full, kept = (both_losses(student, LABELS, teacher, k)[1] for k in (None, 6))
    assert kept == pytest.approx(full, rel=1e-5)


@given(st.integers(0, 10**6), st.integers(1, 19), st.floats(0.1, 60))
def test_fewer_kept_tokens_never_give_more_than_the_full_divergence(seed, kept, scale):
    student, teacher = random_logits(seed, size=20, scale=scale), random_logits(seed + 1, size=20)
    full, lumped = (both_losses(student, LABELS, teacher, k)[1] for k in (None, kept))
    assert -1e-4 <= lumped <= full * (1 + 1e-4) + 1e-4


def test_a_student_sure_of_the_first_token_is_compared_by_its_true_mass_elsewhere():
    # teacher (1/2, 1/6, 1/6, 1/6) cut to one token, student exp(-20) on each other token, nearly 1 on the first:
    # 1/2 ln(1/2) + 1/2 (ln(1/2) - ln(3 exp(-20))) = 10 - ln 2 - 1/2 ln 3; 3 exp(-20) = 6e-9 vanishes in 1 - p
    labels = torch.tensor([[0]])
    logits = torch.tensor([[[20.0, 0, 0, 0]]], requires_grad=True)
    said = teacher_of(logits_at([1 / 2, 1 / 6, 1 / 6, 1 / 6]), labels, 1.0, kept=1)
    loss = distillation(logits, labels, said, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(10 - math.log(2) - 0.5 * math.log(3), rel=1e-4)
    # d KL / d z = student - teacher, with the teacher's mass on the others split as the student splits its own
    torch.testing.assert_close(logits.grad, torch.tensor([[[0.5, -1 / 6, -1 / 6, -1 / 6]]]), rtol=1e-3, atol=1e-4)


def test_hidden_distance_by_hand():
    # block 1: |(1, 2) - (1, 0)|^2 / 1 = 4 and |(0, 0) - (0, 2)|^2 / 4 = 1, on average 2.5; block 2: equal, 0
    teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[7.0, -3.0]])
    student = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[7.0, -3.0]])
    assert float(hidden_distance(student, teacher)) == pytest.approx(1.25)


def test_equal_hidden_states_have_no_distance_and_no_gradient():
    teacher = [torch.randn(5, 3, generator=torch.Generator().manual_seed(4)), torch.zeros(2, 3)]
    student = [t.clone().requires_grad_() for t in teacher]
    loss = hidden_distance(student, teacher)
    loss.backward()
    assert loss.item() == 0
    assert all(not s.grad.any() for s in student)
