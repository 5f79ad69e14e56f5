"""The command line. Stages themselves run through ``dvc repro``; these commands look at them and look after them."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline import profiles, upkeep
from pipeline.adoption import SAMPLE
from pipeline.code_deps import stale_deps, write_deps
from pipeline.errors import PipelineError, StoppedError, WorkspaceError, explained
from pipeline.executors import PART, part_of
from pipeline.params import reference
from pipeline.stage import WORK, read_runs

COLUMNS = (
    ("skill", "skill", 3),
    ("skill_1", "at 1", 3),
    ("skill_6", "at 6", 3),
    ("skill_12", "at 12", 3),
    ("psnr", "PSNR dB", 2),
    ("ssim", "SSIM", 4),
    ("fg_psnr", "objects dB", 2),
)
MEASURED = (
    ("lpips", "LPIPS", 4),
    ("box_iou", "box IoU", 3),
    ("collision_ap", "collision AP", 3),
    ("collision_base_rate", "by chance", 3),
    ("parameters", "parameters", 0),
    ("frames_per_second", "frames/s", 0),
)
"""Columns of what some runs have only; the speed is that of this machine's own runs."""


PROGRAMS = {
    "doctor": "whether this machine and this workspace can do the work, and what to do where they cannot",
    "verify": "compare every stored byte with its digest; --repair rebuilds what is damaged",
    "teachers": "accuracy and speed of every flow teacher at hand against truth",
    "predict": "what happens next in a video of your own, by a trained predictor",
    "animate": "a still image set in motion, by a video's or a drawn motion",
    "transfer": "the motion of one video given to the first frame of another",
    "restyle": "another appearance under the same motion",
    "probe": "how much of motion appearance latents give away, and the other way round",
}
"""Commands that know data and models, which this layer does not: programs of `stages` of the same name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (0 good, 1 something is off, 2 and above: see `pipeline.errors`)."""
    arguments, rest = parser().parse_known_args(argv)
    arguments.rest = rest
    if rest and arguments.run is not _program:
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return arguments.run(arguments)
    except (PipelineError, OSError) as error:
        told = explained(error, Path.cwd(), "working there") if isinstance(error, OSError) else error
        if told is None:
            raise
        print(f"{'' if isinstance(told, StoppedError) else 'error: '}{told}", file=sys.stderr)
        return told.exit_code


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="clevrcast", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    profile = commands.add_parser("profile", help="merge profiles/NAME.yaml into params.yaml (no NAME: list them)")
    profile.add_argument("name", nargs="?")
    profile.set_defaults(run=_profile)
    plan = commands.add_parser("plan", help="what `dvc repro` would do to every stage, why, and how long it may take")
    plan.add_argument("--json", action="store_true", help="for programs")
    plan.set_defaults(run=_plan)
    run = commands.add_parser("run", help="what `dvc repro` does, independent stages side by side")
    run.add_argument("targets", nargs="*", metavar="STAGE", help="bring up to date what these need only")
    run.add_argument("--jobs", type=int, help="stages at once (default: one per GPU, else one per two cores)")
    run.add_argument("--prefect", action="store_true", help="as a Prefect flow; so it is where PREFECT_API_URL is set")
    run.set_defaults(run=_run)
    experiment = commands.add_parser("experiment", help="the workspace with other parameters, beside it, as a dvc exp")
    experiment.add_argument("name")
    experiment.add_argument("targets", nargs="*", metavar="STAGE", help="only what these need")
    for option, text in (
        ("--set", "for every experiment"),
        ("--over", "a list, an experiment for each of its values"),
    ):
        experiment.add_argument(option, action="append", default=[], metavar="KEY=VALUE", help=f"{text}; YAML")
    experiment.add_argument("--jobs", type=int, default=1, help="experiments at once (default 1)")
    experiment.set_defaults(run=_experiment)
    serve = commands.add_parser("serve", help="rebuild on a schedule, after edits and on demand, by Prefect")
    serve.add_argument("--name", help="of the deployments (default: the folder's)")
    serve.add_argument("--host", default="127.0.0.1", help="address of a server that is started (default: loopback)")
    serve.add_argument("--port", type=int, default=4200)
    serve.add_argument("--cron", help="rebuild on this schedule, as in '0 3 * * *'")
    serve.add_argument("--every", type=float, metavar="SECONDS", help="rebuild that often")
    serve.add_argument("--settle", type=float, default=2.0, metavar="SECONDS", help="quiet after an edit (default 2)")
    serve.add_argument("--pool", choices=("process", "docker", "kubernetes"), default="process", help="what runs are")
    serve.set_defaults(run=_serve)
    results = commands.add_parser("results", help="print the table of the last report and where the page is")
    results.set_defaults(run=_results)
    params = commands.add_parser("params", help="list every key of params.yaml with its type, default and meaning")
    params.set_defaults(run=_params)
    inspect = commands.add_parser("inspect", help="what a stage has done so far, also while it runs (no STAGE: all)")
    inspect.add_argument("stage", nargs="?", help="for example flow or encode@frame")
    inspect.add_argument("--json", action="store_true", help="for programs")
    inspect.add_argument("--video", metavar="ID", help="show what the stage made of this video, as a clip")
    inspect.add_argument("--frame", metavar="N", help="of that one moment, as a picture")
    inspect.add_argument("--out", metavar="FILE", help="of the clip or picture")
    inspect.set_defaults(run=_inspect)
    retry = commands.add_parser("retry-failed", help="try the quarantined items of a stage again, and only these")
    retry.add_argument("stage")
    retry.set_defaults(run=_retry)
    adopt = commands.add_parser("adopt", help="after an edit that changes no result: prove it, keep finished work")
    adopt.add_argument("stage")
    adopt.add_argument("--sample", type=int, default=2, help="units to build again and compare (default 2)")
    adopt.set_defaults(run=_adopt)
    part = commands.add_parser("part", help="build the I-th of N parts of a stage, as one task of a job array does")
    part.add_argument("stage")
    part.add_argument("part", metavar="I/N")
    part.set_defaults(run=_part)
    clean = commands.add_parser("clean", help="remove unfinished and outdated work from .work")
    clean.add_argument("--all", action="store_true", help="also what the present artifacts were built from")
    clean.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    clean.set_defaults(run=_clean)
    for name, text in PROGRAMS.items():
        program = commands.add_parser(name, help=text, add_help=False)
        program.set_defaults(run=_program, program=name)
    deps = commands.add_parser("deps", help="compare the code files in dvc.yaml with what the stages import")
    deps.add_argument("--write", action="store_true", help="bring dvc.yaml up to date")
    deps.set_defaults(run=_deps)
    return top


