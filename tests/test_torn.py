"""What a DVC that was killed while writing has left is mended, and what people have written is not touched."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import torn
from pipeline.errors import WorkspaceError
from pipeline.health.workspace import lock_file

ENTRY = """\
  {title}:
    cmd: exec python -m stages.{title}
    deps:
    - path: stages/{title}.py
      hash: md5
      md5: 816cae3d9d13fec62316edc8f0c09cd1
      size: 51
    params:
      params.yaml:
        {title}:
          stride: 2
    outs:
    - path: artifacts/{title}
      hash: md5
      md5: 816cae3d9d13fec62316edc8f0c09cd2.dir
      size: 48
      nfiles: 1
"""
HEAD = "schema: '2.0'\nstages:\n"
WHOLE = HEAD + "".join(ENTRY.format(title=title) for title in ("decode", "train@warp"))
OTHER = WHOLE.replace("stride: 2", "stride: 3")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / ".work").mkdir()
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / ".dvc/config").write_text("[core]\n    site_cache_dir = .dvc/tmp/site\n")
    (tmp_path / "dvc.lock").write_text(WHOLE)
    return tmp_path


@pytest.mark.parametrize("before", [WHOLE, HEAD + ENTRY.format(title="decode")], ids=["again", "for the first time"])
def test_wherever_it_is_cut_off_dvc_goes_on(before: str) -> None:
    between = {
        HEAD.splitlines(keepends=True)[0],
        *(OTHER[: start.start()] for start in re.finditer("^  [a-z]", OTHER, re.M)),
    }
    for end in range(len(OTHER)):
        cut = OTHER[:end]
        if not torn.is_cut(cut, before):  # then DVC takes it, and at most lacks whole entries
            assert torn._usable(cut), cut
            assert cut in between or torn._entries(before).keys() <= torn._entries(cut).keys(), cut


@pytest.mark.parametrize(
    "text",
    [
        WHOLE,
        OTHER,
        HEAD + ENTRY.format(title="decode"),  # the others were taken out
        WHOLE.rstrip("\n"),  # an editor that ends no last line
        f"<<<<<<< HEAD\n{WHOLE}=======\n{OTHER}>>>>>>> theirs\n",
        WHOLE.replace("    deps:\n", "    deps\n", 1),
        WHOLE.replace("schema", "scheme"),
    ],
)
def test_what_people_have_written_stays(root: Path, text: str) -> None:
    torn.keep(root)
    (root / "dvc.lock").write_text(text)
    torn.mend(root)
    assert (root / "dvc.lock").read_text() == text


def test_a_cut_lock_is_put_back_and_kept(root: Path) -> None:
    said: list[str] = []
    torn.keep(root)
    for cut in ("", OTHER[:300]):
        (root / "dvc.lock").write_text(cut)
        torn.keep(root)  # takes no copy of it
        assert "clevrcast run" in next(iter(lock_file(root))).remedy
        torn.mend(root, said.append)
        assert (root / "dvc.lock").read_text() == WHOLE
        assert (root / torn.CUT).read_text() == cut
        assert f"cut off after {len(cut)} characters" in said.pop()
    (root / "dvc.lock").unlink()  # a wish to start anew
    torn.mend(root, said.append)
    assert not (root / "dvc.lock").exists()
    assert not said


def test_without_a_copy_it_says_what_to_do(root: Path) -> None:
    (root / "dvc.lock").write_text("")
    with pytest.raises(WorkspaceError, match=r"git checkout dvc\.lock"):
        torn.mend(root)


def test_nothing_is_touched_while_dvc_writes(root: Path) -> None:
    torn.keep(root)
    (root / "dvc.lock").write_text("")
    with (root / ".dvc/tmp/lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        torn.mend(root, wait=False)
    assert (root / "dvc.lock").read_text() == ""
    torn.mend(root)
    assert (root / "dvc.lock").read_text() == WHOLE


def test_claims_of_what_is_no_dvc_are_taken_out(root: Path) -> None:
    file, said = root / ".dvc/tmp/rwlock", list[str]()
    program = "import sys; print('up', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program, "dvc"], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as dvc:
        assert dvc.stdout is not None
        assert dvc.stdout.readline() == b"up\n"
        alive, gone = {"pid": dvc.pid, "cmd": "dvc"}, {"pid": os.getpid(), "cmd": "dvc repro"}  # it is pytest now
        file.write_text(json.dumps({"write": {"a": gone, "b": alive}, "read": {"c": [gone], "d": [gone, alive]}}))
        torn.mend(root, said.append)
        assert json.loads(file.read_text()) == {"write": {"b": alive}, "read": {"d": [alive]}}
        dvc.communicate()
    torn.mend(root, said.append)  # one of a process that is no more is left to DVC
    assert json.loads(file.read_text()) == {"write": {"b": alive}, "read": {"d": [alive]}}
    assert not said
    file.write_text("")
    torn.mend(root, said.append)
    assert not file.exists()
    assert "could not be read" in said[0]


def test_what_dvc_stumbles_over_or_counts_is_removed(root: Path) -> None:
    runs = root / ".dvc/cache/runs"
    (runs / "ab/empty").mkdir(parents=True)
    (runs / "ab/full").mkdir()
    (runs / "ab/full/entry").touch()
    litter = root / "artifacts/evaluate/.DvbkOnC6sJO7E6f64CkvYw.tmp"
    litter.parent.mkdir(parents=True)
    litter.touch()
    (litter.parent / "results.tmp").touch()
    torn.mend(root)
    assert [file.name for file in sorted(runs.glob("*/*"))] == ["full"]
    assert [file.name for file in litter.parent.iterdir()] == ["results.tmp"]
