"""Who is at work in this workspace, and what dead processes have left locked.

Nothing of DVC's is locked to find out. DVC keeps two kinds of locks in ``.dvc/tmp``:

- ``lock`` (around every command) and ``rwlock.lock`` (around the next file) are held by `flock`. The files stay and
  hold the process id of whoever had them last, which means nothing: the kernel knows who holds them (``/proc/locks``).
- ``rwlock`` is JSON: the paths that running stages read and write, each with the process id and command of the dvc that
  said so, but without its host. DVC drops entries that are in its way and whose process does not exist *here*, be it
  alive on another host; behind one whose process id has gone to some other program it refuses to run.

Our own leases are `flock` on files too (`pipeline.journal.lease`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.health.checks import WORK, Finding, bad, good, listed, one_line, warning
from pipeline.health.machine import dvc_config
from pipeline.journal import holder

TMP = Path(".dvc/tmp")
LEASES = {"run.lock": "clevrcast run", "serve.lock": "clevrcast serve"}


def at_work(root: Path) -> Iterator[Finding]:
    """Who holds our leases: whole runs, stages, devices; and how many units are being built."""
    work, told = root / WORK, []
    leases = {work / name: label for name, label in LEASES.items()}
    leases |= {file: f"the stage {file.parent.name}" for file in sorted(work.glob("*/stage.lock"))}
    leases |= {file: f"the device {file.stem}" for file in sorted(work.glob("devices/*.lock"))}
    told += [f"{label} ({who})" for file, label in leases.items() if (who := lease_holder(file))]
    held = held_here()
    units = [file for file in work.glob("*/*/*.lock") if _inode(file) in held]
    told += [f"{len(units)} units"] if units else []
    yield good(f"at work now: {listed(told, 8)}" if told else "no run, stage, device or unit is leased")


def dvc_lock(root: Path) -> Iterator[Finding]:
    """DVC's lock around every command."""
    file = root / TMP / "lock"
    if dvc_config(root).get("core", "hardlink_lock", fallback="").lower() == "true":
        if file.exists():
            yield warning(
                f"core.hardlink_lock is on and {file} is there: a dvc runs, or one was killed and left it",
                f"where no dvc runs on any host: rm {file}",
            )
            return
    elif (pid := held_here().get(_inode(file))) and file.read_text().strip() == str(pid):
        if is_dvc(pid, root):
            yield good(f"held by {process(pid)}")
        else:
            yield warning(f"held by {process(pid)}, which is no dvc of this workspace", f"look at it: ps -fp {pid}")
        return
    yield good("free" + (" (the file .dvc/tmp/lock always stays and is no lock by itself)" if file.exists() else ""))


def dvc_paths(root: Path) -> Iterator[Finding]:
    """DVC's list of paths that running stages read and write."""
    file = root / TMP / "rwlock"
    try:
        body = json.loads(file.read_text())
        entries = _entries(body)
    except FileNotFoundError:
        body, entries = {}, {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield bad(
            f"{file} cannot be read ({one_line(str(error))}), and DVC refuses to go on", f"where no dvc runs: rm {file}"
        )
        return
    running = []
    for (pid, command), paths in entries.items():
        who, what = f"process {pid} ({command})", listed([_short(path, root) for path in paths], 2)
        if not exists(pid):
            yield warning(
                f"{who} has {what} locked and is not on this host: killed, or on another host",
                f"where no dvc runs on any host: rm {file} (DVC drops such entries itself where they are in the way)",
            )
        elif not is_dvc(pid, root):
            yield bad(
                f"{who} has {what} locked, but {pid} is now {process(pid)}: the entry was left, and DVC refuses to run"
                " what needs them",
                f"where no dvc runs on any host: rm {file}",
            )
        else:
            running.append(f"{pid} ({command})")
    if running:
        yield good(f"in use by {listed(running)}")
    elif not entries:
        yield good("no stage has paths locked")


def _short(path: str, root: Path) -> str:
    """The path as it is written in dvc.yaml."""
    return path.removeprefix(f"{root.resolve()}/")


def _entries(body: Any) -> dict[tuple[int, str], list[str]]:
    """Paths by who locked them."""
    found: dict[tuple[int, str], list[str]] = {}
    for mode in ("write", "read"):
        for path, infos in body.get(mode, {}).items():
            for info in infos if isinstance(infos, list) else [infos]:
                found.setdefault((int(info["pid"]), str(info["cmd"])), []).append(path)
    return {who: sorted(set(paths)) for who, paths in found.items()}


def lease_holder(file: Path) -> str:
    """As `pipeline.journal.holder`, and "" where that may not open the file."""
    try:
        return holder(file)
    except OSError:
        return ""


def held_here() -> dict[int, int]:
    """Process id of the holder of every file, by inode, that a process of this host has locked by flock (Linux)."""
    table, held = Path("/proc/locks"), {}
    for line in table.read_text().splitlines() if table.exists() else ():
        fields = line.split()
        if len(fields) > 5 and fields[1] == "FLOCK":  # not those who wait ("->")
            held[int(fields[5].rsplit(":", 1)[1])] = int(fields[4])
    return held


def _inode(file: Path) -> int:
    """0, which no file has, where it is gone."""
    try:
        return file.stat().st_ino
    except OSError:
        return 0


def exists(pid: int) -> bool:
    """Whether a process of this host has the id, as DVC finds out."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def is_dvc(pid: int, root: Path) -> bool:
    """Whether the process is a dvc, and of this workspace where that can be seen."""
    if not any(Path(word).name == "dvc" for word in _words(pid)[:5]):
        return False
    try:
        return Path(f"/proc/{pid}/cwd").resolve(strict=True).is_relative_to(root.resolve())
    except OSError:  # another user's, or no Linux
        return True


def process(pid: int) -> str:
    """The process in words; one without a command has ended, and its parent has not noticed."""
    return f"{pid} ({' '.join(_words(pid))[:80] or 'ended, but still listed'})"


def _words(pid: int) -> list[str]:
    file = Path(f"/proc/{pid}/cmdline")
    if file.exists():
        return [word for word in file.read_text(errors="replace").split("\0") if word]
    program = shutil.which("ps")
    if program is None:
        return []
    return subprocess.run([program, "-o", "command=", "-p", str(pid)], capture_output=True, text=True).stdout.split()
