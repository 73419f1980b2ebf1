"""Load any checkpoint that the package reads or writes as a transformers model, every weight of it from the file."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msmoe.checkpoint.reader import FLOATS, Checkpoint
from msmoe.errors import UserError, explain_library_errors, warn
from msmoe.families import find_family
from msmoe.families.loading_decoders import check_decoder, decoder_skeleton, load_decoder
from msmoe.formats.registration import register
from msmoe.strict_json import read_object

if TYPE_CHECKING:
    import torch
    from torch import nn

LOADABLE = ("switch_transformers", "msmoe_switch_transformers", "t5")
GENERATION, ADAPTER = "generation_config.json", "adapter_config.json"
SHOWN = 3  # tensors named in a message
PREFIXES = ("module.", "model.", "_orig_mod.", "transformer.")  # that wrappers leave in names


def load(path: str | Path | Checkpoint, *, dtype: torch.dtype | str = "float32") -> Any:
    """Load a checkpoint: original, `exact`, `native` or `dense`.

    Every parameter of the model comes from the file, or is tied to one that does. No code from the folder runs: the
    `exact` model class is the package's own, and pickled weights are read by torch's restricted unpickler.

    Args:
        path: folder, or id of a repository on the hub.
        dtype: of the weights in memory; `"auto"` for the stored one.

    Returns:
        a transformers model in evaluation mode.

    Raises:
        UserError: if the checkpoint is damaged, incomplete, or of another architecture.
    """
    checkpoint = path if isinstance(path, Checkpoint) else Checkpoint(path)
    if is_decoder(checkpoint):
        with quiet_library():
            return load_decoder(checkpoint, dtype=dtype)
    tied = check_complete(checkpoint)
    from transformers import AutoModelForSeq2SeqLM

    with explain_library_errors(f"{checkpoint.path} cannot be loaded"), quiet_library():
        model = AutoModelForSeq2SeqLM.from_pretrained(
            checkpoint.path,
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=not checkpoint.is_pickled,
            local_files_only=True,
            return_dict=True,
        )
    fill_tied(checkpoint, model, tied)
    return model.eval()


def is_decoder(checkpoint: Checkpoint) -> bool:
    family = find_family(checkpoint)
    return family is not None and family.is_causal


@dataclass(frozen=True)
class Tied:
    """Names of one parameter of a model, and those of them that the checkpoint holds."""

    names: tuple[str, ...]
    stored: tuple[str, ...]


def check_complete(checkpoint: Checkpoint) -> list[Tied]:
    """Compare a checkpoint's tensors with the parameters of the model that its configuration describes.

    Nothing is read but headers; the model is built without memory. Tensors that the model does not use are named in a
    warning.

    Returns:
        the parameters that have several names.

    Raises:
        UserError: for a parameter that the file lacks, or has in another shape or as integers, or an adapter beside
            the weights.
    """
    if (checkpoint.path / ADAPTER).exists():  # transformers 5.23 loads the base model that it names instead
        raise UserError(
            f"{checkpoint.path} holds an adapter beside the weights ({ADAPTER}): merge it (peft's "
            "`merge_and_unload`), or move its files to a folder of their own"
        )
    if (checkpoint.path / GENERATION).exists():
        read_object(checkpoint.path / GENERATION, "a configuration of generation")
    if is_decoder(checkpoint):
        check_decoder(checkpoint)
        return []
    model = skeleton(checkpoint)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    reals = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    unused = [name for name in checkpoint if name not in shapes and not is_ignored(model, name)]
    groups = by_parameter(model)
    missing = [group.names[0] for group in groups if not any(name in checkpoint for name in group.names)]
    if missing:
        raise UserError(f"{checkpoint.path} lacks {listed(missing)} of the model{hint(missing, unused)}")
    for name, shape in shapes.items():
        if name in checkpoint and checkpoint.spec(name).shape != shape:
            raise UserError(
                f"{checkpoint.path}: {name} has shape {list(checkpoint.spec(name).shape)}, the model has {list(shape)}"
            )
        if name in checkpoint and name in reals and checkpoint.spec(name).dtype not in FLOATS:
            raise UserError(
                f"{checkpoint.path}: {name} is {checkpoint.spec(name).dtype}, expected one of {', '.join(FLOATS)}: "
                "quantised weights are not read"
            )
    if unused:
        warn(f"{checkpoint.path} holds {listed(unused)}, which the model does not use")
    several = (Tied(g.names, tuple(n for n in g.names if n in checkpoint)) for g in groups if len(g.names) > 1)
    return list(several)


def skeleton(checkpoint: Checkpoint) -> nn.Module:
    """The model of a checkpoint's configuration, on the meta device.

    Raises:
        UserError: for an architecture that cannot be loaded, or a configuration that no model can have.
    """
    if is_decoder(checkpoint):
        return decoder_skeleton(checkpoint)
    if checkpoint.model_type not in LOADABLE:
        raise UserError(
            f"{checkpoint.path} is of architecture {checkpoint.model_type!r}; loadable: {', '.join(LOADABLE)}"
        )
    if checkpoint.config.get("decoder_start_token_id") is None:
        raise UserError(
            f"{checkpoint.path / 'config.json'} has no decoder_start_token_id, with which every target begins: set it, "
            "for Switch Transformers and T5 to pad_token_id"
        )
    family = find_family(checkpoint)
    if family is not None:
        family.check(checkpoint)
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    register()
    with explain_library_errors(f"{checkpoint.path / 'config.json'} describes no model"), quiet_library():
        config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
        with torch.device("meta"):
            return AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager")


def by_parameter(model: nn.Module) -> list[Tied]:
    """The names of each parameter and buffer that is stored; tied ones have several."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return [Tied(tuple(names), ()) for names in groups.values()]


