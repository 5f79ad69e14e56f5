"""Downloads: whole and right after any number of breaks, never two versions in one file, hostile archives refused."""

from __future__ import annotations

import hashlib
import io
import os
import random
import signal
import struct
import subprocess
import sys
import textwrap
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.archive import LARGEST_MEMBER, Archive
from data.clevrer import SPLITS, member_id
from data.download import Remote, Retry, download, fetch, part_of, probe
from data.errors import ArchiveError, DownloadError, MemberError
from data.official import OfficialArchive, archives_for
from data.remote_zip import RangedFile, open_remote, runs
from tests.hostile_server import Server, serve

FAST = Retry(attempts=4, base=0.001, cap=0.004, timeout=5.0)
TRAIN = archives_for([0], proposals=False)[0]
CONTENT = np.random.default_rng(0).bytes(300_001)


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with serve() as server:
        yield server


@pytest.fixture
def server(running: Server) -> Server:
    running.files.clear()
    running.release.clear()
    running.held.clear()
    return running


def bring(server: Server, folder: Path, retry: Retry = FAST) -> bytes:
    remote = probe(f"{server.url}/f", retry)
    target = folder / remote.identity
    download(remote, target, lambda n: None, retry)
    return target.read_bytes()


@pytest.mark.parametrize("seed", range(25))
def test_any_number_of_breaks_gives_the_same_bytes(server: Server, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    drops = [rng.choice((0, 1, rng.randrange(40_000), rng.randrange(200_000))) for _ in range(rng.randrange(1, 30))]
    file = server.add("f", CONTENT, drops=list(drops), reset=seed % 3 == 0, refusals=[503, 500] * (seed % 2))
    assert bring(server, tmp_path, replace(FAST, attempts=len(drops) + 3)) == CONTENT
    if not file.reset:  # what arrived is not asked for again
        assert file.sent == len(CONTENT) + 1
    assert file.guards == {"", '"1"'}  # of the probe, and of everything after


def test_a_server_without_ranges_is_read_on_past_what_is_there(server: Server, tmp_path: Path) -> None:
    server.add("f", CONTENT, ranges=False, drops=[50_000, 20_000, 120_000, 119_000])
    assert not probe(f"{server.url}/f").ranges
    assert bring(server, tmp_path) == CONTENT


def test_tries_without_a_new_byte_are_numbered(server: Server, tmp_path: Path) -> None:
    file = server.add("f", CONTENT, send_at_most=100_000)
    with pytest.raises(DownloadError, match=r"4 tries in a row brought nothing at byte 100000 of 300001"):
        bring(server, tmp_path)
    assert len(file.asked) == 1 + 5
    file.send_at_most = None
    assert bring(server, tmp_path) == CONTENT
    assert file.sent == len(CONTENT) + 2


@pytest.mark.parametrize(("code", "tries"), [(404, 1), (403, 1), (429, 4), (503, 4)])
def test_refusals(server: Server, tmp_path: Path, code: int, tries: int) -> None:
    file = server.add("f", CONTENT, refusals=[code] * 10)
    with pytest.raises(DownloadError, match=str(code)):
        bring(server, tmp_path)
    assert len(file.asked) == tries


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="4 tries in a row"):
        probe("http://127.0.0.1:9/f", FAST)


@pytest.mark.parametrize("how", ["etag", "modified", "length", "content_of_one_etag"])
def test_two_versions_are_never_mixed(server: Server, tmp_path: Path, how: str) -> None:
    server.add("f", CONTENT, etag="" if how == "modified" else '"1"', modified="Mon, 01 Jan 2024 00:00:00 GMT")
    remote = probe(f"{server.url}/f", FAST)
    file = server.files["f"]
    file.drops = [100_000]
    target = tmp_path / remote.identity
    later = CONTENT[::-1]
    taken = 0

    def change(count: int) -> None:
        nonlocal taken
        taken += count
        if taken >= 100_000 and file.content == CONTENT:
            file.content = later[:-1] if how == "length" else later
            file.etag = '"2"' if how == "etag" else file.etag
            file.modified = (
                "Tue, 02 Jan 2024 00:00:00 GMT" if how in ("modified", "content_of_one_etag") else file.modified
            )

    with pytest.raises(DownloadError, match="changed on the server"):
        download(remote, target, change, FAST)
    assert not target.exists()
    if how != "content_of_one_etag":
        assert bring(server, tmp_path) == file.content


