"""`clevrcast serve`: a Prefect server (joined or started), a worker, and the workspace's deployments.

Two deployments stand for the workspace: the flow ``clevrcast`` brings it up to date (on a schedule, when parameters,
the graph or code are edited, when an event asks for it, or on demand), the flow ``clevrcast-experiments`` runs it with
other parameters beside it. Runs of the first wait for one another in a queue of their own.

This process looks after the server and the worker, restarts either when it dies, and takes both along when it ends; a
flow run ends with the worker that started it. So a run that is called running when nothing serves is a dead one, and is
settled at the next start (`settle`).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

from pipeline.children import API, Child, server_at, wait_for
from pipeline.errors import PipelineError
from pipeline.events import Events
from pipeline.journal import lease
from pipeline.process import LOGS, Said
from pipeline.running import asked_to_stop, prepared
from pipeline.stage import WORK
from pipeline.watch import State, Watcher, look

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

SERVE_LOCK = WORK / "serve.lock"
REBUILD_QUEUE = "rebuild"
EVENT = "clevrcast.rebuild"
"""An event of this name about the resource ``clevrcast.workspace.NAME`` asks for a rebuild."""
POOLS = Path(__file__).with_name("pools")
LOOK_SECONDS = 1.0

Pool = Literal["process", "docker", "kubernetes"]


@dataclass(frozen=True)
class Served:
    """What is served, and how."""

    root: Path
    name: str
    host: str = "127.0.0.1"
    port: int = 4200
    pool: Pool = "process"
    cron: str | None = None
    every_seconds: float | None = None
    settle_seconds: float = 2.0
    """For how long files have to be left alone before an edit counts as finished."""

    @property
    def pool_name(self) -> str:
        """Of this workspace alone: two on one server do not get each other's runs."""
        return f"clevrcast-{self.name}-{hashlib.sha256(f'{platform.node()}{self.root}'.encode()).hexdigest()[:6]}"

    @property
    def resource(self) -> str:
        return f"clevrcast.workspace.{self.name}"


def serve(served: Served, say: Said) -> None:
    """Serve until Ctrl-C or SIGTERM; what is running then is stopped and goes on at the next start.

    Raises:
        BusyError: the workspace is served already.
        WorkspaceError: no server answers or can be started, or there is no worker of the pool's type.
    """
    events = Events()
    with (
        lease(SERVE_LOCK, "serving this workspace"),
        asked_to_stop() as stop,
        server_at(served.host, served.port, say, stop.is_set) as server,
    ):
        if stop.is_set():
            return
        events.tell("serve started", url=os.environ[API], pool=served.pool_name)
        deployments = asyncio.run(_register(served))
        _settle(served, deployments)
        worker = Child(_worker_command(served), LOGS / "worker.log", "the worker")
        watcher = Watcher(served.root, settle=served.settle_seconds)
        listing = Listing(deployments, say)
        wanted: State | None = None
        # Prefect looks every ten seconds for what there is to run.
        os.environ.setdefault("PREFECT_WORKER_QUERY_SECONDS", str(LOOK_SECONDS))
        try:
            worker.start()
            _catch_up(served, deployments[0], say)
            say(f"serving {served.root} as {served.name}: {os.environ[API].removesuffix('/api')}")
            while not stop.wait(LOOK_SECONDS):
                if server is not None and server.revive(say):
                    events.tell("server restarted")
                    wait_for(os.environ[API], server, stop.is_set)
                if worker.revive(say):
                    events.tell("worker restarted")
                    _reached(lambda: _settle(served, deployments), say)
                if edited := watcher.edited():
                    events.tell("edited", files=edited)
                    say(f"edited: {', '.join(edited[:5])}{' and more' if len(edited) > 5 else ''}")
                    wanted = watcher.told
                if wanted and _reached(lambda state=wanted: asyncio.run(ask(deployments[0], state, "edited")), say):
                    wanted = None
                _reached(listing.look, say)
                if listing.crashed:  # gone on with once for each state: what dies twice is for people
                    here = look(served.root)
                    asked = _reached(lambda state=here: asyncio.run(ask(deployments[0], state, "crashed")), say)
                    listing.crashed = not asked
        finally:
            worker.end()
            with suppress(Exception):  # the server may be gone; the next start settles
                _settle(served, deployments)
            events.tell("serve ended")
    say("no longer served; what was running goes on at the next start")


def _catch_up(served: Served, deployment: UUID, say: Said) -> None:
    """Ask for a rebuild where something is not up to date: edited while nobody served, or stopped in the middle."""
    try:
        stages = prepared(served.root).stages
    except PipelineError as error:
        say(f"not up to date, and not to be built: {error}")
        return
    if stages:
        say(f"not up to date: {', '.join(stage.title for stage in stages)}")
        asyncio.run(ask(deployment, look(served.root), "start", again=True))


def _worker_command(served: Served) -> list[str]:
    options = ["--pool", served.pool_name, "--type", served.pool, "--install-policy", "never"]
    return [sys.executable, "-m", "prefect", "worker", "start", *options]


