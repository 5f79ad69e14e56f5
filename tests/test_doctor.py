"""`clevrcast doctor`: whatever is broken on purpose is named, with what to do, and nothing makes it fail."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.health import checks, locks, machine
from pipeline.health import workspace as workspace_checks
from pipeline.health.checks import Check, Finding, good, look_at
from pipeline.journal import MARKER, Plan, lease
from stages import doctor
from tests.doctored import bad, change, off, only, run_git, small_checkout
from tests.workspace import Workspace


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Path:
    return small_checkout(root, tmp_path / "checkout")


def test_a_real_workspace_is_looked_at_and_left_as_it_was(root: Path, tmp_path: Path) -> None:
    workspace = Workspace(root, tmp_path)
    (tmp_path / ".work").mkdir()
    before = sorted(p for p in tmp_path.rglob("*") if "__pycache__" not in p.parts)
    said = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "doctor", "--json", "--seconds", "60"],  # others are at work here too
        cwd=tmp_path,
        env=workspace.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    body = json.loads(said.stdout)
    assert said.returncode == (body["state"] == "bad"), said
    states: dict[str, set[str]] = {}
    for line in body["checks"]:
        states.setdefault(line["check"], set()).add(line["state"])
        assert bool(line["remedy"]) == (line["state"] != "good"), line
    assert list(states) == [check.name for check in doctor.CHECKS]
    for name in ("checkout", "writable", "git", "params.yaml", "dvc.yaml", "hard links", "file locks", "DVC paths"):
        assert states[name] == {"good"}, body
    assert sorted(p for p in tmp_path.rglob("*") if "__pycache__" not in p.parts) == before


def test_it_speaks_where_packages_are_broken(checkout: Path, root: Path, tmp_path: Path) -> None:
    for name, text in {
        "rich": "raise ImportError('no rich')",
        "pydantic": "raise ImportError('no pydantic')",
        "torch": "import os; os.abort()",
    }.items():
        (tmp_path / "broken" / name).mkdir(parents=True)
        (tmp_path / "broken" / name / "__init__.py").write_text(text)
    said = subprocess.run(
        [sys.executable, "-m", "stages.doctor", "params.yaml", "devices", "torchvision", "disk", "--seconds", "60"],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'broken'}{os.pathsep}{root}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 1, said
    assert "no pydantic" in said.stdout
    assert "bad     devices: its process died of SIGABRT" in said.stdout
    assert "torchvision: not looked at: devices did not come to its end" in said.stdout
    assert "GB free" in said.stdout


def test_a_check_that_raises_hangs_or_cannot_be_started_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(root: Path) -> Iterator[Finding]:
        yield good("so far")
        raise OSError(errno.EIO, "input/output error")

    def hangs(root: Path) -> Iterator[Finding]:
        time.sleep(30)
        yield good("never")

    monkeypatch.setattr(checks, "PROGRAM", "no_such_program")
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    several = [
        Check("a", raises),
        Check("b", hangs),
        Check("c", hangs, apart="x"),
        Check("d", lambda root: [good("x")]),
    ]
    lines = look_at(several, tmp_path, seconds=1)
    told = [(line.check, line.finding.state, line.finding.found) for line in lines]
    assert told[:2] == [
        ("a", "good", "so far"),
        ("a", "bad", "the check failed: OSError: [Errno 5] input/output error"),
    ]
    assert told[2] == ("b", "bad", "it gave no answer within 1 s")
    assert told[3][:2] == ("c", "bad")
    assert "No module named no_such_program" in told[3][2]
    assert told[4] == ("d", "good", "x")
    assert "clevrcast doctor --trace 'a'" in lines[1].finding.remedy
    monkeypatch.setattr(os, "getloadavg", lambda: (500.0, 0.0, 0.0))
    (line,) = look_at([Check("b", hangs)], tmp_path, seconds=0.1)
    assert line.finding.state == "warning"
    assert "busy" in line.finding.found


def test_the_command_traces_and_refuses_unknown_checks(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(checkout)
    assert doctor.main(["no such check"]) == 2
    assert "there is no check no such check" in capsys.readouterr().err
    assert doctor.main(["dvc.lock", "DVC paths"]) == 0
    assert "1 good" not in (said := capsys.readouterr().out)
    assert "2 good" in said
    (checkout / "params.yaml").write_text("[")
    with pytest.raises(Exception, match="not valid YAML"):
        doctor.main(["--trace", "params.yaml"])
    assert doctor.main(["params.yaml"]) == 1


# The machine.


def test_a_full_disk(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(checkout)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3e8))
    finding = bad(machine.free_space, checkout)
    assert "0.3 GB free for the workspace, .work, artifacts, DVC's cache" in finding.found
    assert "clevrcast clean" in finding.remedy
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1e8))
    assert "films" in off(machine.free_space, checkout)[-1].found


def test_a_file_system_without_locks(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(machine.file_locks, checkout).state == "good"

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    finding = bad(machine.file_locks, checkout)
    assert "No locks available" in finding.found
    assert finding.remedy.startswith("put the checkout on a local disk")
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    finding = bad(machine.file_locks, checkout)
    assert "another process was locked while the lock was held" in finding.found


def test_locks_of_one_host_alone(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_file_system", lambda _: ("lustre", "rw,localflock"))
    (finding,) = off(machine.file_locks, checkout)
    assert finding.state == "warning"
    assert "lustre is mounted with localflock" in finding.found


def test_a_file_system_without_hard_links(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(machine.hard_links, checkout).state == "good"

    def link(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    assert "has no hard links: Operation not permitted" in bad(machine.hard_links, checkout).found


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_two_file_systems(checkout: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        if Path(elsewhere).stat().st_dev == checkout.stat().st_dev:
            pytest.skip("needs a second file system")
        (checkout / ".dvc/config.local").write_text(f"[cache]\n    dir = {elsewhere}\n")
        (finding,) = off(machine.hard_links, checkout)
        assert finding.state == "warning"
        assert "DVC's cache is on another file system" in finding.found
        (checkout / "artifacts").symlink_to(elsewhere)
        assert "cannot be hard-linked" in bad(machine.hard_links, checkout).found


def test_little_memory(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_free_memory", lambda: 5e8)
    assert "CLEVRCAST_EXECUTOR=serial" in bad(machine.memory, checkout).remedy


def test_low_limits(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (256, 512))
    assert off(machine.limits, checkout)[0].remedy == "ulimit -n 512"


@pytest.mark.parametrize(
    ("variable", "value", "state", "said"),
    [
        ("CLEVRCAST_EXECUTER", "ray", "warning", "CLEVRCAST_EXECUTOR is meant?"),
        ("CLEVRCAST_EXECUTOR", "slurm", "bad", "CLEVRCAST_EXECUTOR=slurm is no executor"),
        ("CLEVRCAST_WORKERS", "many", "bad", "CLEVRCAST_WORKERS=many is no number"),
        ("CLEVRCAST_SAVE_SECONDS", "-1", "bad", "is no number of seconds"),
        ("CLEVRCAST_PART", "1/4", "warning", "stages build a part and publish nothing"),
    ],
)
def test_variables_that_mean_nothing(
    variable: str, value: str, state: str, said: str, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    (finding,) = [f for f in off(machine.environment, checkout) if variable in f.found]
    assert finding.state == state
    assert said in finding.found
    assert finding.remedy


# The workspace.


def test_no_checkout(tmp_path: Path) -> None:
    assert "is no clevrcast checkout" in bad(workspace_checks.checkout, tmp_path).found


def test_wrong_parameters(checkout: Path) -> None:
    change(checkout, "decode.resolution", [100, 192])
    finding = bad(workspace_checks.params, checkout)
    assert "decode.resolution [100, 192]: both must be positive multiples of 8" in finding.found
    assert "clevrcast params" in finding.remedy


def test_norun_git(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(workspace_checks.git, checkout).state == "good"
    shutil.rmtree(checkout / ".git")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    finding = bad(workspace_checks.git, checkout)
    assert "git finds no repository here" in finding.found
    assert finding.remedy.startswith("git init && git add -A && git commit")
    run_git(checkout, "init", "-q")
    assert only(workspace_checks.git, checkout).state == "warning"  # no commit yet
    monkeypatch.setenv("PATH", "")
    assert "git is not installed" in bad(workspace_checks.git, checkout).found


def test_a_half_written_lock_file(checkout: Path) -> None:
    whole = (checkout / "dvc.lock").read_bytes()
    generator = random.Random(0)
    for length in [0, 20, *(generator.randrange(len(whole)) for _ in range(5))]:
        if whole[:length].endswith(b"\n"):
            continue
        (checkout / "dvc.lock").write_bytes(whole[:length])
        finding = bad(workspace_checks.lock_file, checkout)
        assert finding.found.startswith("dvc.lock is damaged or half-written: "), length
        assert finding.remedy == "git checkout dvc.lock"
    (checkout / "dvc.lock").write_bytes(b"<<<<<<< HEAD\n" + whole)
    assert "git merge" in bad(workspace_checks.lock_file, checkout).found
    (checkout / "dvc.lock").unlink()
    assert only(workspace_checks.lock_file, checkout).found == "dvc.lock was deleted"
    run_git(checkout, "rm", "-q", "--cached", "dvc.lock")
    (checkout / "dvc.lock").write_bytes(whole[:99])
    assert bad(workspace_checks.lock_file, checkout).remedy.startswith("rm dvc.lock")
    (checkout / "dvc.lock").write_bytes(whole)
    assert only(workspace_checks.lock_file, checkout).state == "good"


def test_a_graph_that_is_broken_or_behind(checkout: Path) -> None:
    (checkout / "stages").mkdir()
    (checkout / "data").mkdir()
    (checkout / "stages/flow.py").write_text("import data.video\n")
    (checkout / "data/video.py").touch()
    graph, text = checkout / "dvc.yaml", "stages:\n  flow:\n    deps:\n      - data/video.py\n      - stages/flow.py\n"
    graph.write_text(text)
    assert only(workspace_checks.graph, checkout).state == "good"
    graph.write_text(text.replace("      - data/video.py\n", "      - data/gone.py\n"))
    finding = bad(workspace_checks.graph, checkout)
    assert "in flow (flow lacks data/video.py, lists data/gone.py in vain)" in finding.found
    assert finding.remedy == "clevrcast deps --write"
    graph.write_text(text + "  - [")
    finding = bad(workspace_checks.graph, checkout)
    assert finding.found.startswith("dvc.yaml cannot be read")
    assert finding.remedy == "git checkout dvc.yaml"
    graph.write_text(text)
    (checkout / "stages/flow.py").write_text("import data.video\ndef (:\n")
    assert "stages/flow.py, line 2: invalid syntax" in bad(workspace_checks.graph, checkout).found


def test_settings_of_dvc(checkout: Path) -> None:
    assert only(workspace_checks.dvc_settings, checkout).state == "good"
    (checkout / ".dvc/config.local").write_text("[cache]\n    type = copy\n")
    (finding,) = off(workspace_checks.dvc_settings, checkout)
    assert finding.remedy == "dvc config cache.type hardlink,symlink"


def test_a_read_only_workspace_is_one_line(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a disk that is mounted read-only answers; root may write anywhere else."""

    def refused(*_: object, **__: object) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    looks = (workspace_checks.can_be_written, machine.hard_links, machine.file_locks)
    (finding,) = [f for look in looks for f in off(look, checkout)]
    assert f"nothing can be written in {checkout}" in finding.found
    assert "remount" in finding.remedy


