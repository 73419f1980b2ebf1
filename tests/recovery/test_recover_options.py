"""Options of a recovery: every value and combination that means nothing is refused by name."""

import pytest

from msmoe.errors import UserError
from msmoe.recovery.options import RecoverOptions

NAN = float("nan")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"steps": None}, "give one of --steps and --epochs"),
        ({"epochs": 1.0}, "give one of --steps and --epochs"),
        ({"steps": 0}, "--steps must be above 0, got 0"),
        ({"steps": None, "epochs": -1.0}, "--epochs must be above 0, got -1"),
        ({"steps": None, "epochs": float("inf")}, "--epochs must be .*, got inf"),
        ({"batch_size": 0}, "--batch-size must be above 0, got 0"),
        ({"accumulate": -2}, "--accumulate must be above 0, got -2"),
        ({"learning_rate": NAN}, "--learning-rate must be above 0, got nan"),
        ({"temperature": 0.0}, "--temperature must be above 0, got 0"),
        ({"clip": 0.0}, "--clip must be above 0, got 0"),
        ({"evaluate_every": 0}, "--evaluate-every must be above 0, got 0"),
        ({"save_every": -1}, "--save-every must be above 0, got -1"),
        ({"kd_weight": -0.1}, "--kd-weight must not be negative, got -0.1"),
        ({"weight_decay": NAN}, "--weight-decay must not be negative, got nan"),
        ({"warmup": 1.0}, "--warmup must be at least 0 and below 1, got 1"),
        ({"beta": -0.5}, "--beta must be at least 0 and below 1, got -0.5"),
        ({"validation_share": 0.0}, "--validation-share must be between 0 and 1, got 0"),
        ({"validation_share": 1.0}, "--validation-share must be between 0 and 1, got 1"),
        ({"validation_share": NAN}, "--validation-share must be between 0 and 1, got nan"),
        ({"keep_rows": 0.0}, "--keep-rows must be above 0 and at most 1, got 0"),
        ({"keep_rows": 1.5}, "--keep-rows must be above 0 and at most 1, got 1.5"),
        ({"prune_warmup": 0.6, "prune_final": 0.4}, "--prune-warmup and --prune-final leave no step to prune in"),
        ({"train": "heads"}, "unknown --train 'heads'; choose one of experts, router, all"),
        ({"row_score": "size"}, "unknown --row-score 'size'; choose one of sensitivity, magnitude"),
        ({"rank": 4}, "--rank factorises in memory with every row kept: give --keep-rows"),
        ({"rank": 0, "keep_rows": 0.1}, "--rank must be above 0, got 0"),
        ({"keep_rows": 0.1, "train": "router"}, "--keep-rows prunes rows of the experts, which --train router does"),
        ({"ce_weight": 0.0, "kd_weight": 0.0}, "every weight of the loss is 0"),
        ({"seed": -1}, "--seed must not be negative, got -1"),
    ],
)
def test_an_option_without_meaning_is_refused(options, complaint):
    with pytest.raises(UserError, match=complaint):
        RecoverOptions(**{"steps": 5} | options).check(has_teacher=True)


def test_without_a_teacher_the_cross_entropy_is_needed():
    options = RecoverOptions(steps=5, ce_weight=0.0)
    options.check(has_teacher=True)
    with pytest.raises(UserError, match="without a teacher the loss is the cross-entropy: --ce-weight must be above 0"):
        options.check(has_teacher=False)
