"""Write a trained checkpoint: the student's own, with the tensors that moved."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msmoe.checkpoint import Checkpoint, TensorSpec
from msmoe.checkpoint.writer import CheckpointWriter
from msmoe.compression.provenance import read_provenance, write_recovery_metadata
from msmoe.errors import UserError
from msmoe.families import Family
from msmoe.families.stored_names import stored_tensors
from msmoe.formats.layout import Copy, Layout
from msmoe.formats.verify import check_written
from msmoe.layer.stored import Place
from msmoe.planning.plan import Plan


def write_recovered(
    source: Checkpoint,
    out: Path,
    tensors: dict[str, Tensor],
    family: Family | None,
    *,
    recovery: dict,
    log: Path,
    factors: dict,
    force: bool,
) -> tuple[int, int]:
    """Write the student with some tensors replaced, in the dtypes of the student.

    Args:
        tensors: name on disk -> new content; a shape may differ from the student's.
        recovery: what was done, for `msmoe.json`.
        log: metrics of the run; a copy goes into the checkpoint.
        factors: layer -> matrix -> shape of factors that the student does not have; their tensors take the place of
            its dense stacks.

    Returns:
        parameters and bytes written.
    """
    before = read_provenance(source)
    compressed = family is not None and family.is_exact(source)
    kind = "exact" if compressed else before.get("export", "original")
    layout = Layout(kind, dict(source.config))
    dropped: dict[str, str] = {}
    for layer, matrices in factors.items():
        assert family is not None
        stacks = {part.roles: part.key for part in family.exact_parts(source, layer, 0, 1)}
        roles = next(known.matrices for known, _ in family.stored_layers(source) if known.name == layer)
        for matrix in matrices:
            for name in family.factor_keys(source, layer, matrix):
                dropped[name] = stacks[roles[matrix]]
    for name in source:
        spec = source.spec(name)
        if family is not None and family.part(name) in ("expert maps", "row indices"):
            layout.indices.add(name)
        if name in dropped.values():
            continue
        shape = tuple(tensors[name].shape) if name in tensors else spec.shape
        layout.tensors.append(TensorSpec(name, spec.dtype, shape))
        if name not in tensors:
            layout.copies.append(Copy(Place(name), Place(name)))
    for name, stack in dropped.items():
        is_index = not tensors[name].is_floating_point()
        dtype = "I32" if is_index else source.spec(stack).dtype
        layout.tensors.append(TensorSpec(name, dtype, tuple(tensors[name].shape)))
        layout.indices |= {name} if is_index else set()
    update_factors(layout, source, family, factors)
    plan = carried_plan(source)
    with CheckpointWriter(
        out, layout.tensors, identity="recovered", force=force, inputs=[source.path], check=check_written
    ) as writer:
        for target, given in layout.copies:
            writer.copy_place(target, source, given)
        for spec in layout.tensors:
            if spec.name in tensors:
                writer.write(spec.name, tensors[spec.name])
        write_recovery_metadata(writer, layout, source, family, plan, recovery=recovery, log=log)
    return layout.num_parameters, layout.num_bytes


def check_plain(source: Checkpoint) -> None:
    """Raise `UserError` for quantised weights, which training cannot move."""
    if source.config.get("quantization_config") is not None:
        raise UserError(f"{source.path} is quantised: recover a checkpoint with plain weights, such as BF16")


def check_stored(source: Checkpoint, model: Any, trained: Iterable[str], *, new: dict) -> None:
    """Check before the training that what it moves can be written in the place of the student's own tensors.

    Args:
        trained: names of parameters; new: layers whose tensors are new, see `write_recovered`.

    Raises:
        UserError: naming a tensor that the student does not store like this.
    """
    state = model.state_dict()
    moved = stored_tensors(model, source, {name: torch.empty_like(state[name], device="meta") for name in trained})
    for name, tensor in moved.items():
        is_new = any(name.startswith(layer + ".") for layer in new)
        if name in source and source.spec(name).shape != tuple(tensor.shape) and not is_new:
            raise UserError(f"{source.path}: {name} would be written as {list(tensor.shape)}, the student stores "
                            f"{list(source.spec(name).shape)}")  # fmt: skip
    if not any(name in source for name in moved) and not new:
        raise UserError(f"{source.path} stores none of the tensors to train, such as {next(iter(moved), 'none')}")


def carried_plan(source: Checkpoint) -> Plan | None:
    """The plan that a compressed checkpoint carries; `UserError` if it is damaged."""
    file = source.path / "plan.json"
    return Plan.load(file) if file.exists() else None


def update_factors(layout: Layout, source: Checkpoint, family: Family | None, factors: dict) -> None:
    """Make the configuration state the shapes of the factors that the layout stores."""
    if family is None:
        return
    shapes = {name: dict(matrices) for name, matrices in (layout.config.get("factors") or {}).items()}
    for layer, matrices in factors.items():
        shapes.setdefault(layer, {}).update(matrices)
    stored = {spec.name: spec.shape for spec in layout.tensors}
    for layer, matrices in shapes.items():
        for matrix in matrices:
            keys = family.factor_keys(source, layer, matrix)
            matrices[matrix] = [stored[keys.u][-1], stored[keys.s][1]]
    if shapes:
        layout.config["factors"] = shapes
