"""Checkpoints on disk: a lazy safetensors reader and a sharded, atomic, resumable writer."""

from msmoe.checkpoint.reader import Checkpoint, TensorSpec, to_dtype
from msmoe.checkpoint.writer import CheckpointWriter
from msmoe.files import write_whole

__all__ = ["Checkpoint", "CheckpointWriter", "TensorSpec", "to_dtype", "write_whole"]
