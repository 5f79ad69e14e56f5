"""Facts of this machine that change no result: which device computes, and where PyTorch may look for weights."""

from __future__ import annotations

import os

from pipeline.errors import PipelineError


def device() -> str:
    """``CLEVRCAST_DEVICE`` (``cpu``, ``cuda``, ``cuda:1``), else CUDA where there is any, else the CPU.

    Raises:
        PipelineError: a CUDA device is asked for and PyTorch sees none of that number.
    """
    import torch  # imported late: the command line answers without waiting for it

    asked = os.environ.get("CLEVRCAST_DEVICE", "")
    if not asked:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked.startswith("cuda"):
        index = int(asked.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise PipelineError(
                f"CLEVRCAST_DEVICE={asked}, but PyTorch sees {torch.cuda.device_count()} CUDA devices",
                remedy="unset CLEVRCAST_DEVICE, or mend the driver until `nvidia-smi` lists the device",
            )
    return asked
