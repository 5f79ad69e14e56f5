"""Whether the machine gives what the pipeline works on: room, hard links, locks, memory, and a sane environment."""

from __future__ import annotations

import configparser
import difflib
import fcntl
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.health.checks import (
    ARTIFACTS,
    WORK,
    Finding,
    bad,
    good,
    listed,
    nearest,
    one_line,
    scratch,
    warning,
    writable,
)

LITTLE_DISK, LEAST_DISK = 5e9, 1e9
LEAST_TEMPORARY = 2e8
FEW_FILES = 10_000
LITTLE_MEMORY, LEAST_MEMORY = 3e9, 1.2e9
"""Bytes. One process of a stage takes up to 1.2 GB (docs/data-plane.md)."""
LITTLE_SHARED = 5e8
FEW_DESCRIPTORS = 1024
FREE_SPACE = "free space (`clevrcast clean`, `dvc gc -w`), or move .work and .dvc/cache"
LOCKS_ELSEWHERE = "put the checkout on a local disk, or mount this one with locks (NFSv4; Lustre with -o flock)"


def free_space(root: Path) -> Iterator[Finding]:
    """Bytes and files that the disks of the workspace still take, and the one for temporary files."""
    disks: dict[int, tuple[Path, list[str]]] = {}
    for name, folder in {"the workspace": root, **places(root)}.items():
        disks.setdefault(nearest(folder).stat().st_dev, (nearest(folder), []))[1].append(name)
    for folder, names in disks.values():
        free, count = shutil.disk_usage(folder).free, os.statvfs(folder)
        what = f"{free / 1e9:.1f} GB free for {listed(names)}"
        if free < LITTLE_DISK:
            yield (bad if free < LEAST_DISK else warning)(what, FREE_SPACE)
        elif count.f_files and count.f_favail < FEW_FILES:
            yield warning(f"{what}, but for {count.f_favail} more files only (inodes)", FREE_SPACE)
        else:
            yield good(what)
    temporary = Path(tempfile.gettempdir())
    if (free := shutil.disk_usage(temporary).free) < LEAST_TEMPORARY:
        yield warning(f"{free / 1e6:.0f} MB free in {temporary}, where films are written", "free some, or set TMPDIR")


def places(root: Path) -> dict[str, Path]:
    """Where the same bytes are linked from, by name."""
    return {".work": root / WORK, "artifacts": root / ARTIFACTS, "DVC's cache": dvc_cache(root)}


def dvc_config(root: Path) -> configparser.ConfigParser:
    """What DVC is told by the checkout: of the repository, then of this copy of it."""
    config = configparser.ConfigParser(interpolation=None)
    config.read([root / ".dvc/config", root / ".dvc/config.local"])
    return config


def dvc_cache(root: Path) -> Path:
    """The folder of DVC's cache; cache.dir is relative to .dvc."""
    return root / ".dvc" / dvc_config(root).get("cache", "dir", fallback="cache").strip("\"' ")


def hard_links(root: Path) -> Iterator[Finding]:
    """Whether finished work can be linked to where it is published and cached, instead of copied."""
    here = places(root)
    devices = {name: nearest(folder).stat().st_dev for name, folder in here.items()}
    if devices[".work"] != devices["artifacts"]:
        yield bad(
            ".work and artifacts are on different file systems, so finished work cannot be hard-linked",
            "move both to one file system, for example by a symbolic link for each",
        )
    elif devices["artifacts"] != devices["DVC's cache"]:
        yield warning(
            "DVC's cache is on another file system than artifacts: outputs take their space twice, or are symbolic "
            "links",
            f"move {dvc_cache(root)} and the checkout to one file system (`dvc cache dir` names the cache)",
        )
    if not writable(root):
        return  # said by another check
    with scratch(root) as folder:
        (folder / "file").touch()
        try:
            os.link(folder / "file", folder / "link")
        except OSError as error:
            yield bad(
                f"the file system of {nearest(root / WORK)} has no hard links: {error.strerror}",
                "put the checkout on a file system that has them (ext4, xfs, btrfs, zfs, NFS)",
            )
            return
    if len(set(devices.values())) == 1:
        yield good(f"{listed(list(here))} are on one file system, and it has hard links")


