"""Decoding: the right frames, the same from both decoders, every damaged file refused, and nothing that hangs or stays.

The corpus of damaged files is made in `damaged_videos`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import damaged_videos
import numpy as np
import pytest

from data.catalog import Catalog, Video
from data.clevrer import FPS, FRAMES, HEIGHT, WIDTH, video_path
from data.decoders import find_fault, read_decord, read_pyav
from data.errors import MachineError, VideoError
from data.picture import encode_video
from data.store import Store
from data.video import VideoReader
from data.worker import NoAnswerError
from pipeline.params import Params, load_params
from pipeline.stage import ARTIFACTS, Job
from pipeline.upkeep import ask_again
from stages import decode

T, H, W = 24, 64, 96

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through /proc")


def moving_square(t: int, h: int, w: int) -> np.ndarray:
    """A bright square that moves 3 px a frame, over a ramp."""
    frames = np.empty((t, h, w, 3), np.uint8)
    frames[:] = np.linspace(40, 80, w, dtype=np.uint8)[:, None]
    for k in range(t):
        frames[k, 20:40, 3 * k : 3 * k + 16] = (200, 180, 40)
    return frames


@pytest.fixture(scope="module")
def film() -> np.ndarray:
    return moving_square(T, H, W)


@pytest.fixture(scope="module")
def clip(film: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    path.write_bytes(encode_video(film, FPS))
    return path


@pytest.fixture(scope="module")
def corpus(clip: Path, film: np.ndarray) -> dict[str, bytes]:
    return damaged_videos.corpus(clip.read_bytes(), film, FPS)


@pytest.fixture(scope="module")
def reader() -> Iterator[VideoReader]:
    with VideoReader(timeout=30.0) as reader:
        yield reader


def read(reader: VideoReader, path: Path, frames: list[int], sha256: str | None = None) -> np.ndarray:
    """Frames of a film of T frames of H x W, as they are."""
    return reader.read(
        path, frames, height=H, width=W, expected_frames=T, native=(H, W), fps=FPS, expected_sha256=sha256
    )


def refusal(reader: VideoReader, path: Path, sha256: str | None = None) -> str:
    with pytest.raises(VideoError) as caught:
        read(reader, path, [0, T - 1], sha256)
    assert caught.value.message.startswith(f"{path}: ")
    return caught.value.message.removeprefix(f"{path}: ")


def test_strided_frames_are_the_right_ones(clip: Path, reader: VideoReader) -> None:
    kept = list(range(0, T, 5))
    frames = read(reader, clip, kept)
    assert frames.shape == (len(kept), H, W, 3)
    for frame, t in zip(frames, kept, strict=True):
        columns = np.flatnonzero(frame[30, :, 0] > 130)
        assert abs(columns[0] - 3 * t) <= 1


@pytest.mark.parametrize(("height", "width"), [(H, W), (32, 64), (40, 56)])
def test_both_decoders_give_the_same_bytes(clip: Path, height: int, width: int) -> None:
    request = (str(clip), list(range(0, T, 2)), height, width, T)
    np.testing.assert_array_equal(read_decord(*request), read_pyav(*request))


def test_what_comes_out_of_the_worker_is_what_the_decoder_read(clip: Path, reader: VideoReader) -> None:
    for frames in ([5], [0, 7, T - 1], list(range(T)), [3]):  # more and fewer through the same shared memory
        np.testing.assert_array_equal(read(reader, clip, frames), read_decord(str(clip), frames, H, W, T))


def test_a_size_that_decord_cannot_copy_is_served_by_pyav(clip: Path, reader: VideoReader) -> None:
    with pytest.raises(Exception, match="size must exactly match"):
        read_decord(str(clip), [0], 32, 48, T)
    frames = reader.read(clip, [0, 7], height=32, width=48, expected_frames=T, native=(H, W))
    np.testing.assert_array_equal(frames, read_pyav(str(clip), [0, 7], 32, 48, T))


def test_indices_outside_the_video_are_not_the_fault_of_the_file(clip: Path, reader: VideoReader) -> None:
    for frames in ([0, T], [-1], []):
        with pytest.raises(IndexError, match="of a video of 24"):
            read(reader, clip, frames)


@pytest.mark.real
def test_real_videos_pass_the_check_and_both_decoders_agree(shared: Path) -> None:
    for path in sorted((shared / "clevrer/videos").rglob("*.mp4"))[:3]:
        assert find_fault(str(path), (HEIGHT, WIDTH), FRAMES, FPS) is None
        for height, width in ((320, 480), (128, 192)):
            request = (str(path), [0, 2, 126], height, width, FRAMES)
            np.testing.assert_array_equal(read_decord(*request), read_pyav(*request))


# Damage


def test_every_damaged_file_is_refused_with_its_reason(
    clip: Path, corpus: dict[str, bytes], reader: VideoReader, tmp_path: Path
) -> None:
    reasons = {}
    for name, content in corpus.items():
        path = tmp_path / "bad.mp4"
        path.write_bytes(content)
        reasons[name] = refusal(reader, path)
        # Each is refused by the check: neither decoder is left to find out.
        assert "decord:" not in reasons[name]
    for name, said in {
        "empty": "empty (0 bytes)",
        "sound": "0 video streams, expected 1",
        "cut in the middle": "frames can be decoded",
        "too few frames": "holds 23, expected 24",
        "too many frames": "holds 25, expected 24",
        "times for more frames": "promises 48 frames and holds 24",
        "many frames made up": "promises 44 frames and holds 24",
        "first frame hidden": "promises 24 frames and holds 23",
        "one frame late": "frame 13 is shown at 0.56 s, expected 0.52 s (constant 25 frames/s)",
        "twice the rate": "frame 1 is shown at 0.02 s, expected 0.04 s",
        "other size": "frame 0 is 48x96 (height x width), expected 64x96",
        "turned": "turned by -90 degrees",
    }.items():
        assert said in reasons[name]
    # The reader serves the next file as if nothing had happened.
    np.testing.assert_array_equal(read(reader, clip, [4]), read_decord(str(clip), [4], H, W, T))


def test_no_file_or_no_regular_file(reader: VideoReader, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    for name in ("absent.mp4", "pipe.mp4", "folder.mp4"):
        assert "no such video" in refusal(reader, tmp_path / name, sha256="0" * 64)


def test_decord_makes_up_frames_that_a_container_promises(corpus: dict[str, bytes], tmp_path: Path) -> None:
    """Why the check exists: without it this file would have passed for one of 44 frames."""
    import decord

    path = tmp_path / "bad.mp4"
    path.write_bytes(corpus["many frames made up"])
    frames = decord.VideoReader(str(path), num_threads=1).get_batch(range(T + 20)).asnumpy()
    assert len(frames) == T + 20
    assert (frames[T:] == frames[T - 1]).all()
    with pytest.raises(decord.DECORDLimitReachedError):
        read_decord(str(path), list(range(T + 20)), H, W, T + 20)


@pytest.mark.parametrize("part", [b"mdat", b"moov"])
def test_the_digest_finds_every_flipped_bit(clip: Path, reader: VideoReader, tmp_path: Path, part: bytes) -> None:
    good = clip.read_bytes()
    promised, path = hashlib.sha256(good).hexdigest(), tmp_path / "flipped.mp4"
    path.write_bytes(good)
    np.testing.assert_array_equal(read(reader, path, [0, 9], promised), read(reader, clip, [0, 9]))
    for seed in range(40):
        path.write_bytes(damaged_videos.flipped(good, part, seed))
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        assert refusal(reader, path, promised) == (f"its sha256 is {found}, expected {promised}: the file has changed")


def test_without_a_digest_a_flip_in_the_index_is_refused_or_harmless(
    clip: Path, reader: VideoReader, tmp_path: Path
) -> None:
    """Except in ``stsd``: it holds the decoder's settings, and other valid settings give other pictures."""
    good, path, frames = clip.read_bytes(), tmp_path / "flipped.mp4", list(range(T))
    start = good.index(b"stsd")
    settings = range(start, start + damaged_videos.word(good[start - 4 :], 0))
    truth, refused = read(reader, clip, frames), 0
    for seed in range(60):
        path.write_bytes(damaged_videos.flipped(good, b"moov", seed))
        if next(i for i, (a, b) in enumerate(zip(good, path.read_bytes(), strict=True)) if a != b) in settings:
            continue
        try:
            np.testing.assert_array_equal(read(reader, path, frames), truth)
        except VideoError:
            refused += 1
    assert 10 < refused < 60


