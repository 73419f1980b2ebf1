"""What is profiled: a checkpoint folder, or a model in memory with the folder that it is or would be saved as."""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from msmoe.calibration.tokenizer import SpecialTokens, load_tokenizer, special_tokens
from msmoe.checkpoint import Checkpoint
from msmoe.checkpoint.fingerprint import SAYS_NOTHING
from msmoe.errors import UserError
from msmoe.families import Family, MoELayer, family_of, find_family, inspectable_family_of
from msmoe.families.stored_names import stored_tensors


@dataclass(frozen=True)
class Subject:
    """A checkpoint and how to come by its model and tokenizer.

    Attributes:
        layers: MoE layers, as stored.
        model: in memory; None to load it.
    """

    checkpoint: Checkpoint
    family: Family
    layers: tuple[MoELayer, ...]
    special: SpecialTokens
    tokenizer: Any
    model: Any = None

    @contextlib.contextmanager
    def running(self, device: torch.device | None, dtype: torch.dtype) -> Iterator[Any]:
        """The model in evaluation mode on the device; one in memory stays as it is, and is given back as it was.

        Raises:
            UserError: if a weight is NaN or infinite.
        """
        if self.model is None:
            model = self.family.load_model(self.checkpoint.path, dtype=dtype)
            check_finite(self.checkpoint, model)
            yield model.to(device)
            return
        check_finite(self.checkpoint, self.model)
        trains, required = self.model.training, [(p, p.requires_grad) for p in self.model.parameters()]
        self.model.eval()
        try:
            yield self.model
        finally:
            self.model.train(trains)
            for parameter, value in required:
                parameter.requires_grad_(value)


@contextlib.contextmanager
def open_subject(given: str | Path | nn.Module, tokenizer: Any) -> Iterator[Subject]:
    """Open a checkpoint folder, or what stands for a model in memory until the context ends.

    That is the folder that the model was loaded from if their weights are the same, else a temporary copy as
    `save_pretrained` writes it: statistics then fit what the model is saved as.

    Raises:
        UserError: for a checkpoint or a model that cannot be profiled.
    """
    with contextlib.ExitStack() as stack:
        model = None if isinstance(given, str | Path) else given
        checkpoint = Checkpoint(given) if isinstance(given, str | Path) else loaded_from(given) or saved(given, stack)
        family = inspectable_family_of(checkpoint)
        layers = tuple(layer for layer, _ in family.stored_layers(checkpoint))
        if not layers:
            family_of(checkpoint)  # says why not
        special = special_tokens(checkpoint.config, checkpoint.path / "config.json")
        tokenizer = tokenizer or load_tokenizer(checkpoint.path)
        yield Subject(checkpoint, family, layers, special, tokenizer, model)


def loaded_from(model: Any) -> Checkpoint | None:
    """The checkpoint folder that a model was loaded from, if it is still what the folder holds."""
    path = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not path or not Path(path).is_dir():
        return None
    checkpoint = Checkpoint(path)
    if checkpoint.config.get("quantization_config") is not None:
        return None
    buffers = stored_tensors(model, checkpoint, dict(model.named_buffers()))
    parameters = stored_tensors(model, checkpoint, dict(model.named_parameters(remove_duplicate=False)))
    family = find_family(checkpoint)
    unused = family.dropped(checkpoint) if family is not None else {}
    if any(name not in parameters and name not in buffers and name not in unused for name in checkpoint):
        return None
    if any(parameters[n].shape != checkpoint.spec(n).shape for n in checkpoint if n in parameters):
        return None
    stored = ((parameters[name].detach().cpu(), checkpoint.read(name)) for name in checkpoint if name in parameters)
    # a router widens as it runs in half precision (transformers 5.23)
    casts = (lambda t, p: t.to(p.dtype)), (lambda t, p: t.to(model.dtype).to(p.dtype))
    same = all(any(torch.equal(p, cast(t, p)) for cast in casts) for p, t in stored)
    return checkpoint if same and has_configuration_of(model, checkpoint) else None


def has_configuration_of(model: Any, checkpoint: Checkpoint) -> bool:
    """Whether a model's configuration is that of a folder, but for what says nothing about the weights' values."""
    stored = type(model.config).from_pretrained(checkpoint.path, local_files_only=True).to_dict()
    own = model.config.to_dict()
    return all(own.get(key) == stored.get(key) for key in (own.keys() | stored.keys()) - {*SAYS_NOTHING, "dtype"})


def saved(model: Any, stack: contextlib.ExitStack) -> Checkpoint:
    """A temporary checkpoint of a model in memory; it goes when the stack closes."""
    if not hasattr(model, "save_pretrained"):
        raise UserError(f"expected a checkpoint folder or a transformers model, got {type(model).__name__}")
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="msmoe-"))
    model.save_pretrained(folder)
    return Checkpoint(folder)


def check_finite(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Raise `UserError` naming the first tensor of the model with a NaN or infinite value."""
    for name, parameter in model.named_parameters():
        if parameter.detach().sum().isfinite():
            continue
        for stored in stored_tensors(model, checkpoint, {name: parameter.detach()}):
            if stored in checkpoint:
                checkpoint.read_finite(stored)
