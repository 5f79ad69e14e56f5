"""Experiments: the workspace as it is, a few parameters changed, run beside it and kept as a `dvc exp`.

An experiment runs in a clone of its own, ``.work/experiments/NAME``, so that the workspace, its ``params.yaml`` and
whoever works in it are left alone, and several can run at once: they share DVC's cache and the leases of devices. What
the workspace has finished is linked into the clone, so an experiment builds only what its changes concern. One that was
stopped goes on when it is started again under its name.

`dvc exp run --temp` holds DVC's lock on the workspace from its first to its last stage, and starts from no finished
shard; hence the clone of our own (docs/adr/008-experiments-in-clones.md).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.dag import cache_folder
from pipeline.errors import ParamsError, PipelineError, StoppedError, WorkspaceError
from pipeline.journal import MARKER, PLAN, lease
from pipeline.params import read_yaml
from pipeline.process import LOGS, Said, last_lines, supervise
from pipeline.profiles import edit
from pipeline.stage import WORK
from pipeline.upkeep import EXPERIMENTS, newest, titles

FOLDER = WORK / EXPERIMENTS


@dataclass(frozen=True)
class Trial:
    """One experiment: its name, the parameters it changes (dotted keys), and the stages wanted (none: all)."""

    name: str
    changes: Mapping[str, Any]
    targets: tuple[str, ...] = ()

    @property
    def told(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.changes.items())


def replace_leaves(params: Any, changes: Mapping[str, Any]) -> None:
    """Put the values in place of those at their dotted keys; whether such a key may be is for the schema to say.

    Raises:
        ParamsError: a key goes on below a value that is no section.
    """
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = params
        for part in parents:
            if not isinstance(node.get(part, {}), MutableMapping):
                raise ParamsError(f"{key}: {part} is no section", remedy="`clevrcast params` lists every key")
            node = node.setdefault(part, {})
        node[last] = value


def carry_out(
    root: Path,
    trial: Trial,
    *,
    stopped: Callable[[], bool] = lambda: False,
    said: Said = lambda line: None,
) -> dict[str, float]:
    """Run one experiment and keep it as the `dvc exp` of its name; returns the skill of every predictor it evaluated.

    Raises:
        BusyError: an experiment of this name is running.
        StoppedError: it was stopped; started again it goes on.
        PipelineError: a stage failed, with the last lines of what was said, or git or DVC did.
    """
    root = root.resolve()
    folder = root / FOLDER / trial.name
    with lease(root / FOLDER / f".{trial.name}.lock", f"the experiment {trial.name}"):
        said(f"{trial.name}: {trial.told or 'nothing changed'}")
        _clone(root, folder)
        edit(folder / "params.yaml", lambda params: replace_leaves(params, trial.changes), trial.told)
        command = [sys.executable, "-m", "pipeline.cli", "run", *trial.targets]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
        log = root / LOGS / f"experiment-{trial.name}.log"
        ended = supervise(command, log, cwd=folder, environment=environment, stopped=stopped, said=said)
        if ended == "stopped":
            raise StoppedError(f"the experiment {trial.name} was stopped", remedy="start it again: it goes on")
        if ended:
            raise PipelineError(
                f"the experiment {trial.name} failed (exit code {ended}), {log}:\n{last_lines(log, 20)}",
                remedy="mend what the last lines name and start it again under the same name: it goes on",
            )
        # Without targets DVC wants every output of the graph, those that nobody asked for too.
        named = ["--force", "--name", trial.name, "--message", trial.told or trial.name]
        _dvc(folder, "exp", "save", *named, *trial.targets)
        _git(root, "fetch", "--quiet", str(folder), "+refs/exps/*:refs/exps/*")
        skills = _skills(folder, trial)
        shutil.rmtree(folder)  # its outputs are in DVC's cache, everything else in git
    return skills


def _clone(root: Path, folder: Path) -> None:
    """The workspace as it is, files that git does not know yet included, with what it has finished; what an earlier
    clone of this name has finished stays."""
    kept = folder.with_name(f".{folder.name}.work")
    if (folder / WORK).exists():
        (folder / WORK).replace(kept)
    if folder.exists():
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    head = _git(root, "rev-parse", "HEAD")
    with _index_beside(folder) as index:
        _git(root, "read-tree", "HEAD", index=index)
        _git(root, "add", "--all", index=index)
        tree = _git(root, "write-tree", index=index)
    _git(root, "clone", "--quiet", "--shared", "--no-checkout", str(root), str(folder))
    _git(folder, "checkout", "--quiet", "--detach", head)
    _git(folder, "read-tree", "-u", "-m", head, tree)
    local = root / ".dvc/config.local"
    if local.exists():
        shutil.copy(local, folder / ".dvc/config.local")
    _dvc(folder, "cache", "dir", "--local", str(cache_folder(root)))
    if kept.exists():
        kept.replace(folder / WORK)
    _link_finished(root / WORK, folder / WORK)
    _link_ignored(root, folder)


def _link_finished(source: Path, target: Path) -> None:
    """Finished units of every stage's newest fingerprint, by hard links; and one set of device leases for all."""
    target.mkdir(exist_ok=True)
    for title in titles(source):
        here = newest(source, title)
        assert here is not None
        there = target / title / here.name
        if there.exists():
            continue
        there.mkdir(parents=True)
        shutil.copy2(here / PLAN, there / PLAN)
        for marker in here.glob(f"*/{MARKER}"):
            shutil.copytree(marker.parent, there / marker.parent.name, copy_function=os.link)
    (source / "devices").mkdir(exist_ok=True)
    if not (target / "devices").is_symlink():
        (target / "devices").symlink_to(source.resolve() / "devices")


