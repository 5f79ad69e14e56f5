"""ptlflow's networks in a process of another environment: what reaches them, what comes back, and every way to fail.

Most of it against a small stand-in for the package (`fake_ptlflow`); the real one where ``CLEVRCAST_PTLFLOW_PYTHON``
names a Python that has it.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fake_ptlflow
import pytest
import torch
from torch import Tensor

from data.errors import ClevrcastError
from models import ptlflow_server
from models.flow_teachers import build_teacher
from models.ptlflow_server import Network, Options, Refusal, download, licence, receive, send
from models.ptlflow_teacher import PYTHON, PtlflowTeacher
from pipeline.code import closure

SHARED = Path(__file__).resolve().parents[2] / "shared"
CHECKPOINT = SHARED / "weights/hub/checkpoints/raft_small_C_T_V1-ad48884c.pth"
H, W = 12, 20


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The stand-in, on the path of every process that is started meanwhile."""
    folder = fake_ptlflow.write(tmp_path_factory.mktemp("package"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.fspath(folder))
        patch.setenv(PYTHON, sys.executable)
        yield folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "probe.ckpt"
    torch.save({"state_dict": {"scale": torch.tensor(3.0)}}, path)
    return path


@pytest.fixture(scope="module")
def probe(package: Path) -> PtlflowTeacher:
    return PtlflowTeacher("probe", "random", batch=2)


@pytest.fixture
def inside(package: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in importable in this process, for what needs no other."""
    monkeypatch.syspath_prepend(package)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "ptlflow"]:
        del sys.modules[name]


def options(model: str = "probe", weights: str = "random") -> Options:
    return Options(model, weights, "cpu", "float32", 4, os.getpid())


def frames_of(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, H, W, 3), dtype=torch.uint8, generator=generator)


def test_networks_get_bgr_in_0_1_and_both_directions_come_back(probe: PtlflowTeacher) -> None:
    """Four pairs in batches of two; the odd sizes stay as they are, since ptlflow's networks pad for themselves."""
    frames = frames_of(5)
    red, blue = (frames[..., c].float() / 255 for c in (0, 2))
    pair = probe(frames)
    torch.testing.assert_close(pair.flow_fwd, torch.stack([blue[:-1], red[1:]], dim=1), atol=1e-7, rtol=0)
    torch.testing.assert_close(pair.flow_bwd, torch.stack([blue[1:], red[:-1]], dim=1), atol=1e-7, rtol=0)


def test_a_video_is_its_pairs(probe: PtlflowTeacher) -> None:
    frames = frames_of(4, seed=1)
    video = probe(frames)
    for k in range(3):
        pair = probe(frames[k : k + 2])
        assert torch.equal(video.flow_fwd[k], pair.flow_fwd[0])
        assert torch.equal(video.flow_bwd[k], pair.flow_bwd[0])


def test_frames_of_any_layout_arrive_as_they_look(probe: PtlflowTeacher) -> None:
    planar = frames_of(3, seed=2).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(probe(planar).flow_fwd, probe(planar.contiguous()).flow_fwd)


def test_one_frame_is_refused(probe: PtlflowTeacher) -> None:
    with pytest.raises(ValueError, match="two frames"):
        probe(frames_of(1))


def test_random_weights_are_said_loudly(probe: PtlflowTeacher) -> None:
    assert "RANDOM, UNTRAINED" in probe.facts["warning"]
    assert probe.facts["weights"] == "random"
    assert probe.weights_digest == ""
    assert probe.identity == f"{fake_ptlflow.VERSION} {torch.__version__} random"


def test_a_checkpoint_is_named_by_its_digest(package: Path, checkpoint: Path) -> None:
    teacher = build_teacher("ptlflow:probe", weights=os.fspath(checkpoint))
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert teacher.weights_digest == digest
    assert digest in teacher.identity
    assert fake_ptlflow.VERSION in teacher.identity
    assert teacher.facts == {
        "name": "ptlflow:probe",
        "weights_sha256": digest,
        "licence": "code: Fake Public License; weights: Only for tests (ptlflow probe)",
        "weights": os.fspath(checkpoint),
        "ptlflow": fake_ptlflow.VERSION,
        "torch": torch.__version__,
    }
    frames = frames_of(2)
    assert torch.equal(teacher(frames).flow_fwd[:, 0], 3 * (frames[:1, ..., 2].float() / 255))


def test_without_a_readme_the_authors_are_named(tmp_path: Path) -> None:
    assert licence(tmp_path, "probe") == "see the model's authors; ptlflow probe"


@pytest.mark.parametrize(
    ("model", "weights", "said", "remedy", "of_weights"),
    [
        ("prob", "random", "has no model 'prob'", "did you mean probe", False),
        ("probe_large", "things", "'things' is no published checkpoint of probe_large", "none; or give a path", True),
        ("probe", "./absent.ckpt", "there is no file /.*absent.ckpt", "give a path", True),
    ],
)
def test_what_is_not_there_is_refused_with_the_way_out(
    inside: None, model: str, weights: str, said: str, remedy: str, of_weights: bool
) -> None:
    with pytest.raises(Refusal, match=said) as caught:
        Network(options(model, weights))
    assert remedy in caught.value.remedy
    assert caught.value.weights is of_weights


def test_published_checkpoints_are_downloaded_once_and_checked(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = checkpoint.read_bytes()
    good = tmp_path / f"probe-{hashlib.sha256(content).hexdigest()[:8]}.ckpt"
    bad = tmp_path / "probe-00000000.ckpt"
    for file in (good, bad):
        file.write_bytes(content)
    package = fake_ptlflow.write(tmp_path / "package", {"good": good.as_uri(), "bad": bad.as_uri()})
    monkeypatch.syspath_prepend(package)
    monkeypatch.setenv("TORCH_HOME", os.fspath(tmp_path / "home"))
    hub = tmp_path / "home/hub/checkpoints"
    try:
        network = Network(options(weights="good"))
        assert network.file == hub / good.name
        assert network.about()["weights_sha256"] == hashlib.sha256(content).hexdigest()
        good.unlink()
        assert Network(options(weights="good")).file == hub / good.name
        with pytest.raises(Refusal, match="its name says 00000000") as caught:
            Network(options(weights="bad"))
        assert caught.value.weights
        assert "TORCH_HOME" in caught.value.remedy
        with pytest.raises(Refusal, match="'god' is no published") as caught:
            Network(options(weights="god"))
        assert "did you mean good? published for probe: good, bad" in caught.value.remedy
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "ptlflow"]:
            del sys.modules[name]
    assert [f.name for f in hub.iterdir()] == [good.name]


def test_a_download_that_another_worker_finished_is_no_error(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "there.ckpt").write_bytes(b"theirs")
    download(checkpoint.as_uri(), tmp_path / "there.ckpt")
    assert (tmp_path / "there.ckpt").read_bytes() == b"theirs"


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 cut off"])
def test_a_damaged_checkpoint_is_named(inside: None, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cut.ckpt"
    path.write_bytes(content)
    network = Network(options(weights=os.fspath(path)))
    with pytest.raises(Refusal, match=r"probe cannot be built with weights .*cut\.ckpt") as caught:
        next(network.flows(bytearray(2 * H * W * 3), [2, H, W, 3]))
    assert caught.value.weights


def test_random_weights_are_the_same_ones_every_time(inside: None) -> None:
    values = []
    for _ in range(2):
        network = Network(options())
        next(network.flows(bytearray(2 * H * W * 3), [2, H, W, 3]))
        values.append(network.built.seeded)  # type: ignore[union-attr]
    assert values[0] == values[1]


def test_errors_of_the_network_are_told_and_the_process_goes_on(package: Path) -> None:
    teacher, frames = PtlflowTeacher("trouble", "random"), frames_of(2)
    for kind, said in ((1, "on 2 frames of 12x20.*RuntimeError: this network takes three"), (2, "not finite")):
        frames[0, 0, 0, 0] = kind
        with pytest.raises(ClevrcastError, match=said):
            teacher(frames)
    frames[0, 0, 0, 0] = 3
    with pytest.raises(ClevrcastError, match=r"shape \(2, 1, 2, 12, 19\), not \(2, 1, 2, 12, 20\)"):
        teacher(frames)
    frames[0, 0, 0, 0] = 0
    assert teacher(frames).flow_fwd.shape == (1, 2, H, W)
    frames[0, 0, 0, 0] = 4
    with pytest.raises(ClevrcastError, match=r"(?s)exit code 9.*out of memory, says the fake"):
        teacher(frames)
    with pytest.raises(ClevrcastError, match="exit code 9"):
        teacher(frames)


def test_a_network_that_hangs_is_killed(package: Path) -> None:
    teacher, frames = PtlflowTeacher("trouble", "random"), frames_of(2)
    frames[0, 0, 0, 0] = 0
    teacher(frames)  # what follows waits for the network alone
    frames[0, 0, 0, 0], teacher.timeout = 5, 1.0
    with pytest.raises(ClevrcastError, match="no answer within 1 s and was killed"):
        teacher(frames)
    assert teacher._process.poll() == -signal.SIGKILL


def test_a_closed_teacher_says_so_and_its_process_is_gone(package: Path) -> None:
    teacher = PtlflowTeacher("probe", "random")
    teacher.close()
    assert teacher._process.returncode == -signal.SIGKILL
    with pytest.raises(ClevrcastError, match="was closed"):
        teacher(frames_of(2))


def test_a_busy_process_dies_with_its_parent(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent is killed while the other side is inside an import and reads nothing."""
    monkeypatch.setenv("FAKE_HANG", "1")
    program = f"""
import json, os, subprocess, sys, time
options = dict(model="probe", weights="random", device="cpu", precision="float32", batch=1, parent=os.getpid())
command = [sys.executable, {ptlflow_server.__file__!r}, json.dumps(options)]
child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
assert b"among the answers" in child.stderr.readline()
print(child.pid, flush=True)
time.sleep(120)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        child = int(parent.stdout.readline())
    os.kill(child, 0)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


@pytest.mark.parametrize(
    ("python", "said"),
    [("/no/such/python", "is /no/such/python, which cannot be run"), (sys.executable, "cannot import ptlflow")],
)
def test_without_ptlflow_the_remedy_names_the_variable(
    python: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PYTHON, python)
    (tmp_path / "ptlflow.py").write_text("raise ImportError('none here')")
    monkeypatch.setenv("PYTHONPATH", os.fspath(tmp_path))
    with pytest.raises(ClevrcastError, match=said) as caught:
        PtlflowTeacher("probe", "random")
    assert PYTHON in caught.value.remedy


def test_the_program_imports_nothing_of_ours(root: Path) -> None:
    assert closure(root, "models/ptlflow_server.py") == ("models/ptlflow_server.py",)


def test_a_message_survives_and_half_a_message_is_an_end() -> None:
    stream = io.BytesIO()
    send(stream, {"a": [1, 2]}, torch.arange(3).numpy())
    whole = stream.getvalue()
    assert receive(io.BytesIO(whole)) == ({"a": [1, 2]}, torch.arange(3).numpy().tobytes())
    for cut in (0, 5, 18, len(whole) - 1):
        assert receive(io.BytesIO(whole[:cut])) is None


REAL = pytest.mark.skipif(not os.environ.get(PYTHON), reason=f"needs {PYTHON}, a Python that has ptlflow")


@pytest.mark.real
@REAL
@pytest.mark.parametrize("model", ["raft_small", "sea_raft_s"])
def test_real_networks_with_random_weights(model: str) -> None:
    """133x130 is no multiple of any stride: the networks pad and crop."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (3, 133, 130, 3), dtype=torch.uint8, generator=generator)
    teacher = PtlflowTeacher(model, "random")
    video = teacher(frames)
    for flows in (video.flow_fwd, video.flow_bwd):
        assert flows.shape == (2, 2, 133, 130)
        assert flows.isfinite().all()
    pair = teacher(frames[1:])
    torch.testing.assert_close(video.flow_fwd[1:], pair.flow_fwd, atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(video.flow_bwd[1:], pair.flow_bwd, atol=1e-2, rtol=1e-3)
    assert not torch.equal(video.flow_fwd, video.flow_bwd)


@pytest.mark.real
@REAL
def test_real_names_are_matched_and_listed() -> None:
    with pytest.raises(ClevrcastError, match="no model 'sea_raf_s'") as caught:
        PtlflowTeacher("sea_raf_s", "random")
    assert "did you mean sea_raft_s" in caught.value.remedy
    assert "waft_dav2_a2" in caught.value.remedy


@pytest.mark.real
@REAL
@pytest.mark.skipif(not CHECKPOINT.exists(), reason=f"needs {CHECKPOINT}")
def test_ptlflows_raft_with_torchvisions_weights_is_torchvisions_raft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One network in two packages: the same flow proves channels, range, directions, padding and the way there."""
    path = tmp_path / "raft_small.ckpt"
    state = torch.load(CHECKPOINT, weights_only=True)
    torch.save({"state_dict": {ptlflow_name(name): value for name, value in state.items()}}, path)
    coarse = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    big = torch.nn.functional.interpolate(coarse, (192, 192), mode="bicubic", align_corners=False).clamp(0, 1)
    picture = (big[0].permute(1, 2, 0) * 255).to(torch.uint8)
    frames = torch.stack([picture[20:156, 20:156], picture[23:159, 15:151]])
    monkeypatch.setenv("TORCH_HOME", os.fspath(SHARED / "weights"))
    ours = build_teacher("raft_small", iterations=32)(frames)  # as many as ptlflow's makes
    theirs = build_teacher("ptlflow:raft_small", weights=os.fspath(path))(frames)
    torch.testing.assert_close(theirs.flow_fwd, ours.flow_fwd, atol=2e-3, rtol=0)
    torch.testing.assert_close(theirs.flow_bwd, ours.flow_bwd, atol=2e-3, rtol=0)
    inner = theirs.flow_fwd[0, :, 16:-16, 16:-16].mean(dim=(1, 2))
    torch.testing.assert_close(inner, torch.tensor([5.0, -3.0]), atol=0.2, rtol=0)


def ptlflow_name(name: str) -> str:
    """The original's name, which ptlflow keeps, of one of torchvision's tensors."""
    for ours, theirs in (
        ("feature_encoder", "fnet"),
        ("context_encoder", "cnet"),
        (r"net\.convnormrelu\.0", "net.conv1"),
        (r"net\.conv\.", "net.conv2."),
        (r"convnormrelu(\d)\.0", r"conv\1"),
        ("motion_encoder", "encoder"),
        (r"conv([cf])(?:orr|low)(\d)\.0", r"conv\1\2"),
        (r"encoder\.conv\.0", "encoder.conv"),
        (r"recurrent_block\.convgru1", "gru"),
    ):
        name = re.sub(ours, theirs, name)
    return name
