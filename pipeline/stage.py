"""The entry of every stage: ``python -m stages.NAME [KEY]``, without flags; everything comes from ``params.yaml``.

`run_stage` reads the parameters, dies with its parent (so that killing DVC leaves no second writer behind), turns
expected errors into one clear message and exit code, and keeps a record of seconds and counts in ``.work/runs``.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import torn
from pipeline.adoption import adopt, adoptable, adoption_sample
from pipeline.code import closure, code_digest
from pipeline.devices import devices
from pipeline.errors import DEFECT, PipelineError, WorkspaceError, explained
from pipeline.executors import Call, crew_for, helped_fingerprint, is_part, part_of, single_thread
from pipeline.journal import BadItem, Built, Plan, Unit, digest_of, lease, missing
from pipeline.params import Params, load_params
from pipeline.peers import agree, watched
from pipeline.process import die_with_parent
from pipeline.ranks import become_torchrun, launched, own_devices, rank, world_size
from pipeline.shards import Make, build_free_units, build_units, kept_state, unfinished

ARTIFACTS = Path("artifacts")
WORK = Path(".work")
RUNS = WORK / "runs"
PARENTS = ("dvc", "torch", "stages.")
"""Words in the command of whoever may start the process of a stage where DVC runs it: itself, torchrun, the stage."""


@dataclass
class Job:
    """One execution of one stage: its parameters, where it writes, and how it builds resumable units."""

    name: str
    key: str
    params: Params
    root: Path
    devices: tuple[str, ...]
    """What this process and its workers compute on; the first is this process's own."""
    built: list[Built] = field(default_factory=list)
    made: int = 0
    """Units that were not there when this run began."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What this run measured of itself (speed): kept in ``.work/runs``, never in an output."""
    _made_of: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.name}@{self.key}" if self.key else self.name

    @property
    def device(self) -> str:
        return self.devices[0]

    @property
    def out(self) -> Path:
        """The stage's output folder below ``artifacts``."""
        return ARTIFACTS / self.name / self.key if self.key else ARTIFACTS / self.name

    @property
    def work(self) -> Path:
        """The stage's folder below ``.work``."""
        return WORK / self.title

    def fingerprint(self, params: Any, *, weights: str = "", modules: Iterable[str] = ()) -> str:
        """What a result depends on besides its inputs: parameters, code (without comments) and weights.

        ``modules`` names files that the stage imports by name at run time.
        """
        files = {f for entry in (f"stages/{self.name}.py", *modules) for f in closure(self.root, entry)}
        plain = json.loads(json.dumps(params, default=lambda section: section.model_dump(mode="json")))
        made_of = {"params": plain, "code": code_digest(self.root, files), "weights": weights}
        fingerprint = digest_of(made_of)
        self._made_of[fingerprint] = made_of
        return fingerprint

    def build(
        self,
        fingerprint: str,
        units: Sequence[Unit],
        make: Make,
        *,
        counted: str = "videos",
        computes: bool = True,
        before: Callable[[Sequence[Unit]], None] = lambda missing: None,
    ) -> list[Built]:
        """Build the units under ``.work/<stage>/<fingerprint>``, see `pipeline.shards.build_units`.

        ``computes``: whether units are made on the device; else the work is the CPU's, and so is the number of
        workers, on a machine with GPUs too. ``before`` is called with the missing units, if there are any, before the
        first is built and before any worker starts.

        Raises:
            PipelineError: more items were quarantined than ``shards.max_bad_fraction`` allows.
        """
        folder = self.work / fingerprint
        _check_same_disk()
        if world_size() > 1:
            agree(_seen(folder, units), _ONE_STORE)
        if rank():
            raise Finished(_compute_along(folder, units, make))
        if len(units) > 1:
            single_thread()
        if helped := helped_fingerprint():
            if helped != fingerprint:
                raise WorkspaceError(
                    f"{self.title}: a worker finds parameters or code other than those of the run that started it",
                    remedy="leave params.yaml and the code alone while a stage runs; run the same command again",
                )
            raise Finished(build_free_units(folder, part_of(units), make))
        plan = Plan(self.title, counted, self._made_of[fingerprint], tuple(units), time.time())
        if sample := adoption_sample():
            raise Finished(0, adopt(folder, plan, make, sample))
        if is_part():
            plan.save(folder)
            mine = part_of(units)
            self._run_crew(folder, fingerprint, mine, make, counted, computes, before)
            raise Finished(self.made, f"{self.title}: {len(mine)} of {len(units)} units are this part, all finished")
        plan.save(folder)
        built = self._run_crew(folder, fingerprint, units, make, counted, computes, before)
        self.built += built
        self.check_bad([item for b in built for item in b.bad], sum(len(unit.ids) for unit in units))
        return built

    def check_bad(self, bad: Sequence[BadItem], total: int) -> None:
        """Raise PipelineError where more of ``total`` items are bad than ``shards.max_bad_fraction`` allows."""
        limit = self.params.shards.max_bad_fraction
        if not bad or len(bad) <= limit * total:
            return
        listed = "\n".join(f"    {item.id}: {item.reason}" for item in bad[:10])
        more = f"\n    and {len(bad) - 10} more: `clevrcast inspect {self.title}`" if len(bad) > 10 else ""
        raise PipelineError(
            f"{self.title}: {len(bad)} of {total} items are bad, shards.max_bad_fraction {limit} "
            f"allows {int(limit * total)}:\n{listed}{more}",
            remedy="mend or leave out these items, or raise shards.max_bad_fraction if the loss is acceptable; "
            f"`clevrcast retry-failed {self.title}` tries them again",
        )

    def _run_crew(
        self,
        folder: Path,
        fingerprint: str,
        units: Sequence[Unit],
        make: Make,
        counted: str,
        computes: bool,
        before: Callable[[Sequence[Unit]], None],
    ) -> list[Built]:
        absent = missing(folder, units)
        self.made += len(absent)
        if absent:
            before(absent)
            if hint := adoptable(folder, self._made_of[fingerprint]):
                print(hint, flush=True)
        on = self.devices if computes else ("cpu",)
        log, single = self.work / "workers.log", len(units) == 1
        call = Call(self.name, self.key, self.root, fingerprint, on, log, computes, single)
        with crew_for(call, len(absent)) as crew:
            return build_units(folder, units, make, what=self.title, counted=counted, crew=crew)


