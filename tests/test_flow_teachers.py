"""Every registered teacher keeps the contract; RAFT's weights, frame sizes and the gate against static noise."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models.optical_flow import Raft_Small_Weights, raft_large, raft_small
from torchvision.models.optical_flow.raft import RAFT

from data.errors import ClevrcastError, WeightsError
from models.flow_teachers import TEACHERS, FlowPair, FlowTeacher, RaftTeacher, build_teacher, load_raft_weights
from models.raft_engine import RaftEngine
from models.static_gate import gate_flow, static_gate

SHARED = Path(__file__).resolve().parents[2] / "shared"
HUB = SHARED / "weights"
CHECKPOINT = HUB / "hub/checkpoints/raft_small_C_T_V1-ad48884c.pth"
SINTEL = SHARED / "flow_truth/sintel_alley_1"
H, W = 128, 160

WEIGHT_FILES = {"raft_small": CHECKPOINT.name, "raft_large": "raft_large_C_T_V2-1bb1363a.pth"}


def trained(name: str) -> object:
    """A teacher as a case of a contract test; those with weights only where their weights are."""
    if name not in WEIGHT_FILES:
        return name
    path = CHECKPOINT.with_name(WEIGHT_FILES[name])
    return pytest.param(name, marks=[pytest.mark.real, pytest.mark.skipif(not path.exists(), reason=f"needs {path}")])


EVERY_TEACHER = pytest.mark.parametrize("name", [trained(name) for name in TEACHERS])


@pytest.fixture(scope="module")
def teacher_called() -> Callable[[str], FlowTeacher]:
    built: dict[str, FlowTeacher] = {}

    def get(name: str) -> FlowTeacher:
        if name not in built:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("TORCH_HOME", os.fspath(HUB))
                built[name] = build_teacher(name, iterations=6)
        return built[name]

    return get


def texture(height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth enough to match, rich enough to be unique: uint8 (h, w, 3)."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(1, 3, height, width)
    for cells in (8, 16, 32):
        coarse = torch.rand(1, 3, cells, cells, generator=generator) - 0.5
        image += torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    return ((image[0].permute(1, 2, 0) + 1) / 2).clamp(0, 1).mul(255).to(torch.uint8)


def translating(dx: int, dy: int, count: int = 2) -> Tensor:
    """A window over a large texture; the picture moves by (dx, dy) pixels a frame."""
    big = texture(H + 64, W + 64)
    return torch.stack([big[32 - k * dy : 32 - k * dy + H, 32 - k * dx : 32 - k * dx + W] for k in range(count)])


@EVERY_TEACHER
def test_shapes_range_and_identity(name: str, teacher_called: Callable[[str], FlowTeacher]) -> None:
    teacher = teacher_called(name)
    pair = teacher(translating(2, 1, 3))
    for flow in (pair.flow_fwd, pair.flow_bwd):
        assert flow.shape == (2, 2, H, W)
        assert flow.dtype == torch.float32
        assert flow.isfinite().all()
        assert flow.abs().max() < max(H, W)
    assert teacher.name == name
    assert teacher.licence
    assert len(teacher.weights_digest) in (0, 64)


@EVERY_TEACHER
@pytest.mark.parametrize(("dx", "dy"), [(5, 0), (-3, 4)])
def test_translation_is_recovered_in_both_directions(
    name: str, dx: int, dy: int, teacher_called: Callable[[str], FlowTeacher]
) -> None:
    """Right is +dx, down is +dy; forward flow agrees with the motion and backward flow is its opposite."""
    pair = teacher_called(name)(translating(dx, dy))
    motion = torch.tensor([float(dx), float(dy)])
    inner = (..., slice(16, -16), slice(16, -16))
    torch.testing.assert_close(pair.flow_fwd[inner].mean(dim=(0, 2, 3)), motion, atol=0.25, rtol=0)
    torch.testing.assert_close(pair.flow_bwd[inner].mean(dim=(0, 2, 3)), -motion, atol=0.25, rtol=0)


@EVERY_TEACHER
def test_a_video_is_its_pairs(name: str, teacher_called: Callable[[str], FlowTeacher]) -> None:
    """Bit-equal: the engine's batches are chosen for it, and dis works pair by pair."""
    teacher, frames = teacher_called(name), translating(3, 1, 5)
    video = teacher(frames)
    for k in range(4):
        pair = teacher(frames[k : k + 2])
        assert torch.equal(video.flow_fwd[k], pair.flow_fwd[0])
        assert torch.equal(video.flow_bwd[k], pair.flow_bwd[0])


@EVERY_TEACHER
def test_a_static_video_stands_still_behind_the_gate(name: str, teacher_called: Callable[[str], FlowTeacher]) -> None:
    noise = torch.randint(-2, 3, (3, H, W, 3), generator=torch.Generator().manual_seed(1))
    frames = (texture(H, W).int() + noise).clamp(0, 255).to(torch.uint8)
    pair = gate_flow(teacher_called(name)(frames), frames)
    assert pair.flow_fwd.abs().max() == 0
    assert pair.flow_bwd.abs().max() == 0


