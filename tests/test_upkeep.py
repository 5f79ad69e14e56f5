"""Looking at stages and looking after them: inspect, verify and repair, retry-failed, adopt, clean."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.clevrer import video_path
from tests.workspace import Workspace, local_workspace, write_source

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
UNITS = 4


@pytest.fixture(scope="module")
def built(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Six videos in four shards, up to the flow; video 1 is damaged."""
    folder = tmp_path_factory.mktemp("upkeep")
    (folder / "checkout").mkdir()
    write_source(folder / "source", [*range(5), 15000])
    victim = folder / "source" / video_path("train", 1)
    shutil.copy(victim, folder / "whole.mp4")
    victim.write_bytes(victim.read_bytes()[:900])
    workspace = local_workspace(root, folder / "checkout", folder / "source", {"train": "0-4", "test": "15000"}, 2)
    workspace.set("shards.max_bad_fraction", 0.5)
    for stage in ("acquire", "decode", "label", "flow"):
        workspace.repro("-s", stage)
    workspace.commit("built")
    return workspace


def command(workspace: Workspace, *arguments: str, ok: bool = True) -> str:
    return workspace.module("pipeline.cli", *arguments, ok=ok)


def shard_of(workspace: Workspace, stage: str, name: str) -> Path:
    return next((workspace.folder / f"artifacts/{stage}/store.zarr/{name}").glob("c.1.*"))


