"""acquire from the official archives gives what a local copy gives, moves as little as it can and survives kills."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

from data.catalog import Catalog
from data.clevrer import SPLITS, annotation_path, proposal_path, video_path
from data.download import Remote, probe
from data.errors import ArchiveError, DownloadError, SourceError
from pipeline.errors import DiskFullError, ParamsError, PipelineError
from pipeline.params import parse_params, read_yaml
from pipeline.stage import Job
from pipeline.upkeep import ask_again
from stages.acquire import run
from tests.hostile_server import Served, Server, serve

IDS = (*range(12), 10000, 10001, 15000)
VIDEOS = {"train": "0-3,5", "validation": 10000, "test": 15000}
WANTED = (0, 1, 2, 3, 5, 10000, 15000)
TRAIN = "videos/train/video_train.zip"


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as server:
        yield server


@pytest.fixture(autouse=True)
def workspace(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "workspace"
    folder.mkdir()
    shutil.copy(root / "dvc.yaml", folder)
    for name in ("data", "models", "stages", "pipeline"):
        (folder / name).symlink_to(root / name)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CLEVRCAST_WORKERS", "1")
    return folder


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Files in the official layout; `acquire` looks into none of them."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "dataset"
    for video in IDS:
        split = split_of(video)
        write(folder / video_path(split, video), rng.bytes(40_000 if video < 2 else 100_000))
        if split != "test":
            write(folder / annotation_path(split, video), json.dumps({"scene_index": video}).encode())
        if video not in (3, 15000):
            write(folder / proposal_path(split, video), json.dumps({"video_index": video}).encode())
    return folder


def split_of(video: int) -> Any:
    return "train" if video < 10000 else "validation" if video < 15000 else "test"


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def official(server: Server, dataset: Path, **how: Any) -> dict[str, Served]:
    """Serve the data set as the archives in which it is released."""
    served = {}
    for kind in ("video", "annotation"):
        for split in SPLITS:
            files = sorted((dataset / f"{kind}s" / split).rglob("*.*"))
            path = f"{kind}s/{split}/{kind}_{split}.zip"
            served[path] = server.add(path, pack(files, dataset / f"{kind}s" / split), **how)
    proposals = sorted((dataset / "proposals").rglob("*.json"))
    served["derender_proposals.zip"] = server.add("derender_proposals.zip", pack(proposals, dataset), **how)
    return served


def pack(files: list[Path], top: Path) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for folder in sorted({f.parent for f in files}):
            archive.mkdir(str(folder.relative_to(top)))
        for file in files:
            archive.write(file, file.relative_to(top))
    return out.getvalue()


def parameters(root: Path, source: dict[str, Any], bad: float = 0.05) -> dict[str, Any]:
    raw = read_yaml(root / "params.yaml")
    raw["acquire"] = {"videos": VIDEOS, **source}
    raw["shards"] = {"videos": 2, "clip": 16, "max_bad_fraction": bad}
    return raw


def acquire(checkout: Path, bad: float = 0.05, **source: Any) -> tuple[Catalog, Job]:
    job = Job("acquire", "", parse_params(parameters(checkout, source, bad)), checkout, ("cpu",))
    run(job)
    return Catalog.load("artifacts/acquire"), job


def from_server(root: Path, server: Server, bad: float = 0.05, **more: Any) -> tuple[Catalog, Job]:
    return acquire(root, bad, source="clevrer", url=server.url, **more)


def from_folder(root: Path, dataset: Path, **more: Any) -> Catalog:
    return acquire(root, source="local", root=str(dataset), **more)[0]


def tree(folder: Path) -> dict[str, bytes]:
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "manifest.json")
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


@pytest.mark.parametrize("how", ["as it comes", "ranges ignored", "no validator"])
def test_the_same_catalog_as_from_a_folder(
    server: Server, dataset: Path, root: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    local = from_folder(root, dataset)
    files = tree(Path("artifacts/acquire"))
    more = {"ranges ignored": {"ranges": False}, "no validator": {"etag": ""}}.get(how, {})
    served = official(server, dataset, **more)
    remote, _ = from_server(root, server)
    assert remote.videos == local.videos
    assert remote.quarantine == local.quarantine == ()
    assert tree(Path("artifacts/acquire")) == files
    said = capsys.readouterr().out
    assert ("the server does not send parts" in said) is (how == "ranges ignored")
    assert " to download" in said
    assert served["videos/test/video_test.zip"].sent > 0
    assert served["derender_proposals.zip"].asked == []
    before = server.sent
    _, job = from_server(root, server)  # everything is there: only probes, and directories that have no validator
    assert job.made == 0
    assert server.sent - before < (2000 if how == "as it comes" else 10**9)


@pytest.mark.real
def test_real_videos_come_out_as_they_are(server: Server, shared: Path, root: Path) -> None:
    videos = {"train": "0-11,1000,2000", "test": 10000}
    local = from_folder(root, shared / "clevrer", videos=videos)
    official(server, shared / "clevrer")
    remote, _ = from_server(root, server, videos=videos)
    assert remote.videos == local.videos
    assert len(remote.videos) == 15


def test_a_few_videos_move_a_few_bytes(server: Server, root: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    big = tmp_path / "big.zip"
    with zipfile.ZipFile(big, "w") as archive:
        for video in range(1000):
            archive.writestr(video_path("train", video).name, rng.bytes(60_000))
    file = server.add(TRAIN, big)
    server.add("annotations/train/annotation_train.zip", pack([], tmp_path))
    catalog, _ = from_server(root, server, videos={"train": "0-2", "test": "3-4"})
    assert [v.id for v in catalog.videos] == [0, 1, 2, 3, 4]
    assert file.sent < len(file) / 100, f"{file.sent} of {len(file)}"


def test_over_half_of_an_archive_is_downloaded_whole(server: Server, dataset: Path, root: Path) -> None:
    served = official(server, dataset)[TRAIN]
    from_server(root, server, videos={"train": "2-10", "test": 0})
    assert [a for a in served.asked if a == f"bytes=0-{len(served) - 1}"]
    assert served.sent < len(served) + 70_000
    before = served.sent
    catalog, job = from_server(root, server, videos={"train": "2-11", "test": "0-1"})  # all is here now
    assert len(catalog.videos) == 12
    assert job.made == 2
    assert served.sent == before + 1


def test_a_changed_video_changes_its_unit_only(server: Server, dataset: Path, root: Path) -> None:
    official(server, dataset)
    from_server(root, server)
    write(dataset / video_path("train", 3), b"another" * 1000)
    for file in official(server, dataset).values():
        file.etag = '"2"'
    catalog, job = from_server(root, server)
    assert job.made == 1
    assert catalog.videos == from_folder(root, dataset).videos


def test_an_archive_that_changes_before_it_is_here_stops_the_stage(server: Server, dataset: Path, root: Path) -> None:
    served = official(server, dataset, etag="")[TRAIN]
    everything = {"train": "0-10", "test": 11}
    from_server(root, server, videos=everything)
    write(dataset / video_path("train", 3), np.random.default_rng(9).bytes(100_000))
    served.content = pack(sorted((dataset / "videos/train").rglob("*.mp4")), dataset / "videos/train")
    with pytest.raises(ArchiveError, match="members differ"):
        from_server(root, server, videos=everything)
    catalog, _ = from_server(root, server, videos=everything)
    assert catalog.videos == from_folder(root, dataset, videos=everything).videos


# ---- damage ----


def middle(file: Served, dataset: Path, path: Any) -> int:
    """An offset in the packed bytes of a member."""
    assert isinstance(file.content, bytes)
    with zipfile.ZipFile(io.BytesIO(file.content)) as archive:
        (info,) = (i for i in archive.infolist() if i.filename.endswith(path.name))
    return info.header_offset + 30 + len(info.filename) + info.compress_size // 2


@pytest.mark.parametrize("videos", [VIDEOS, {"train": "0-10", "test": 11}], ids=["ranged", "whole"])
def test_a_member_damaged_on_the_way_is_fetched_again(
    server: Server, dataset: Path, root: Path, videos: dict[str, Any]
) -> None:
    served = official(server, dataset)[TRAIN]
    served.flips = [middle(served, dataset, video_path("train", 3))]
    catalog, _ = from_server(root, server, videos=videos)
    assert served.flips == []
    assert catalog.videos == from_folder(root, dataset, videos=videos).videos


@pytest.mark.parametrize("kind", ["video", "annotation"])
def test_a_member_damaged_on_the_server_is_quarantined_whole(
    server: Server, dataset: Path, root: Path, kind: str
) -> None:
    path = f"{kind}s/train/{kind}_train.zip"
    served = official(server, dataset)[path]
    member = (video_path if kind == "video" else annotation_path)("train", 3)
    assert isinstance(served.content, bytes)
    good = served.content
    content = bytearray(good)
    content[middle(served, dataset, member)] ^= 1
    served.content = bytes(content)
    with pytest.raises(PipelineError, match=f"1 of 7 items are bad(.|\n)*{member.name} is damaged"):
        from_server(root, server)
    assert not Path("artifacts/acquire").exists()
    catalog, _ = from_server(root, server, bad=0.2)
    assert [v.id for v in catalog.videos] == [0, 1, 2, 5, 10000, 15000]
    (item,) = catalog.quarantine
    assert item["id"] == 3
    assert f"{member.name} is damaged" in item["reason"]
    assert not [name for name in tree(Path("artifacts/acquire")) if "00003" in name]
    served.content = good  # mended: nothing but the damaged unit is made again, when asked for
    assert [item.id for item in ask_again(Path(".work"), "acquire")] == [3]
    catalog, job = from_server(root, server)
    assert (len(catalog.videos), job.made) == (7, 1)


HOSTILE: dict[str, Callable[[zipfile.ZipFile], None]] = {
    "absolute": lambda z: z.writestr("/evil.txt", b"x"),
    "dots": lambda z: z.writestr("../../../../evil.txt", b"x"),
    "link": lambda z: z.writestr(link("folder"), b"/etc"),
    "id twice": lambda z: z.writestr("again/video_00001.mp4", b"x"),
    "bomb": lambda z: z.writestr("video_00099.mp4", bytes(8 << 20), zipfile.ZIP_DEFLATED),
}


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info


@pytest.mark.parametrize(("kind", "ranges"), [*((kind, True) for kind in sorted(HOSTILE)), ("dots", False)])
def test_a_hostile_archive_gives_nothing(
    server: Server, dataset: Path, root: Path, tmp_path: Path, kind: str, ranges: bool
) -> None:
    served = official(server, dataset, ranges=ranges)[TRAIN]
    assert isinstance(served.content, bytes)
    packed = io.BytesIO(served.content)
    with zipfile.ZipFile(packed, "a") as archive:
        HOSTILE[kind](archive)
    served.content = packed.getvalue()
    before = tree(tmp_path)
    with pytest.raises(ArchiveError, match="is refused: member"):
        from_server(root, server)
    after = tree(tmp_path)
    assert {n for n in after if n not in before} <= {
        n for n in after if n.startswith("workspace/.work/acquire/archives/")
    }
    assert {n: after[n] for n in before} == before


# ---- what is missing ----


def test_missing_and_known_bad_videos_are_named(server: Server, dataset: Path, root: Path) -> None:
    write(dataset / video_path("train", 7648), b"x")
    official(server, dataset)
    catalog, _ = from_server(root, server, bad=0.5, videos={"train": "0-3,40,7648", "test": 15000})
    assert [q["id"] for q in catalog.quarantine] == [40, 7648]
    reasons = [q["reason"] for q in catalog.quarantine]
    assert "video_train.zip holds no video_00040.mp4" in reasons[0]
    assert "known to be bad" in reasons[1]
    with pytest.raises(PipelineError, match=r"2 of 7 items are bad.*allows 0"):
        from_server(root, server, videos={"train": "0-3,40,7648", "test": 15000})


def test_a_whole_split_has_to_be_whole(server: Server, root: Path, tmp_path: Path) -> None:
    for kind, suffix in (("video", "mp4"), ("annotation", "json")):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for video in range(10000, 15000):
                if kind == "video" or video != 12345:
                    archive.writestr(f"{kind}_{video}.{suffix}", b"")
        server.add(f"{kind}s/validation/{kind}_validation.zip", packed.getvalue())
    with pytest.raises(SourceError, match=r"annotation_validation\.zip holds 4999 files of the 5000.*missing is 12345"):
        from_server(root, server, videos={"test": "10000-14999"})


def test_proposals_are_optional(server: Server, dataset: Path, root: Path) -> None:
    official(server, dataset)
    from_server(root, server, proposals=True)
    manifest = json.loads(Path("artifacts/acquire/manifest.json").read_text())
    assert manifest["without_proposal"] == [3, 15000]
    found = {n for n in tree(Path("artifacts/acquire")) if n.startswith("proposals")}
    assert found == {str(proposal_path(split_of(i), i)) for i in WANTED if i not in (3, 15000)}


def test_no_space(server: Server, dataset: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    official(server, dataset)
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=400_000))
    with pytest.raises(
        DiskFullError, match=r"7 videos need 7\d\d\.\d kB, the disk that holds \.work has 400\.0 kB free"
    ):
        from_server(root, server)
    assert server.sent < 300_000  # directories: these archives are hardly larger
    assert not list(Path(".work").rglob("*.mp4"))


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"source": "clevrer", "url": "ftp://x"}, r"acquire\.url = 'ftp://x'"),
        ({"source": "clevrer", "url": "file:///etc"}, r"acquire\.url"),
        ({"source": "simulated", "proposals": True}, r"acquire\.source is simulated: only clevrer has them"),
    ],
)
def test_wrong_parameters(root: Path, section: dict[str, Any], said: str) -> None:
    with pytest.raises(ParamsError, match=said):
        parse_params(parameters(root, section))


@pytest.mark.parametrize("source", ["clevrer", "simulated"])
def test_ids_that_clevrer_does_not_have(root: Path, source: str) -> None:
    with pytest.raises(SourceError, match=r"acquire\.videos\.test: video id 20000 is outside CLEVRER's 0\.\.19999"):
        acquire(root, source=source, url="http://127.0.0.1:9", videos={"test": "19999-20000"})


def test_no_such_archive(server: Server, root: Path) -> None:
    with pytest.raises(DownloadError, match=r"video_train\.zip: the server answered 404"):
        from_server(root, server)


# ---- processes ----


def start(
    workspace: Path, root: Path, server: Server, videos: dict[str, Any], workers: int = 1
) -> subprocess.Popen[bytes]:
    raw = parameters(root, {"source": "clevrer", "url": server.url, "videos": videos})
    YAML().dump(raw, workspace / "params.yaml")
    environment = {**os.environ, "CLEVRCAST_WORKERS": str(workers)}
    return subprocess.Popen(
        [sys.executable, "-m", "stages.acquire"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def kill(process: subprocess.Popen[bytes]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_kill_9_in_a_unit_costs_that_unit(server: Server, dataset: Path, root: Path, workspace: Path) -> None:
    served = official(server, dataset, hold_after=120_000)[TRAIN]  # units have 80, 200 and 100 kB
    process = start(workspace, root, server, VIDEOS)
    assert server.held.wait(60)
    kill(process)
    assert len(list(workspace.rglob("unit.json"))) == 1
    served.hold_after, served.sent = None, 0
    catalog, job = from_server(root, server)
    assert job.made == 4
    assert 300_000 < served.sent < 302_000  # videos 2, 3 and 5, and a probe: neither 0 and 1 nor the directory again
    files = tree(Path("artifacts/acquire"))
    assert catalog.videos == from_folder(root, dataset).videos
    assert files == tree(Path("artifacts/acquire"))


def test_kill_9_in_a_whole_archive_costs_nothing_and_workers_share_it(
    server: Server, dataset: Path, root: Path, workspace: Path
) -> None:
    served = official(server, dataset, hold_after=500_000)[TRAIN]
    everything = {"train": "0-10", "test": 11}
    process = start(workspace, root, server, everything)
    assert server.held.wait(60)
    parts = workspace / ".work/acquire/archives"
    wait_for(lambda: any(f.stat().st_size == 500_000 for f in parts.glob("video_train-*.part")))
    kill(process)
    served.hold_after, served.sent = None, 0
    process = start(workspace, root, server, everything, workers=2)
    said = process.communicate()[0].decode()
    assert process.returncode == 0, said
    # What was missing, and a byte from each process that asks whether it is the same file (a late worker need not).
    assert served.sent - (len(served) - 500_000) in (1, 2)
    assert Catalog.load("artifacts/acquire").videos == from_folder(root, dataset, videos=everything).videos


def test_the_identity_of_an_archive_is_its_version(server: Server) -> None:
    server.add("f", b"abc")
    first = probe(f"{server.url}/f")
    assert first == Remote(f"{server.url}/f", 3, '"1"', "", True)
    server.files["f"].etag = '"2"'
    assert probe(f"{server.url}/f").identity != first.identity
