"""What DVC leaves when it is killed while it writes, and mending it: DVC itself would refuse to go on.

``dvc.lock`` is written in place, and may be cut off. Empty it is refused; cut off where it still is YAML, it is taken
for one in which the later stages have never run. So the whole file is copied to ``.work/dvc.lock.whole`` when a run or
a stage starts, and the next run puts that back. Results that the cut file had and the copy has not are in DVC's cache
and in the journal, and are taken from there. Only what a cut leaves is replaced, the beginning of a file that ends in
the middle of something, and it is kept. What people have made of it (conflict markers, a slip, stages taken out) stays
as it is, and DVC tells.

``.dvc/tmp/rwlock``, the list of paths that running stages use, is written in place too. Unreadable it is removed;
entries whose process id belongs to what is no DVC are taken out.

A folder of the run cache is made before the entry in it; DVC stumbles over an empty one, which is removed.

Files by which DVC tries out links stay in ``artifacts``, where they would count as outputs; they are removed.

Everything outside the cache is looked at while DVC's own locks are held, so that nobody else is writing it.
"""

from __future__ import annotations

import fcntl
import json
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError

from pipeline.errors import WorkspaceError
from pipeline.journal import write_atomically
from pipeline.process import Said

LOCK = "dvc.lock"
WHOLE = ".work/dvc.lock.whole"
CUT = ".work/dvc.lock.cut"
TMP = Path(".dvc/tmp")
WAIT_SECONDS = 3.0
"""For DVC's lock; as long as DVC waits itself."""
YOUNG_SECONDS = 2.0
"""A folder of the run cache may be empty for as long, since its entry is just being written."""


def mend(root: Path, say: Said = print, *, wait: bool = True) -> None:
    """Mend what a killed DVC has left. While another DVC has its lock, also after some seconds' ``wait``, the files
    that it may be writing are left alone.

    Raises:
        WorkspaceError: ``dvc.lock`` is cut off and there is no copy of it.
    """
    _mend_run_cache(root)
    with dvc_stands_still(root, WAIT_SECONDS if wait else 0.0) as still:
        if not still:
            return
        _mend_paths(root, say)
        _mend_artifacts(root)
        file, copy = root / LOCK, root / WHOLE
        text, whole = _text(file), _text(copy)
        if text is None or not is_cut(text, whole or ""):
            return
        if whole is None:
            raise WorkspaceError(
                f"{LOCK} is cut off after {len(text)} characters: DVC was killed while writing it",
                remedy=f"`git checkout {LOCK}`; finished work is found again in DVC's cache and in .work",
            )
        write_atomically(root / CUT, text)
        write_atomically(file, whole)
        say(
            f"{LOCK} was cut off after {len(text)} characters, since DVC was killed while writing it: it is again as it"
            f" was at {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(copy.stat().st_mtime))} ({WHOLE});"
            f" the cut one is {CUT}"
        )


def keep(root: Path, *, wait: bool = True) -> None:
    """Copy ``dvc.lock``, if it is whole, and remove what would count as an output; not where another DVC is at work,
    whose files may be half written."""
    with dvc_stands_still(root, WAIT_SECONDS if wait else 0.0) as still:
        if not still:
            return
        _mend_artifacts(root)
        text, whole = _text(root / LOCK), _text(root / WHOLE)
        if text and text != whole and not is_cut(text, whole or ""):
            (root / WHOLE).parent.mkdir(exist_ok=True)
            write_atomically(root / WHOLE, text)


def can_be_put_back(root: Path) -> bool:
    """Whether ``dvc.lock`` is cut off, and there is a copy."""
    text, whole = _text(root / LOCK), _text(root / WHOLE)
    return text is not None and whole is not None and is_cut(text, whole)


def is_cut(text: str, whole: str) -> bool:
    """Whether ``text`` is the beginning of a ``dvc.lock`` that was being written, ``whole`` being one from before."""
    if not text:
        return True
    if text == whole:
        return False
    stages, before = _entries(text), _entries(whole)
    last = list(stages)[-1] if stages else ""
    in_the_middle = (
        not text.endswith("\n")
        or text.endswith(":\n")  # a key without its value
        or stages.get(last, 0) < before.get(last, 0)
    )
    if not in_the_middle or (before.keys() <= stages.keys() and _usable(text)):
        return False
    return _parsed(text[: text.rfind("\n") + 1]) is not None  # what stands before the last line is as DVC writes it


@contextmanager
def dvc_stands_still(root: Path, seconds: float) -> Iterator[bool]:
    """Hold DVC's locks on the workspace and on its list of paths for a moment; false where they are not to be had."""
    until = time.monotonic() + seconds
    with ExitStack() as held:
        for name in ("lock", "rwlock.lock"):
            (root / TMP).mkdir(parents=True, exist_ok=True)
            stream = held.enter_context((root / TMP / name).open("a"))
            while True:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= until:
                        yield False
                        return
                time.sleep(0.05)
        yield True


def _mend_paths(root: Path, say: Said) -> None:
    """Take out of DVC's list of claimed paths what would be in its way for ever; all of it, if nobody can read it.

    DVC itself drops entries of processes that are no more, but not those whose process id has gone to another program
    (as after a restart of a container), or whose process is dead and not yet waited for.
    """
    from pipeline.health.locks import exists, is_dvc  # a stage, which only copies, does without

    def stands(info: dict[str, Any]) -> bool:
        return not exists(info["pid"]) or is_dvc(info["pid"], root)

    file = root / TMP / "rwlock"
    text = _text(file)
    if text is None:
        return
    try:
        listed = json.loads(text)
        kept = {
            "write": {path: info for path, info in listed.get("write", {}).items() if stands(info)},
            "read": {
                path: left
                for path, infos in listed.get("read", {}).items()
                if (left := [info for info in infos if stands(info)])
            },
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        listed = kept = {}
        say(f"{file.relative_to(root)} could not be read, since DVC was killed while writing it: it is removed")
    if not kept:
        file.unlink()
    elif kept != listed:
        write_atomically(file, json.dumps(kept))


def _mend_run_cache(root: Path) -> None:
    from pipeline.dag import cache_folder  # loads in a second; likewise

    for folder in (cache_folder(root) / "runs").glob("*/*"):
        with suppress(OSError):  # of those who were quicker
            if not any(folder.iterdir()):
                time.sleep(max(0.0, YOUNG_SECONDS - (time.time() - folder.stat().st_mtime)))
                folder.rmdir()  # unless there is an entry by now


def _mend_artifacts(root: Path) -> None:
    for depth in ("*", "*/*", "*/*/*"):  # beside outputs, which are no deeper
        for file in (root / "artifacts").glob(f"{depth}.tmp"):
            if re.fullmatch(r"\.[\w-]{22}\.tmp", file.name):
                file.unlink()


def _entries(text: str) -> dict[str, int]:
    """How many lines the entry of each stage has, in their order."""
    parts = re.split(r"^  (\S.*):$", text, flags=re.MULTILINE)
    return {title: body.count("\n") for title, body in zip(parts[1::2], parts[2::2], strict=True)}


def _usable(text: str) -> bool:
    """Whether DVC would take it."""
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA  # loads in a second, and is hardly ever needed
    from voluptuous import Invalid

    try:
        COMPILED_LOCKFILE_SCHEMA(_parsed(text))
    except Invalid:
        return False
    return True


def _parsed(text: str) -> Any:
    """None where it is no YAML."""
    try:
        return YAML(typ="safe").load(text) or {}
    except YAMLError:
        return None


def _text(file: Path) -> str | None:
    try:
        return file.read_text()
    except FileNotFoundError:
        return None
