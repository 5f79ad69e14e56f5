"""What DVC knows of the pipeline: the order of its stages, what has changed, and what `dvc repro` would do about it.

`foresee` walks the graph as `dvc repro` does, but runs nothing: where a stage would be restored from the run cache or
linked again, the digests of its outputs are known beforehand, and the walk goes on with them. No lock is taken, so it
looks on while a pipeline runs.
"""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dvc.dependency.param import ParamsDependency
from dvc.exceptions import DvcException, NotDvcRepoError
from dvc.repo import Repo
from dvc.repo.reproduce import get_active_graph, plan_repro
from dvc.scm import SCMError
from dvc.stage.cache import _get_cache_hash
from dvc.stage.serialize import to_single_stage_lockfile
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.meta import Meta
from dvc_data.hashfile.tree import Tree

from pipeline.code import RESULT_PACKAGES
from pipeline.errors import WorkspaceError, full_disk

State = Literal["kept", "restored", "linked", "computed", "open"]
"""What becomes of a stage: nothing; its outputs come back from DVC's cache; it runs, finds every unit finished and
links it; it runs and computes; or that depends on what the stages before it will give."""
RETRIES = 2
Kind = Literal["new", "command", "parameter", "code", "data", "output", "upstream"]


@dataclass(frozen=True)
class Reason:
    """Why a stage does not stay as it is."""

    kind: Kind
    what: str


@dataclass(frozen=True)
class Foreseen:
    """One stage in the order of `dvc repro`."""

    title: str
    state: State
    reasons: tuple[Reason, ...]
    upstream: tuple[str, ...]
    """Titles of the stages whose outputs it reads."""
    code: tuple[str, ...]
    """Files of ours that it depends on."""
    gpus: int
    """Devices it computes on, from ``meta`` in dvc.yaml."""
    limit_seconds: float | None
    """How long it may take, likewise."""
    retries: int
    """How often it is tried again where that may help, likewise."""

    @property
    def certain(self) -> bool:
        """Whether it is known that the stage changes, or that it does not."""
        return self.state != "open" or any(reason.kind != "upstream" for reason in self.reasons)


def foresee(root: Path, finished: Callable[[str, Sequence[str]], bool]) -> list[Foreseen]:
    """Every stage, in the order in which `dvc repro` goes through them.

    ``finished(title, code)`` says whether a stage of which nothing but code has changed would compute nothing, since
    that change means nothing (comments) and all it has built is at hand.

    Raises:
        WorkspaceError: DVC cannot read the pipeline.
        DiskFullError: there is no space for its records.
    """
    with _explained(root):
        repo = Repo(str(root))
        graph = get_active_graph(repo.index.graph)
        walk = _Walk(repo, graph, finished)
        return [walk.visit(stage) for stage in plan_repro(graph)]


@contextmanager
def _explained(root: Path) -> Iterator[None]:
    """What DVC raises, as errors of ours."""
    try:
        yield
    except (SCMError, NotDvcRepoError) as error:
        raise WorkspaceError(
            f"DVC finds no repository: {error}",
            remedy="work in a git clone of the project; `git init && git add -A && git commit -m start` makes one of "
            "a copy without .git",
        ) from error
    except sqlite3.Error as error:  # DVC's record of what it has hashed
        if "full" in str(error):
            raise full_disk(root, "DVC opens its records") from error
        raise WorkspaceError(
            f"DVC cannot open its records: {error}",
            remedy="where no dvc runs here: `rm -r .dvc/tmp/site`; they are made again",
        ) from error
    except DvcException as error:
        raise WorkspaceError(
            f"DVC cannot read the pipeline: {error}",
            remedy="mend dvc.yaml, dvc.lock or params.yaml; `dvc status` tells",
        ) from error


@functools.cache
def cache_folder(root: Path) -> Path:
    """Where DVC keeps the outputs of the checkout ``root``. Raises WorkspaceError where DVC cannot open it."""
    with _explained(root):
        return Path(Repo(str(root)).cache.local_cache_dir)