@EVERY_TEACHER
def test_one_frame_is_refused(name: str, teacher_called: Callable[[str], FlowTeacher]) -> None:
    with pytest.raises(ValueError, match="two frames"):
        teacher_called(name)(translating(0, 0, 1))


@EVERY_TEACHER
def test_frames_too_small_are_refused_with_both_sizes(name: str, teacher_called: Callable[[str], FlowTeacher]) -> None:
    with pytest.raises(ClevrcastError, match=r"at least \d+x\d+ \(h x w\), not 12x40.*(?s:.*)teacher"):
        teacher_called(name)(torch.zeros(2, 12, 40, 3, dtype=torch.uint8))


@pytest.mark.parametrize("name", ["raft_tiny", "ptlflow:raft_small"])
def test_unknown_teachers_are_refused_by_name(name: str) -> None:
    """ptlflow's too, where no weights are named: there is no default for what is trained and what is not."""
    with pytest.raises(KeyError, match=r"raft_small.*ptlflow:NAME with weights"):
        build_teacher(name)


def random_raft(create: Callable[..., RAFT] = raft_small) -> RaftTeacher:
    torch.manual_seed(0)
    raft = create(weights=None).eval()
    return RaftTeacher("raft_small", lambda: RaftEngine(raft, iterations=1), Raft_Small_Weights.C_T_V1, "", "cpu")


