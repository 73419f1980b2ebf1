"""The teacher: live, and from what it said once."""

import numpy as np
import pytest
import torch
from tiny import build_switch, random_records
from trials import QUIET

from msmoe.calibration.batches import collate
from msmoe.calibration.records import TokenRecord
from msmoe.recovery.loss import distillation
from msmoe.recovery.student import forward
from msmoe.recovery.teacher import CACHED_TOKENS, CachedTeacher, LiveTeacher, fill_cache

RECORDS = [TokenRecord(r["input_ids"], r["labels"]) for r in random_records(11, seed=5)]
RECORDS[4].labels[1] = -100  # a hole in the middle of a target


def live_teacher(**options) -> LiveTeacher:
    return LiveTeacher(build_switch(**QUIET | options), forward, temperature=2.0, hidden=False)


def fill(folder, teacher: LiveTeacher | None, *, identity="one", progress=None) -> CachedTeacher:
    """Fill a cache; without a teacher, fail where one would be loaded."""

    def load() -> LiveTeacher:
        assert teacher is not None, "the teacher was loaded"
        return teacher

    fill_cache(
        folder, {"teacher": identity}, load, RECORDS, batch_size=4, pad_id=0, device=torch.device("cpu"),
        progress=progress,
    )  # fmt: skip
    return CachedTeacher(folder, RECORDS)


@pytest.fixture(scope="module")
def wide():
    """A teacher whose vocabulary is larger than what is kept of it."""
    return live_teacher(vocab_size=200)


@pytest.fixture(scope="module")
def cache(wide, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "teacher"
    fill(folder, wide)
    return folder


def batch_at(chosen: list[int]) -> dict[str, torch.Tensor]:
    return collate([RECORDS[i] for i in chosen], pad_id=0)


def student_logits(batch, size: int) -> torch.Tensor:
    return 2 * torch.randn(*batch["labels"].shape, size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("chosen", [[0], [7, 4, 10], list(range(11))])
def test_a_cache_that_holds_the_whole_vocabulary_gives_the_loss_of_the_live_teacher(chosen, tmp_path):
    teacher, batch = live_teacher(), batch_at(chosen)
    cached, logits = fill(tmp_path / "teacher", teacher), student_logits(batch, CACHED_TOKENS)
    losses = [float(distillation(logits, batch["labels"], t(chosen, batch), 2.0)) for t in (teacher, cached)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_cache_holds_the_likeliest_tokens_and_the_mass_of_all_others(wide, cache):
    chosen = [9, 0, 4]
    batch = batch_at(chosen)
    full = wide(chosen, batch).log_probabilities.double()
    best = full.sort(dim=-1, descending=True)
    cached = CachedTeacher(cache, RECORDS)(chosen, batch)
    expected = torch.cat([best.values[:, :64], best.values[:, 64:].logsumexp(-1, keepdim=True)], -1)
    torch.testing.assert_close(cached.log_probabilities.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(full.gather(-1, cached.tokens), best.values[:, :64])


def test_a_cut_teacher_gives_a_lower_bound_of_the_live_loss(wide, cache):
    chosen = [2, 3, 8]
    batch = batch_at(chosen)
    logits = student_logits(batch, 200)
    live, cut = (
        float(distillation(logits, batch["labels"], t(chosen, batch), 2.0))
        for t in (wide, CachedTeacher(cache, RECORDS))
    )
    assert 0.5 * live < cut < live


def test_the_live_teacher_speaks_at_the_temperature_of_the_distillation():
    teacher, batch = live_teacher(), batch_at([1])
    with torch.no_grad():
        logits = teacher.model(input_ids=batch["input_ids"], labels=batch["labels"]).logits[0]
    expected = torch.stack([row / 2 - (row / 2).logsumexp(0) for row in logits])
    torch.testing.assert_close(teacher([1], batch).log_probabilities, expected, rtol=1e-5, atol=1e-5)


def test_nothing_that_a_teacher_says_has_a_gradient():
    teacher = LiveTeacher(build_switch(**QUIET), forward, temperature=2.0, hidden=True)
    said = teacher([1, 2], batch_at([1, 2]))
    assert not any(t.requires_grad for t in (said.log_probabilities, *said.hidden))


def test_a_cache_of_the_same_identity_is_used_without_the_teacher(wide, cache):
    before = (cache / "log_probabilities.npy").read_bytes()
    fill(cache, None)
    assert (cache / "log_probabilities.npy").read_bytes() == before


def test_a_cache_of_another_identity_is_filled_again(wide, tmp_path):
    fill(tmp_path / "teacher", wide)
    other = live_teacher(vocab_size=200, seed=9)
    again = fill(tmp_path / "teacher", other, identity="two")
    best = other([3], batch_at([3])).log_probabilities.max(-1).values
    torch.testing.assert_close(again([3], batch_at([3])).log_probabilities[:, 0], best, rtol=1e-5, atol=1e-5)


def test_a_cache_that_was_never_finished_is_filled_again(wide, cache, tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "teacher", wide, progress=interrupt)
    fill(tmp_path / "teacher", wide)
    for name in ("tokens.npy", "log_probabilities.npy"):
        assert (tmp_path / "teacher" / name).read_bytes() == (cache / name).read_bytes()


def test_progress_counts_the_records(wide, tmp_path):
    calls = []
    fill(tmp_path / "teacher", wide, progress=lambda *call: calls.append(call))
    assert calls == [(4, 11), (8, 11), (11, 11)]


def test_the_files_of_a_cache_hold_plain_numbers(cache):
    stored = {file.name: np.load(file, allow_pickle=False).dtype.kind for file in cache.glob("*.npy")}
    assert stored == {"tokens.npy": "i", "log_probabilities.npy": "f"}


class Evil:
    """Says so when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was read')",)


def test_a_pickle_in_place_of_the_cache_is_refused_and_not_run(wide, tmp_path):
    fill(tmp_path / "teacher", wide)
    np.save(tmp_path / "teacher" / "tokens.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="object"):
        CachedTeacher(tmp_path / "teacher", RECORDS)
