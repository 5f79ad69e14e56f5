"""Which devices there are to compute on, whether PyTorch can use them, and whether those that are asked for exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.health.checks import Finding, bad, good, one_line, warning
from pipeline.health.packages import TORCH_AGAIN

LITTLE_BYTES = 2e9
"""Less free memory of a GPU than this is remarked upon."""
CPU_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")
"""Of processors that compute in bfloat16, as /proc/cpuinfo has them."""


@dataclass(frozen=True)
class Gpu:
    """A device that PyTorch sees; ``fault`` is why it does not compute."""

    name: str
    free: float
    total: float
    bfloat16: bool
    fault: str = ""


@dataclass(frozen=True)
class Seen:
    """What PyTorch sees, and the warning with which it does."""

    torch: str
    cuda: str
    """The version that it was built for, "" for a build without."""
    gpus: tuple[Gpu, ...]
    said: str = ""


@dataclass(frozen=True)
class Driver:
    """What nvidia-smi lists. ``fault`` is what it said where it failed."""

    version: str
    gpus: tuple[str, ...]
    fault: str = ""


def devices(root: Path) -> Iterator[Finding]:
    """What computes here."""
    yield from judged(seen(), driver(), os.environ)


def asked_for(root: Path) -> Iterator[Finding]:
    """Devices that the environment names."""
    yield from named(os.environ, len(seen().gpus))


def judged(torch: Seen, smi: Driver | None, environment: Mapping[str, str]) -> Iterator[Finding]:
    """What PyTorch sees beside what the driver does (None: there is no nvidia-smi)."""
    if smi and smi.fault:
        yield bad(f"nvidia-smi fails: {smi.fault}", "load the driver again: after an update of it, reboot")
    elif smi and smi.gpus and not torch.gpus:
        yield _unseen(torch, smi, environment)
    elif not torch.gpus:
        yield _cpu()
    for index, gpu in enumerate(torch.gpus):
        yield _gpu(f"cuda:{index}", gpu)


def _cpu() -> Finding:
    if cpu_bfloat16():
        return good(f"no GPU: {_cores()} cores of the CPU, which computes in bfloat16")
    return warning(
        f"no GPU: {_cores()} cores of the CPU, which only imitates bfloat16, the default of training",
        "compare the steps/s with precision: float32 under training in params.yaml",
    )


def _unseen(torch: Seen, smi: Driver, environment: Mapping[str, str]) -> Finding:
    there = f"nvidia-smi lists {len(smi.gpus)} GPUs ({smi.gpus[0]}, driver {smi.version})"
    hidden, device = environment.get("CUDA_VISIBLE_DEVICES"), environment.get("CLEVRCAST_DEVICE")
    if hidden is not None:
        return warning(f"{there}, CUDA_VISIBLE_DEVICES={hidden!r} hides all of them", "unset CUDA_VISIBLE_DEVICES")
    if device == "cpu":
        return good(f"{there}, CLEVRCAST_DEVICE=cpu leaves them alone")
    if not torch.cuda:
        return bad(f"{there}, PyTorch {torch.torch} is a build without CUDA", TORCH_AGAIN)
    said = f": {torch.said}" if torch.said else ""
    return bad(
        f"{there}, PyTorch {torch.torch} sees none{said}",
        f"update the NVIDIA driver to one for CUDA {torch.cuda} (`nvidia-smi` shows for which it is), or go on "
        "without: export CLEVRCAST_DEVICE=cpu",
    )


def _gpu(device: str, gpu: Gpu) -> Finding:
    if gpu.fault:
        return bad(
            f"{device} {gpu.name} does not compute: {gpu.fault}",
            "look at `nvidia-smi` and `dmesg`, or name the other devices in CLEVRCAST_GPUS",
        )
    what = f"{device} {gpu.name}, {gpu.free / 1e9:.1f} of {gpu.total / 1e9:.1f} GB free, "
    what += "bfloat16" if gpu.bfloat16 else "no bfloat16"
    if gpu.free < LITTLE_BYTES:
        return warning(what, "see who holds it by `nvidia-smi`, or name other devices in CLEVRCAST_GPUS")
    return good(what)


def named(environment: Mapping[str, str], count: int) -> Iterator[Finding]:
    """Whether the devices of ``CLEVRCAST_DEVICE`` and ``CLEVRCAST_GPUS`` are among ``count`` CUDA devices."""
    wrong = False
    for variable in ("CLEVRCAST_DEVICE", "CLEVRCAST_GPUS"):
        names = [name for name in environment.get(variable, "").split(",") if name]
        if variable == "CLEVRCAST_DEVICE" and len(names) > 1:
            names = [",".join(names)]
        absent = [name for name in names if not _exists(name, count)]
        if absent or len(set(names)) < len(names):
            wrong = True
            there = ", ".join(["cpu", *(f"cuda:{index}" for index in range(count))])
            told = f"{', '.join(absent)} is not here" if absent else "one is named twice"
            yield bad(
                f"{variable}={environment[variable]}: {told}; there are {there}",
                f"unset {variable}, or name one of these",
            )
    asked = [f"{v}={environment[v]}" for v in ("CLEVRCAST_DEVICE", "CLEVRCAST_GPUS") if environment.get(v)]
    if not wrong:
        yield good(", ".join(asked) or "none is asked for by name: all are used")


def _exists(name: str, count: int) -> bool:
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    return found is not None and (name == "cpu" or int(found[1] or 0) < count)


def seen() -> Seen:
    """Ask PyTorch, with a small sum on every device."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = tuple(_try(index) for index in range(count))
    told = one_line(str(said[0].message)) if said else ""
    return Seen(torch.__version__, torch.version.cuda or "", gpus, told)


def _try(index: int) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(index)
    native = properties.major >= 8  # older ones imitate it
    try:
        free, total = torch.cuda.mem_get_info(index)
        fault = "" if (torch.ones(8, device=f"cuda:{index}") + 1).sum().item() == 16 else "1 + 1 is not 2 there"
    except torch.OutOfMemoryError:
        free, total, fault = 0, properties.total_memory, ""
    except RuntimeError as error:  # kernels that were not built for it, a device that fell off the bus
        free, total, fault = 0, properties.total_memory, one_line(str(error))
    return Gpu(properties.name, free, total, native, fault)


def driver() -> Driver | None:
    """Ask nvidia-smi. None where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = ["--query-gpu=driver_version,name", "--format=csv,noheader"]
    asked = subprocess.run([program, *query], capture_output=True, text=True, timeout=5, check=False)
    if asked.returncode:
        return Driver("", (), one_line(asked.stdout + asked.stderr))
    rows = [line.split(", ", 1) for line in asked.stdout.splitlines() if ", " in line]
    return Driver(rows[0][0] if rows else "", tuple(row[1] for row in rows))


def cpu_bfloat16() -> bool:
    """Whether the processor computes in bfloat16 by itself, as far as Linux tells."""
    file = Path("/proc/cpuinfo")
    flags = set(file.read_text().split()) if file.exists() else set[str]()
    return any(flag in flags for flag in CPU_FLAGS)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