def _root() -> Path:
    root = Path.cwd()
    if not (root / "dvc.yaml").exists():
        raise WorkspaceError(f"no dvc.yaml in {root}", remedy="run at the top of a clevrcast checkout")
    return root


def _console() -> Console:
    console = Console()
    console.width = max(console.width, 100)  # a log has no width: names and figures are not cut
    return console


def _profile(arguments: argparse.Namespace) -> int:
    if arguments.name is None:
        for name in profiles.available(_root()):
            print(name)
        return 0
    changes = profiles.apply(_root(), arguments.name)
    print("\n".join(changes) if changes else "params.yaml already says so")
    print("now run `dvc repro`; `git checkout params.yaml` is the way back")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from pipeline import plan  # DVC takes half a second to load

    rows = plan.rows(_root())
    if arguments.json:
        print(plan.as_json(rows))
    else:
        _console().print(plan.as_table(rows))
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from pipeline import running

    root = _root()
    if arguments.jobs is not None and arguments.jobs < 1:
        raise WorkspaceError(f"--jobs is {arguments.jobs}", remedy="use a number from 1 on")
    prefect = arguments.prefect or bool(os.environ.get("PREFECT_API_URL"))
    running.run(root, targets=arguments.targets, jobs=arguments.jobs, prefect=prefect, console=_console())
    return 0