@pytest.mark.real
def test_without_a_digest_most_flips_in_a_real_stream_are_refused(shared: Path, tmp_path: Path) -> None:
    """Measured: 226 of 240 in four videos."""
    good, path = next((shared / "clevrer/videos").rglob("video_00001.mp4")).read_bytes(), tmp_path / "flipped.mp4"
    faults = []
    for seed in range(20):
        path.write_bytes(damaged_videos.flipped(good, b"mdat", seed))
        faults.append(find_fault(str(path), (HEIGHT, WIDTH), FRAMES, FPS))
    named = [fault for fault in faults if fault is not None]
    assert len(named) >= 16
    assert all("damaged" in fault or "frames" in fault for fault in named)


# The stage


@pytest.fixture
def params(root: Path) -> Params:
    params = load_params(root / "params.yaml")
    changed = {
        "shards": params.shards.model_copy(update={"videos": 8, "max_bad_fraction": 1.0}),
        "decode": params.decode.model_copy(update={"resolution": (32, 64), "stride": 8}),
    }
    return params.model_copy(update=changed)


class Workspace:
    """A folder with a catalog of videos, in which the decode stage runs in this process."""

    def __init__(self, root: Path, params: Params) -> None:
        self.root, self.params = root, params

    def place(self, videos: dict[int, bytes]) -> None:
        entries = []
        for video, content in videos.items():
            self.path(video).parent.mkdir(parents=True, exist_ok=True)
            self.path(video).write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            entries.append(Video(video, "train", str(video_path("train", video)), digest, None, None))
        Catalog(ARTIFACTS / "acquire", tuple(entries), ()).save()

    def path(self, video: int) -> Path:
        return ARTIFACTS / "acquire" / video_path("train", video)

    def decode(self) -> tuple[dict[int, np.ndarray], dict[int, tuple[str, str]]]:
        """Frames of the good videos; reason and digest of the bad."""
        decode.run(Job("decode", "", self.params, self.root, ("cpu",)))
        store = Store(ARTIFACTS / "decode")
        bad = {q["id"]: (q["reason"], q["digest"]) for q in store.manifest["quarantine"]}
        return {i: store.read("frames", i) for i in store.ids}, bad