def test_a_server_that_ignores_the_guard_is_found_out(server: Server) -> None:
    server.add("f", CONTENT, etag='"1"')
    remote = probe(f"{server.url}/f", FAST)
    server.files["f"].etag = '"2"'
    stale = Remote(remote.url, remote.size, modified="", etag='W/"1"')  # a weak ETag is no guard, but is compared
    with pytest.raises(DownloadError, match=r'ETag was W/"1", is "2"'):
        list(fetch(stale, 5, 10, FAST))


def test_without_a_validator_an_old_part_is_not_trusted(server: Server, tmp_path: Path) -> None:
    file = server.add("f", CONTENT, etag="", drops=[100_000, 0, 0, 0, 0])
    with pytest.raises(DownloadError):
        bring(server, tmp_path)
    file.content = CONTENT[::-1]
    assert bring(server, tmp_path) == CONTENT[::-1]


def test_a_lie_about_the_length(server: Server, tmp_path: Path) -> None:
    server.add("f", CONTENT, claimed=len(CONTENT) + 10)
    with pytest.raises(DownloadError, match=f"at byte {len(CONTENT)} of {len(CONTENT) + 10}"):
        bring(server, tmp_path)


def test_only_http_is_spoken(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"secret")
    with pytest.raises(DownloadError, match="unknown url type"):
        probe(f"file://{tmp_path}/f", FAST)


def test_pauses_grow_to_the_cap_and_vary() -> None:
    retry = Retry(base=1.0, cap=8.0)
    for failures, longest in ((1, 1), (2, 2), (3, 4), (4, 8), (9, 8)):
        pauses = {retry.pause(failures) for _ in range(50)}
        assert len(pauses) == 50
        assert all(longest / 2 <= p <= longest for p in pauses)