def file_locks(root: Path) -> Iterator[Finding]:
    """Whether a lock that this process holds keeps another one out, on the workspace's file system."""
    if not writable(root):
        return
    kind, options = _file_system(nearest(root / WORK))
    with scratch(root) as folder, (folder / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            yield bad(f"files cannot be locked on {kind}: {error.strerror}", LOCKS_ELSEWHERE)
            return
        while_held = _other_process_locks(folder / "lock")
        fcntl.flock(stream, fcntl.LOCK_UN)
        afterwards = _other_process_locks(folder / "lock")
    if (while_held, afterwards) != ("refused", "locked"):
        yield bad(
            f"locks have no effect on {kind}: another process was {while_held} while the lock was held, and "
            f"{afterwards} afterwards",
            LOCKS_ELSEWHERE,
        )
    elif local := {"nolock", "local_lock=flock", "local_lock=all", "localflock"} & set(options.split(",")):
        yield warning(
            f"{kind} is mounted with {listed(sorted(local))}: locks keep out processes of this host alone",
            "work on this host alone, or mount it without that option",
        )
    else:
        yield good(f"another process is kept out by a lock ({kind})")


def _other_process_locks(file: Path) -> str:
    program = (
        "import fcntl, sys\n"
        "try: fcntl.flock(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB); print('locked')\n"
        "except BlockingIOError: print('refused')\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, str(file)], capture_output=True, text=True, timeout=5, check=False
    )
    return done.stdout.strip() or f"not answered ({one_line(done.stderr)})"


def _file_system(folder: Path) -> tuple[str, str]:
    """Its type and options, as far as Linux tells."""
    table, real = Path("/proc/self/mounts"), folder.resolve()
    rows = [line.split() for line in table.read_text().splitlines()] if table.exists() else []
    above = [row for row in rows if len(row) > 3 and real.is_relative_to(row[1].replace("\\040", " "))]
    best = max(enumerate(above), key=lambda row: (len(row[1][1]), row[0]), default=None)
    return (best[1][2], best[1][3]) if best else ("this file system", "")


def memory(root: Path) -> Iterator[Finding]:
    """What is free for processes, within the limit of a container."""
    free = _free_memory()
    if free is None:
        return
    what = f"{free / 1e9:.1f} GB of memory available; a process of a stage takes up to {LEAST_MEMORY / 1e9:.1f}"
    if free < LITTLE_MEMORY:
        remedy = "close other programs; fewer processes: export CLEVRCAST_EXECUTOR=serial, `clevrcast run --jobs 1`"
        yield (bad if free < LEAST_MEMORY else warning)(what, remedy)
    else:
        yield good(what)


def _free_memory() -> float | None:
    file = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", file.read_text(), re.MULTILINE) if file.exists() else None
    if found is None:
        return None
    limits = [float(found[1]) * 1024]
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (most := (group / "memory.max").read_text().strip()).isdigit():
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
        limits.append(float(most) - used)
    return max(min(limits), 0)


def limits(root: Path) -> Iterator[Finding]:
    """Open files, and the memory that processes share."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shared = Path("/dev/shm")  # noqa: S108 - looked at, not written to
    size = os.statvfs(shared) if shared.exists() else None
    parts = [f"{'any number of' if soft == resource.RLIM_INFINITY else soft} open files"]
    if size is not None:
        parts.append(f"{size.f_blocks * size.f_frsize / 1e9:.1f} GB of shared memory")
    fine = True
    if soft != resource.RLIM_INFINITY and soft < FEW_DESCRIPTORS:
        most = 4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)
        yield warning(f"a process may open {soft} files only", f"ulimit -n {most}")
        fine = False
    if size is not None and size.f_blocks * size.f_frsize < LITTLE_SHARED:
        told = f"{size.f_blocks * size.f_frsize / 1e6:.0f} MB of shared memory (/dev/shm)"
        yield warning(f"{told}: too little for torchrun on GPUs and for Ray", "give a container more: --shm-size=2g")
        fine = False
    if fine:
        yield good(", ".join(parts))


def environment(root: Path) -> Iterator[Finding]:
    """Variables of ours that are set: known, and with values that mean something."""
    from pipeline.devices import save_seconds
    from pipeline.executors import EXECUTOR, HELPER, PART, WORKERS, executor, part_of

    known = _known_variables()
    asked = {name: value for name, value in os.environ.items() if name.startswith("CLEVRCAST_")}
    for name in sorted(asked.keys() - known):
        near = difflib.get_close_matches(name, known, n=1)
        yield warning(
            f"{name} is set, which nothing reads" + (f"; {near[0]} is meant?" if near else ""), f"unset {name}"
        )
    for check in (executor, save_seconds, lambda: part_of([])):
        check()  # raises what is wrong, with its remedy
    workers = asked.get(WORKERS, "")
    if workers and not workers.isdigit():
        yield bad(f"{WORKERS}={workers} is no number", f"unset {WORKERS}, or use a number from 1 on")
    for name in (PART, HELPER):
        if asked.get(name):
            yield warning(f"{name}={asked[name]} is set: stages build a part and publish nothing", f"unset {name}")
    told = [f"{name}={value}" for name, value in sorted(asked.items())]
    yield good(listed(told) if told else f"no variable of ours is set ({EXECUTOR} is process)")


def _known_variables() -> set[str]:
    """Every name that the code has, so that no list has to be kept."""
    code = Path(__file__).resolve().parents[2]
    files = [file for package in ("pipeline", "stages", "models", "data") for file in (code / package).rglob("*.py")]
    return {name for file in files for name in re.findall(r"CLEVRCAST_[A-Z_]*[A-Z]", file.read_text())}
