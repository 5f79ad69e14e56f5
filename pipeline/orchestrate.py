"""Runs as Prefect flows: one task per stage or experiment, its log and its end in Prefect, what people look for there
as artifacts.

Prefect sees and schedules, DVC decides and caches: task caching is off, and a task is nothing but
`pipeline.running.stage_work` for its stage. The result is the same without Prefect.

As a program (``python -m pipeline.orchestrate``) this is the process of one served flow run: Prefect's engine, which
ends with the worker that started it.
"""

from __future__ import annotations

import base64
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.process import die_with_parent

if __name__ == "__main__":
    die_with_parent("prefect")

# Read when prefect is imported. The terminal has the board, Prefect has the logs; nothing is sent to its makers.
os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")

import httpx
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture, wait
from prefect.settings import get_current_settings
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from pipeline import sweep as sweeps
from pipeline.board import LOOK_SECONDS, Board
from pipeline.dag import Foreseen
from pipeline.drawing import as_svg
from pipeline.errors import PipelineError, WorkspaceError
from pipeline.notify import told_if_it_fails
from pipeline.reproduce import Outcome
from pipeline.running import Work, carry_out, only_run, prepared

FLOW = "clevrcast"
EXPERIMENTS = "clevrcast-experiments"
LAST_LINES = 40
"""Of an error, in the message of a failed run."""

SAMPLE = Path("clips/first.png")
"""Of an evaluation's output: what is shown of it."""
MOST_SAMPLE_BYTES = 2**21

# The decorators' overloads do not cover what they are given here.
_task: Any = task(cache_policy=NO_CACHE, persist_result=False)
_flow: Any = flow


def through_tasks(stages: Sequence[Foreseen], work: Work, board: Board) -> None:
    """`pipeline.running.in_threads` for a flow run: a task for each stage, then the artifacts."""

    def run_stage(stage: Foreseen) -> State[Any]:
        outcome = work(stage, get_run_logger().info)
        told = f"{outcome.what}, {outcome.seconds:.1f} s"
        return Completed(message=told) if outcome.good else Failed(message=f"{told}: see the end of this log")

    stage_task = _task(run_stage)
    futures: dict[str, PrefectFuture[Any]] = {}
    for stage in stages:
        earlier = [futures[title] for title in stage.upstream if title in futures]
        futures[stage.title] = stage_task.with_options(task_run_name=stage.title).submit(stage, wait_for=earlier)
    for future in futures.values():
        ended = threading.Event()
        future.add_done_callback(lambda _, ended=ended: ended.set())
        while not ended.wait(LOOK_SECONDS):
            pass  # as `pipeline.running.in_threads` does, for the sake of signals
    wait(list(futures.values()))
    for stage in stages:
        if stage.title not in board.outcomes:
            board.end(Outcome(stage.title, "skipped"))
    publish(board)


def in_prefect(stages: Sequence[Foreseen], work: Work, board: Board) -> None:
    """`pipeline.running.in_threads`, as a run of the flow `FLOW`; the board says how it ended."""
    ours = signal.getsignal(signal.SIGTERM)

    def run() -> State[Any]:
        # Prefect has put its own in place, which would leave the flow and let the stages go on.
        prefects = signal.signal(signal.SIGTERM, ours)
        try:
            through_tasks(stages, work, board)
        finally:
            signal.signal(signal.SIGTERM, prefects)
        bad = [title for title, outcome in board.outcomes.items() if not outcome.good]
        return Failed(message=f"not brought up to date: {', '.join(bad)}") if bad else Completed(message="up to date")

    runner = ThreadPoolTaskRunner(max_workers=max(1, len(stages)))
    name = f"run-{board.events.run}"
    try:
        _flow(name=FLOW, flow_run_name=name, task_runner=runner, persist_result=False)(run)(return_state=True)
    except httpx.TransportError as error:
        raise WorkspaceError(
            f"Prefect's server at {get_current_settings().api.url} is gone ({type(error).__name__}: {error})",
            remedy="run the same command again, or without Prefect: finished stages and units are kept",
        ) from error


@_flow(name=FLOW, persist_result=False)
def rebuild(targets: list[str] | None = None, jobs: int | None = None, reason: str = "on demand") -> State[Any]:
    """Bring the workspace up to date, or what ``targets`` need, with ``jobs`` stages at once."""
    logger, stop = get_run_logger(), threading.Event()
    logger.info("asked for: %s", reason)
    try:
        with only_run(wait=True, stopped=stop.is_set), told_if_it_fails("rebuild"):
            board = prepared(Path.cwd(), targets or (), logger.warning)
            if not board.stages:
                return Completed(message="everything was up to date")
            logger.info("to do: %s", ", ".join(stage.title for stage in board.stages))
            carry_out(board, through_tasks, jobs=jobs, stopped=stop.is_set)
    except PipelineError as error:
        return _failed(error)
    finally:
        stop.set()  # a cancelled run raises in this thread; its tasks, in others, look here
    return Completed(message=f"{len(board.stages)} stages brought up to date")