async def _register(served: Served) -> list[UUID]:
    """Bring pool, queue and deployments up to date on the server; returns the ids of the deployments."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
    from prefect.deployments.runner import RunnerDeployment
    from prefect.events import DeploymentEventTrigger
    from prefect.exceptions import ObjectAlreadyExists

    from pipeline.orchestrate import EXPERIMENTS, FLOW

    async with get_client() as client:
        template = json.loads((POOLS / f"{served.pool}.json").read_text())
        about = f"{served.root} on {platform.node()}"
        pool = WorkPoolCreate(name=served.pool_name, description=about, type=served.pool, base_job_template=template)
        await client.create_work_pool(pool, overwrite=True)
        with suppress(ObjectAlreadyExists):
            await client.create_work_queue(
                REBUILD_QUEUE, concurrency_limit=1, priority=1, work_pool_name=served.pool_name
            )
    environment = {name: value for name, value in os.environ.items() if name.startswith("CLEVRCAST_")}
    variables = {"workspace": str(served.root), "env": environment}
    if served.pool == "process":
        variables["command"] = shlex.join([sys.executable, "-m", "pipeline.orchestrate"])
    schedules: list[Any] = [CronSchedule(cron=served.cron)] if served.cron else []
    schedules += [IntervalSchedule(interval=timedelta(seconds=served.every_seconds))] if served.every_seconds else []
    trigger = DeploymentEventTrigger(
        expect={EVENT}, match={"prefect.resource.id": served.resource}, parameters={"reason": "{{ event.event }}"}
    )
    common: dict[str, Any] = {"name": served.name, "work_pool_name": served.pool_name, "job_variables": variables}
    module = "pipeline.orchestrate"
    rebuild = RunnerDeployment(
        flow_name=FLOW,
        entrypoint=f"{module}.rebuild",
        description=f"Brings {about} up to date.",
        schedules=schedules,
        triggers=[trigger],
        work_queue_name=REBUILD_QUEUE,
        **common,
    )
    experiments = RunnerDeployment(
        flow_name=EXPERIMENTS,
        entrypoint=f"{module}.experiments",
        description=f"{about} with other parameters, beside it: parameters `name`, `set`, `over`.",
        **common,
    )
    return [await deployment.aapply() for deployment in (rebuild, experiments)]


def _settle(served: Served, deployments: Sequence[UUID]) -> None:
    """`settle`, where runs are processes of this machine; those of containers outlive a worker."""
    if served.pool == "process":
        asyncio.run(settle(deployments))


async def settle(deployments: Sequence[UUID]) -> None:
    """To be called when no flow run of ours can be alive: those that are called so have crashed, or were cancelled;
    of scheduled runs that were missed, the newest stands for all."""
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelled, Crashed

    async with get_client() as client:
        for deployment in deployments:
            for run in await _runs(client, deployment, ["RUNNING", "PENDING", "CANCELLING"]):
                cancelled = run.state is not None and run.state.is_cancelling()
                state = Cancelled() if cancelled else Crashed(message="its process ended with what served it")
                await client.set_flow_run_state(run.id, state, force=True)
            late = [run for run in await _runs(client, deployment, ["SCHEDULED"], due=True) if run.auto_scheduled]
            for run in sorted(late, key=lambda run: run.expected_start_time or _now())[:-1]:
                state = Cancelled(message="missed while nothing served; a later one stands for it")
                await client.set_flow_run_state(run.id, state, force=True)


async def ask(deployment: UUID, state: State, reason: str, *, again: bool = False) -> None:
    """Ask for a rebuild of the workspace as it is, once for each reason and state; ``again``: also where that was asked
    for before. Where one is waiting already, that one will do: it reads the workspace when it starts."""
    from prefect.client.orchestration import get_client

    async with get_client() as client:
        if await _runs(client, deployment, ["SCHEDULED"], due=True):
            return
        name = f"{reason}-{state.key}"
        key = f"{name}-{time.time_ns()}" if again else name
        await client.create_flow_run_from_deployment(
            deployment, parameters={"reason": reason}, idempotency_key=key, name=name[: len(reason) + 9]
        )


async def _runs(client: Any, deployment: UUID, states: Sequence[str], *, due: bool = False) -> list[FlowRun]:
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterId,
        FlowRunFilter,
        FlowRunFilterExpectedStartTime,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )

    kinds: Any = list(states)
    wanted = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=kinds)),
        expected_start_time=FlowRunFilterExpectedStartTime(before_=_now()) if due else None,
    )
    of = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
    return await client.read_flow_runs(flow_run_filter=wanted, deployment_filter=of)


def _now() -> Any:  # Prefect annotates its own kind of datetime
    return datetime.now(UTC)


class Listing:
    """Says in the terminal what becomes of runs; ``crashed``: whether one of the first deployment did."""

    def __init__(self, deployments: Sequence[UUID], say: Said) -> None:
        self.deployments, self.say = deployments, say
        self._since = datetime.now(UTC)
        self.crashed = False
        self._told: dict[str, str] = {}

    def look(self) -> None:
        asyncio.run(self._look())

    async def _look(self) -> None:
        from prefect.client.orchestration import get_client

        states = ["PENDING", "RUNNING", "COMPLETED", "FAILED", "CRASHED", "CANCELLED", "CANCELLING"]
        async with get_client() as client:
            for deployment in self.deployments:
                for run in await _runs(client, deployment, states):
                    if run.state is None or run.state.timestamp < self._since:
                        continue
                    if self._told.get(str(run.id)) != run.state.name:
                        self._told[str(run.id)] = run.state.name or ""
                        message = f": {run.state.message}" if run.state.message and run.state.is_final() else ""
                        self.say(f"{run.name} {str(run.state.name).lower()}{message}")
                        self.crashed |= run.state.is_crashed() and deployment == self.deployments[0]


def _reached(call: Callable[[], object], say: Said) -> bool:
    """Do what needs the server; false where that is on its way down or up, and it has to be done again."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - of httpx, sqlite and anyio alike; the server's end is seen elsewhere
        say(f"the server does not answer ({type(error).__name__}); it is asked again")
        return False
    return True
