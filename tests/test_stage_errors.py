"""What a user can get wrong ends in one clear error, and nothing half-written is taken for done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from data.clevrer import annotation_path, video_path
from pipeline import profiles
from pipeline.params import read_yaml
from tests.workspace import write_source

VIDEOS = (0, 1, 2, 15000)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in CLEVRER's layout whose pictures are noise: quick to make, and enough for every data stage."""
    return write_source(tmp_path_factory.mktemp("source"), VIDEOS)


@pytest.fixture
def workspace(root: Path, source: Path, tmp_path: Path) -> Path:
    """A workspace on a copy of that folder."""
    return make_workspace(root, source, tmp_path)


def make_workspace(root: Path, source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder / "source")
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(root / name, folder / name)
    shutil.copytree(root / "profiles", folder / "profiles")
    for name in ("data", "models", "stages", "pipeline"):
        (folder / name).symlink_to(root / name)
    profiles.apply(folder, "tiny")
    change(folder, {"acquire": {"source": "local", "root": "source"}})
    return folder


def change(workspace: Path, overlay: dict[str, object]) -> None:
    params = read_yaml(workspace / "params.yaml")
    profiles.merge(params, overlay, [])
    YAML().dump(params, workspace / "params.yaml")


def stage(workspace: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Exit code and everything printed."""
    name, *rest = arguments
    done = subprocess.run(
        [sys.executable, "-m", f"stages.{name}", *rest],
        cwd=workspace,
        env={**os.environ, "CLEVRCAST_WORKERS": "1", **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    return done.returncode, done.stdout


def good(workspace: Path, *stages: str) -> None:
    for name in stages:
        code, said = stage(workspace, *name.split())
        assert code == 0, said


def clear(said: str) -> str:
    """The message, having checked that it is one and no traceback."""
    assert "Traceback" not in said
    assert said.count("what to do:") == 1, said
    return said


def test_a_wrong_parameter(workspace: Path) -> None:
    change(workspace, {"decode": {"stride": 0}})
    code, said = stage(workspace, "acquire")
    assert code == 2
    assert "decode.stride = 0" in clear(said)
    assert not (workspace / "artifacts").exists()


def test_a_stage_before_its_input(workspace: Path) -> None:
    code, said = stage(workspace, "decode")
    assert code == 1
    assert "artifacts/acquire holds no manifest.json" in clear(said)


def test_no_such_folder(workspace: Path) -> None:
    change(workspace, {"acquire": {"root": "elsewhere"}})
    code, said = stage(workspace, "acquire")
    assert code == 1
    assert "elsewhere" in clear(said)


def test_too_many_listed_videos_are_missing(workspace: Path) -> None:
    change(workspace, {"acquire": {"videos": {"train": "0-5"}}})
    code, said = stage(workspace, "acquire")
    assert code == 1
    assert "3 of 7 items are bad" in clear(said)
    assert "no video_00003.mp4" in said


def test_an_id_in_two_splits(workspace: Path) -> None:
    change(workspace, {"acquire": {"videos": {"test": "2,15000"}}})
    code, said = stage(workspace, "acquire")
    assert code == 1
    assert "gives id 2 to" in clear(said)


def test_an_unreadable_video_is_quarantined_or_stops_the_stage(workspace: Path) -> None:
    victim = workspace / "source" / video_path("train", 1)
    victim.write_bytes(victim.read_bytes()[:700])
    good(workspace, "acquire")
    code, said = stage(workspace, "decode")
    assert code == 1
    assert "1 of 4 items are bad" in clear(said)
    assert "video_00001.mp4" in said
    assert not (workspace / "artifacts/decode/manifest.json").exists()
    change(workspace, {"shards": {"max_bad_fraction": 0.5}})
    good(workspace, "acquire", "decode")
    manifest = json.loads((workspace / "artifacts/decode/manifest.json").read_text())
    assert [q["id"] for q in manifest["quarantine"]] == [1]
    assert "video_00001.mp4" in manifest["quarantine"][0]["reason"]
    assert [i for shard in manifest["shards"] for i in shard["ids"]] == [0, 2, 15000]


def test_a_missing_annotation_is_listed_and_stops_the_teacher_that_needs_it(workspace: Path) -> None:
    (workspace / "source" / annotation_path("train", 2)).unlink()
    good(workspace, "acquire", "label")
    assert json.loads((workspace / "artifacts/label/manifest.json").read_text())["unlabelled"] == [2]
    change(workspace, {"flow": {"teacher": "scene"}})
    code, said = stage(workspace, "flow")
    assert code == 1
    assert "video 2 has no labels, which the scene teacher copies" in clear(said)


def test_a_broken_annotation_names_file_and_field(workspace: Path) -> None:
    victim = workspace / "source" / annotation_path("train", 0)
    victim.write_text(victim.read_text().replace('"collision"', '"collisions"'))
    good(workspace, "acquire")
    code, said = stage(workspace, "label")
    assert code == 1
    assert "annotation_00000.json: collision is 'absent'" in clear(said)


def test_absent_weights_name_the_three_ways_out(workspace: Path, tmp_path: Path) -> None:
    change(workspace, {"flow": {"teacher": "raft_small", "resolution": [128, 192]}})
    good(workspace, "acquire", "label")
    code, said = stage(workspace, "flow", TORCH_HOME=str(tmp_path / "empty"), https_proxy="http://127.0.0.1:9")
    assert code == 1
    said = clear(said)
    assert "raft_small" in said
    for way in ("network", "TORCH_HOME", "dis"):
        assert way in said
    assert not (workspace / "artifacts/flow").exists()


@pytest.fixture
def small_disk(tmp_path: Path, source: Path) -> Iterator[Path]:
    """A file system that holds the source and half a copy of it."""
    size = sum(-(-f.stat().st_size // 4096) * 4 for f in source.rglob("*") if f.is_file())
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2 + 200}k", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root on Linux")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def remount(disk: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(disk)], check=True)


def test_a_full_disk(root: Path, source: Path, small_disk: Path) -> None:
    workspace = make_workspace(root, source, small_disk)
    code, said = stage(workspace, "acquire")
    assert code == 4, said
    assert ".work/acquire" in clear(said)
    assert "is full" in said
    assert not (workspace / "artifacts/acquire").exists()
    remount(small_disk, "size=50m")
    good(workspace, "acquire", "decode")


def test_a_disk_that_fills_up_in_the_middle_of_a_shard(root: Path, source: Path, small_disk: Path) -> None:
    """By files, not by bytes, so that the estimate beforehand has nothing to object to."""
    remount(small_disk, "size=50m")
    workspace = make_workspace(root, source, small_disk)
    change(workspace, {"shards": {"videos": 1}})
    good(workspace, "acquire", "label", "flow")
    manifest = (workspace / "artifacts/flow/manifest.json").read_bytes()
    for folder in (".work/flow", "artifacts/flow"):
        shutil.rmtree(workspace / folder)
    used = os.statvfs(small_disk).f_files - os.statvfs(small_disk).f_ffree
    remount(small_disk, f"nr_inodes={used + 25}")
    code, said = stage(workspace, "flow")
    assert code == 4, said
    assert ".work/flow" in clear(said)
    assert "is full" in said
    assert not (workspace / "artifacts/flow").exists()
    finished = len(list((workspace / ".work/flow").glob("*/*/unit.json")))
    assert 0 < finished < len(VIDEOS)
    assert not list((workspace / ".work/flow").glob("*/.*.building"))
    remount(small_disk, f"nr_inodes={used + 60}")  # enough for the shards, too few to publish them
    code, said = stage(workspace, "flow")
    assert code == 4, said
    assert "is full" in clear(said)
    assert "while publishing what is finished" in said
    assert not (workspace / "artifacts/flow/manifest.json").exists()
    finished = len(VIDEOS)
    remount(small_disk, "nr_inodes=10000")
    code, said = stage(workspace, "flow")
    assert code == 0, said
    assert f"0 units built, {finished} found ready" in said
    assert (workspace / "artifacts/flow/manifest.json").read_bytes() == manifest


def test_work_and_artifacts_on_two_disks(workspace: Path, small_disk: Path) -> None:
    (workspace / "artifacts").symlink_to(small_disk)
    code, said = stage(workspace, "acquire")
    assert code == 5
    assert "different file systems" in clear(said)
