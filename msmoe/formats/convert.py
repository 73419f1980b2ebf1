"""Write a checkpoint as safetensors: the same tensors, streamed, once."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from msmoe.checkpoint import Checkpoint
from msmoe.checkpoint.writer import MAX_SHARD_BYTES, CheckpointWriter
from msmoe.compression.provenance import read_provenance
from msmoe.families.loading import check_complete
from msmoe.formats.verify import check_written
from msmoe.planning.plan import Plan

LEFT_OUT = (".bin", ".safetensors", ".h5", ".msgpack", ".ckpt", ".pt", ".pth", ".gguf", ".onnx")
MAX_FILE_BYTES = 100 * 2**20


@dataclass(frozen=True)
class ConvertReport:
    """What `convert` wrote: the folder, its parameters and bytes of weights, and whether the input was pickled."""

    out: Path
    num_parameters: int
    num_bytes: int
    was_pickled: bool


def convert(
    checkpoint: str | Path,
    out: str | Path,
    *,
    force: bool = False,
    resume: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> ConvertReport:
    """Write the tensors of a checkpoint, bit by bit, as safetensors, with everything else that lies in its folder.

    Statistics and plans of the input are those of the output: their fingerprints are the same.

    Args:
        checkpoint: folder, or id of a repository on the hub, with safetensors or pickled weights.
        out: folder to write; complete or absent at any moment.
        force: replace an existing `out`.
        resume: finish what a killed run left.
        max_shard_bytes: largest weight file.
        progress: called with (tensors done, tensors in all).

    Raises:
        UserError: for an input that is damaged, incomplete or holds values that are not finite, or an output that
            cannot be written.
    """
    source = Checkpoint(checkpoint)
    check_complete(source)
    if read_provenance(source) and (source.path / "plan.json").exists():
        Plan.load(source.path / "plan.json")
    writer = CheckpointWriter(
        out, [source.spec(name) for name in source], identity=f"convert {source.fingerprint}", force=force,
        resume=resume, max_shard_bytes=max_shard_bytes, inputs=[source.path], check=check_written,
    )  # fmt: skip
    with writer:
        for done, name in enumerate(source, 1):
            if name not in writer.done:
                writer.copy(name, source, name)
            if progress:
                progress(done, len(writer.specs))
        for file in sorted(source.path.iterdir()):
            is_weight_file = file.suffix in LEFT_OUT or file.name.endswith(".index.json")
            if file.is_file() and not is_weight_file and file.stat().st_size <= MAX_FILE_BYTES:
                writer.copy_file(file)
    return ConvertReport(writer.out, source.num_parameters, source.num_bytes, source.is_pickled)
