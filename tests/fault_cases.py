"""The cases of tests/test_faults.py: who is killed, in which phase, in which way of running, and by which signal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tests.faults import ROLES, Case, Halt, Role, Sign, Way

LOCK, RWLOCK, DVC_LOCK = r"/dvc\.lock", r"\.dvc/tmp/rwlock ", ".dvc/tmp/lock"


def dvc(*steps: tuple[str, str, int], torn: tuple[str, int] | None = None, stage: str = "decode") -> Halt:
    """In the DVC that runs everything, or this stage."""
    return Halt(rf"-m dvc.* repro$|-m dvc.* repro.* {stage}$", steps, torn)


def stage(*steps: tuple[str, str, int], name: str = "decode", helper: bool = False) -> Halt:
    return Halt(rf"^\S*python\S* (-m stages\.{name}|stub_stage\.py {name})", steps, helper=helper)


def run(*steps: tuple[str, str, int]) -> Halt:
    return Halt(ROLES["run"], steps)


def server(*steps: tuple[str, str, int]) -> Halt:
    return Halt(ROLES["Prefect's server"], steps)


def worker(*steps: tuple[str, str, int]) -> Halt:
    return Halt(ROLES["Prefect's worker"], steps)


def flow_run(*steps: tuple[str, str, int]) -> Halt:
    return Halt(ROLES["flow run"], steps)


# Before anything of ours is loaded.
STARTS = (("import", "", 1),)
# Of a real stage, in the order in which they come.
STAGE_LOADS = (("import", r"^numpy$", 1),)
STAGE_PLANS = (("open", r"params\.yaml r", 1),)
NO_SHARD = (("os.mkdir", r"\.building \d", 1),)
SOME_SHARDS = (("os.mkdir", r"\.building \d", 3),)
MARKS_SHARD = (("open", r"unit\.json w", 2),)
NAMES_SHARD = (("os.rename", r"\.building ", 2),)
FIRST_NAME = (("os.rename", r"\.building ", 1),)
PUBLISHES = (("os.link", r"artifacts/", 3),)
STAGE_ENDS = (("open", r"\.work/runs/\S+ w", 1),)
# Of a stub.
STUB_LOADS = (("import", r"^ruamel\.yaml$", 1),)
STUB_COMPUTES = (("sleep", "", 1),)
STUB_WRITES = (("open", r"artifacts/\S+ w", 1),)
# Of DVC.
DVC_LOADS = (("import", r"^dvc\.repo\.reproduce$", 1),)
DVC_WAITS = (("sleep", r"^0\.5", 1),)
DVC_READS = (("open", LOCK + " r", 1),)
DVC_CLAIMS = (("open", RWLOCK + "w", 1),)
DVC_RELEASES = (("subprocess.Popen", r"label", 1), ("open", RWLOCK + "w", 1))
DVC_REMOVES = (("shutil.rmtree", r"artifacts/decode", 1), ("os.rmdir", "", 1))
RAN = ("subprocess.Popen", r"decode", 1)
DVC_HASHES = (RAN, ("open", r"artifacts/decode/\S+ r", 1))
DVC_TRIES = (RAN, ("os.remove", r"\.dvc/cache/files/md5/\w\w/\w{30} ", 1))
DVC_MOVES = (RAN, ("os.link", r"artifacts/decode/\S+ \S+\.dvc/cache/files/", 1))
DVC_PROTECTS = (*DVC_MOVES, ("os.chmod", r"\.dvc/cache/files/md5/\w\w/\w{30} ", 1))
DVC_TRIES_LINKS = (*DVC_MOVES, ("os.remove", r"artifacts/\.\S+\.tmp", 1))
DVC_LINKS = (RAN, ("os.remove", r"artifacts/decode", 1))
DVC_RECORDS = (RAN, ("open", r"\.dvc/cache/runs/\S+ w", 1))
DVC_WRITES = (RAN, ("open", LOCK + " w", 1))
DVC_NEXT = (RAN, ("subprocess.Popen", r"", 1))
DVC_ENDS = (RAN, ("open", LOCK + " w", 1), ("open", r"", 1))


# Of a run.
RUN_LOADS = (("import", r"^pipeline\.dag$", 1),)
RUN_PLANS = (("open", LOCK + " r", 1),)
RUN_WAITS = (("sleep", r"^0\.2", 1),)
RUN_STARTS_STAGE = (("subprocess.Popen", r"-m dvc", 1),)
RUN_NEXT = (("subprocess.Popen", r"-m dvc", 3),)
RUN_ENDS = (("open", r"events\.jsonl w", 8),)
# Of Prefect's.
SERVER_LOADS = (("import", r"^prefect\b", 1),)
FLOW_LOADS = (("import", r"^prefect\b", 1),)
FLOW_WAITS = (("sleep", r"^1(\.0)?$", 1),)
SIGNS: tuple[Sign, ...] = ("KILL", "TERM", "INT")


class Cases:
    """Cases of one pipeline, in one way of running it."""

    def __init__(self, bed: str, way: Way, target: str = "") -> None:
        self.bed, self.target = bed, target
        self.way: Way = way
        self.all: list[Case] = []

    def add(self, victim: Role, phase: str, halt: Halt | None, *signs: Sign, **more: Any) -> None:
        self.all += [
            Case(victim, phase, self.way, sign, halt, self.bed, self.target, **more) for sign in signs or ("KILL",)
        ]


def real() -> Iterator[Case]:
    """Real data stages on small videos: shards are kept, stores are the same."""
    cases = Cases("real", "dvc repro", "decode")
    cases.add("stage", "starting", stage(*STARTS), done="none")
    cases.add("stage", "loading", stage(*STAGE_LOADS), done="none")
    cases.add("stage", "planning", stage(*STAGE_PLANS), done="none")
    cases.add("stage", "computing, no shard finished", stage(*NO_SHARD), done="none")
    cases.add("stage", "computing, some shards finished", stage(*SOME_SHARDS), *SIGNS, done="some")
    cases.add("stage", "marking a shard as finished", stage(*MARKS_SHARD), done="some")
    cases.add("stage", "giving a finished shard its name", stage(*NAMES_SHARD), done="some")
    cases.add("stage", "publishing", stage(*PUBLISHES), "KILL", "TERM", done="all")
    cases.add("stage", "ending", stage(*STAGE_ENDS), done="all")
    for phase, halt, done in (
        ("stage starting", stage(*STARTS), "none"),
        ("stage loading", stage(*STAGE_LOADS), "none"),
        ("stage planning", stage(*STAGE_PLANS), "none"),
        ("stage computing, no shard finished", stage(*NO_SHARD), "none"),
        ("stage publishing", stage(*PUBLISHES), "all"),
        ("stage ending", stage(*STAGE_ENDS), "all"),
        ("hashing outputs", dvc(*DVC_HASHES), "all"),
        ("moving outputs into the cache", dvc(*DVC_MOVES), "all"),
        ("dvc.lock just emptied", dvc(*DVC_WRITES, torn=("dvc.lock", 0)), "all"),
    ):
        cases.add("dvc", phase, halt, done=done)
    some = stage(*SOME_SHARDS)
    cases.add("dvc", "stage computing, some shards finished", some, "KILL", "TERM", "INT", "Ctrl-C", done="some")
    cases.add("worker", "starting", stage(*STARTS, helper=True))
    cases.add("worker", "loading", stage(*STAGE_LOADS, helper=True))
    cases.add("stage", "worker starting", stage(*STARTS, helper=True))
    cases.add("dvc", "worker starting", stage(*STARTS, helper=True))
    busy = {"meanwhile": stage(*NO_SHARD)}  # else the stage has built everything before the worker has started
    cases.add("worker", "computing its first shard", stage(*NO_SHARD, helper=True), *SIGNS, **busy)
    cases.add("worker", "giving a finished shard its name", stage(*FIRST_NAME, helper=True), **busy)
    cases.add("stage", "computing, with a worker", stage(*NO_SHARD, helper=True), *SIGNS, **busy)
    cases.add("dvc", "stage computing, with a worker", stage(*NO_SHARD, helper=True), *SIGNS, **busy)
    yield from cases.all
    cases = Cases("real", "clevrcast run", "decode")
    cases.add("run", "stage loading", stage(*STAGE_LOADS), done="none")
    cases.add("run", "stage computing, some shards finished", some, *SIGNS, done="some")
    cases.add("run", "stage publishing", stage(*PUBLISHES), done="all")
    cases.add("run", "dvc.lock just emptied", dvc(*DVC_WRITES, torn=("dvc.lock", 0)), done="all")
    cases.add("run", "stage computing, with a worker", stage(*NO_SHARD, helper=True), *SIGNS, **busy)
    cases.add("dvc", "stage computing, some shards finished", some, *SIGNS, done="some")
    cases.add("stage", "computing, some shards finished", some, *SIGNS, done="some")
    cases.add("worker", "computing its first shard", stage(*NO_SHARD, helper=True), **busy)
    yield from cases.all
    cases = Cases("real", "clevrcast run", "flow")
    some, flow = stage(*SOME_SHARDS, name="flow"), stage(*NO_SHARD, name="flow")
    cases.add("run", "stage computing, some shards finished", some, done="some")
    cases.add("stage", "computing, some shards finished", some, done="some")
    cases.add("worker", "computing its first shard", stage(*NO_SHARD, name="flow", helper=True), meanwhile=flow)
    yield from cases.all


def stubs() -> Iterator[Case]:
    """The graph with stages that only write down what they were made of: DVC's phases, and those between stages."""
    cases = Cases("stub", "dvc repro")
    cases.add("dvc", "loading", dvc(*DVC_LOADS), "KILL", "TERM", "INT")
    cases.add("dvc", "waiting for DVC's lock", dvc(*DVC_WAITS), held=DVC_LOCK)
    cases.add("dvc", "reading the graph", dvc(*DVC_READS))
    cases.add("dvc", "claiming paths", dvc(*DVC_CLAIMS))
    cases.add("dvc", "list of claimed paths just emptied", dvc(*DVC_CLAIMS, torn=(".dvc/tmp/rwlock", 0)))
    cases.add("dvc", "removing old outputs", dvc(*DVC_REMOVES))
    cases.add("dvc", "stage computing", stage(*STUB_COMPUTES), *SIGNS)
    cases.add("dvc", "hashing outputs", dvc(*DVC_HASHES), *SIGNS)
    cases.add("dvc", "moving outputs into the cache", dvc(*DVC_MOVES), *SIGNS)
    cases.add("dvc", "an empty file in the cache, to try a copy-on-write link", dvc(*DVC_TRIES))
    cases.add("dvc", "protecting what is in the cache", dvc(*DVC_PROTECTS))
    cases.add("dvc", "trying out links in artifacts", dvc(*DVC_TRIES_LINKS))
    cases.add("dvc", "writing into the run cache", dvc(*DVC_RECORDS))
    cases.add("dvc", "replacing outputs by links into the cache", dvc(*DVC_LINKS))
    cases.add("dvc", "about to write dvc.lock", dvc(*DVC_WRITES))
    cases.add("dvc", "dvc.lock just emptied", dvc(*DVC_WRITES, torn=("dvc.lock", 0)))
    cases.add("dvc", "dvc.lock half written", dvc(*DVC_WRITES, torn=("dvc.lock", 1)), *SIGNS)
    cases.add("dvc", "between two stages", dvc(*DVC_NEXT))
    cases.add("stage", "loading", stage(*STUB_LOADS))
    cases.add("stage", "computing", stage(*STUB_COMPUTES), *SIGNS)
    cases.add("stage", "writing outputs", stage(*STUB_WRITES))
    yield from cases.all
    cases = Cases("stub", "clevrcast run")
    device = ".work/devices/fake:0.lock"
    cases.add("run", "starting up", run(*RUN_LOADS), *SIGNS)
    cases.add("run", "planning", run(*RUN_PLANS), *SIGNS)
    cases.add("run", "waiting for a device", run(*RUN_WAITS), *SIGNS, held=device)
    cases.add("run", "starting a stage", run(*RUN_STARTS_STAGE))
    cases.add("run", "stage computing on a device", stage(*STUB_COMPUTES, name="flow"), *SIGNS)
    cases.add("run", "hashing outputs", dvc(*DVC_HASHES), *SIGNS)
    cases.add("run", "dvc.lock just emptied", dvc(*DVC_WRITES, torn=("dvc.lock", 0)))
    cases.add("run", "between two stages", run(*RUN_NEXT), *SIGNS)
    cases.add("run", "ending", run(*RUN_ENDS), *SIGNS)
    cases.add("run", "dvc starting", dvc(*STARTS))
    cases.add("run", "stage starting", stage(*STARTS))
    cases.add("dvc", "stage starting", stage(*STARTS))
    cases.add("dvc", "loading", dvc(*DVC_LOADS))
    cases.add("dvc", "waiting for DVC's lock", dvc(*DVC_WAITS), held=DVC_LOCK)
    cases.add("dvc", "list of claimed paths just emptied", dvc(*DVC_CLAIMS, torn=(".dvc/tmp/rwlock", 0)))
    emptied = dvc(*DVC_RELEASES, torn=(".dvc/tmp/rwlock", 0), stage="label")
    beside = {"meanwhile": stage(*STUB_COMPUTES)}
    cases.add("dvc", "list of claimed paths just emptied, another stage computing", emptied, **beside)
    cases.add("dvc", "hashing outputs", dvc(*DVC_HASHES), *SIGNS)
    cases.add("dvc", "dvc.lock half written", dvc(*DVC_WRITES, torn=("dvc.lock", 1)), *SIGNS)
    cases.add("stage", "computing on a device", stage(*STUB_COMPUTES, name="flow"), *SIGNS)
    yield from cases.all


