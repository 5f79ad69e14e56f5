"""Resumable units: a kill costs the unit in progress, a second writer refuses, a full disk is said and survived."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pipeline.errors import BusyError, DiskFullError
from pipeline.journal import BadItem, Unit, digest_of
from pipeline.progress import Tick
from pipeline.shards import build_units, link_tree

UNITS = [Unit((2 * k, 2 * k + 1), (f"input {k}",), f"videos {2 * k}-{2 * k + 1}") for k in range(4)]


def write(unit: Unit, folder: Path, tick: Tick) -> list[BadItem]:
    (folder / "deep").mkdir()
    for i in unit.ids:
        (folder / "deep" / f"{i}.bin").write_bytes(bytes([i]) * 1000)
        tick(1)
    return [BadItem(3, "because", "abc")] if 3 in unit.ids else []


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*.bin"))}


def test_units_are_built_once_and_found_again(tmp_path: Path) -> None:
    first = build_units(tmp_path, UNITS, write, what="t")
    assert [b.reused for b in first] == [False] * 4
    assert first[1].bad == (BadItem(3, "because", "abc"),)
    assert first[1].good == (2,)

    def never(unit: Unit, folder: Path, tick: Tick) -> list[BadItem]:
        raise AssertionError(f"{unit.label} was built again")

    again = build_units(tmp_path, UNITS, never, what="t")
    assert [b.reused for b in again] == [True] * 4
    assert [b.bad for b in again] == [b.bad for b in first]


def test_a_changed_input_rebuilds_only_its_unit(tmp_path: Path) -> None:
    build_units(tmp_path, UNITS, write, what="t")
    changed = [*UNITS[:2], Unit(UNITS[2].ids, ("another input",), "changed"), UNITS[3]]
    assert [b.reused for b in build_units(tmp_path, changed, write, what="t")] == [True, True, False, True]


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_damaged_unit_is_built_again(tmp_path: Path, damage: str) -> None:
    built = build_units(tmp_path, UNITS, write, what="t")
    victim = built[2].folder / "deep" / "4.bin"
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(b"torn")
    again = build_units(tmp_path, UNITS, write, what="t")
    assert [b.reused for b in again] == [True, True, False, True]
    assert victim.read_bytes() == bytes([4]) * 1000


def test_kill_9_in_the_middle_of_a_unit_costs_that_unit(tmp_path: Path, root: Path) -> None:
    script = textwrap.dedent(
        f"""
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, {str(root)!r})
        from pipeline.journal import Unit
        from pipeline.shards import build_units
        from tests.test_shards import UNITS, write

        def make(unit, folder, tick):
            if unit.ids[0] == 4:
                (folder / "half.bin").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            return write(unit, folder, tick)

        build_units(Path({str(tmp_path)!r}), UNITS, make, what="t")
        """
    )
    killed = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    resumed = build_units(tmp_path, UNITS, write, what="t")
    assert [b.reused for b in resumed] == [True, True, False, False]
    clean = build_units(tmp_path / "clean", UNITS, write, what="t")
    assert [tree(b.folder) for b in resumed] == [tree(b.folder) for b in clean]
    assert not list(tmp_path.rglob("half.bin"))


def test_a_second_writer_refuses(tmp_path: Path) -> None:
    def nested(unit: Unit, folder: Path, tick: Tick) -> list[BadItem]:
        with pytest.raises(BusyError, match=f"pid {os.getpid()}"):
            build_units(tmp_path, [unit], write, what="second")
        return write(unit, folder, tick)

    assert not build_units(tmp_path, UNITS[:1], nested, what="first")[0].reused


def test_a_full_disk_is_one_clear_error_and_keeps_what_is_finished(tmp_path: Path) -> None:
    def full(unit: Unit, folder: Path, tick: Tick) -> list[BadItem]:
        if unit.ids[0] == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(unit, folder, tick)

    with pytest.raises(DiskFullError, match=r"videos 4-5") as caught:
        build_units(tmp_path, UNITS, full, what="t")
    assert "run the same command again" in str(caught.value)
    assert not list(tmp_path.glob(".*.building"))
    assert [b.reused for b in build_units(tmp_path, UNITS, write, what="t")] == [True, True, False, False]


def test_other_errors_pass_and_leave_nothing_that_counts(tmp_path: Path) -> None:
    def broken(unit: Unit, folder: Path, tick: Tick) -> list[BadItem]:
        (folder / "x.bin").write_bytes(b"x")
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        build_units(tmp_path, UNITS[:1], broken, what="t")
    assert not build_units(tmp_path, UNITS[:1], write, what="t")[0].reused


def test_links_share_bytes_and_leave_out_what_is_private(tmp_path: Path) -> None:
    (built,) = build_units(tmp_path / "work", UNITS[:1], write, what="t")
    link_tree(built.folder, tmp_path / "out", without=("deep/1.bin",))
    assert [f.name for f in (tmp_path / "out").rglob("*") if f.is_file()] == ["0.bin"]
    assert (tmp_path / "out/deep/0.bin").samefile(built.folder / "deep/0.bin")


def test_digests_do_not_depend_on_the_order_of_keys() -> None:
    assert digest_of({"a": 1, "b": [2, 3]}) == digest_of({"b": [2, 3], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 2})
