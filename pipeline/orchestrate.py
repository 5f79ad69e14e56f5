"""Runs as Prefect flows: one task per stage or experiment, its log and its end in Prefect, what people look for there
as artifacts.

Prefect sees and schedules, DVC decides and caches: task caching is off, and a task is nothing but
`pipeline.running.stage_work` for its stage. The result is the same without Prefect.

As a program (``python -m pipeline.orchestrate``) this is the process of one served flow run: Prefect's engine, which
ends with the worker that started it.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.process import die_with_parent

if __name__ == "__main__":
    die_with_parent()

# Read when prefect is imported. The terminal has the board, Prefect has the logs; nothing is sent to its makers.
os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture, wait
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from pipeline import sweep as sweeps
from pipeline.board import Board
from pipeline.dag import Foreseen
from pipeline.errors import PipelineError
from pipeline.notify import told_if_it_fails
from pipeline.reproduce import Outcome
from pipeline.running import Work, carry_out, only_run, prepared

FLOW = "clevrcast"
EXPERIMENTS = "clevrcast-experiments"
LAST_LINES = 40
"""Of an error, in the message of a failed run."""

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
    wait(list(futures.values()))
    for stage in stages:
        if stage.title not in board.outcomes:
            board.end(Outcome(stage.title, "skipped"))
    publish(board)


def in_prefect(stages: Sequence[Foreseen], work: Work, board: Board) -> None:
    """`pipeline.running.in_threads`, as a run of the flow `FLOW`; the board says how it ended."""

    def run() -> State[Any]:
        through_tasks(stages, work, board)
        bad = [title for title, outcome in board.outcomes.items() if not outcome.good]
        return Failed(message=f"not brought up to date: {', '.join(bad)}") if bad else Completed(message="up to date")

    runner = ThreadPoolTaskRunner(max_workers=max(1, len(stages)))
    _flow(name=FLOW, task_runner=runner, persist_result=False)(run)(return_state=True)


@_flow(name=FLOW, persist_result=False)
def rebuild(targets: list[str] | None = None, jobs: int | None = None, reason: str = "on demand") -> State[Any]:
    """Bring the workspace up to date, or what ``targets`` need, with ``jobs`` stages at once."""
    logger, stop = get_run_logger(), threading.Event()
    logger.info("asked for: %s", reason)
    try:
        with only_run(wait=True, stopped=stop.is_set), told_if_it_fails("rebuild"):
            board = prepared(Path.cwd(), targets or ())
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
    stop = threading.Event()

    def run_one(trial: sweeps.Trial) -> sweeps.Result:
        say = get_run_logger().info
        (result,) = sweeps.side_by_side(Path.cwd(), [trial], jobs=1, stopped=stop.is_set, said=say)
        if result.error:
            get_run_logger().error(str(result.error))
        return result

    try:
        wanted = sweeps.trials(Path.cwd(), name, set or {}, over, targets or ())
        places = threading.BoundedSemaphore(max(1, jobs))

        def in_its_turn(trial: sweeps.Trial) -> sweeps.Result:
            with places:
                return run_one(trial)

        trial_task = _task(in_its_turn)
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
    """The stage table, the graph and what the run did to the metrics, as artifacts of the run."""
    rows = [
        {"stage": stage.title, "was": stage.state, "became": outcome.what, "seconds": round(outcome.seconds, 1)}
        for stage in board.stages
        if (outcome := board.outcomes.get(stage.title)) is not None
    ]
    create_table_artifact(rows, key="stages", description="What became of every stage.")
    create_markdown_artifact(
        f"```mermaid\n{mermaid(board)}\n```", key="graph", description="The stages and their order."
    )
    create_markdown_artifact(
        metrics_difference(), key="metrics", description="`dvc metrics diff` against the last commit."
    )


def mermaid(board: Board) -> str:
    """The graph of the run's stages, each with how it ended."""
    names = {stage.title: f"s{number}" for number, stage in enumerate(board.stages)}
    lines = ["flowchart TD"]
    for stage in board.stages:
        outcome = board.outcomes.get(stage.title)
        lines.append(f'  {names[stage.title]}["{stage.title}: {outcome.what if outcome else "waiting"}"]')
        lines += [f"  {names[title]} --> {names[stage.title]}" for title in stage.upstream if title in names]
    return "\n".join(lines)


def metrics_difference() -> str:
    """Markdown of `dvc metrics diff`, or why there is none."""
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "metrics", "diff", "--md"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or done.stderr.strip() or "No metric has changed."


if __name__ == "__main__":
    runpy.run_module("prefect.engine", run_name="__main__")
