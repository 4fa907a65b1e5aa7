"""The GPU of a rank."""

import os

import torch

from shardemb.exceptions import InputError


def take_gpu(got: str, otherwise: str) -> torch.device:
    """Make this rank's GPU the current one; ValueError, for a setting's value, without any."""
    if not torch.cuda.is_available():
        raise InputError(
            f"{got}, but torch finds no GPU: use {otherwise!r}, or install torch's CUDA build"
        )
    number = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(number)
    return torch.device("cuda", number)
