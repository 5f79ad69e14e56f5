"""Killing each process in each phase: nothing is lost, doubled, locked or left running, and the next run ends as if
nothing had happened.

A handful of cases run with the suite. All of them, and their table::

    CLEVRCAST_FAULTS=all CLEVRCAST_FAULT_TABLE=/tmp/faults python -m pytest tests/test_faults.py -n 0 -s
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import pytest

from tests.fault_cases import CASES, WITH_THE_SUITE
from tests.fault_table import table
from tests.faults import WORKERS, Bed, Case, MissedError, carry_out, edit
from tests.served_faults import ServedBed, carry_out_served
from tests.workspace import local_workspace, stub_workspace, write_source

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ALL = os.environ.get("CLEVRCAST_FAULTS") == "all"
TABLE = os.environ.get("CLEVRCAST_FAULT_TABLE", "")
TRIES = 3
STUBS = ("acquire", "decode", "label", "flow")


@pytest.fixture(scope="module")
def beds(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Beds]:
    made = Beds(root, tmp_path_factory.mktemp("beds"))
    yield made
    made.end()
    if TABLE:
        (Path(TABLE) / "table.md").write_text(table(Path(TABLE), [case.id for case in CASES]))


class Beds:
    """Pipelines that are ready to be run, each made when it is first asked for."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        self._made: dict[str, Bed] = {}

    def __getitem__(self, name: str) -> Bed:
        if name not in self._made:
            make = {"real": real_bed, "stub": stub_bed}[name]
            self._made[name] = make(self.root, self.folder / name)
        return self._made[name]

    @cached_property
    def served(self) -> ServedBed:
        folder = self.folder / "served"
        (folder / "checkout").mkdir(parents=True)
        workspace = stub_workspace(self.root, folder / "checkout", STUBS)
        return ServedBed(workspace, folder)

    def end(self) -> None:
        if "served" in self.__dict__:
            self.served.end()


def real_bed(root: Path, folder: Path) -> Bed:
    """Decoding and flow of six small videos, a shard each, of which everything before is there."""
    (folder / "checkout").mkdir(parents=True)
    source = write_source(folder / "source", [*range(5), 15000])
    videos = {"train": "0-4", "test": "15000"}
    workspace = local_workspace(root, folder / "checkout", source, videos, 1)
    workspace.keep_stages("acquire", "decode", "label", "flow")
    workspace.repro("acquire", "label")
    workspace.commit("ready")
    return Bed(workspace, folder, {"CLEVRCAST_WORKERS": str(WORKERS), "CLEVRCAST_GPUS": ""})


def stub_bed(root: Path, folder: Path) -> Bed:
    """Three of four stages have to run, one of them on a device."""
    (folder / "checkout").mkdir(parents=True)
    workspace = stub_workspace(root, folder / "checkout", STUBS)
    edit(workspace, 48)
    return Bed(workspace, folder, {"CLEVRCAST_GPUS": "fake:0"})


@pytest.mark.parametrize("case", [case for case in CASES if ALL or case.id in WITH_THE_SUITE], ids=lambda case: case.id)
def test_a_kill(case: Case, beds: Beds, tmp_path: Path) -> None:
    for number in range(1, TRIES + 1):
        (folder := tmp_path / str(number)).mkdir()
        try:
            served = case.bed == "served"
            row = carry_out_served(case, beds.served) if served else carry_out(case, beds[case.bed], folder)
            break
        except MissedError as missed:
            print(f"{case.id}: {missed}")
    else:
        pytest.fail(f"the phase was not hit in {TRIES} tries")
    if TABLE:
        row.save(Path(TABLE))
    print(f"{row.process} {row.signal}, {row.phase} ({row.way}): {row.outcome} in {row.gone_seconds} s; {row.next_run}")
    assert not row.failures, "\n".join(row.failures)
