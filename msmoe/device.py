"""Where models run, in which precision, and what to do when memory runs out."""

import contextlib
from collections.abc import Iterator

import torch

from msmoe.errors import UserError

AUTO = "auto"
DTYPES = {
    AUTO: torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip
CPU_MESSAGES = ("can't allocate memory", "not enough memory", "DefaultCPUAllocator")  # RuntimeError of torch 2.13


def choose_device(name: str = AUTO) -> torch.device:
    """The device of a name; `auto` is the first CUDA device where there is one, else the CPU.

    Raises:
        UserError: if torch cannot use it.
    """
    if name == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"device {name!r} cannot be used: {str(error).splitlines()[0]}; choose auto, cpu or one that is there"
        ) from error
    return torch.device(name)


def choose_dtype(name: str = AUTO) -> torch.dtype:
    """The dtype in which a model runs; `auto` is float32, whatever the checkpoint stores.

    Raises:
        UserError: for an unknown name.
    """
    if name not in DTYPES:
        raise UserError(f"unknown --dtype {name!r}; choose from {', '.join(DTYPES)}")
    return DTYPES[name]


@contextlib.contextmanager
def memory_explained(advice: str) -> Iterator[None]:
    """Turn running out of memory, of the device or of the machine, into a `UserError` that ends with the advice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"the device's memory is too small: {advice}") from error
    except MemoryError as error:
        raise UserError(f"the machine's memory is too small: {advice}") from error
    except RuntimeError as error:
        if not any(text in str(error) for text in CPU_MESSAGES):
            raise
        raise UserError(f"the machine's memory is too small: {advice}") from error
