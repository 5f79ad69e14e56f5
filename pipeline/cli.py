"""The command line: ``clevrcast profile | params | results | deps``. Stages themselves run through ``dvc repro``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline import profiles
from pipeline.dag import stale_deps, write_deps
from pipeline.errors import PipelineError, WorkspaceError
from pipeline.params import reference

COLUMNS = (
    ("skill", "skill", 3),
    ("skill_1", "at 1", 3),
    ("skill_6", "at 6", 3),
    ("skill_12", "at 12", 3),
    ("psnr", "PSNR dB", 2),
    ("ssim", "SSIM", 4),
    ("fg_psnr", "objects dB", 2),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (0 good, 1 something is off, 2 and above: see `pipeline.errors`)."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="clevrcast", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    profile = commands.add_parser("profile", help="merge profiles/NAME.yaml into params.yaml (no NAME: list them)")
    profile.add_argument("name", nargs="?")
    profile.set_defaults(run=_profile)
    results = commands.add_parser("results", help="print the table of the last report and where the page is")
    results.set_defaults(run=_results)
    params = commands.add_parser("params", help="list every key of params.yaml with its type, default and meaning")
    params.set_defaults(run=_params)
    deps = commands.add_parser("deps", help="compare the code files in dvc.yaml with what the stages import")
    deps.add_argument("--write", action="store_true", help="bring dvc.yaml up to date")
    deps.set_defaults(run=_deps)
    return top


def _root() -> Path:
    root = Path.cwd()
    if not (root / "dvc.yaml").exists():
        raise WorkspaceError(f"no dvc.yaml in {root}", remedy="run at the top of a clevrcast checkout")
    return root


def _profile(arguments: argparse.Namespace) -> int:
    if arguments.name is None:
        for name in profiles.available(_root()):
            print(name)
        return 0
    changes = profiles.apply(_root(), arguments.name)
    print("\n".join(changes) if changes else "params.yaml already says so")
    print("now run `dvc repro`; `git checkout params.yaml` is the way back")
    return 0


def _params(_: argparse.Namespace) -> int:
    for key, kind, default, meaning in reference():
        print(f"{key}\n    {kind}; {default}\n    {meaning}")
    return 0


def _results(_: argparse.Namespace) -> int:
    file = _root() / "artifacts/report/metrics.json"
    if not file.exists():
        raise WorkspaceError(f"there is no {file}", remedy="run `dvc repro` first")
    figures = json.loads(file.read_text())
    table = Table(title="skill = 1 - MSE / MSE(copy_last), over the horizon and at single steps")
    table.add_column("predictor", no_wrap=True)
    for title in (column[1] for column in COLUMNS):
        table.add_column(title, justify="right", no_wrap=True)
    for name, row in figures.items():
        if "skill" in row:
            cells = [f"{row[key]:.{digits}f}" if key in row else "-" for key, _, digits in COLUMNS]
            table.add_row(name, *cells)
    console = Console()
    console.width = max(console.width, 100)  # a log has no width: names and figures are not cut
    console.print(table)
    teacher = figures.get("teacher")
    if teacher:
        console.print("teacher against truth: " + ", ".join(f"{k} {v:.3f}" for k, v in teacher.items()))
    console.print(f"report: {(_root() / 'artifacts/report/index.html').as_uri()}", soft_wrap=True)
    return 0


def _deps(arguments: argparse.Namespace) -> int:
    root = _root()
    if arguments.write:
        changed = write_deps(root)
        print(f"dvc.yaml: {', '.join(changed)} brought up to date" if changed else "dvc.yaml is up to date")
        return 0
    stale = stale_deps(root)
    for stage, (missing, surplus) in stale.items():
        print(f"{stage}: lacks {missing}, lists in vain {surplus}")
    if stale:
        print("what to do: run `clevrcast deps --write`")
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
