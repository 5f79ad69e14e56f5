"""Keeping the work folder in order: trying quarantined items again, and removing what nothing needs any more."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import BusyError
from pipeline.journal import MARKER, PLAN, RETRY, BadItem, holder, lease

EXPERIMENTS = "experiments"
"""Below ``.work``: the clones that experiments run in (`pipeline.experiment`)."""


def newest(work: Path, title: str) -> Path | None:
    """The folder of the fingerprint that a stage ran with last, or None where it has not run."""
    plans = sorted((work / title).glob(f"*/{PLAN}"), key=lambda plan: plan.stat().st_mtime)
    return plans[-1].parent if plans else None


def titles(work: Path) -> list[str]:
    """The stages that have left something in ``work``."""
    return sorted({plan.parent.parent.name for plan in work.glob(f"*/*/{PLAN}")})


def quarantined(folder: Path) -> dict[Path, tuple[BadItem, ...]]:
    """Finished units with bad items, below the folder of a fingerprint."""
    found = {}
    for marker in sorted(folder.glob(f"*/{MARKER}")):
        if bad := json.loads(marker.read_text())["bad"]:
            found[marker.parent] = tuple(BadItem(**item) for item in bad)
    return found


def ask_again(work: Path, title: str) -> list[BadItem]:
    """Mark the quarantined items of a stage's last run to be tried again by its next; returns them."""
    folder = newest(work, title)
    found = quarantined(folder) if folder else {}
    for unit in found:
        (unit / RETRY).touch()
    return [item for items in found.values() for item in items]


@dataclass(frozen=True)
class Removed:
    folder: Path
    bytes: int
    """That no other hard link keeps alive: what the disk gets back at once."""
    why: str


def clean(work: Path, *, everything: bool = False, dry_run: bool = False) -> list[Removed]:
    """Remove half-built units that nobody builds, the units of fingerprints that are not a stage's newest, and what
    experiments left that failed or were stopped.

    ``everything``: the newest too; finished artifacts stay, but what they are made of has to be computed again when
    the data set grows.

    Raises:
        BusyError: a stage is running.
    """
    removed: list[Removed] = []
    for title in titles(work):
        with lease(work / title / "stage.lock", f"the stage {title}"):
            found = _removable(work, title, everything)
            if not dry_run:
                for item in found:
                    shutil.rmtree(item.folder)
            removed += found
    for folder in sorted((work / EXPERIMENTS).glob("*/")):
        if not folder.is_symlink() and not holder(folder.with_name(f".{folder.name}.lock")):
            removed.append(Removed(folder, _freed(folder), "an experiment that did not come to its end"))
            if not dry_run:
                shutil.rmtree(folder)
    return removed


def _removable(work: Path, title: str, everything: bool) -> list[Removed]:
    found, keep = [], newest(work, title)
    for folder in sorted(plan.parent for plan in (work / title).glob(f"*/{PLAN}")):
        if everything or folder != keep:
            _refuse_if_held(folder)
            found.append(Removed(folder, _freed(folder), "the newest" if folder == keep else "older"))
            continue
        partials = sorted([*folder.glob(".*.building"), *folder.glob(".*.state")])
        idle = [p for p in partials if not holder(folder / f"{p.stem[1:]}.lock")]
        found += [Removed(partial, _freed(partial), "unfinished") for partial in idle]
    return found


def _refuse_if_held(folder: Path) -> None:
    for lock in folder.glob("*.lock"):
        if who := holder(lock):
            raise BusyError(
                f"{folder} is being worked on ({who})", remedy="wait for it to finish, or stop it, then clean again"
            )


def _freed(folder: Path) -> int:
    stats = [f.stat() for f in folder.rglob("*") if f.is_file()]
    return sum(s.st_size for s in stats if s.st_nlink == 1)
