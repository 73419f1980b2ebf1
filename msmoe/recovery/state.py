"""State of a training run on disk: weights, optimiser moments, row scores; safetensors, never half a file."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from msmoe.errors import UserError
from msmoe.files import explain_os_errors, sync

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of torch's AdamW


def save_tensors(path: Path, tensors: dict[str, Tensor], about: dict) -> None:
    """Write tensors and a small record beside the final name, then rename."""
    partial = path.with_name(f"{path.name}.partial")
    content = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
    try:
        with explain_os_errors(path):
            save_file(content, partial, {"about": json.dumps(about)})
            sync(partial)
            os.replace(partial, path)
    except UserError:
        partial.unlink(missing_ok=True)
        raise


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """What `save_tensors` wrote.

    Raises:
        UserError: if the file is damaged.
    """
    try:
        with safe_open(path, "pt") as stored:
            return {k: stored.get_tensor(k) for k in stored.keys()}, json.loads(stored.metadata()["about"])  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}; start without --resume") from error


def optimizer_tensors(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and moments by name; a parameter that never had a gradient has no moments."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"weight/{name}"] = parameter
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{moment}/{name}"] = value.reshape(-1) if moment == "step" else value
    return tensors


@torch.no_grad()
def restore(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put weights and moments back."""
    for name, parameter in parameters.items():
        parameter.copy_(tensors[f"weight/{name}"])
        if f"exp_avg/{name}" in tensors:
            optimizer.state[parameter] = {
                moment: tensors[f"{moment}/{name}"][0].clone()
                if moment == "step"
                else tensors[f"{moment}/{name}"].to(parameter.device)
                for moment in MOMENTS
            }