def in_prefect() -> Iterator[Case]:
    """Runs as Prefect flows, with a server of their own."""
    cases = Cases("stub", "clevrcast run --prefect")
    cases.add("run", "starting its server", server(*SERVER_LOADS), *SIGNS)
    cases.add("run", "stage computing on a device", stage(*STUB_COMPUTES, name="flow"), *SIGNS)
    cases.add("run", "between two stages", run(*RUN_NEXT))
    cases.add("run", "ending", run(*RUN_ENDS))
    cases.add("Prefect's server", "starting up", server(*SERVER_LOADS))
    cases.add("Prefect's server", "stage computing", stage(*STUB_COMPUTES))
    cases.add("Prefect's server", "run ending", run(*RUN_ENDS))
    cases.add("dvc", "hashing outputs", dvc(*DVC_HASHES))
    cases.add("stage", "computing", stage(*STUB_COMPUTES))
    yield from cases.all


def served() -> Iterator[Case]:
    """A served workspace: serve, what it has started, and what those start."""
    cases = Cases("served", "clevrcast serve")
    servants: tuple[Role, ...] = ("serve", "Prefect's worker", "Prefect's server")
    for victim in servants:
        cases.add(victim, "idle", None, "KILL", "TERM")
        cases.add(victim, "flow run starting", flow_run(*STARTS))
        cases.add(victim, "flow run loading", flow_run(*FLOW_LOADS))
        cases.add(victim, "stage computing", stage(*STUB_COMPUTES))
    cases.add("serve", "stage computing", stage(*STUB_COMPUTES), "TERM", "INT")
    cases.add("serve", "hashing outputs", dvc(*DVC_HASHES))
    cases.add("serve", "dvc.lock just emptied", dvc(*DVC_WRITES, torn=("dvc.lock", 0)))
    cases.add("serve", "starting the server", server(*SERVER_LOADS), *SIGNS)
    cases.add("serve", "starting the worker", worker(*SERVER_LOADS))
    cases.add("flow run", "loading", flow_run(*FLOW_LOADS))
    cases.add("flow run", "waiting for another run", flow_run(*FLOW_WAITS), held=".work/run.lock")
    cases.add("flow run", "planning", flow_run(*RUN_PLANS))
    cases.add("flow run", "stage computing", stage(*STUB_COMPUTES), *SIGNS)
    cases.add("flow run", "between two stages", flow_run(*RUN_NEXT))
    cases.add("flow run", "ending", flow_run(*RUN_ENDS))
    cases.add("dvc", "hashing outputs", dvc(*DVC_HASHES))
    cases.add("dvc", "dvc.lock just emptied", dvc(*DVC_WRITES, torn=("dvc.lock", 0)))
    cases.add("stage", "computing", stage(*STUB_COMPUTES))
    yield from cases.all


WITH_THE_SUITE = {
    "dvc-repro-decode-worker-computing-its-first-shard-kill",
    "dvc-repro-dvc-dvc-lock-just-emptied-kill",
    "clevrcast-run-dvc-list-of-claimed-paths-just-emptied-kill",
    "clevrcast-run-run-stage-computing-on-a-device-kill",
}
CASES: Sequence[Case] = [*real(), *stubs(), *in_prefect(), *served()]
