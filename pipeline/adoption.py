"""Taking over finished work after an edit of the code that changes no result, on proof.

Every edit of a stage's code gives its results another fingerprint (docs/adr/002), also one that only rewords an error
message. ``clevrcast adopt STAGE`` builds a few units again with the code as it is now and compares them byte for byte
with those that other code built from the same parameters and weights; if all are equal the rest is linked under the
new fingerprint, otherwise nothing is.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.journal import MARKER, PLAN, Plan, Unit, find, lease
from pipeline.shards import Make, build_units

SAMPLE = "CLEVRCAST_ADOPT"


def adoption_sample() -> int:
    """How many units this process is to prove, 0 where it has another job."""
    return int(os.environ.get(SAMPLE) or 0)


def adoptable(folder: Path, made_of: Mapping[str, Any]) -> str:
    """One line that says what `adopt` could take over into ``folder``, "" if there is nothing."""
    for other in _of_other_code(folder, made_of):
        count = len(list(other.glob(f"*/{MARKER}")))
        title = Plan.load(other).title
        return (
            f"{title}: {count} units were finished by other code with the same parameters; if the edit changes no "
            f"result, stop this and run `clevrcast adopt {title}`"
        )
    return ""


def adopt(folder: Path, plan: Plan, make: Make, sample: int) -> str:
    """Take over what other code finished, after building ``sample`` units again; returns what was done.

    Raises:
        PipelineError: there is nothing to take over, or a unit has come out differently.
    """
    for other in _of_other_code(folder, plan.made_of):
        wanted = [u for u in plan.units if find(other, u) is not None and find(folder, u) is None]
        if not wanted:
            continue
        every = max(1, len(wanted) // sample)
        proof = wanted[::every][:sample]
        for built in build_units(folder, proof, make, what=f"proof of {plan.title}", counted=plan.counted):
            _compare(plan.title, built.unit, dict(built.files), other)
        taken = [u for u in wanted if u not in proof]
        for unit in taken:
            _link_unit(other, folder, unit)
        return f"{plan.title}: {len(proof)} units came out byte for byte as before, {len(taken)} more taken over"
    raise PipelineError(
        f"{plan.title}: no units of other code with the same parameters and weights wait to be taken over",
        remedy=f"run `dvc repro {plan.title}`",
    )


def _of_other_code(folder: Path, made_of: Mapping[str, Any]) -> list[Path]:
    """Folders of other fingerprints that differ in nothing but the code and hold finished units, newest first."""
    found = []
    for plan in folder.parent.glob(f"*/{PLAN}"):
        other = plan.parent
        if other == folder or not any(other.glob(f"*/{MARKER}")):
            continue
        theirs = Plan.load(other).made_of
        if theirs["code"] != made_of["code"] and {**theirs, "code": ""} == {**made_of, "code": ""}:
            found.append(other)
    return sorted(found, key=lambda other: -(other / PLAN).stat().st_mtime)


def _compare(title: str, unit: Unit, files: dict[str, str], other: Path) -> None:
    before = find(other, unit)
    if before is None or files == dict(before.files):
        return
    differing = sorted(name for name in {*files, *before.files} if files.get(name) != before.files.get(name))
    raise PipelineError(
        f"{title}: {unit.label} comes out differently with the code as it is now ({', '.join(differing[:5])})",
        remedy=f"the edit changes results: run `dvc repro {title}` and let it compute again",
    )


def _link_unit(source: Path, target: Path, unit: Unit) -> None:
    with lease(target / f"{unit.key()}.lock", unit.label):
        final, partial = target / unit.key(), target / f".{unit.key()}.building"
        for stale in (final, partial):
            if stale.exists():
                shutil.rmtree(stale)
        shutil.copytree(source / unit.key(), partial, copy_function=os.link)
        partial.rename(final)
