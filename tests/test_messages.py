"""What a user meets on a bad day ends in one clear message with what to do, and in the documented exit code."""

from __future__ import annotations

import errno
import json
import os
import re
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import dag, errors, running
from pipeline.children import API
from pipeline.cli import main
from pipeline.errors import PipelineError, explained
from pipeline.events import Events
from pipeline.journal import lease
from pipeline.notify import HOOK, told_if_it_fails
from tests.workspace import Workspace

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")  # within DVC
Said = Callable[..., tuple[int, str]]


@pytest.fixture
def say(stub: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Said]:
    """Runs a command in the workspace: its exit code and what it printed on stderr, one message with one remedy."""
    params = stub.folder / "params.yaml"
    before = params.read_text()
    monkeypatch.chdir(stub.folder)
    monkeypatch.setenv("CLEVRCAST_GPUS", "")
    monkeypatch.delenv(API, raising=False)

    def run(*command: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(command)
        said = capsys.readouterr().err
        assert said.count("what to do:") == 1, said
        return code, said

    yield run
    params.write_text(before)


def test_a_second_run_of_a_workspace(say: Said) -> None:
    with lease(running.RUN_LOCK, "this workspace"):
        code, said = say("run")
    assert code == 3
    assert f"this workspace is being built by another process (pid {os.getpid()} on " in said


def test_no_git(say: Said, stub: Workspace) -> None:
    git = stub.folder / ".git"
    git.rename(stub.folder / ".git-away")
    try:
        for command in (["run"], ["plan"], ["experiment", "x", "--set", "flow.iterations=3"]):
            code, said = say(*command)
            assert code == 5
            assert "git init" in said
    finally:
        (stub.folder / ".git-away").rename(git)


def test_a_lock_that_another_host_left(
    say: Said, stub: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The number of a process of that host is the number of another one here, which is no DVC."""
    entry = {"pid": os.getpid(), "cmd": "dvc repro, elsewhere"}
    stub.set("flow.iterations", 13)
    (stub.folder / ".dvc/tmp/rwlock").write_text(
        json.dumps({"write": {str(stub.folder / "artifacts/flow"): entry}, "read": {}})
    )
    assert main(["run", "flow"]) == 0
    assert "flow: ran" in capsys.readouterr().out
    assert "elsewhere" not in (stub.folder / ".dvc/tmp/rwlock").read_text()


@pytest.mark.parametrize(
    ("number", "code", "told"),
    [
        (errno.EROFS, 5, "mount the file system for writing"),
        (errno.ENOLCK, 5, "has no locks"),
        (errno.ENOSPC, 4, "full"),
    ],
)
def test_a_machine_that_does_not_play_along(
    say: Said, monkeypatch: pytest.MonkeyPatch, number: int, code: int, told: str
) -> None:
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number), ".work/run.lock")

    monkeypatch.setattr("pipeline.journal.fcntl.flock", fails)
    exit_code, said = say("run")
    assert exit_code == code
    assert told in said


@pytest.mark.parametrize(("message", "code"), [("database or disk is full", 4), ("database is locked", 5)])
def test_records_of_dvc_that_cannot_be_opened(
    say: Said, monkeypatch: pytest.MonkeyPatch, message: str, code: int
) -> None:
    def fails(_: str) -> None:
        raise sqlite3.OperationalError(message)

    monkeypatch.setattr(dag, "Repo", fails)
    assert say("plan")[0] == code


def test_a_server_that_does_not_answer(say: Said, stub: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API, "http://127.0.0.1:9/api")
    stub.set("flow.iterations", 14)
    code, said = say("run")
    assert code == 5
    assert "no Prefect server answers at PREFECT_API_URL=http://127.0.0.1:9/api" in said


def test_wrong_parameters_stop_a_run_before_it_begins(say: Said, stub: Workspace) -> None:
    stub.set("flow.iterations", "many")
    code, said = say("run")
    assert code == 2
    assert "flow.iterations" in said


def test_targets_and_experiments_that_are_none(say: Said) -> None:
    assert "there is no stage flaw" in say("run", "flaw")[1]
    assert say("experiment", "../x")[0] == 2
    assert say("experiment", "x", "--set", "flow.iteration=3")[0] == 2
    assert say("experiment", "x", "--set", "flow.iterations")[0] == 2
    assert "has no values" in say("experiment", "x", "--over", "flow.iterations=[]")[1]


def test_what_is_no_fault_of_the_machine_is_not_explained() -> None:
    assert explained(OSError(errno.ECONNRESET, "reset"), Path(), "reading") is None


def test_events_are_lines_of_json_and_the_old_ones_are_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.events.MOST_BYTES", 300)
    events = Events(tmp_path / "logs/events.jsonl")
    for number in range(5):
        events.tell("stage ended", stage=f"s{number}", log=Path("a"))
    files = [tmp_path / "logs/events.jsonl.1", tmp_path / "logs/events.jsonl"]
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert lines[-1]["stage"] == "s4"
    assert {"time", "host", "pid", "run", "event"} < lines[0].keys()
    (tmp_path / "file").touch()
    broken = Events(tmp_path / "file/events.jsonl")
    broken.tell("a")
    broken.tell("b")
    assert capsys.readouterr().err.count("not written any more") == 1


def test_the_hook_is_told_of_failures_and_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = "import sys; open(sys.argv[1], 'w').write(sys.stdin.read())"
    monkeypatch.setenv(HOOK, f"{sys.executable} -c '{program.replace(chr(39), chr(34))}' '{tmp_path}/a b.json'")
    with pytest.raises(PipelineError), told_if_it_fails("run"):
        raise PipelineError("it broke", remedy="mend it")
    told = json.loads((tmp_path / "a b.json").read_text())
    assert told["error"] == "it broke\n  what to do: mend it"
    assert told["exit_code"] == 1
    monkeypatch.setenv(HOOK, "/no/such/program")
    with pytest.raises(PipelineError), told_if_it_fails("run"):
        raise PipelineError("it broke", remedy="mend it")
    assert "nobody was told" in capsys.readouterr().err


def test_exit_codes_are_documented(root: Path) -> None:
    text = (root / "docs/orchestration.md").read_text().split("## Exit codes")[1]
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    known = {
        kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PipelineError)
    }
    assert listed == known | {0, errors.DEFECT}
