"""Load any checkpoint that the package reads or writes as a transformers model."""

from pathlib import Path

import torch

from msmoe.checkpoint import Checkpoint
from msmoe.errors import UserError
from msmoe.registration import register

LOADABLE = ("switch_transformers", "msmoe_switch_transformers", "t5")


def load(path: str | Path, *, dtype: torch.dtype | str = torch.float32):
    """Load a checkpoint folder: original, `exact`, `native` or `dense`.

    No code from the folder runs: the `exact` model class is the package's own.

    Args:
        dtype: of the weights in memory; `"auto"` for the stored one.

    Returns:
        a transformers model in evaluation mode.

    Raises:
        UserError: if the folder is damaged or of another architecture.
    """
    checkpoint = Checkpoint(path)
    if checkpoint.model_type not in LOADABLE:
        raise UserError(f"{path} is of architecture {checkpoint.model_type!r}; loadable: {', '.join(LOADABLE)}")
    from transformers import AutoModelForSeq2SeqLM

    register()
    model = AutoModelForSeq2SeqLM.from_pretrained(
        checkpoint.path, dtype=dtype, attn_implementation="eager", use_safetensors=True
    )
    return model.eval()
