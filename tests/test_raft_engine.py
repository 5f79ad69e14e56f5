"""The whole-video engine against torchvision's plain loop: bit by bit in float32, within hundredths in bfloat16."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models.optical_flow import raft_large, raft_small
from torchvision.models.optical_flow.raft import RAFT

from models.flow_teachers import load_raft_weights
from models.raft_engine import RaftEngine
from models.raft_recurrence import Recurrence

SHARED = Path(__file__).resolve().parents[2] / "shared"
CHECKPOINT = SHARED / "weights/hub/checkpoints/raft_small_C_T_V1-ad48884c.pth"
VIDEO = SHARED / "clevrer/videos/train/video_00000-01000/video_00000.mp4"
MiB = 2**20


@torch.no_grad()
def plain_loop(raft: RAFT, images: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """What everybody writes: one pair at a time, then the other direction."""
    fwd = [raft(a[None], b[None], num_flow_updates=iterations)[-1] for a, b in pairwise(images)]
    bwd = [raft(b[None], a[None], num_flow_updates=iterations)[-1] for a, b in pairwise(images)]
    return torch.cat(fwd), torch.cat(bwd)


def drifting_texture(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=generator)
    texture = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0]
    return torch.stack([texture.roll((k, 2 * k), dims=(1, 2)) for k in range(count)]) * 2 - 1


@pytest.fixture(scope="module")
def small() -> RAFT:
    torch.manual_seed(0)
    return raft_small(weights=None).eval()


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(4, 128, 128), (3, 128, 200), (3, 160, 240)])
def test_float32_is_bit_equal_to_the_plain_loop(small: RAFT, shape: tuple[int, int, int]) -> None:
    """128x128 is where PyTorch runs the update of a batch of one through another kernel than a larger batch."""
    images = drifting_texture(*shape)
    engine = RaftEngine(small, iterations=2)
    for ours, plain in zip(engine(images), plain_loop(small, images, 2), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.usefixtures("one_thread")
def test_bit_equal_with_one_thread_and_many_pairs(small: RAFT) -> None:
    """With one thread, 1x1 convolutions of 16 items and more would run through another kernel."""
    images = drifting_texture(10, 128, 136)
    engine = RaftEngine(small, iterations=1, memory_budget=1024 * MiB)
    for ours, plain in zip(engine(images), plain_loop(small, images, 1), strict=True):
        assert torch.equal(ours, plain)


def test_raft_large_is_bit_equal_too() -> None:
    torch.manual_seed(0)
    large = raft_large(weights=None).eval()  # random weights: its convex upsampling and two-way recurrence are its own
    images = drifting_texture(3, 128, 136)
    for ours, plain in zip(RaftEngine(large, iterations=2)(images), plain_loop(large, images, 2), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("budget", [1, 24 * MiB])
def test_the_memory_budget_changes_no_bit(small: RAFT, budget: int) -> None:
    images = drifting_texture(5, 128, 136)
    whole = RaftEngine(small, iterations=1, memory_budget=1024 * MiB)(images)
    for a, b in zip(RaftEngine(small, iterations=1, memory_budget=budget)(images), whole, strict=True):
        assert torch.equal(a, b)


def test_iterations_are_counted_as_torchvision_counts_them(small: RAFT) -> None:
    images = drifting_texture(2, 128, 128)
    once, twice = (RaftEngine(small, iterations=n)(images)[0] for n in (1, 2))
    assert torch.equal(once, plain_loop(small, images, 1)[0])
    assert not torch.equal(once, twice)


def test_the_model_of_the_caller_is_left_alone(small: RAFT) -> None:
    RaftEngine(small, iterations=1, precision="bfloat16")(drifting_texture(2, 128, 128))
    assert {p.dtype for p in small.parameters()} == {torch.float32}


@pytest.mark.parametrize("create", [raft_small, raft_large])
def test_bfloat16_look_up_is_the_same_look_up(create: type) -> None:
    """Before any refinement has accumulated rounding: one iteration, both directions, both radii."""
    torch.manual_seed(0)
    raft = create(weights=None).eval()
    images = drifting_texture(2, 128, 144)
    for ours, plain in zip(
        RaftEngine(raft, iterations=1, precision="bfloat16")(images), plain_loop(raft, images, 1), strict=True
    ):
        assert (ours - plain).norm(dim=1).mean() < 0.03 * plain.norm(dim=1).mean()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("create", [raft_small, raft_large])
@torch.no_grad()
def test_the_recurrence_is_the_update_block(create: type, exact: bool) -> None:
    """In float32, where the order of the sums is all that differs, over two iterations of one context."""
    torch.manual_seed(0)
    block = create(weights=None).eval().update_block
    size, taps = block.hidden_state_size, block.motion_encoder.convcorr1[0].in_channels
    channels = block.recurrent_block.convgru1.convz.in_channels - size - block.motion_encoder.conv[0].out_channels - 2
    hidden, context = torch.randn(2, size, 16, 18).tanh(), torch.randn(2, channels, 16, 18).relu()
    iterate, plain = Recurrence(block, exact=exact).start(context), hidden
    for _ in range(2):
        window, flow = torch.randn(2, taps, 16, 18), torch.randn(2, 2, 16, 18)
        hidden, delta = iterate(hidden, window, flow)
        plain, expected = block(plain, context, window, flow)
        torch.testing.assert_close(hidden, plain, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(delta, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_compiled_iterations_give_the_same_flow(small: RAFT) -> None:
    images = drifting_texture(3, 128, 144)
    plain = RaftEngine(small, iterations=2, precision="bfloat16")(images)
    compiled = RaftEngine(small, iterations=2, precision="bfloat16", compiled=True)(images)
    for a, b in zip(plain, compiled, strict=True):
        assert (a - b).norm(dim=1).mean() < 0.03 * a.norm(dim=1).mean()
    with pytest.raises(ValueError, match="compiled goes with bfloat16, not float32"):
        RaftEngine(small, compiled=True)


@pytest.mark.parametrize("shape", [(1, 3, 128, 128), (2, 3, 130, 128), (2, 3, 128, 132)])
def test_what_raft_cannot_take_is_refused(small: RAFT, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="divisible by 8"):
        RaftEngine(small)(torch.zeros(shape))


@pytest.mark.real
@pytest.mark.skipif(not (CHECKPOINT.exists() and VIDEO.exists()), reason=f"needs {CHECKPOINT} and {VIDEO}")
def test_real_weights_on_a_real_video(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 bit-equal; bfloat16 within 0.05 px of it on average, both ways."""
    monkeypatch.setenv("TORCH_HOME", os.fspath(SHARED / "weights"))
    raft = raft_small(weights=None).eval()
    load_raft_weights(raft, "raft_small")
    with av.open(os.fspath(VIDEO)) as container:
        decoded = islice(container.decode(video=0), 40, 43, 2)
        frames = np.stack([frame.to_ndarray(width=240, height=160, format="rgb24") for frame in decoded])
    images = torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1
    plain = plain_loop(raft, images, 12)
    exact = RaftEngine(raft, iterations=12)(images)
    quick = RaftEngine(raft, iterations=12, precision="bfloat16")(images)
    for a, b, c in zip(plain, exact, quick, strict=True):
        assert torch.equal(a, b)
        assert (a - c).norm(dim=1).mean() < 0.05
