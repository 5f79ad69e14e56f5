"""Several processes that train one model together, as ``torchrun`` starts them: which one this is, and their group.

Every process computes; the first one (rank 0) alone holds the stage's lease, writes and publishes.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pipeline.errors import PipelineError

TORCHRUN = "CLEVRCAST_TORCHRUN"
"""Options of torchrun, with which a stage that trains starts itself again: so DVC can start several processes."""


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def several_nodes() -> bool:
    """Whether the processes of this torchrun are on more than one machine."""
    return launched() and int(os.environ["GROUP_WORLD_SIZE"]) > 1


def become_torchrun(module: str, arguments: Sequence[str]) -> None:
    """Replace this process by the torchrun that ``CLEVRCAST_TORCHRUN`` describes, running ``module``; else nothing."""
    if (options := os.environ.get(TORCHRUN)) and not launched():
        command = ["-m", "torch.distributed.run", *shlex.split(options), "-m", module, *arguments]
        os.execv(sys.executable, [sys.executable, *command])  # noqa: S606 - no shell is wanted


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
    elif several_nodes() and (interface := interface_towards(os.environ["MASTER_ADDR"])):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    yield
    dist.destroy_process_group()  # not after an error: the others may wait for this process, until torchrun ends them


def interface_towards(host: str) -> str:
    """The network interface of this machine by which ``host`` is reached, "" where that is not known.

    Without being told, gloo takes the address of the machine's own name, which often is the loopback's.
    """
    import psutil

    try:
        family, kind, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return ""
    names = (n for n, addresses in psutil.net_if_addrs().items() if own in {a.address.split("%")[0] for a in addresses})
    return next(names, "")