_ONE_STORE = (
    "give every node the same params.yaml and code, and the same artifacts and .work by a file system that they share; "
    "one that shows changes late may need a minute"
)


def _seen(folder: Path, units: Sequence[Unit]) -> dict[str, str]:
    """What the processes of a torchrun must see alike, or they would train different things and wait for ever."""
    states = [file for unit in units for file in sorted(kept_state(unfinished(folder, unit)).glob("*"))]
    return {
        "the fingerprint of parameters, code and weights": folder.name,
        "the digest of the data": digest_of([unit.key() for unit in units]),
        "what is left to build": ", ".join(unit.label for unit in missing(folder, units)) or "nothing",
        "the interrupted run": ", ".join(f"{file.name} of {file.stat().st_size} bytes" for file in states) or "none",
    }


def _compute_along(folder: Path, units: Sequence[Unit], make: Make) -> int:
    """What every process of a torchrun but the first does: its share of the computing, and no books."""
    absent = missing(folder, units)
    for unit in absent:
        make(unit, unfinished(folder, unit), lambda advance=1, note="": None)
    return len(absent)


class Finished(Exception):  # noqa: N818 - not an error: the stage ends here, without publishing anything
    """Raised by `Job.build` in a process that publishes nothing: a worker, a part, all but the first of a torchrun."""

    def __init__(self, made: int, message: str = "") -> None:
        super().__init__(message)
        self.made = made


def run_helper(name: str, key: str) -> int:
    """Run a stage as a worker of another process, in this process; returns how many units it built."""
    job = Job(name, key, load_params(Path("params.yaml")), Path.cwd(), tuple(devices()))
    try:
        importlib.import_module(f"stages.{name}").run(job)
    except Finished as finished:
        return finished.made
    raise AssertionError(f"stages.{name}.run ended without building anything")


def run_stage(name: str, run: Callable[[Job], None], *, keyed: bool = False, together: bool = False) -> None:
    """Run a stage as a program and exit; see the module's docstring. ``together``: torchrun may start it."""
    die_with_parent(*PARENTS if "DVC_STAGE" in os.environ else ())
    arguments = sys.argv[1:]
    started = time.monotonic()
    try:
        if len(arguments) != int(keyed):
            raise WorkspaceError(
                f"python -m stages.{name} takes {'one KEY' if keyed else 'no argument'}, found {arguments}",
                remedy=f"use `dvc repro {name}`: parameters belong in params.yaml",
            )
        if launched() and not together:
            raise WorkspaceError(
                f"torchrun started the stage {name}, which does not train a predictor",
                remedy="start it by `dvc repro`; docs/data-plane.md tells how work is shared",
            )
        if not Path("dvc.yaml").exists():
            raise WorkspaceError(f"no dvc.yaml in {Path.cwd()}", remedy="run at the top of a clevrcast checkout")
        key = arguments[0] if keyed else ""
        if together:
            become_torchrun(f"stages.{name}", arguments)
        with watched(Finished):
            job = Job(name, key, load_params(Path("params.yaml")), Path.cwd(), own_devices(devices()))
            with _stage_lease(job):
                if _publishes():
                    torn.keep(job.root, wait=False)
                run(job)
    except Finished as finished:
        if str(finished):
            print(finished)
        raise SystemExit(0) from None
    except KeyboardInterrupt:
        print(f"{name}: stopped by Ctrl-C; finished units are kept", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as raised:  # noqa: BLE001 - every one is told in full
        error = raised
        if isinstance(raised, OSError):  # while publishing: units see to theirs themselves
            error = explained(raised, WORK, "publishing what is finished") or raised
        if not hasattr(error, "remedy"):
            traceback.print_exc()  # a defect of ours
            raise SystemExit(DEFECT) from None
        print(f"\nerror in stage {' '.join([name, *arguments])}: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(getattr(error, "exit_code", PipelineError.exit_code)) from None
    _record(job, time.monotonic() - started)


def _stage_lease(job: Job) -> AbstractContextManager[None]:
    """The only right to publish the stage. A process that only builds units needs none, theirs have their own."""
    return lease(job.work / "stage.lock", f"the stage {job.title}") if _publishes() else nullcontext()


def _publishes() -> bool:
    """Whether this is the process that DVC started, and not one that only builds units or computes along."""
    return not (helped_fingerprint() or is_part() or adoption_sample() or rank())


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


def read_runs(folder: Path = RUNS) -> dict[str, dict[str, Any]]:
    """The record of every stage's last run on this machine, by title (``flow``, ``train@latent_warp``)."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}


def _check_same_disk() -> None:
    for folder in (WORK, ARTIFACTS):
        folder.mkdir(parents=True, exist_ok=True)
    if WORK.stat().st_dev != ARTIFACTS.stat().st_dev:
        raise WorkspaceError(
            f"{WORK} and {ARTIFACTS} are on different file systems, so finished work cannot be hard-linked",
            remedy="move both to one file system, for example by a symbolic link for each",
        )
