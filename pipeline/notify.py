"""Telling somebody that a run failed: the program that ``CLEVRCAST_ON_FAILURE`` names gets a JSON object on stdin.

The value is a program with arguments, as in ``python /opt/notify.py --channel video``; no shell reads it. The object
has ``workspace``, ``host``, ``what`` (run, rebuild, experiments NAME), ``error`` (all of it) and ``exit_code``.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import PipelineError, StoppedError

HOOK = "CLEVRCAST_ON_FAILURE"
PATIENCE = 60.0
"""Seconds that the program may take."""


@contextmanager
def told_if_it_fails(what: str) -> Iterator[None]:
    """Call the hook, if there is one, where the block ends in an error; being stopped is none. Whatever becomes of the
    hook changes nothing of the run; it is said on stderr."""
    try:
        yield
    except StoppedError:
        raise
    except PipelineError as error:
        _notify(
            {
                "workspace": str(Path.cwd()),
                "host": platform.node(),
                "what": what,
                "error": str(error),
                "exit_code": error.exit_code,
            }
        )
        raise


def _notify(facts: dict[str, object]) -> None:
    command = shlex.split(os.environ.get(HOOK, ""))
    if not command:
        return
    try:
        subprocess.run(command, input=json.dumps(facts), text=True, timeout=PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"{HOOK} failed, nobody was told: {error}", file=sys.stderr)
