"""Whether the checkout is whole: its files readable and in step, git and DVC at hand, nothing left in the middle."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.health.checks import ARTIFACTS, WORK, Finding, bad, good, listed, one_line, warning, writable
from pipeline.health.locks import lease_holder
from pipeline.health.machine import dvc_config
from pipeline.upkeep import newest, quarantined, titles

LINKS = "hardlink,symlink"
"""What cache.type has to be for outputs to take their space once."""


def checkout(root: Path) -> Iterator[Finding]:
    """The files without which nothing runs."""
    absent = [name for name in ("dvc.yaml", "params.yaml", ".dvc", "stages", "pipeline") if not (root / name).exists()]
    if "dvc.yaml" in absent and len(absent) > 1:
        yield bad(f"{root.resolve()} is no clevrcast checkout: no {listed(absent)}", "run at the top of a checkout")
    elif absent:
        yield bad(f"missing in the checkout: {listed(absent)}", f"git checkout {' '.join(absent)}")
    else:
        yield good(str(root.resolve()))


def can_be_written(root: Path) -> Iterator[Finding]:
    """Whether work can be written where it belongs."""
    folders = [folder for name in (".", WORK, ARTIFACTS, ".dvc", ".dvc/tmp") if (folder := root / name).is_dir()]
    closed = [str(folder.resolve()) for folder in folders if not writable(folder)]
    if closed:
        yield bad(
            f"nothing can be written in {listed(closed, 1)}: it is read-only, or somebody else's",
            f"`mount -o remount,rw`, or `sudo chown -R $USER {closed[0]}`, or clone to a place of your own",
        )
    else:
        yield good("work can be written where it belongs")


def git(root: Path) -> Iterator[Finding]:
    """DVC refuses to work outside a git repository."""
    if shutil.which("git") is None:
        yield bad("git is not installed, and DVC does not work without", "install git, for example apt-get install git")
        return
    asked = _git(root, "rev-parse", "--is-inside-work-tree")
    if asked.returncode:
        said = one_line(asked.stderr)
        if "dubious ownership" in said:
            yield bad(f"git refuses: {said}", f"git config --global --add safe.directory {root.resolve()}")
        else:
            yield bad(
                f"git finds no repository here ({said}), and DVC does not work without",
                "git init && git add -A && git commit -m start, or clone instead of unpacking an archive",
            )
    elif _git(root, "rev-parse", "--verify", "-q", "HEAD").returncode:
        yield warning(
            "the git repository has no commit, so nothing can be compared with it", "git add -A && git commit -m start"
        )
    else:
        changed = _git(root, "status", "--porcelain", "--untracked-files=no").stdout.splitlines()
        yield good(f"a git repository, {len(changed)} tracked files changed")


def params(root: Path) -> Iterator[Finding]:
    """``params.yaml`` against its schema."""
    from pipeline.params import load_params

    found = load_params(root / "params.yaml")
    yield good(
        f"valid: source {found.acquire.source}, teacher {found.flow.teacher}, {len(found.predictors)} predictors"
    )


def graph(root: Path) -> Iterator[Finding]:
    """``dvc.yaml``: readable, and in step with what the stages import."""
    from pipeline.code_deps import stale_deps

    if not (root / "dvc.yaml").exists():
        return  # said by another check
    try:
        stale = stale_deps(root)
    except SyntaxError as error:
        yield bad(f"{error.filename}, line {error.lineno}: {error.msg}", "mend the line, or take it back from git")
        return
    except Exception as error:  # noqa: BLE001 - a graph that is broken by hand may be anything
        yield bad(f"dvc.yaml cannot be read: {' '.join(str(error).split())[:300]}", "git checkout dvc.yaml")
        return
    if stale:
        first, (lacks, surplus) = next(iter(stale.items()))
        what = [*(f"lacks {file}" for file in lacks), *(f"lists {file} in vain" for file in surplus)]
        yield bad(
            f"dvc.yaml is not in step with the code in {listed(list(stale))} ({first} {listed(what, 3)}): edits of it "
            "would go unnoticed",
            "clevrcast deps --write",
        )
    else:
        yield good("dvc.yaml lists the code that the stages import")


def lock_file(root: Path) -> Iterator[Finding]:
    """``dvc.lock``: whole. DVC writes it in place, so a kill may cut it."""
    file = root / "dvc.lock"
    tracked = shutil.which("git") is not None and not _git(root, "ls-files", "--error-unmatch", "dvc.lock").returncode
    back = "git checkout dvc.lock" if tracked else "rm dvc.lock && dvc repro (finished work is linked, not computed)"
    if not file.exists():
        yield warning("dvc.lock was deleted", back) if tracked else good("there is no dvc.lock yet: nothing has run")
        return
    if fault := _lock_fault(file):
        yield bad(f"dvc.lock is damaged or half-written: {fault}", back)
    else:
        yield good("dvc.lock is whole")


def _lock_fault(file: Path) -> str:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    text = file.read_text(errors="replace")
    if re.search(r"^(<{7}|>{7}) ", text, re.MULTILINE):
        return "it holds the marks of a git merge"
    try:
        body: Any = YAML(typ="safe").load(text)
        if not isinstance(body, dict) or body.get("schema") != "2.0":
            return f"no lock file of DVC ({len(text)} bytes)"
        for title, stage in (body.get("stages") or {}).items():
            entries = [*(stage.get("deps") or []), *(stage.get("outs") or [])]
            if not stage["cmd"] or not all(entry["path"] and _whole_digest(entry) for entry in entries):
                return f"the stage {title} is cut"
    except YAMLError as error:
        return one_line(str(getattr(error, "problem", "") or error)) + _line_of(error)
    except (TypeError, KeyError, AttributeError):
        return "its stages are cut"
    return "" if text.endswith("\n") else "its last line has no end"


def _whole_digest(entry: dict[str, Any]) -> bool:
    if "hash" in entry and entry["hash"] not in entry:
        return False
    return re.fullmatch(r"[0-9a-f]{32}(\.dir)?", str(entry.get("md5", "0" * 32))) is not None


def _line_of(error: Any) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}" if mark else ""


def dvc_settings(root: Path) -> Iterator[Finding]:
    """``.dvc/config``: outputs are linked, and what DVC remembers of files stays in the checkout."""
    if not (root / ".dvc/config").exists():
        yield bad("there is no .dvc/config", "git checkout .dvc/config")
        return
    config, wrong = dvc_config(root), False
    kind = config.get("cache", "type", fallback="").strip("\"' ").replace(" ", "")
    if kind != LINKS:
        wrong = True
        yield warning(
            f"DVC's cache.type is {kind or 'not set'}, not {LINKS}: outputs may take their space twice",
            f"dvc config cache.type {LINKS}",
        )
    if not config.has_option("core", "site_cache_dir"):
        wrong = True
        yield warning(
            "DVC's core.site_cache_dir is not set: what it knows of files is lost with the temporary folder",
            "dvc config core.site_cache_dir .dvc/tmp/site",
        )
    if not wrong:
        yield good(f".dvc/config: cache.type is {LINKS}")


def quarantine(root: Path) -> Iterator[Finding]:
    """Items that were bad when their stage last ran."""
    work, count = root / WORK, 0
    for title in titles(work):
        folder = newest(work, title)
        items = [item for each in (quarantined(folder) if folder else {}).values() for item in each]
        count += len(items)
        if items:
            yield warning(
                f"{title}: {len(items)} in quarantine, the first is {items[0].id}: {one_line(items[0].reason)}",
                f"clevrcast inspect {title}; clevrcast retry-failed {title} tries them again",
            )
    if not count:
        yield good("nothing is in quarantine")


def unfinished(root: Path) -> Iterator[Finding]:
    """Units that were begun and that nobody is building now."""
    partial = (root / WORK).glob("*/*/.*.building")
    left = [folder for folder in partial if not lease_holder(folder.parent / f"{folder.stem[1:]}.lock")]
    if left:
        stages = sorted({folder.parent.parent.name for folder in left})
        yield warning(
            f"{len(left)} units of {listed(stages)} were begun and are built by nobody now",
            "dvc repro goes on; clevrcast clean removes them",
        )
    else:
        yield good("no unit was left in the middle")


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=8, check=False)