def is_ignored(model: Any, name: str) -> bool:
    """Whether the library says of a stored tensor that older versions wrote it and nothing needs it."""
    return any(re.search(pattern, name) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())


def fill_tied(checkpoint: Checkpoint, model: Any, tied: list[Tied]) -> None:
    """Give parameters that have several names the values that are stored, under whichever of them.

    Without `tie_word_embeddings`, the library ties two names only where the file does not hold both.

    Raises:
        UserError: if the file holds different values for names that are one parameter.
    """
    import torch

    parameters = model.state_dict(keep_vars=True)
    says_tied = checkpoint.config.get("tie_word_embeddings", True)
    for group in tied:
        filled: dict[int, tuple[str, torch.Tensor]] = {}
        for name in (*group.stored, *(other for other in group.names if other not in group.stored)):
            values = checkpoint.read(name if name in group.stored else group.stored[0])
            first, known = filled.setdefault(0 if says_tied else id(parameters[name]), (name, values))
            if name in group.stored and not torch.equal(known, values):
                raise UserError(f"{checkpoint.path}: the configuration ties {first} to {name}, but their values differ")
            with torch.no_grad():
                parameters[name].copy_(known)


def listed(names: Iterable[str]) -> str:
    """The first of some tensor names, and how many more there are."""
    every = sorted(names)
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    kind = "tensor" if len(every) == 1 else "tensors"
    return f"{kind} {', '.join(every[:SHOWN])}{more}"


def hint(missing: list[str], unused: list[str]) -> str:
    """What explains missing tensors: a prefix, or the unused ones."""
    wanted = set(missing)
    for prefix in PREFIXES:
        if any(name.startswith(prefix) and name.removeprefix(prefix) in wanted for name in unused):
            return f": its names begin with {prefix!r}, which a wrapper left there: save them without it"
        if any(name.startswith(prefix) and name.removeprefix(prefix) in set(unused) for name in missing):
            return f": its names lack the beginning {prefix!r}"
    return f", and holds {listed(unused)} instead" if unused else ""


@contextlib.contextmanager
def quiet_library() -> Iterator[None]:
    """Keep transformers from writing reports and progress bars of its own; what matters is checked here."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
