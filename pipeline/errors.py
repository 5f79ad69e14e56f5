"""Errors of the orchestration layer, in the shape of `data.errors`: a message with the values, and a remedy."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path


class PipelineError(Exception):
    """Base: what is wrong, and what to do about it. ``exit_code`` is what the command ends with."""

    exit_code = 1

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  what to do: {self.remedy}"


class ParamsError(PipelineError):
    """``params.yaml`` is missing, malformed or contradicts itself."""

    exit_code = 2


class BusyError(PipelineError):
    """Another process is building the same thing: a second writer refuses."""

    exit_code = 3


class DiskFullError(PipelineError):
    """The disk is full; everything finished so far is kept."""

    exit_code = 4


def disk_full(error: OSError, folder: Path, doing: str) -> DiskFullError | None:
    """What to raise instead of an `OSError` that says that the disk of ``folder`` is full; None if it says else."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    free = shutil.disk_usage(folder).free
    return DiskFullError(
        f"the disk that holds {folder} is full ({free / 2**20:.0f} MiB free) while {doing}",
        remedy="free space (`clevrcast clean`, `dvc gc -w`, or move .work and .dvc/cache) and run the same command "
        "again: every finished unit is kept",
    )


class WorkspaceError(PipelineError):
    """The folder is not a clevrcast checkout, or DVC is not ready in it."""

    exit_code = 5
