"""Several processes that train one model together, as ``torchrun`` starts them: which one this is, and their group.

Every process computes; the first one (rank 0) alone holds the stage's lease, writes and publishes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import PipelineError


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """This process' number among those of the run, 0 where it is alone."""
    return int(os.environ["RANK"]) if launched() else 0


def world_size() -> int:
    """How many processes the run has."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def own_devices(devices: list[str]) -> tuple[str, ...]:
    """Those of the machine's devices that this process may use: under torchrun one GPU each, or the CPU for all.

    Raises:
        PipelineError: there are more processes on this machine than GPUs.
    """
    if not launched() or devices == ["cpu"]:
        return tuple(devices)
    local = int(os.environ["LOCAL_RANK"])
    if local >= len(devices):
        raise PipelineError(
            f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes here, for {len(devices)} devices",
            remedy=f"use --nproc-per-node={len(devices)}",
        )
    return (devices[local],)


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """The group in which gradients are averaged, where torchrun started this process: nccl on GPUs, gloo on CPUs."""
    if not launched():
        yield
        return
    import torch
    import torch.distributed as dist

    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    yield
    dist.destroy_process_group()  # not after an error: the others may wait for this process, until torchrun ends them