class _Walk:
    """The walk: what is known of the outputs that will be other ones."""

    def __init__(self, repo: Repo, graph: Any, finished: Callable[[str, Sequence[str]], bool]) -> None:
        self.repo, self.graph, self.finished = repo, graph, finished
        self.outs: dict[str, tuple[str, HashInfo | None]] = {}
        """Path of an output that will be written -> by which stage, and its digest, None where nobody knows it."""

    def visit(self, stage: Any) -> Foreseen:
        new = not any(entry.hash_info for entry in (*stage.deps, *stage.outs))
        reasons: list[Reason] = []
        hashes: dict[Any, HashInfo | None] = {}
        awaited: list[str] = []
        if new:
            reasons.append(Reason("new", "it has never run here"))
        elif stage.changed_stage():
            reasons.append(Reason("command", "its command in dvc.yaml"))
        for dep in stage.deps:
            if isinstance(dep, ParamsDependency):
                hashes[dep] = dep.get_hash()
                reasons += _changed_params(dep)
                continue
            makers, hashes[dep] = self._coming(dep)
            if hashes[dep] is None:
                awaited += makers
            elif not new and hashes[dep] != dep.hash_info:
                reasons.append(_changed_file(dep.def_path, makers))
        for out in stage.outs:
            if not new and (status := out.status()):
                reasons.append(Reason("output", f"{out.def_path}: {status[str(out)]}"))
        state = self._state(stage, reasons, awaited, hashes)
        reasons += [Reason("upstream", maker) for maker in dict.fromkeys(awaited)]
        before = tuple(sorted(s.addressing for s in self.graph.successors(stage)))
        meta = stage.meta or {}
        limit = float(meta["limit_seconds"]) if "limit_seconds" in meta else None
        gpus, retries = int(meta.get("gpus", 0)), int(meta.get("retries", RETRIES))
        return Foreseen(stage.addressing, state, tuple(reasons), before, _code(stage), gpus, limit, retries)

    def _state(
        self, stage: Any, reasons: list[Reason], awaited: list[str], hashes: Mapping[Any, HashInfo | None]
    ) -> State:
        if not reasons and not awaited:
            return "kept"
        state: State
        coming: Mapping[str, HashInfo | None]
        if awaited:
            state, coming = "open", {out.fs_path: None for out in stage.outs}
        elif restored := self._restorable(stage, hashes):
            state, coming = "restored", restored
        elif self._only_linked(stage, reasons):
            state, coming = "linked", {out.fs_path: out.hash_info for out in stage.outs}
        else:
            state, coming = "computed", {out.fs_path: None for out in stage.outs}
        self.outs |= {path: (stage.addressing, digest) for path, digest in coming.items()}
        return state

    def _only_linked(self, stage: Any, reasons: list[Reason]) -> bool:
        return all(reason.kind == "code" for reason in reasons) and self.finished(stage.addressing, _code(stage))

    def _coming(self, dep: Any) -> tuple[list[str], HashInfo | None]:
        """Who will have written the dependency by then, and its digest at that time; None where nobody knows."""
        fs, path = dep.fs, dep.fs_path
        below = {out: made for out, made in self.outs.items() if out == path or fs.isin(out, path)}
        makers = [title for title, _ in below.values()]
        if any(digest is None for _, digest in below.values()):
            return [title for title, digest in below.values() if digest is None], None
        if path in below:
            return makers, below[path][1]
        if not dep.exists:
            return makers, HashInfo("md5", "absent") if not below else self._merged(dep, below)
        return makers, self._merged(dep, below) if below else dep.get_hash()

    def _merged(self, dep: Any, below: Mapping[str, tuple[str, HashInfo | None]]) -> HashInfo:
        """The digest of a folder in which some outputs are replaced."""
        fs, tree = dep.fs, Tree()
        replaced = [fs.relparts(out, dep.fs_path) for out in below]
        if dep.exists:
            _, _, there = dep._build(dep.cache, dep.fs_path, dep.fs, dep.hash_name, ignore=dep.dvcignore)
            for key, meta, digest in there:
                if not any(key[: len(parts)] == parts for parts in replaced):
                    tree.add(key, meta, digest)
        for parts, (_, digest) in zip(replaced, below.values(), strict=True):
            assert digest is not None
            if digest.isdir:
                for key, meta, inner in Tree.load(self.repo.cache.local, digest):
                    tree.add((*parts, *key), meta, inner)
            else:
                tree.add(parts, None, digest)
        tree.digest()
        assert tree.hash_info is not None
        return tree.hash_info

    def _restorable(self, stage: Any, hashes: Mapping[Any, HashInfo | None]) -> dict[str, HashInfo | None] | None:
        """Path and digest of the outputs that DVC's run cache would give for these dependencies; None without."""
        cache = self.repo.stage_cache
        if not stage.changed_stage() and all(dep.hash_info == digest for dep, digest in hashes.items()):
            entry = to_single_stage_lockfile(stage) if all(out.hash_info for out in stage.outs) else None
        else:
            with _pretended(hashes):
                key = _get_cache_hash(to_single_stage_lockfile(stage), key=True)
            entry = _newest(cache, key)
        if entry is None:
            return None
        there = cache._create_stage(entry, wdir=stage.wdir)
        return {out.fs_path: out.hash_info for out in there.outs} if there.outs_cached() else None


