"""The table of tests/test_faults.py for docs/orchestration.md: a line for each process, phase and way of running."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tests.faults import Row

HEAD = """\
| way of running | process | phase | signal | the run | units kept | the next run |
|---|---|---|---|---|---|---|"""


def table(folder: Path, order: Sequence[str]) -> str:
    """Of all the rows that were saved in the folder, in the order of the cases; signals with the same end together."""
    rows = {file.stem: Row(**json.loads(file.read_text())) for file in folder.glob("*.json")}
    lines: dict[tuple[str, ...], list[str]] = {}
    for case in order:
        if (row := rows.get(case)) is None:
            continue
        bad = "FAILED: " if row.failures else ""
        kept = str(row.kept_units or "")
        ended = (row.way, row.process, row.phase, row.outcome, kept, bad + row.next_run)
        lines.setdefault(ended, []).append(row.signal)
    shown = [
        f"| {way} | {process} | {phase} | {', '.join(signals)} | {outcome} | {kept} | {after} |"
        for (way, process, phase, outcome, kept, after), signals in lines.items()
    ]
    good = sum(not row.failures for row in rows.values())
    return "\n".join([f"{len(rows)} kills, every phase hit, {good} without a trace:", "", HEAD, *shown, ""])
