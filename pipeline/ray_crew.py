"""Workers on a Ray cluster: one actor per GPU (or core), each with its model resident, over a shared file system.

The cluster is ``CLEVRCAST_RAY_ADDRESS`` (``auto``, ``host:port``), or one that is started on this machine for the run.
Every node has to see the workspace at the same path. Actors build whatever unit nobody holds; one that dies with its
node is started again elsewhere, and the kernel has given its lease back. The process that runs the stage only looks
on, so that a head node without a GPU can drive a cluster; when it ends, Ray ends its actors.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.devices import DEVICE
from pipeline.errors import WorkspaceError
from pipeline.shards import Crew, NoCrew

if TYPE_CHECKING:
    from pipeline.executors import Call

ADDRESS = "CLEVRCAST_RAY_ADDRESS"
MOST_DEATHS = 20
"""Actors that may die in one run of a stage before it goes on without Ray."""


class Worker:
    """The actor: runs a stage as a worker, in the workspace, until every unit is finished."""

    def work(self, root: str, name: str, key: str, fingerprint: str, device: str) -> int:
        """Build free units. Raises WorkspaceError on a node that does not see the workspace."""
        from pipeline.executors import HELPER
        from pipeline.stage import run_helper

        if not (Path(root) / "dvc.yaml").exists():
            raise WorkspaceError(
                f"this node sees no workspace at {root}", remedy="mount the workspace at the same path on every node"
            )
        os.chdir(root)
        os.environ |= {HELPER: fingerprint, DEVICE: device}
        return run_helper(name, key)


class _Actors:
    alone = False

    def __init__(self, ray: Any, call: Call, count: int) -> None:
        self.ray, self.call, self.on_gpu = ray, call, on_gpus(ray, call)
        self.deaths = 0
        self.running: dict[Any, Any] = {}
        for _ in range(count):
            self._start()

    def working(self) -> bool:
        """Replace actors that died; whether any is left, and the cluster still has what they run on."""
        if self.running:
            ready, _ = self.ray.wait(list(self.running), num_returns=len(self.running), timeout=0)
            for reference in ready:
                self._ended(reference)
        return bool(self.running) and _capacity(self.ray, self.on_gpu) > 0

    def _ended(self, reference: Any) -> None:
        self.running.pop(reference)
        try:
            self.ray.get(reference)
        except self.ray.exceptions.RayActorError as error:
            self.deaths += 1
            print(f"a Ray actor died ({_first_line(error)}); another takes its place", file=sys.stderr)
            if self.deaths < MOST_DEATHS:
                self._start()
        except self.ray.exceptions.RayTaskError as error:
            # Not a death: the worker itself failed, and this process will meet the same error and say it in full.
            print(f"a Ray actor failed: {_first_line(error.cause or error)}", file=sys.stderr)

    def _start(self) -> None:
        gpu = self.on_gpu
        actor = self.ray.remote(Worker).options(num_cpus=1, num_gpus=1 if gpu else 0).remote()
        call = self.call
        device = "cuda" if gpu else "cpu"  # Ray shows an actor its own GPU only
        self.running[actor.work.remote(str(call.root), call.name, call.key, call.fingerprint, device)] = actor


@contextmanager
def ray_crew(call: Call, units: int) -> Iterator[Crew]:
    """Join or start a cluster and fill it with actors, one per GPU or core and at most one per unit.

    A stage that is one unit gets one only for the sake of a GPU: an actor computes with one thread, and on a CPU the
    number of threads changes the result of a training and its speed.

    Raises:
        WorkspaceError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise WorkspaceError(
            "CLEVRCAST_EXECUTOR=ray, and Ray is not installed",
            remedy="run `pip install -c constraints.txt -e '.[ray]'`",
        ) from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    path = os.pathsep.join(p for p in (str(call.root), os.environ.get("PYTHONPATH", "")) if p)
    try:
        ray.init(
            address=os.environ.get(ADDRESS) or "local",
            log_to_driver=False,
            include_dashboard=None if os.environ.get(ADDRESS) else False,
            runtime_env={"env_vars": {"PYTHONPATH": path}},
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise WorkspaceError(
            f"no Ray cluster at {ADDRESS}={os.environ.get(ADDRESS)}: {_first_line(error)}",
            remedy=f"start one with `ray start --head`, or unset {ADDRESS} to use this machine alone",
        ) from error
    try:
        on_gpu = on_gpus(ray, call)
        alone = call.single and not on_gpu
        yield NoCrew() if alone else _Actors(ray, call, min(_capacity(ray, on_gpu), units))
    finally:
        ray.shutdown()


def on_gpus(ray: Any, call: Call) -> bool:
    """Whether actors get a GPU each: where this machine would use one, or has none and the cluster has some."""
    there = call.computes and os.environ.get(DEVICE, "") != "cpu" and _capacity(ray, gpu=True) > 0
    return call.on_gpu or there


def _capacity(ray: Any, gpu: bool) -> int:
    """GPUs or cores of the nodes that are alive."""
    return int(ray.cluster_resources().get("GPU" if gpu else "CPU", 0))


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