def test_raft_scales_frames_as_its_weights_want_them() -> None:
    """To [-1, 1], by the transform that ships with the weights."""
    seen: list[Tensor] = []
    teacher = random_raft()

    def engine(images: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(images)
        return images[:-1, :2], images[:-1, :2]

    teacher.engine = engine  # type: ignore[assignment]
    frames = torch.zeros(2, H, W, 3, dtype=torch.uint8)
    frames[1] = 255
    teacher(frames)
    assert seen[0].aminmax() == (-1, 1)


def test_raft_pads_by_replication_and_crops() -> None:
    frames = translating(1, 0)[:, :123, :130]
    with pytest.raises(ClevrcastError, match="123x130"):
        random_raft()(frames)
    frames = torch.cat([frames, frames[:, :10]], dim=1)  # 133x130: padded to 136x136, 1 and 3 before, 2 and 3 after
    padded = np.stack([cv2.copyMakeBorder(f, 1, 2, 3, 3, cv2.BORDER_REPLICATE) for f in frames.numpy()])
    whole = random_raft()(torch.from_numpy(padded))
    cropped = random_raft()(frames)
    assert torch.equal(cropped.flow_fwd, whole.flow_fwd[..., 1:134, 3:133])
    assert torch.equal(cropped.flow_bwd, whole.flow_bwd[..., 1:134, 3:133])


def test_raft_large_runs_through_the_same_teacher() -> None:
    pair = random_raft(raft_large)(translating(1, 0)[:, :, :128])
    assert pair.flow_fwd.shape == pair.flow_bwd.shape == (1, 2, 128, 128)
    assert pair.flow_fwd.isfinite().all()


@pytest.mark.parametrize("name", ["raft_small", "raft_large"])
def test_without_network_and_file_the_three_ways_out_are_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise socket.gaierror("no network in this test")

    monkeypatch.setenv("TORCH_HOME", os.fspath(tmp_path))
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    limit = socket.getdefaulttimeout()
    with pytest.raises(WeightsError) as caught:
        build_teacher(name)
    for way_out in ("network", "TORCH_HOME", "dis", "scene"):
        assert way_out in caught.value.remedy
    assert os.fspath(tmp_path) in caught.value.message
    assert socket.getdefaulttimeout() == limit
    assert not list(tmp_path.rglob("*.pth*"))


@pytest.mark.parametrize("content", [b"", b"not weights", b"half of it", b"PK\x03\x04 cut off"])
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "hub/checkpoints" / CHECKPOINT.name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    monkeypatch.setenv("TORCH_HOME", os.fspath(tmp_path))
    with pytest.raises(WeightsError, match=CHECKPOINT.name):
        load_raft_weights(raft_small(weights=None), "raft_small")


def test_weights_of_another_model_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "hub/checkpoints" / CHECKPOINT.name
    path.parent.mkdir(parents=True)
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    monkeypatch.setenv("TORCH_HOME", os.fspath(tmp_path))
    with pytest.raises(WeightsError, match="raft_small"):
        load_raft_weights(raft_small(weights=None), "raft_small")


def untrained_file(folder: Path, seed: int = 0) -> Path:
    """Random weights of RAFT-small where torch.hub would keep the real ones."""
    path = folder / "hub/checkpoints" / CHECKPOINT.name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    torch.save(raft_small(weights=None).state_dict(), path)
    return path


def test_a_network_is_built_at_the_first_call_and_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", os.fspath(tmp_path))
    path = untrained_file(tmp_path)
    teacher = build_teacher("raft_small", iterations=1)
    assert teacher.weights_digest == teacher.identity == hashlib.sha256(path.read_bytes()).hexdigest()
    assert teacher.facts == {
        "name": "raft_small",
        "weights_sha256": teacher.weights_digest,
        "licence": RaftTeacher.licence,
    }
    assert "engine" not in vars(teacher)
    teacher(translating(0, 0))
    assert "engine" in vars(teacher)


def test_weights_that_change_after_their_digest_was_taken_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", os.fspath(tmp_path))
    untrained_file(tmp_path)
    teacher = build_teacher("raft_small", iterations=1)
    untrained_file(tmp_path, seed=1)
    with pytest.raises(WeightsError, match=teacher.weights_digest):
        teacher(translating(0, 0))


def test_dis_repeats_itself() -> None:
    """Neither a previous call nor another instance leaves a trace."""
    frames = translating(4, 2, 3)
    first = build_teacher("dis", preset="fast")
    before = first(frames)
    first(translating(-6, 1, 2))
    for again in (first(frames), build_teacher("dis", preset="fast")(frames)):
        assert torch.equal(again.flow_fwd, before.flow_fwd)
        assert torch.equal(again.flow_bwd, before.flow_bwd)


def moving_square(count: int, step: int = 4, size: int = 40) -> Tensor:
    """A plain grey square over a plain background: nothing changes inside it but at its edges."""
    frames = torch.full((count, H, W, 3), 120, dtype=torch.uint8)
    for k in range(count):
        frames[k, 40 : 40 + size, 4 + k * step : 4 + k * step + size] = 190
    return frames


def test_the_inside_of_a_plain_moving_object_is_kept() -> None:
    gate = static_gate(moving_square(24))
    for k in range(23):
        square = slice(40, 80), slice(4 + 4 * k, 44 + 4 * k)
        moved = slice(40, 80), slice(8 + 4 * k, 48 + 4 * k)
        assert gate.fwd[k][square].float().mean() > 0.98  # the blur rounds the corners
        assert gate.bwd[k][moved].float().mean() > 0.98
        assert gate.fwd[k].sum() < 1.35 * 40 * 44  # and little else


def test_two_frames_keep_an_object_whose_edges_the_radius_joins() -> None:
    frames = moving_square(2, size=16)
    middle = (0, slice(45, 51), slice(4, 20))  # the disc that closes does not reach into the corners
    assert static_gate(frames, radius=8).fwd[middle].all()
    assert static_gate(frames, radius=0).fwd[middle].float().mean() < 0.75


def test_resting_objects_are_gated_and_moving_ones_are_not() -> None:
    """Foreground alone is not motion: the second square appears at half time and rests."""
    frames = moving_square(24)
    frames[14:, 100:120, 120:140] = 30
    gate = static_gate(frames, radius=2)
    assert gate.bwd[13, 102:118, 122:138].all()  # it appears between frames 13 and 14
    assert not gate.fwd[14:, 98:122, 118:142].any()
    assert not gate.bwd[14:, 98:122, 118:142].any()
    assert gate.fwd[14:].any(dim=(1, 2)).all()


def test_gating_zeroes_what_the_gate_leaves_out_and_nothing_else() -> None:
    frames = moving_square(6)
    ones = torch.ones(5, 2, H, W)
    pair, gate = gate_flow(FlowPair(ones, 2 * ones), frames, radius=3), static_gate(frames, radius=3)
    assert torch.equal(pair.flow_fwd, gate.fwd[:, None].expand(-1, 2, -1, -1).float())
    assert torch.equal(pair.flow_bwd, 2 * gate.bwd[:, None].expand(-1, 2, -1, -1).float())


def read_flo(path: Path) -> Tensor:
    """Middlebury's format: magic 202021.25, width, height, then dx, dy per pixel."""
    content = path.read_bytes()
    assert np.frombuffer(content, "<f4", 1)[0] == np.float32(202021.25)
    w, h = np.frombuffer(content, "<i4", 2, offset=4)
    return torch.from_numpy(np.frombuffer(content, "<f4", offset=12).reshape(h, w, 2).copy()).permute(2, 0, 1)


@pytest.mark.real
@pytest.mark.skipif(not (CHECKPOINT.exists() and SINTEL.exists()), reason=f"needs {CHECKPOINT} and {SINTEL}")
def test_raft_small_on_sintel(monkeypatch: pytest.MonkeyPatch) -> None:
    """1024x436, which is not divisible by 8; a published implementation reaches an end-point error below 0.35 px."""
    monkeypatch.setenv("TORCH_HOME", os.fspath(HUB))
    names = ("frame_0002.png", "frame_0003.png")
    # Not by OpenCV, which reads no PNG in a process that imported decord before it.
    images = [next(av.open(os.fspath(SINTEL / name)).decode(video=0)).to_ndarray(format="rgb24") for name in names]
    teacher = build_teacher("raft_small", iterations=12)
    pair = teacher(torch.from_numpy(np.stack(images)))
    truth = read_flo(SINTEL / "frame_0002.flo")
    assert (pair.flow_fwd[0] - truth).norm(dim=0).mean() <= 0.35
    assert (pair.flow_bwd[0] - truth).norm(dim=0).mean() > 1.0  # the other direction is another field
