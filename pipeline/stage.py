"""The entry of every stage: ``python -m stages.NAME [KEY]``, without flags; everything comes from ``params.yaml``.

`run_stage` reads the parameters, dies with its parent (so that killing DVC leaves no second writer behind), turns
expected errors into one clear message and exit code, and keeps a record of seconds and counts in ``.work/runs``.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.code import closure, code_digest
from pipeline.devices import device
from pipeline.errors import PipelineError, WorkspaceError
from pipeline.executors import helpers, is_helper, single_thread, worker_count
from pipeline.params import Params, load_params
from pipeline.shards import Built, Make, Unit, build_free_units, build_units, digest_of

ARTIFACTS = Path("artifacts")
WORK = Path(".work")
RUNS = WORK / "runs"
DEFECT_EXIT = 70
"""Exit code of an error that is our fault (shown with its traceback)."""


@dataclass
class Job:
    """One execution of one stage: its parameters, where it writes, and how it builds resumable units."""

    name: str
    key: str
    params: Params
    root: Path
    device: str
    built: list[Built] = field(default_factory=list)
    made: int = 0
    """Units that were not there when this run began."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What this run measured of itself (speed): kept in ``.work/runs``, never in an output."""

    @property
    def title(self) -> str:
        return f"{self.name}@{self.key}" if self.key else self.name

    @property
    def out(self) -> Path:
        """The stage's output folder below ``artifacts``."""
        return ARTIFACTS / self.name / self.key if self.key else ARTIFACTS / self.name

    def fingerprint(self, params: Any, *, weights: str = "", modules: Iterable[str] = ()) -> str:
        """What a result depends on besides its inputs: parameters, code (without comments) and weights.

        ``modules`` names files that the stage imports by name at run time.
        """
        files = {f for entry in (f"stages/{self.name}.py", *modules) for f in closure(self.root, entry)}
        plain = json.loads(json.dumps(params, default=lambda section: section.model_dump(mode="json")))
        return digest_of({"params": plain, "code": code_digest(self.root, files), "weights": weights})

    def build(self, fingerprint: str, units: Sequence[Unit], make: Make, *, counted: str = "videos") -> list[Built]:
        """Build the units under ``.work/<stage>/<fingerprint>``, see `pipeline.shards.build_units`.

        Raises:
            PipelineError: more items were quarantined than ``shards.max_bad_fraction`` allows.
        """
        folder = WORK / self.title / fingerprint
        _check_same_disk()
        if len(units) > 1:
            single_thread()
        if is_helper():
            build_free_units(folder, units, make)
            raise SystemExit(0)
        missing = sum(not (folder / unit.key()).exists() for unit in units)
        self.made += missing
        count = worker_count(self.device, missing) - 1
        with helpers(count, self.name, self.key, WORK / self.title / "helpers.log") as started:

            def wait() -> None:
                for process in started:
                    process.wait()

            built = build_units(folder, units, make, what=self.title, counted=counted, wait_for_others=wait)
        self.built += built
        bad = [item for b in built for item in b.bad]
        total = sum(len(unit.ids) for unit in units)
        limit = self.params.shards.max_bad_fraction
        if bad and len(bad) > limit * total:
            listed = "\n".join(f"    {item.id}: {item.reason}" for item in bad[:10])
            raise PipelineError(
                f"{self.title}: {len(bad)} of {total} items are bad, shards.max_bad_fraction {limit} "
                f"allows {int(limit * total)}:\n{listed}",
                remedy="mend or leave out these items, or raise shards.max_bad_fraction if the loss is acceptable",
            )
        return built


def run_stage(name: str, run: Callable[[Job], None], *, keyed: bool = False) -> None:
    """Run a stage as a program and exit; see the module's docstring."""
    _die_with_parent()
    arguments = sys.argv[1:]
    started = time.monotonic()
    try:
        if len(arguments) != int(keyed):
            raise WorkspaceError(
                f"python -m stages.{name} takes {'one KEY' if keyed else 'no argument'}, found {arguments}",
                remedy=f"use `dvc repro {name}`: parameters belong in params.yaml",
            )
        if not Path("dvc.yaml").exists():
            raise WorkspaceError(f"no dvc.yaml in {Path.cwd()}", remedy="run at the top of a clevrcast checkout")
        job = Job(name, arguments[0] if keyed else "", load_params(Path("params.yaml")), Path.cwd(), device())
        run(job)
    except KeyboardInterrupt:
        print(f"{name}: stopped by Ctrl-C; finished units are kept", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if not hasattr(error, "remedy"):
            raise  # a defect of ours: the traceback is the message
        print(f"\nerror in stage {' '.join([name, *arguments])}: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(getattr(error, "exit_code", PipelineError.exit_code)) from None
    _record(job, time.monotonic() - started)


def _record(job: Job, seconds: float) -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    body: Mapping[str, Any] = {
        "seconds": round(seconds, 2),
        "built": job.made,
        "reused": len(job.built) - job.made,
        "build_seconds": round(sum(b.seconds for b in job.built), 2),
        "device": job.device,
        **job.facts,
    }
    (RUNS / f"{job.title}.json").write_text(json.dumps(body))
    print(f"{job.title}: {job.made} units built, {len(job.built) - job.made} found ready, {seconds:.1f} s")


def read_runs() -> dict[str, dict[str, Any]]:
    """The record of every stage's last run on this machine, by title (``flow``, ``train@latent_warp``)."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(RUNS.glob("*.json"))}


def _check_same_disk() -> None:
    for folder in (WORK, ARTIFACTS):
        folder.mkdir(parents=True, exist_ok=True)
    if WORK.stat().st_dev != ARTIFACTS.stat().st_dev:
        raise WorkspaceError(
            f"{WORK} and {ARTIFACTS} are on different file systems, so finished work cannot be hard-linked",
            remedy="move both to one file system, for example by a symbolic link for each",
        )


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends; elsewhere there is no such thing and nothing is done."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the request
        os.kill(os.getpid(), signal.SIGKILL)