@_flow(name=EXPERIMENTS, persist_result=False)
def experiments(
    name: str,
    set: dict[str, Any] | None = None,
    over: dict[str, list[Any]] | None = None,
    targets: list[str] | None = None,
    jobs: int = 1,
) -> State[Any]:
    """The workspace with other parameters, beside it: one `dvc exp`, or one for every combination of ``over``."""
    stop, places = threading.Event(), threading.BoundedSemaphore(max(1, jobs))

    def run_one(trial: sweeps.Trial) -> sweeps.Result:
        logger = get_run_logger()
        with places:
            result = sweeps.attempt(Path.cwd(), trial, stopped=stop.is_set, said=logger.info)
        if result.error:
            logger.error(str(result.error))
        return result

    try:
        wanted = sweeps.trials(Path.cwd(), name, set or {}, over, targets or ())
        trial_task = _task(run_one)
        futures = [trial_task.with_options(task_run_name=trial.name).submit(trial) for trial in wanted]
        results = [future.result() for future in futures]
        create_table_artifact(sweeps.rows(results), key="experiments", description="Skill by experiment.")
        with told_if_it_fails(f"experiments {name}"):
            sweeps.check(results)
    except PipelineError as error:
        return _failed(error)
    finally:
        stop.set()
    return Completed(message=f"{len(wanted)} experiments kept: `dvc exp show`")


def _failed(error: PipelineError) -> State[Any]:
    get_run_logger().error(str(error))
    return Failed(message="\n".join(str(error).splitlines()[:LAST_LINES]))


def publish(board: Board) -> None:
    """The stage table, the graph, what the run did to the metrics, and samples, as artifacts of the run."""
    became = {stage.title: "unchanged" for stage in board.graph if stage.state == "kept"}
    became |= {title: outcome.what for title, outcome in board.outcomes.items()}
    create_table_artifact(
        [
            {
                "stage": stage.title,
                "became": became.get(stage.title, "not wanted"),
                "seconds": round(board.outcomes[stage.title].seconds, 1) if stage.title in board.outcomes else "",
                "why": "; ".join(f"{reason.kind}: {reason.what}" for reason in stage.reasons[:3]),
            }
            for stage in board.graph
        ],
        key="stages",
        description="What became of every stage.",
    )
    drawn = base64.b64encode(as_svg(board.graph, became).encode()).decode()
    create_markdown_artifact(
        f"![the graph](data:image/svg+xml;base64,{drawn})", key="graph", description="The stages and their order."
    )
    create_table_artifact(
        metrics_difference(),
        key="metrics",
        description="What has changed of the metrics since the last commit; `dvc metrics diff` has every step.",
    )
    for stage in board.stages:
        name, _, key = stage.title.partition("@")
        picture = Path("artifacts", name, key, SAMPLE)
        if picture.exists() and picture.stat().st_size < MOST_SAMPLE_BYTES and board.outcomes[stage.title].good:
            inline = base64.b64encode(picture.read_bytes()).decode()
            create_markdown_artifact(
                f"![{picture}](data:image/png;base64,{inline})",
                key=f"sample-{key.replace('_', '-').lower()}",
                description=f"{stage.title}: {picture}",
            )


def metrics_difference() -> list[dict[str, Any]]:
    """Of `dvc metrics diff`, what concerns the whole horizon: one row per predictor and metric."""
    command = [sys.executable, "-m", "dvc", "metrics", "diff", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return [{"note": line} for line in done.stderr.strip().splitlines()]
    rows = []
    for file, values in json.loads(done.stdout).items():
        folder = Path(file).parent
        for key, change in values.items() if folder.parent.name == "evaluate" else ():
            metric = key.removeprefix("overall.").removesuffix(".value")
            if key.startswith("overall.") and "." not in metric:
                figures = {name: _short(change.get(name)) for name in ("old", "new", "diff")}
                rows.append({"predictor": folder.name, "metric": metric, **figures})
    rows.sort(key=lambda row: (row["predictor"], row["metric"] != "skill", row["metric"]))
    return rows or [{"note": "no metric has changed"}]


def _short(value: object) -> object:
    return float(f"{value:.4g}") if isinstance(value, float) else value if value is not None else ""


if __name__ == "__main__":
    runpy.run_module("prefect.engine", run_name="__main__")