def test_kill_9_costs_nothing_that_was_written(server: Server, tmp_path: Path, root: Path) -> None:
    file = server.add("f", CONTENT, hold_after=3_000)
    remote = probe(f"{server.url}/f")
    script = textwrap.dedent(
        f"""
        from pathlib import Path
        from data.download import download, probe
        remote = probe({remote.url!r})
        download(remote, Path({str(tmp_path)!r}) / remote.identity, lambda n: None)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=root)
    part = part_of(tmp_path / remote.identity)
    deadline = time.monotonic() + 30
    while not part.exists() or part.stat().st_size < 3_000:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    file.hold_after, file.sent = None, 0
    assert bring(server, tmp_path) == CONTENT
    assert file.sent == len(CONTENT) - 3_000 + 1


def test_of_two_processes_one_downloads(server: Server, tmp_path: Path, root: Path) -> None:
    file = server.add("f", CONTENT, hold_after=200_000)
    remote = probe(f"{server.url}/f")
    script = textwrap.dedent(
        f"""
        from pathlib import Path
        from data.download import Remote, download
        print("ready", flush=True)
        remote = Remote({remote.url!r}, {remote.size}, {remote.etag!r})
        download(remote, Path({str(tmp_path / "f")!r}), lambda n: print("took", n))
        """
    )

    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    first = start()
    assert server.held.wait(30)
    second = start()
    time.sleep(0.5)
    assert len(file.asked) == 2  # the probe and the first: the second waits
    server.release.set()
    assert b"took" in first.communicate()[0]
    assert second.communicate()[0] == b""
    assert (first.returncode, second.returncode) == (0, 0)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert file.sent == len(CONTENT) + 1


# ---- archives ----


def name_of(video: int) -> str:
    first = video // 1000 * 1000
    return f"video_{first:05d}-{first + 1000:05d}/video_{video:05d}.mp4"


def pack(members: dict[str, bytes] | list[tuple[zipfile.ZipInfo | str, bytes]]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items() if isinstance(members, dict) else members:
            archive.writestr(name, content)
    return out.getvalue()


GOOD = {"video_00000-01000/": b"", name_of(0): b"zero" * 100, "readme.txt": b"hello", name_of(7): CONTENT[:9000]}


def judged(archive: bytes, official: OfficialArchive = TRAIN) -> Archive:
    opened = Archive(io.BytesIO(archive), official, "it")
    opened.check_headers()
    return opened


def extract_all(archive: bytes, folder: Path) -> dict[str, bytes]:
    """What every member gives, by name."""
    opened = judged(archive)
    out = {}
    for member in opened.members.values():
        opened.extract(member, folder / str(member.id))
        out[member.name] = (folder / str(member.id)).read_bytes()
    return out


def test_members_are_found_by_pattern_at_any_depth(tmp_path: Path) -> None:
    archive = judged(pack({**GOOD, "deep/er/video_00012.mp4": b"x", "video_12.mp4": b"", "annotation_00013.json": b""}))
    assert list(archive.members) == [0, 7, 12]
    archive.extract(archive.members[7], tmp_path / "a" / "b")
    assert (tmp_path / "a/b").read_bytes() == CONTENT[:9000]


def test_proposals_go_by_two_names() -> None:
    official = archives_for([0], proposals=True)[-1]
    assert official.kind == "proposal"
    archive = judged(pack({"p/proposal_00003.json": b"{}", "p/sim_17000.json": b"{}"}), official)
    assert list(archive.members) == [3, 17000]
    with pytest.raises(ArchiveError, match=r"proposal_00003\.json' and 'sim_00003\.json' have one id"):
        judged(pack({"proposal_00003.json": b"{}", "sim_00003.json": b"{}"}), official)
    assert member_id("sim_٠٠٠٠٣.json", "proposal") is None


def info(name: str, mode: int = 0o100644) -> zipfile.ZipInfo:
    out = zipfile.ZipInfo(name)
    out.external_attr = mode << 16
    out.create_system = 3
    return out


def directory_entry(archive: bytes, name: str) -> int:
    """Offset of the member's entry in the central directory."""
    at = archive.rindex(name.encode()) - 46
    assert archive[at : at + 4] == b"PK\x01\x02"
    return at


def patched(at: int, format: str, value: int, name: str = name_of(7)) -> bytes:
    out = bytearray(pack(GOOD))
    struct.pack_into(format, out, directory_entry(bytes(out), name) + at, value)
    return bytes(out)


def both(at_local: int, at_central: int, format: str, value: int) -> bytes:
    out = bytearray(pack(GOOD))
    struct.pack_into(format, out, out.index(name_of(7).encode()) - 30 + at_local, value)
    struct.pack_into(format, out, directory_entry(bytes(out), name_of(7)) + at_central, value)
    return bytes(out)


def doubled() -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return pack([(name_of(7), b"1"), (name_of(7), b"2")])


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "absolute": (lambda: pack({**GOOD, "/tmp/video_00009.mp4": b""}), "'/tmp/video_00009.mp4' has an absolute path"),
    "dots": (lambda: pack({**GOOD, "a/../../video_00009.mp4": b""}), r"'a/\.\./\.\./video_00009\.mp4' leads out"),
    "dots, not a video": (lambda: pack({**GOOD, "../evil.sh": b""}), r"'\.\./evil\.sh' leads out"),
    "backslash": (lambda: pack({**GOOD, "..\\video_00009.mp4": b""}), "backslash or a drive"),
    "drive": (lambda: pack({**GOOD, "C:/video_00009.mp4": b""}), "'C:/video_00009.mp4' has a name with a backslash or"),
    "NUL": (lambda: pack(GOOD).replace(b"readme.txt", b"read\0e.txt"), "control characters"),
    "link": (lambda: pack([(info(name_of(7), 0o120777), b"/etc/passwd")]), r"video_00007\.mp4' is a symbolic link"),
    "device": (lambda: pack([(info("disk", 0o060666), b"")]), "'disk' is a special file"),
    "name twice": (doubled, r"video_00007\.mp4' exists twice"),
    "id twice": (lambda: pack({"a/video_00007.mp4": b"", "b/video_00007.mp4": b""}), "have one id"),
    "other split": (lambda: pack({name_of(10000): b""}), r"video_10000\.mp4' is outside its ids 0-9999"),
    "encrypted": (lambda: both(6, 8, "<H", 1), r"video_00007\.mp4' is encrypted"),
    "method": (lambda: both(8, 10, "<H", 12), "compressed by method 12"),
    "huge": (lambda: patched(24, "<I", LARGEST_MEMBER + 1), f"declares {LARGEST_MEMBER + 1} bytes"),
    "bomb": (lambda: pack({name_of(7): bytes(20 << 20)}), "more than 100-fold"),
    "overlap": (lambda: patched(20, "<I", 1 << 20), "reaches to byte"),
    "same bytes twice": (lambda: patched(42, "<I", 0), "reaches to byte"),
    "local name": (lambda: pack(GOOD).replace(b"video_00007", b"video_00008", 1), "contradicts the directory"),
    "local size": (lambda: patched(24, "<I", 9001), "contradicts the directory"),
    "local CRC": (lambda: patched(16, "<I", 1), "contradicts the directory"),
    "local method": (lambda: patched(10, "<H", 0), "is stored, but declares|contradicts the directory"),
    "offset": (lambda: patched(42, "<I", 3), "contradicts|reaches"),
    "cut end": (lambda: pack(GOOD)[:-30], "directory cannot be read"),
    "empty": (lambda: b"", "directory cannot be read"),
}


