"""What happened, one JSON object a line, in ``.work/logs/events.jsonl``: for programs, and for looking back.

Every line has ``time`` (UTC, ISO 8601), ``host``, ``pid``, ``run`` and ``event``; docs/orchestration.md lists the
events and their other fields. Lines are appended whole, so several processes may write.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import uuid
from datetime import UTC, datetime
from pathlib import Path

from pipeline.process import LOGS

FILE = LOGS / "events.jsonl"
MOST_BYTES = 16 * 2**20
"""A longer file is set aside as ``events.jsonl.1``, in place of the one before."""


class Events:
    """The events of one run."""

    def __init__(self, file: Path = FILE) -> None:
        self.file, self.run = file, uuid.uuid4().hex[:12]
        self._silent = False

    def tell(self, event: str, **facts: object) -> None:
        """Append one line. A disk that takes it no more stops no run: it is said once, on stderr."""
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "host": platform.node(),
            "pid": os.getpid(),
            "run": self.run,
            "event": event,
            **facts,
        }
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if self.file.exists() and self.file.stat().st_size > MOST_BYTES:
                self.file.replace(self.file.with_name(f"{self.file.name}.1"))
            with self.file.open("ab", buffering=0) as stream:
                stream.write(json.dumps(line, default=str).encode() + b"\n")
        except OSError as error:
            if not self._silent:
                print(f"{self.file} is not written any more: {error}", file=sys.stderr)
            self._silent = True