def _link_ignored(root: Path, folder: Path) -> None:
    """What parameters name outside git, at the place that they name as seen from the clone."""
    if (root / "pretrained").exists():
        (folder / "pretrained").symlink_to(root / "pretrained")
    for value in _strings(read_yaml(root / "params.yaml")):
        if value.startswith("../") and (name := Path(value).parts[1]) != "..":
            link = folder.parent / name
            if not link.is_symlink() and (root.parent / name).exists():
                link.symlink_to(root.parent / name)


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for inner in node.values() if isinstance(node, dict) else node:
            yield from _strings(inner)


def _skills(folder: Path, trial: Trial) -> dict[str, float]:
    """Of the evaluations that the trial wanted."""
    wanted = [target.partition("@")[2] for target in trial.targets if target.startswith("evaluate@")]
    files = sorted((folder / "artifacts/evaluate").glob("*/metrics.json"))
    found = {file.parent.name: json.loads(file.read_text()).get("skill") for file in files}
    return {name: skill for name, skill in found.items() if skill is not None and (not wanted or name in wanted)}


@contextmanager
def _index_beside(folder: Path) -> Iterator[Path]:
    """A git index of our own, so that what the user has staged stays as it is."""
    index = folder.with_name(f".{folder.name}.index")
    try:
        yield index
    finally:
        index.unlink(missing_ok=True)


def _git(folder: Path, *arguments: str, index: Path | None = None) -> str:
    environment = {**os.environ, **({"GIT_INDEX_FILE": str(index)} if index else {})}
    return _told(["git", "-C", str(folder), *arguments], folder, environment)


def _dvc(folder: Path, *arguments: str) -> str:
    return _told([sys.executable, "-m", "dvc", *arguments], folder, dict(os.environ))


def _told(command: Sequence[str], folder: Path, environment: dict[str, str]) -> str:
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise WorkspaceError(f"{command[0]} is not installed", remedy=f"install {command[0]}") from error
    if done.returncode:
        raise WorkspaceError(
            f"`{' '.join(map(str, command))}` failed: {done.stderr.strip() or done.stdout.strip()}",
            remedy="experiments need a git repository with at least one commit (`git init`, `git commit`)",
        )
    return done.stdout.strip()
