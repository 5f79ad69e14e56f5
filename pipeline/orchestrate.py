"""The run as a Prefect flow: one task per stage, its log and its end in Prefect, and what people look for as artifacts.

Prefect sees and schedules, DVC decides and caches: task caching is off, and a task is nothing but
`pipeline.running.stage_work` for its stage. The result is the same without Prefect.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

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

from pipeline.dag import Foreseen
from pipeline.reproduce import Outcome
from pipeline.running import Board, Work

FLOW = "clevrcast"


def in_prefect(stages: Sequence[Foreseen], work: Work, board: Board) -> None:
    """What `pipeline.running.in_threads` does, as a run of the flow `FLOW`."""

    def run_stage(stage: Foreseen) -> State[Any]:
        outcome = work(stage)
        logger = get_run_logger()
        for line in outcome.log.read_text(errors="replace").splitlines() if outcome.log else ():
            logger.info(line.rsplit("\r", 1)[-1])
        told = f"{outcome.what}, {outcome.seconds:.1f} s"
        return Completed(message=told) if outcome.good else Failed(message=f"{told}: see the end of this log")

    # The decorators' overloads do not cover what they take.
    stage_task: Any = task(cache_policy=NO_CACHE, persist_result=False)(run_stage)
    runner: Any = ThreadPoolTaskRunner(max_workers=max(1, len(stages)))

    def rebuild() -> State[Any]:
        futures: dict[str, PrefectFuture[Any]] = {}
        for stage in stages:
            earlier = [futures[title] for title in stage.upstream if title in futures]
            futures[stage.title] = stage_task.with_options(task_run_name=stage.title).submit(stage, wait_for=earlier)
        wait(list(futures.values()))
        for stage in stages:
            board.outcomes.setdefault(stage.title, Outcome(stage.title, "skipped"))
        publish(board)
        bad = [title for title, outcome in board.outcomes.items() if not outcome.good]
        return Failed(message=f"not brought up to date: {', '.join(bad)}") if bad else Completed(message="up to date")

    run_flow: Any = flow(name=FLOW, task_runner=runner, persist_result=False)(rebuild)
    run_flow(return_state=True)  # the board says how it ended


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