def test_a_workspace_of_somebody_else(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Really, by permissions: as another user where the tests are root's."""
    monkeypatch.chdir(checkout)  # whose parents another user may not enter
    for folder in (checkout, checkout / ".dvc", checkout / ".dvc/tmp"):
        folder.chmod(0o555)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        finding = bad(workspace_checks.can_be_written, Path())
    finally:
        if root:
            os.seteuid(0)
        for folder in (checkout, checkout / ".dvc", checkout / ".dvc/tmp"):
            folder.chmod(0o755)
    assert f"nothing can be written in {checkout} and 2 more: " in finding.found
    assert "sudo chown" in finding.remedy


def test_quarantine_and_what_was_left_in_the_middle(checkout: Path) -> None:
    assert only(workspace_checks.quarantine, checkout).state == "good"
    assert only(workspace_checks.unfinished, checkout).state == "good"
    folder = checkout / ".work/decode/f00d"
    Plan("decode", "videos", {}, (), time.time()).save(folder)
    (folder / "abc").mkdir()
    (folder / "abc" / MARKER).write_text(json.dumps({"bad": [{"id": 7, "reason": "it is empty"}]}))
    (folder / ".abd.building").mkdir()
    finding = only(workspace_checks.quarantine, checkout)
    assert finding.found == "decode: 1 in quarantine, the first is 7: it is empty"
    assert "clevrcast retry-failed decode" in finding.remedy
    finding = only(workspace_checks.unfinished, checkout)
    assert finding.found == "1 units of decode were begun and are built by nobody now"
    assert "clevrcast clean" in finding.remedy
    with lease(folder / "abd.lock", "a unit"):
        assert only(workspace_checks.unfinished, checkout).state == "good"
        assert "1 units" in only(locks.at_work, checkout).found


# Locks.


def test_who_is_at_work(checkout: Path) -> None:
    work = checkout / ".work"
    assert only(locks.at_work, checkout).found == "no run, stage, device or unit is leased"
    with lease(work / "flow/stage.lock", ""), lease(work / "devices/cuda:1.lock", ""), lease(work / "run.lock", ""):
        told = only(locks.at_work, checkout).found
    for what in ("clevrcast run", "the stage flow", "the device cuda:1"):
        assert f"{what} (pid {os.getpid()} on " in told
    assert only(locks.at_work, checkout).found == "no run, stage, device or unit is leased"


@contextmanager
def sleeper(folder: Path, *words: str) -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", *words], cwd=folder)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def rwlock(checkout: Path, pid: int) -> None:
    entry = {"pid": pid, "cmd": "dvc repro flow"}
    body = {"write": {f"{checkout}/artifacts/flow": entry}, "read": {f"{checkout}/artifacts/acquire": [entry]}}
    (checkout / ".dvc/tmp/rwlock").write_text(json.dumps(body))


def test_an_entry_that_a_dead_process_left_in_the_list_of_paths(checkout: Path) -> None:
    with sleeper(checkout) as pid:
        pass
    rwlock(checkout, pid)
    finding = only(locks.dvc_paths, checkout)
    assert finding.state == "warning"  # DVC drops it where it is in the way
    assert f"process {pid} (dvc repro flow) has artifacts/acquire, artifacts/flow locked" in finding.found
    assert "not on this host" in finding.found
    assert f"rm {checkout}/.dvc/tmp/rwlock" in finding.remedy


def test_an_entry_whose_process_id_has_gone_to_another_program(checkout: Path, tmp_path: Path) -> None:
    with sleeper(checkout) as pid:
        rwlock(checkout, pid)
        finding = bad(locks.dvc_paths, checkout)
        assert f"but {pid} is now {pid} (" in finding.found
        assert finding.remedy == f"where no dvc runs on any host: rm {checkout}/.dvc/tmp/rwlock"
    with subprocess.Popen(["true"]) as ended:  # a zombie, as a container without an init keeps it
        while locks.process(ended.pid) != f"{ended.pid} (ended, but still listed)":
            time.sleep(0.01)
        rwlock(checkout, ended.pid)
        assert "ended, but still listed" in bad(locks.dvc_paths, checkout).found
    with sleeper(checkout, "dvc", "repro") as pid:
        rwlock(checkout, pid)
        assert only(locks.dvc_paths, checkout) == good(f"in use by {pid} (dvc repro flow)")
    with sleeper(tmp_path, "dvc", "repro") as pid:  # of another workspace
        rwlock(checkout, pid)
        bad(locks.dvc_paths, checkout)


@pytest.mark.parametrize("text", ["", '{"write": {"/a', "[]", '{"write": {"/a": {"cmd": "repro"}}}'])
def test_a_list_of_paths_that_cannot_be_read(checkout: Path, text: str) -> None:
    assert only(locks.dvc_paths, checkout).state == "good"
    (checkout / ".dvc/tmp/rwlock").write_text(text)
    finding = bad(locks.dvc_paths, checkout)
    assert "DVC refuses to go on" in finding.found
    assert "rm " in finding.remedy


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="Linux tells who holds a lock")
def test_the_lock_of_dvc(checkout: Path) -> None:
    file = checkout / ".dvc/tmp/lock"
    file.write_text(" 4711\n")
    assert only(locks.dvc_lock, checkout).state == "good"  # a file that stays is no lock
    program = (
        "import sys, zc.lockfile, time\n"
        "held = zc.lockfile.LockFile(sys.argv[1]); print('held', flush=True); time.sleep(60)"
    )
    for words, state in ((["dvc"], "good"), ([], "warning")):
        command = [sys.executable, "-c", program, str(file), *words]
        with subprocess.Popen(command, cwd=checkout, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            finding = only(locks.dvc_lock, checkout)
            process.kill()
        assert finding.state == state
        assert f"held by {process.pid} (" in finding.found
    (checkout / ".dvc/config.local").write_text("[core]\n    hardlink_lock = true\n")
    assert f"rm {file}" in only(locks.dvc_lock, checkout).remedy
