"""A checkout to break, and what a check of `clevrcast doctor` says of it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

from ruamel.yaml import YAML

from pipeline.health.checks import Check, Finding, findings


def small_checkout(root: Path, folder: Path) -> Path:
    """What a checkout has besides code, in a git repository."""
    (folder / ".dvc/tmp").mkdir(parents=True)
    for name in (".dvc/config", "dvc.lock", "params.yaml", "pyproject.toml", "constraints.txt"):
        shutil.copy(root / name, folder / name)
    run_git(folder, "init", "-q")
    run_git(folder, "add", "-A")
    run_git(folder, "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "-m", "start")
    return folder


def run_git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=folder, check=True)


def only(look: Callable[[Path], Iterable[Finding]], root: Path) -> Finding:
    (finding,) = findings(Check("it", look), root)
    return finding


def off(look: Callable[[Path], Iterable[Finding]], root: Path) -> list[Finding]:
    return [finding for finding in findings(Check("it", look), root) if finding.state != "good"]


def bad(look: Callable[[Path], Iterable[Finding]], root: Path) -> Finding:
    (finding,) = off(look, root)
    assert finding.state == "bad", finding
    return finding


def change(folder: Path, path: str, value: object) -> None:
    yaml, file = YAML(), folder / "params.yaml"
    document = yaml.load(file)
    node, (*parents, last) = document, path.split(".")
    for part in parents:
        node = node.setdefault(part, {})
    node[last] = value
    yaml.dump(document, file)
