"""Checkpoints on disk: a lazy reader and a sharded, atomic, resumable writer, which alone needs torch."""

from typing import TYPE_CHECKING

from msmoe.checkpoint.reader import Checkpoint, TensorSpec, to_dtype

if TYPE_CHECKING:
    from msmoe.checkpoint.writer import CheckpointWriter, write_whole

__all__ = ["Checkpoint", "CheckpointWriter", "TensorSpec", "to_dtype", "write_whole"]


def __getattr__(name: str):
    if name not in ("CheckpointWriter", "write_whole"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from msmoe.checkpoint import writer

    return getattr(writer, name)