@pytest.fixture
def workspace(root: Path, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLEVRCAST_WORKERS", "1")
    return Workspace(root, params)


def test_bad_videos_are_quarantined_and_the_others_of_their_shard_untouched(workspace: Workspace) -> None:
    film = moving_square(FRAMES, HEIGHT, WIDTH)
    good = encode_video(film, FPS)
    others = {i: encode_video(film[:, :, ::-1] if i % 2 else np.ascontiguousarray(film[::-1]), FPS) for i in (0, 9)}
    free = (i for i in range(1, 40) if i not in others)
    damaged = dict(zip(free, damaged_videos.corpus(good, film, FPS).values(), strict=False))
    assert max(damaged) < 39
    changed = {40: damaged_videos.flipped(good, b"mdat", 0), 41: damaged_videos.flipped(good, b"moov", 1), 42: b""}
    workspace.place({**others, 43: good})
    clean, bad = workspace.decode()
    assert sorted(clean) == [0, 9, 43]
    assert bad == {}

    workspace.place(dict(sorted({**others, **damaged, **dict.fromkeys([*changed, 43, 44], good)}.items())))
    for video, content in changed.items():  # after the catalog was written
        workspace.path(video).write_bytes(content)
    workspace.path(44).unlink()
    frames, bad = workspace.decode()
    assert sorted(bad) == sorted([*damaged, *changed, 44])
    assert sorted(frames) == sorted(clean)
    for video, truth in clean.items():
        np.testing.assert_array_equal(frames[video], truth)
    for video, (reason, digest) in bad.items():
        assert reason.startswith(f"VideoError: {workspace.path(video)}: ")
        assert digest == hashlib.sha256({**damaged}.get(video, good)).hexdigest(), "what acquire promised"
    for video in (40, 41):
        found = hashlib.sha256(changed[video]).hexdigest()
        assert f"its sha256 is {found}, expected {hashlib.sha256(good).hexdigest()}" in bad[video][0]

    workspace.path(40).write_bytes(good)  # mended: its quarantine ends when it is asked to, that of the others stays
    ask_again(Path(".work"), "decode")
    frames, bad = workspace.decode()
    assert 40 in frames
    assert 41 in bad
    for video, truth in clean.items():
        np.testing.assert_array_equal(frames[video], truth)


# Processes


def test_a_decoder_that_hangs_with_the_interpreter_lock_is_killed_and_the_next_one_asked(clip: Path) -> None:
    with VideoReader(timeout=3.0, decoders={"decord": damaged_videos.hang, "pyav": read_pyav}) as reader:
        np.testing.assert_array_equal(read(reader, clip, [0, 3]), read_decord(str(clip), [0, 3], H, W, T))


def test_an_over_reported_video_on_which_decord_itself_may_loop_is_survived_and_refused(
    clip: Path, reader: VideoReader, tmp_path: Path
) -> None:
    """Asked for scattered frames, decord loops for ever or (its threads race) makes frames up; both were seen."""
    noise = np.random.default_rng(0).integers(0, 255, (H, W, 3), dtype=np.uint8)
    path = tmp_path / "bad.mp4"
    path.write_bytes(damaged_videos.looping(encode_video(np.stack([np.roll(noise, 3 * t, 1) for t in range(T)]), FPS)))
    with VideoReader(timeout=3.0) as impatient:
        frames = [*range(0, T + 100, 7), T + 99]
        try:
            answer = str(len(impatient.worker.ask(damaged_videos.seek, str(path), frames, H, W, T + 100)))
        except NoAnswerError as error:
            answer = str(error)
        assert answer in (str(len(frames)), "no answer within 3 s, the decoder was killed")
        assert read(impatient, clip, [0]).shape == (1, H, W, 3)
    assert refusal(reader, path) == "it promises 124 frames and holds 24, expected 24"


@linux
def test_a_video_on_which_all_decoders_hang_is_refused_in_time(clip: Path) -> None:
    with VideoReader(timeout=2.0, decoders={"first": damaged_videos.hang}) as reader:
        read_process = reader.worker.connect()[0]  # started: its start is not part of the time limit
        worker, started = read_process.pid, time.monotonic()
        assert refusal(reader, clip) == "first: no answer within 2 s, the decoder was killed"
        assert 2 <= time.monotonic() - started < 10
        assert worker is not None
        assert not Path(f"/proc/{worker}").exists()  # not even as a zombie


def test_a_check_that_hangs_ends_too(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.video.find_fault", damaged_videos.hang)
    with VideoReader(timeout=1.0) as reader:
        assert refusal(reader, clip) == "no answer within 1 s, the decoder was killed"


def test_a_decoder_that_crashes_is_named_and_replaced(clip: Path) -> None:
    with VideoReader(timeout=30.0, decoders={"first": damaged_videos.die}) as reader:
        assert refusal(reader, clip) == f"first: the decoder died (exit code {-signal.SIGSEGV})"
    with VideoReader(timeout=30.0, decoders={"first": damaged_videos.die, "second": read_pyav}) as reader:
        assert read(reader, clip, [3]).shape == (1, H, W, 3)


def test_a_worker_that_is_killed_at_work_is_replaced_once_and_never_the_videos_fault(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / clip.name
    shutil.copy(clip, path)
    with VideoReader(timeout=30.0, decoders={"first": damaged_videos.killed_once}) as reader:
        np.testing.assert_array_equal(read(reader, path, [3]), read_pyav(str(path), [3], H, W, T))
        assert path.with_suffix(".killed").exists()
    monkeypatch.setattr("data.video.find_fault", damaged_videos.killed)
    with (
        VideoReader(timeout=30.0) as reader,
        pytest.raises(MachineError, match=rf"{clip.name}: 2 .* killed from outside \(exit code -9\)"),
    ):
        read(reader, path, [0])


def test_a_worker_that_was_killed_is_replaced(clip: Path) -> None:
    with VideoReader(timeout=30.0) as reader:
        before = read(reader, clip, [3])
        worker = reader.worker.connect()[0]
        worker.kill()
        worker.join()
        np.testing.assert_array_equal(read(reader, clip, [3]), before)


def test_a_machine_without_decoder_stops_instead_of_refusing_every_video(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "decord.py").write_text("raise ImportError('libavcodec is not where it should be')")
    monkeypatch.syspath_prepend(tmp_path)  # the worker looks where this process looks
    with VideoReader() as reader, pytest.raises(RuntimeError, match=r"ended at its start \(exit code 1\)"):
        read(reader, clip, [0])


PARENT = """
import sys
from damaged_videos import hang
from data.video import VideoReader

if __name__ == "__main__":
    reader = VideoReader(timeout=600.0, decoders={"first": hang})
    print(reader.worker.connect()[0].pid, flush=True)
    reader.read(sys.argv[1], [0], height=64, width=96, expected_frames=24, native=(64, 96))
"""


@linux
def test_a_killed_parent_leaves_no_decoder_behind_even_one_that_hangs(clip: Path, root: Path, tmp_path: Path) -> None:
    clip = Path(shutil.copy(clip, tmp_path))
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}
    with subprocess.Popen(
        [sys.executable, str(script), str(clip)], env=environment, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        wait_until(clip.with_suffix(".hanging").exists)
        family = [pid for pid in processes() if stat(pid)[1] == parent.pid]
        assert worker in family
        parent.kill()
    wait_until(lambda: all(stat(pid)[0] in "XZ" for pid in family))


def processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def stat(pid: int) -> tuple[str, int]:
    """State (X: gone, Z: dead and waiting for whoever adopted it) and parent of a process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "X", 0
    return fields[0], int(fields[1])


def wait_until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@linux
def test_reading_many_videos_takes_no_more_memory_than_reading_few(
    clip: Path, corpus: dict[str, bytes], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(corpus["cut in the middle"])

    def resident(pid: int | None) -> float:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20

    with VideoReader(timeout=30.0) as reader:
        pids = (os.getpid(), reader.worker.connect()[0].pid)
        sizes = []
        for k in range(200):
            read(reader, clip, list(range(T)))
            if k % 4 == 0:
                refusal(reader, bad)
            if k + 1 in (20, 200):
                sizes.append([resident(pid) for pid in pids])
        assert reader.worker.connect()[0].pid == pids[1]
        for few, many in zip(*sizes, strict=True):
            assert many - few < 8  # MiB; 180 films of 24 frames are 76
