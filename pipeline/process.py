"""Who started this process, and ending with it.

`stages/__init__.py` imports this module before anything else, since loading PyTorch takes seconds in which whoever
started the stage may die: a parent that is asked for only then would be the wrong one, and the stage would live on as
a second writer.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

STARTED_BY: Final = os.getppid()


def killed_with_starter() -> None:
    """On Linux, have the kernel kill this process when the thread that started it ends; elsewhere nothing."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends; elsewhere there is no such thing and nothing is done."""
    if sys.platform != "linux":
        return
    killed_with_starter()
    if os.getppid() != STARTED_BY:  # it ended before the request
        os.kill(os.getpid(), signal.SIGKILL)