def _code(stage: Any) -> tuple[str, ...]:
    """Files of ours that the stage depends on."""
    return tuple(dep.def_path for dep in stage.deps if dep.def_path.split("/")[0] in RESULT_PACKAGES)


def _newest(cache: Any, key: str) -> Any:
    """The newest entry of the run cache under ``key``, as `StageCache._load` finds it for dependencies on disk."""
    folder = Path(cache._get_cache_dir(key))
    entries = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime) if folder.is_dir() else []
    return cache._load_cache(key, entries[-1].name) if entries else None


@contextmanager
def _pretended(hashes: Mapping[Any, HashInfo | None]) -> Iterator[None]:
    """Dependencies as they will be."""
    before = {dep: (dep.hash_info, dep.meta) for dep in hashes}
    try:
        for dep, digest in hashes.items():
            if digest != dep.hash_info:
                dep.hash_info, dep.meta = digest, Meta()  # the old one holds the old digest too
        yield
    finally:
        for dep, (digest, meta) in before.items():
            dep.hash_info, dep.meta = digest, meta


def _changed_params(dep: ParamsDependency) -> list[Reason]:
    """Leaf by leaf, old -> new."""
    if not (status := dep.status()):
        return []
    known: Any = dep.hash_info.value if dep.hash_info else None  # a mapping, whatever its annotation says
    old, new = known or {}, dep.read_params()
    if isinstance(status.get(str(dep)), str):  # no parameter is on record
        return []
    leaves: list[Reason] = []
    for name in status[str(dep)]:
        leaves += [Reason("parameter", line) for line in differences(old.get(name), new.get(name), name)]
    return leaves


def differences(old: Any, new: Any, where: str) -> list[str]:
    """``key: old -> new`` for every leaf that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [line for key in {**old, **new} for line in differences(old.get(key), new.get(key), f"{where}.{key}")]
    return [] if old == new else [f"{where}: {_shown(old)} -> {_shown(new)}"]


def _shown(value: Any) -> str:
    return "(absent)" if value is None else str(value)


def _changed_file(path: str, makers: Sequence[str]) -> Reason:
    if makers:
        return Reason("data", f"{path}, other than before once {', '.join(dict.fromkeys(makers))} is back")
    return Reason("code" if path.split("/")[0] in RESULT_PACKAGES else "data", path)