@pytest.mark.parametrize("kind", sorted(HOSTILE))
def test_hostile_archives_are_refused_and_touch_nothing(tmp_path: Path, kind: str) -> None:
    make, said = HOSTILE[kind]
    (tmp_path / "outside").write_text("as before")
    target = tmp_path / "inside" / "target"
    target.mkdir(parents=True)
    with pytest.raises(ArchiveError, match=said):
        extract_all(make(), target)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["inside", "inside/target", "outside"]
    assert not Path("/tmp/video_00009.mp4").exists()


def test_the_control_archive_is_accepted() -> None:
    assert list(judged(pack(GOOD)).members) == [0, 7]


def test_a_directory_that_claims_to_be_huge_is_not_read() -> None:
    class Claiming(io.BytesIO):
        largest = 0

        def read(self, n: int | None = -1, /) -> bytes:
            self.largest = max(self.largest, n or 0)
            return super().read(n)

    good = pack(GOOD)
    stream = Claiming(bytes(70 << 20) + good[:-10] + struct.pack("<IIH", 66 << 20, 0, 0))
    with pytest.raises(ArchiveError, match="claims to take 69206016 bytes"):
        Archive(stream, TRAIN, "it")
    assert stream.largest < 1 << 20


def test_damaged_bytes_are_a_member_error_and_leave_no_file(tmp_path: Path) -> None:
    damaged = bytearray(pack(GOOD))
    damaged[damaged.index(CONTENT[:50]) + 4000] ^= 1
    archive = judged(bytes(damaged))
    with pytest.raises(MemberError, match=r"video_00007\.mp4 is damaged: Bad CRC-32"):
        archive.extract(archive.members[7], tmp_path / "x")
    assert not list(tmp_path.iterdir())
    archive.extract(archive.members[0], tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == GOOD[name_of(0)]


@pytest.mark.parametrize("seed", range(30))
def test_random_damage_is_found_or_harmless(tmp_path: Path, seed: int) -> None:
    """No flipped byte gives another error than ours, or other bytes than the true ones."""
    rng = random.Random(seed)
    good = pack(GOOD)
    for _ in range(40):
        damaged = bytearray(good)
        for _ in range(rng.choice((1, 1, 1, 3))):
            damaged[-rng.randrange(1, 500) if rng.random() < 0.7 else rng.randrange(len(good))] = rng.randrange(256)
        try:
            given = extract_all(bytes(damaged), tmp_path)
        except ArchiveError:
            continue
        assert given.items() <= GOOD.items()


# ---- single members of a remote archive ----

COUNT, BYTES = 2000, 75_000


@pytest.fixture(scope="module")
def realistic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """150 MB in 2,000 stored members of uneven sizes: CLEVRER's proportions at a tenth of its sizes."""
    path = tmp_path_factory.mktemp("archive") / "video_train.zip"
    rng = np.random.default_rng(1)
    with zipfile.ZipFile(path, "w") as archive:
        for video in range(COUNT):
            archive.writestr(name_of(video), rng.bytes(int(rng.integers(BYTES // 2, BYTES * 3 // 2))))
    yield path
    path.unlink()


def extracted(server: Server, ids: range, folder: Path) -> dict[int, str]:
    """sha256 of members that are read by range."""
    remote = probe(f"{server.url}/f", FAST)
    archive = open_remote(remote, TRAIN, folder / "directory", FAST)
    stream = archive.stream
    assert isinstance(stream, RangedFile)
    out = {}
    for group in runs(archive.members[i] for i in ids):
        stream.prefetch(group[0].first, group[-1].end)
        for member in group:
            archive.extract(member, folder / "x")
            out[member.id] = hashlib.sha256((folder / "x").read_bytes()).hexdigest()
    return out


def truth(path: Path, ids: range) -> dict[int, str]:
    with zipfile.ZipFile(path) as archive:
        return {i: hashlib.sha256(archive.read(name_of(i))).hexdigest() for i in ids}


@pytest.mark.parametrize("drops", [(), (3000, 0, 40_000, 100_000)])
def test_five_videos_take_less_than_a_hundredth(
    server: Server, realistic: Path, tmp_path: Path, drops: tuple[int, ...]
) -> None:
    file = server.add("f", realistic, drops=list(drops))
    assert extracted(server, range(5), tmp_path) == truth(realistic, range(5))
    assert file.sent < len(file) / 100, f"{file.sent} of {len(file)}"
    if not drops:
        assert len(file.asked) == 4  # probe, tail, the rest of the directory, the members
        sent = file.sent
        extracted(server, range(5), tmp_path)  # the directory is kept
        assert file.sent - sent < 5 * BYTES * 1.5 + 1000


def test_members_far_apart_come_apart(server: Server, realistic: Path, tmp_path: Path) -> None:
    file = server.add("f", realistic)
    spread = range(0, 100, 20)  # 1.5 MB apart
    assert extracted(server, spread, tmp_path) == truth(realistic, spread)
    assert file.sent < len(file) / 100
    file = server.add("f", realistic)
    many = range(400)
    assert extracted(server, many, tmp_path) == truth(realistic, many)
    assert len(file.asked) <= 3 + 3  # 30 MB in requests of up to 16 MiB


def test_zip64_beyond_4_gb(server: Server, tmp_path: Path) -> None:
    """12 GB, nearly all of it a hole: members lie beyond what 32 bits can address."""
    path = tmp_path / "big.zip"
    ids = range(0, 9000, 3)
    with path.open("wb") as stream:
        stream.seek(12 << 30)
        with zipfile.ZipFile(stream, "w") as archive:
            for video in ids:
                archive.writestr(name_of(video), CONTENT[video : video + 3000])
    assert path.stat().st_blocks * 512 < 32 << 20
    file = server.add("f", path)
    assert b"PK\x06\x06" in file.part(len(file) - 200, len(file))
    wanted = extracted(server, ids[:5], tmp_path)
    assert wanted == {i: hashlib.sha256(CONTENT[i : i + 3000]).hexdigest() for i in ids[:5]}
    assert file.sent < 1 << 20
    path.unlink()


def test_zip64_records_of_a_small_archive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 500)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    packed = pack(GOOD)
    monkeypatch.undo()
    assert b"PK\x06\x06" in packed
    archive = judged(packed)
    archive.extract(archive.members[7], tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT[:9000]


def test_the_official_archives() -> None:
    assert [a.path for a in archives_for([0, 10000, 15000], proposals=True)] == [
        "videos/train/video_train.zip",
        "annotations/train/annotation_train.zip",
        "videos/validation/video_validation.zip",
        "annotations/validation/annotation_validation.zip",
        "videos/test/video_test.zip",
        "derender_proposals.zip",
    ]
    assert [a.path for a in archives_for([19999], proposals=False)] == ["videos/test/video_test.zip"]
    assert {len(a.ids) for a in archives_for([0, 10000, 15000], proposals=True)} == {10000, 5000, 20000}
    assert SPLITS["test"][1] == 20000
