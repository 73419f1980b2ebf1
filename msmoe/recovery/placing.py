"""Where a training run takes place: accelerate's choice, or the user's."""

from typing import Any

import torch

from msmoe.device import AUTO, choose_device, choose_dtype
from msmoe.errors import UserError

MIXED = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}  # accelerate's names


def accelerator(device: str, dtype: str) -> Any:
    """An `Accelerator` on the device; forward passes run in the dtype, weights stay float32.

    Raises:
        UserError: for a device or a dtype that cannot be used.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    on_cpu = False
    if device != AUTO:
        place = choose_device(device)
        on_cpu = place.type == "cpu" and torch.accelerator.is_available()
        if place.type == "cuda" and place.index is not None:
            torch.cuda.set_device(place)
    precision = None if dtype == AUTO else MIXED[choose_dtype(dtype)]
    handlers: list = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    try:
        return Accelerator(cpu=on_cpu, mixed_precision=precision, kwargs_handlers=handlers)
    except ValueError as error:
        raise UserError(f"--device {device} --dtype {dtype} cannot be used: {' '.join(str(error).split())}") from error
