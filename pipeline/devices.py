"""Facts of this machine that change no result: which devices compute, how often a training run is saved."""

from __future__ import annotations

import os

from pipeline.errors import PipelineError

DEVICE = "CLEVRCAST_DEVICE"
SAVE_SECONDS = "CLEVRCAST_SAVE_SECONDS"


def device() -> str:
    """The first of `devices`."""
    return devices()[0]


def devices() -> list[str]:
    """``CLEVRCAST_DEVICE`` alone (``cpu``, ``cuda``, ``cuda:1``), else every CUDA device, else the CPU.

    Raises:
        PipelineError: a CUDA device is asked for and PyTorch sees none of that number.
    """
    import torch  # imported late: the command line answers without waiting for it

    asked = os.environ.get(DEVICE, "")
    count = torch.cuda.device_count()
    if not asked:
        return [f"cuda:{index}" for index in range(count)] or ["cpu"]
    if asked.startswith("cuda"):
        index = int(asked.partition(":")[2] or 0)
        if index >= count:
            raise PipelineError(
                f"{DEVICE}={asked}, but PyTorch sees {count} CUDA devices",
                remedy=f"unset {DEVICE}, or mend the driver until `nvidia-smi` lists the device",
            )
    return [asked]


def save_seconds() -> float:
    """``CLEVRCAST_SAVE_SECONDS``, else 60: a killed training run loses about so many seconds; 0 saves every step.

    Raises:
        PipelineError: it is no number of seconds.
    """
    asked = os.environ.get(SAVE_SECONDS, "") or "60"
    try:
        seconds = float(asked)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise PipelineError(f"{SAVE_SECONDS}={asked} is no number of seconds", remedy="use a number from 0 on")
    return seconds