def flip(file: Path) -> None:
    """One bit of one byte, in place and with the times as they were, as a failing disk would."""
    before = file.stat()
    file.chmod(0o644)
    with file.open("r+b") as stream:
        stream.seek(before.st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(before.st_size // 2)
        stream.write(bytes([byte ^ 4]))
    file.chmod(before.st_mode)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def newest(workspace: Workspace) -> Path:
    """Where the units of the last flow run are."""
    return max((workspace.folder / ".work/flow").glob("*/plan.json"), key=lambda plan: plan.stat().st_mtime).parent


def test_inspect_tells_state_sizes_quarantine_and_ranges(built: Workspace) -> None:
    said = json.loads(command(built, "inspect", "flow", "--json"))
    assert (said["state"], said["units"], said["finished_units"]) == ("finished", UNITS, UNITS)
    assert said["items"] == said["finished_items"] == 6
    assert [q["id"] for q in said["quarantine"]] == [1]
    assert "video_00001.mp4" in said["quarantine"][0]["reason"]
    arrays = {a["name"]: a for a in said["arrays"]}
    assert arrays["flow_fwd"]["shape"] == [19, 2, 160, 240]
    assert 0 < arrays["flow_fwd"]["greatest"] < 30, "pixels, not 1/32 pixels"
    assert said["bytes"] > 1000
    table = command(built, "inspect", "decode")
    assert "finished" in table
    assert "video_00001.mp4" in table
    overview = command(built, "inspect")
    assert all(stage in overview for stage in ("acquire", "decode", "flow"))
    assert "what to do" in command(built, "inspect", "train@nothing", ok=False)


def test_inspect_works_on_a_stage_that_was_killed(built: Workspace) -> None:
    built.set("flow.resolution", [320, 480])  # slow enough to be looked at
    stage = subprocess.Popen(
        [sys.executable, "-m", "stages.flow"],
        cwd=built.folder,
        env={**built.environment, "CLEVRCAST_EXECUTOR": "serial"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    seen = {}
    while stage.poll() is None:
        seen = json.loads(command(built, "inspect", "flow", "--json"))
        if seen["state"] == "running" and seen["finished_units"]:
            break
        time.sleep(0.05)
    assert seen["state"] == "running"
    assert seen["builders"] == [f"pid {stage.pid} on {os.uname().nodename}"]
    assert seen["seconds_left"] > 0
    stage.send_signal(signal.SIGKILL)
    stage.wait()
    said = json.loads(command(built, "inspect", "flow", "--json"))
    assert said["state"] == "unfinished"
    assert 0 < said["finished_units"] < UNITS
    assert said["seconds_left"] > 0
    built.run("git", "checkout", "-q", "params.yaml")
    built.module("stages.flow")


def test_a_flipped_bit_is_found_and_mended_by_building_one_shard(built: Workspace) -> None:
    before, lock = built.digests("flow"), (built.folder / "dvc.lock").read_bytes()
    assert "0 damaged" in command(built, "verify")
    victim = shard_of(built, "flow", "flow_fwd")
    flip(victim)
    said = command(built, "verify", ok=False)
    assert str(victim.relative_to(built.folder)) in said
    assert "verify --repair" in said
    assert json.loads(command(built, "verify", "--json", "flow", ok=False))[0]["stage"] == "flow"
    assert "0 damaged" in command(built, "verify", "decode")
    assert "repaired: flow" in command(built, "verify", "--repair")
    assert built.last_run("flow")["built"] == 1
    assert built.digests("flow") == before
    assert (built.folder / "dvc.lock").read_bytes() == lock
    assert "0 damaged" in command(built, "verify")


def test_a_damaged_manifest_and_a_lost_file_are_found_and_mended(built: Workspace) -> None:
    before = built.digests("decode")
    manifest = built.folder / "artifacts/decode/manifest.json"
    flip(manifest)
    assert "manifest.json" in command(built, "verify", ok=False)
    assert "repaired: decode" in command(built, "verify", "--repair")
    assert built.last_run("decode")["built"] == 0
    shard_of(built, "decode", "frames").unlink()
    assert "missing" in command(built, "verify", ok=False)
    assert "repaired: decode" in command(built, "verify", "--repair")
    assert built.digests("decode") == before


def test_repair_does_not_throw_away_shards_that_cannot_be_found_again(built: Workspace) -> None:
    built.run("mv", ".work/flow", "elsewhere")
    victim = shard_of(built, "flow", "flow_fwd")
    flip(victim)
    said = command(built, "verify", "--repair", "flow", ok=False)
    assert f"{UNITS} of {UNITS} shards are not in .work/flow" in said
    assert victim.exists()
    built.run("mv", "elsewhere", ".work/flow")
    assert "repaired" in command(built, "verify", "--repair", "flow")


def test_a_write_to_a_finished_shard_is_noticed_by_the_next_run(built: Workspace) -> None:
    """Without any verify: the file's time has changed, so it is hashed again, and differs."""
    before = built.digests("flow")
    victim = next(newest(built).glob("*/flow_fwd/c.0.0.0.0.0"))
    flip(victim)
    os.utime(victim)
    built.module("stages.flow")
    assert built.last_run("flow")["built"] == 1
    assert built.digests("flow") == before


def test_retry_failed_tries_the_bad_item_and_keeps_the_good_ones(built: Workspace) -> None:
    damaged = built.digests("decode")
    assert "nothing in quarantine" in command(built, "retry-failed", "acquire")
    said = command(built, "retry-failed", "decode")
    assert "trying 1 items again" in said
    assert built.last_run("decode")["built"] == 1
    assert built.digests("decode") == damaged, "it is as bad as before"


def test_adopt_proves_an_edit_on_a_sample_and_refuses_one_that_changes_results(built: Workspace) -> None:
    before = built.digests("decode")
    built.edit("stages/decode.py", "(h, w), native =", "unused = 1  # noqa\n    (h, w), native =")
    said = command(built, "adopt", "decode", "--sample", "1")
    assert "1 units came out byte for byte as before, 3 more taken over" in said
    built.repro("-s", "decode")
    assert built.last_run("decode")["built"] == 0
    assert built.digests("decode")["store.zarr/frames/zarr.json"] == before["store.zarr/frames/zarr.json"]
    shards = {name: digest for name, digest in before.items() if "/c." in name}
    assert {n: d for n, d in built.digests("decode").items() if "/c." in n} == shards
    built.edit("stages/decode.py", "if native else frames", "if native else 255 - frames")
    said = command(built, "adopt", "decode", ok=False)
    assert "comes out differently" in said
    assert "frames" in said
    built.run("git", "checkout", "-q", "stages")
    built.repro("-s", "decode")
    assert built.digests("decode") == before


def test_clean_removes_old_and_unfinished_work_only(built: Workspace) -> None:
    keep = newest(built)
    half, state = keep / ".feed.building", keep / ".feed.state"
    for folder in (half, state):
        folder.mkdir()
        (folder / "x").write_bytes(bytes(1_000_000))
    would = command(built, "clean", "--dry-run")
    assert "would free 2.0 MB" in would or "would free" in would
    assert half.exists()
    command(built, "clean")
    assert not half.exists()
    assert not state.exists()
    assert [f.parent for f in (built.folder / ".work/flow").glob("*/plan.json")] == [keep]
    assert built.repro("-s", "flow") == []
    before = built.digests("flow")
    command(built, "clean", "--all")
    assert not list((built.folder / ".work/flow").glob("*/plan.json"))
    assert built.digests("flow") == before
