"""What a stage has done so far: shards, items, rate, remaining time, quarantine, sizes and a look into the arrays.

Everything is read from the journal in ``.work``, so it works while the stage runs, after it was killed, and after it
finished; arrays are opened by plain zarr, from one finished shard.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from rich.console import Group
from rich.table import Table

from pipeline.errors import WorkspaceError
from pipeline.journal import MARKER, Plan, find, finished_sizes, holder
from pipeline.size_estimate import readable
from pipeline.upkeep import newest, quarantined, titles


@dataclass(frozen=True)
class ArrayView:
    """One array of one finished shard: the range of its first item in the array's own unit, and how well it packs."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    least: float
    mean: float
    greatest: float
    ratio: float
    """Bytes before compression : bytes on disk, over the whole shard."""


@dataclass(frozen=True)
class StageView:
    """The state of one stage."""

    title: str
    fingerprint: str
    counted: str
    units: int
    finished_units: int
    items: int
    finished_items: int
    builders: tuple[str, ...]
    """Who builds a unit at this moment."""
    items_per_second: float | None
    """Of this run; None before its first unit is finished."""
    seconds_left: float | None
    """At that rate where somebody builds, else for one worker."""
    bytes: int
    bytes_expected: int | None
    bytes_free: int
    quarantine: tuple[dict[str, Any], ...]
    arrays: tuple[ArrayView, ...]

    @property
    def state(self) -> str:
        if self.finished_units == self.units:
            return "finished"
        return "running" if self.builders else "unfinished"


def view(work: Path, title: str) -> StageView:
    """Look at a stage. Raises WorkspaceError where it has never run here."""
    folder = newest(work, title)
    if folder is None:
        known = ", ".join(titles(work)) or "none has run yet"
        raise WorkspaceError(f"{title} has left nothing in {work}", remedy=f"name one of these stages: {known}")
    plan = Plan.load(folder)
    built = {unit.key(): found for unit in plan.units if (found := find(folder, unit)) is not None}
    done = sum(found.unit.items for found in built.values())
    total = sum(unit.items for unit in plan.units)
    builders = tuple(who for unit in plan.units if (who := holder(folder / f"{unit.key()}.lock")))
    rate = _rate(folder, plan)
    slow = sum(found.seconds for found in built.values()) / done if done else None
    left = None
    if done < total:
        per_item = 1 / rate if rate and builders else slow
        left = per_item * (total - done) if per_item else None
    size = sum(bytes_ for _, bytes_ in finished_sizes(folder, plan.units))
    bad = [{"unit": unit.name, **asdict(item)} for unit, items in quarantined(folder).items() for item in items]
    first = next(iter(built.values()), None)
    return StageView(
        title=title,
        fingerprint=folder.name,
        counted=plan.counted,
        units=len(plan.units),
        finished_units=len(built),
        items=total,
        finished_items=done,
        builders=builders,
        items_per_second=rate,
        seconds_left=left,
        bytes=size,
        bytes_expected=round(size * total / done) if done else None,
        bytes_free=shutil.disk_usage(folder).free,
        quarantine=tuple(bad),
        arrays=tuple(_arrays(first.folder)) if first else (),
    )


def _rate(folder: Path, plan: Plan) -> float | None:
    """Items a second of wall time, over what was finished since the last run began."""
    ends, items = [], 0
    for unit in plan.units:
        marker = folder / unit.key() / MARKER
        if marker.exists() and (end := json.loads(marker.read_text())["finished"]) >= plan.started:
            ends.append(end)
            items += unit.items
    return items / max(max(ends) - plan.started, 1e-3) if ends else None


def _arrays(unit: Path) -> list[ArrayView]:
    views = []
    for metadata in sorted(unit.glob("*/zarr.json")):
        array = zarr.open_array(store=str(metadata.parent), mode="r")
        first = np.asarray(array[0], dtype=np.float64) * float(str(array.attrs.get("scale_factor", 1)))
        stored = sum(f.stat().st_size for f in metadata.parent.rglob("*") if f.is_file())
        views.append(
            ArrayView(
                metadata.parent.name,
                tuple(array.shape[1:]),
                str(array.dtype),
                float(first.min()),
                float(first.mean()),
                float(first.max()),
                array.nbytes / max(stored, 1),
            )
        )
    return views


def as_json(stage: StageView) -> str:
    return json.dumps({"state": stage.state, **asdict(stage)}, indent=1)


def as_table(stage: StageView) -> Group:
    """The same for people."""
    facts = Table(title=f"{stage.title}: {stage.state}", show_header=False)
    facts.add_row("shards", f"{stage.finished_units} of {stage.units}")
    facts.add_row(stage.counted, f"{stage.finished_items} of {stage.items}, {len(stage.quarantine)} in quarantine")
    if stage.builders:
        facts.add_row("built now by", "\n".join(stage.builders))
    if stage.items_per_second:
        facts.add_row("rate of the last run", f"{stage.items_per_second:.3g} {stage.counted} a second")
    if stage.seconds_left is not None:
        who = "at this rate" if stage.builders else "for one worker; nobody is at work"
        facts.add_row("time left", f"{_span(stage.seconds_left)} {who}")
    expected = f", about {readable(stage.bytes_expected)} when finished" if stage.bytes_expected else ""
    facts.add_row("size", f"{readable(stage.bytes)}{expected}; {readable(stage.bytes_free)} free")
    facts.add_row("fingerprint", stage.fingerprint)
    parts: list[Table] = [facts]
    if stage.arrays:
        arrays = Table(title="arrays, from the first item of one finished shard")
        for column in ("array", "shape of one item", "type", "least", "mean", "greatest", "packed"):
            arrays.add_column(column, justify="left" if column in ("array", "type") else "right")
        for a in stage.arrays:
            numbers = (f"{x:.5g}" for x in (a.least, a.mean, a.greatest))
            arrays.add_row(a.name, " x ".join(map(str, a.shape)), a.dtype, *numbers, f"{a.ratio:.1f} times")
        parts.append(arrays)
    if stage.quarantine:
        bad = Table(title="quarantine")
        bad.add_column("id", justify="right")
        bad.add_column("reason")
        for item in stage.quarantine:
            bad.add_row(str(item["id"]), item["reason"])
        parts.append(bad)
    return Group(*parts)


def as_overview(work: Path) -> Table:
    """Every stage that has run here, one line each."""
    table = Table(title="stages with work on this machine")
    for column in ("stage", "state", "shards", "items", "bad", "size", "seconds left"):
        table.add_column(column, justify="left" if column in ("stage", "state") else "right")
    for title in titles(work):
        stage = view(work, title)
        left = "-" if stage.seconds_left is None else f"{stage.seconds_left:.0f}"
        shards, items = f"{stage.finished_units}/{stage.units}", f"{stage.finished_items}/{stage.items} {stage.counted}"
        table.add_row(title, stage.state, shards, items, str(len(stage.quarantine)), readable(stage.bytes), left)
    return table


def _span(seconds: float) -> str:
    started = time.gmtime(seconds)
    if seconds >= 86400:
        return f"{seconds / 86400:.1f} days"
    return time.strftime("%H:%M:%S", started)
