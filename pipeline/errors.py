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
    return full_disk(folder, doing) if error.errno in (errno.ENOSPC, errno.EDQUOT) else None


def full_disk(folder: Path, doing: str) -> DiskFullError:
    """The error for a disk that is known to be full."""
    free = shutil.disk_usage(folder).free
    return DiskFullError(
        f"the disk that holds {folder} is full ({free / 2**20:.0f} MiB free) while {doing}",
        remedy="free space (`clevrcast clean`, `dvc gc -w`, or move .work and .dvc/cache) and run the same command "
        "again: every finished unit is kept",
    )


class WorkspaceError(PipelineError):
    """The folder is not a clevrcast checkout, or not one that can be worked in."""

    exit_code = 5


class StoppedError(PipelineError):
    """Ctrl-C, SIGTERM or a cancelled run ended it; everything finished so far is kept."""

    exit_code = 130


DEFECT = 70
"""Exit code of an error that is our fault (shown with its traceback)."""


def explained(error: OSError, folder: Path, doing: str) -> PipelineError | None:
    """What to raise instead of an `OSError` that tells of the machine, not of us; None if it does not.

    A full disk, a file system that is mounted read-only or belongs to somebody else, one without locks.
    """
    where = error.filename or folder
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return WorkspaceError(
            f"{where} cannot be written ({error.strerror}) while {doing}",
            remedy="mount the file system for writing, or run as the owner of the checkout (`ls -ld . .work .dvc`)",
        )
    if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        return WorkspaceError(
            f"{where}: this file system has no locks ({error.strerror}), so nothing would keep two writers apart",
            remedy="mount it with locks (NFSv4; Lustre with `flock`), or work on a local disk",
        )
    return disk_full(error, folder, doing)
