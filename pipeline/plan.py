"""`clevrcast plan`: what `dvc repro` would do to every stage, why, how many shards are left and how long it may take.

Seconds are those of the stage's last run on this machine, in proportion to the units that are left.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.table import Table

from pipeline.code import closure, code_digest
from pipeline.code_deps import PREDICTORS
from pipeline.dag import Foreseen, Reason, State, foresee
from pipeline.journal import PLAN, Plan, missing
from pipeline.stage import WORK, read_runs
from pipeline.upkeep import newest

SHOWN: dict[State, str] = {
    "kept": "unchanged",
    "restored": "from the cache",
    "linked": "links what is there",
    "computed": "computes",
    "open": "may run",
}
MOST_REASONS = 4


@dataclass(frozen=True)
class Row:
    """One stage of the plan. Units are those of its last run; ``seconds`` is None where no run is on record."""

    title: str
    state: State
    reasons: tuple[Reason, ...]
    units: int | None
    units_left: int | None
    seconds: float | None
    certain: bool
    """Whether it is known that the stage changes, or that it does not."""


def rows(root: Path) -> list[Row]:
    """The plan of the checkout ``root``, which is the current folder, in the order of `dvc repro`.

    Raises:
        WorkspaceError: DVC cannot read the pipeline.
    """
    runs = read_runs()
    return [_row(root, stage, runs.get(stage.title, {})) for stage in foreseen(root)]


def foreseen(root: Path) -> list[Foreseen]:
    """`pipeline.dag.foresee` for the checkout ``root``, which is the current folder."""
    return foresee(root, partial(_finished, root))


def _row(root: Path, stage: Foreseen, run: dict[str, float]) -> Row:
    folder = newest(WORK, stage.title)
    plan = Plan.load(folder) if folder else None
    units = len(plan.units) if plan else None
    left, seconds = units, _whole_seconds(run)
    if stage.state in ("kept", "restored", "linked"):
        left, seconds = 0, 0.0
    elif plan and folder and units and _goes_on(root, folder, stage):
        left = len(missing(folder, plan.units))
        seconds = None if seconds is None else seconds * left / units
    return Row(stage.title, stage.state, stage.reasons, units, left, seconds, stage.certain)


def _whole_seconds(run: dict[str, float]) -> float | None:
    """Of building everything: a run that found units ready says how long these had taken."""
    return run.get("build_seconds" if run.get("reused") else "seconds")


def _goes_on(root: Path, folder: Path, stage: Foreseen) -> bool:
    """Whether the next run wants what the last one wanted: neither parameters nor code were written to since."""
    begun = (folder / PLAN).stat().st_mtime
    return all(
        (root / file).stat().st_mtime <= begun for file in ("params.yaml", *stage.code) if (root / file).exists()
    )


def _finished(root: Path, title: str, code: Sequence[str]) -> bool:
    """Whether the stage's last run had code of the same meaning, and everything that it built is at hand."""
    folder = newest(WORK, title)
    if folder is None:
        return False
    plan = Plan.load(folder)
    entries = [f"stages/{title.partition('@')[0]}.py", *(file for file in code if Path(file).parent == PREDICTORS)]
    files = {file for entry in entries for file in closure(root, entry)}
    return plan.made_of.get("code") == code_digest(root, files) and not missing(folder, plan.units)


def as_table(plan: Sequence[Row]) -> Table:
    """For people: one line per stage, at most `MOST_REASONS` reasons each."""
    total = sum(row.seconds or 0 for row in plan)
    unknown = sum(row.seconds is None for row in plan)
    caption = f"about {_duration(total)}" + (f" and {unknown} stages of which no run is on record" if unknown else "")
    table = Table(title="what `dvc repro` would do", caption=caption if any(_runs(row) for row in plan) else "")
    for title in ("stage", "", "why", "units left", "expected"):
        numbers = title in ("units left", "expected")
        table.add_column(
            title,
            justify="right" if numbers else "left",
            no_wrap=title != "why",
            overflow="fold" if title == "why" else "ellipsis",
        )
    for row in plan:
        why = [f"{reason.kind}: {reason.what}" for reason in row.reasons[:MOST_REASONS]]
        if more := len(row.reasons) - len(why):
            why.append(f"and {more} more")
        left = "" if not _runs(row) else "-" if row.units is None else f"{row.units_left} of {row.units}"
        expected = "" if not _runs(row) else "-" if row.seconds is None else _duration(row.seconds)
        shown = "runs" if row.state == "open" and row.certain else SHOWN[row.state]
        table.add_row(row.title, shown, "\n".join(why), left, expected)
    return table


def as_json(plan: Sequence[Row]) -> str:
    """For programs."""
    return json.dumps([asdict(row) for row in plan], indent=2)


def _runs(row: Row) -> bool:
    return row.state in ("computed", "open")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