def _experiment(arguments: argparse.Namespace) -> int:
    from pipeline import running, sweep

    root = _root()
    changes, over = (dict(map(sweep.assignment, given)) for given in (arguments.set, arguments.over))
    wanted = sweep.trials(root, arguments.name, changes, over, arguments.targets)
    with running.asked_to_stop() as stop:
        results = sweep.side_by_side(root, wanted, jobs=arguments.jobs, stopped=stop.is_set, said=print)
    _console().print(sweep.as_table(results))
    print("`dvc exp show` has every metric, `dvc exp apply NAME` takes an experiment over")
    sweep.check(results)
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    from pipeline.serve import Served, serve

    root = _root()
    served = Served(
        root=root.resolve(),
        name=arguments.name or root.resolve().name,
        host=arguments.host,
        port=arguments.port,
        pool=arguments.pool,
        cron=arguments.cron,
        every_seconds=arguments.every,
        settle_seconds=arguments.settle,
    )
    serve(served, lambda line: print(time.strftime("%H:%M:%S"), line, flush=True))
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
    runs = read_runs()
    rows = {
        name: row | {"frames_per_second": runs.get(f"evaluate@{name}", {}).get("frames_per_second")}
        for name, row in figures.items()
        if "skill" in row
    }
    table = Table(title="skill = 1 - MSE / MSE(copy_last), over the horizon and at single steps")
    table.add_column("predictor", no_wrap=True)
    columns = [*COLUMNS, *(c for c in MEASURED if any(row.get(c[0]) is not None for row in rows.values()))]
    for title in (column[1] for column in columns):
        table.add_column(title, justify="right", no_wrap=True)
    for name, row in rows.items():
        cells = ["-" if row.get(key) is None else f"{row[key]:,.{digits}f}" for key, _, digits in columns]
        table.add_row(name, *cells)
    console = _console()
    console.width = max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table)
    teacher = figures.get("teacher")
    if teacher:
        console.print("teacher against truth: " + ", ".join(f"{k} {v:.3f}" for k, v in teacher.items()))
    console.print(f"report: {(_root() / 'artifacts/report/index.html').as_uri()}", soft_wrap=True)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    _root()
    shown = {name: value for name in ("video", "frame", "out") if (value := getattr(arguments, name)) is not None}
    if shown:
        stage = [] if arguments.stage is None else [arguments.stage]
        return _call("stages.look", *stage, *(f"--{name}={value}" for name, value in shown.items()))
    from pipeline import inspection  # zarr takes a second to load

    if arguments.stage is None:
        _console().print(inspection.as_overview(WORK))
        return 0
    stage = inspection.view(WORK, arguments.stage)
    if arguments.json:
        print(inspection.as_json(stage))
    else:
        _console().print(inspection.as_table(stage))
    return 0


def _retry(arguments: argparse.Namespace) -> int:
    _root()
    items = upkeep.ask_again(WORK, arguments.stage)
    if not items:
        print(f"{arguments.stage} has nothing in quarantine")
        return 0
    for item in items:
        print(f"{item.id}: {item.reason}")
    print(f"trying {len(items)} items again")
    return _call("dvc", "--wait-for-lock", "repro", "--single-item", "--force", arguments.stage)


def _adopt(arguments: argparse.Namespace) -> int:
    _root()
    return _stage(arguments.stage, {SAMPLE: str(max(1, arguments.sample))})


def _part(arguments: argparse.Namespace) -> int:
    _root()
    part_of([], arguments.part)
    return _stage(arguments.stage, {PART: arguments.part})


def _clean(arguments: argparse.Namespace) -> int:
    _root()
    removed = upkeep.clean(WORK, everything=arguments.all, dry_run=arguments.dry_run)
    for item in removed:
        print(f"{item.folder} ({item.why}): {item.bytes / 1e6:.1f} MB")
    verb = "would free" if arguments.dry_run else "freed"
    print(f"{len(removed)} folders, {verb} {sum(item.bytes for item in removed) / 1e6:.1f} MB at once; what DVC's")
    print("cache also holds is freed by `dvc gc -w`")
    return 0


def _program(arguments: argparse.Namespace) -> int:
    if arguments.program != "doctor":  # which says so itself, among the rest
        _root()
    return _call(f"stages.{arguments.program}", *arguments.rest)


def _stage(title: str, environment: dict[str, str]) -> int:
    name, _, key = title.partition("@")
    return _call(f"stages.{name}", *([key] if key else []), environment=environment)


def _call(module: str, *arguments: str, environment: dict[str, str] | None = None) -> int:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env={**os.environ, **(environment or {})}, check=False).returncode


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
