"""Floating-point operations of forward passes, as torch counts them, with those of grouped experts."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

GROUPED = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")  # that torch 2.13 has no formula for


def grouped_flops(tokens: torch.Size, experts: torch.Size, *_: Any, **__: Any) -> int:
    """Operations of a product of tokens (T, D), sorted by expert, with their experts' matrices (E, D, F)."""
    return 2 * tokens[0] * tokens[1] * experts[-1]


def flop_counter() -> FlopCounterMode:
    """A context that counts operations, multiply-adds as two."""
    formulas = {}
    for name in GROUPED:
        library, operator = name.split("::")
        found = getattr(getattr(torch.ops, library), operator, None)
        if found is not None:
            formulas[found] = grouped_flops
    return FlopCounterMode(display=False, custom_mapping=formulas)
