"""Warping against slow, obvious references, and the direction of flow."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.warp import advect_flow, backward_warp, chain_flow, resize_flow


def sample(image: Tensor, x: float, y: float) -> Tensor:
    """Bilinear value of a (c, h, w) image at (x, y); coordinates beyond the outer pixel centres are moved there."""
    _, h, w = image.shape
    x, y = min(max(x, 0.0), w - 1.0), min(max(y, 0.0), h - 1.0)
    x0, y0 = math.floor(x), math.floor(y)
    x1, y1 = min(x0 + 1, w - 1), min(y0 + 1, h - 1)
    top = image[:, y0, x0] * (1 - (x - x0)) + image[:, y0, x1] * (x - x0)
    bottom = image[:, y1, x0] * (1 - (x - x0)) + image[:, y1, x1] * (x - x0)
    return top * (1 - (y - y0)) + bottom * (y - y0)


def slow_backward_warp(source: Tensor, flow_bwd: Tensor) -> Tensor:
    out = torch.empty_like(source)
    b, _, h, w = source.shape
    for i in range(b):
        for y in range(h):
            for x in range(w):
                dx, dy = flow_bwd[i, :, y, x].tolist()
                out[i, :, y, x] = sample(source[i], x + dx, y + dy)
    return out


def textures(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_backward_warp_is_a_bilinear_look_up() -> None:
    source = textures(2, 3, 9, 13)
    flow_bwd = 6 * torch.randn(2, 2, 9, 13, generator=torch.Generator().manual_seed(1))  # many samples fall outside
    torch.testing.assert_close(backward_warp(source, flow_bwd), slow_backward_warp(source, flow_bwd), atol=1e-5, rtol=0)


def test_no_flow_is_the_identity() -> None:
    source = textures(1, 4, 10, 7)
    torch.testing.assert_close(backward_warp(source, torch.zeros(1, 2, 10, 7)), source, atol=1e-6, rtol=0)


def test_first_channel_is_right_and_second_is_down() -> None:
    source = torch.zeros(1, 1, 5, 6)
    source[0, 0, 1, 4] = 1.0  # row 1, column 4
    flow_bwd = torch.zeros(1, 2, 5, 6)
    flow_bwd[:, 0], flow_bwd[:, 1] = 2.0, -1.0  # look two to the right and one up
    out = backward_warp(source, flow_bwd)
    assert out[0, 0].argmax() == 2 * 6 + 2
    torch.testing.assert_close(out.sum(), torch.tensor(1.0), atol=1e-5, rtol=0)


def test_only_the_backward_flow_makes_the_next_frame() -> None:
    """Something moves right and down: the flow from t+1 back to t reproduces t+1, that from t to t+1 does not."""
    frame = textures(1, 3, 40, 60)
    moved = frame.roll((2, 3), dims=(2, 3))  # 3 right, 2 down
    flow_fwd = torch.tensor([3.0, 2.0]).view(1, 2, 1, 1).expand(1, 2, 40, 60).contiguous()
    inner = (..., slice(5, -5), slice(5, -5))
    right = (backward_warp(frame, -flow_fwd) - moved)[inner].abs().mean()
    wrong = (backward_warp(frame, flow_fwd) - moved)[inner].abs().mean()
    assert right < 1e-5
    assert wrong > 0.2


def test_bfloat16_autocast_does_not_blur_coordinates() -> None:
    source = textures(1, 1, 4, 128)
    flow_bwd = torch.full((1, 2, 4, 128), 0.3)
    exact = backward_warp(source, flow_bwd)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(backward_warp(source, flow_bwd), exact)


def slow_area_shrink(flow: Tensor, factor_y: int, factor_x: int) -> Tensor:
    b, _, h, w = flow.shape
    out = torch.empty(b, 2, h // factor_y, w // factor_x)
    for y in range(h // factor_y):
        for x in range(w // factor_x):
            block = flow[:, :, y * factor_y : (y + 1) * factor_y, x * factor_x : (x + 1) * factor_x]
            mean = block.flatten(2).mean(dim=2)
            out[:, 0, y, x] = mean[:, 0] / factor_x
            out[:, 1, y, x] = mean[:, 1] / factor_y
    return out


def slow_grow(flow: Tensor, height: int, width: int) -> Tensor:
    b, _, h, w = flow.shape
    out = torch.empty(b, 2, height, width)
    for i in range(b):
        for y in range(height):
            for x in range(width):
                value = sample(flow[i], (x + 0.5) * w / width - 0.5, (y + 0.5) * h / height - 0.5)
                out[i, 0, y, x], out[i, 1, y, x] = value[0] * width / w, value[1] * height / h
    return out


def test_resize_flow_shrinks_by_areas() -> None:
    flow = textures(2, 2, 12, 20) - 0.5
    torch.testing.assert_close(resize_flow(flow, 4, 10), slow_area_shrink(flow, 3, 2), atol=1e-6, rtol=0)


def test_resize_flow_grows_bilinearly() -> None:
    flow = textures(1, 2, 5, 6) - 0.5
    torch.testing.assert_close(resize_flow(flow, 10, 24), slow_grow(flow, 10, 24), atol=1e-5, rtol=0)


def test_resized_flow_is_the_same_motion() -> None:
    """5 of 50 pixels are 1 of 10: in units of the frame nothing changes."""
    flow = torch.tensor([5.0, -3.0]).view(1, 2, 1, 1).expand(1, 2, 30, 50).contiguous()
    small = resize_flow(flow, 10, 10)
    torch.testing.assert_close(small, torch.tensor([1.0, -1.0]).view(1, 2, 1, 1).expand(1, 2, 10, 10))
    assert resize_flow(flow, 30, 50) is flow


def slow_advect(flow_bwd: Tensor, reach: int) -> Tensor:
    """Pixel by pixel: the vector found along the largest neighbour, where it is larger than one's own."""
    b, _, h, w = flow_bwd.shape
    largest = torch.zeros_like(flow_bwd)
    for i in range(b):
        for y in range(h):
            for x in range(w):
                window = flow_bwd[i, :, max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1].flatten(1)
                largest[i, :, y, x] = window[:, window.norm(dim=0).argmax()]
    arriving = slow_backward_warp(flow_bwd, largest)
    out = flow_bwd.clone()
    for i in range(b):
        for y in range(h):
            for x in range(w):
                if arriving[i, :, y, x].norm() > flow_bwd[i, :, y, x].norm():
                    out[i, :, y, x] = arriving[i, :, y, x]
    return out


def test_chained_flows_warp_like_one_after_the_other() -> None:
    """A slope is interpolated without error, so both ways agree away from the borders."""
    ys, xs = torch.meshgrid(torch.arange(24.0), torch.arange(32.0), indexing="ij")
    picture = torch.stack([2 * xs - ys, ys])[None]
    first, second = torch.stack([0.3 * ys / 24 + 1, 0.2 * xs / 32])[None], torch.full((1, 2, 24, 32), -1.25)
    stepwise = backward_warp(backward_warp(picture, first), second)
    inside = (slice(None), slice(None), slice(4, -4), slice(4, -4))
    torch.testing.assert_close(backward_warp(picture, chain_flow(second, first))[inside], stepwise[inside])


def test_advect_flow_follows_itself() -> None:
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(11.0), indexing="ij")
    flow_bwd = torch.stack([torch.sin(y / 2) + x / 20, torch.cos(x / 3)])[None]
    torch.testing.assert_close(advect_flow(flow_bwd, reach=2), slow_advect(flow_bwd, 2), atol=1e-5, rtol=0)


def test_advected_flow_moves_with_the_object() -> None:
    """A block moves right at 4 pixels a frame: its flow arrives 4 pixels further right, and stays behind it."""
    flow_bwd = torch.zeros(1, 2, 20, 40)
    flow_bwd[:, 0, 5:15, 8:20] = -4.0
    carried = advect_flow(flow_bwd, reach=5)
    expected = torch.zeros_like(flow_bwd)
    expected[:, 0, 5:15, 8:24] = -4.0
    torch.testing.assert_close(carried, expected)
    # Farther than it reaches, nothing is known of the block, and nothing is invented beyond its front.
    torch.testing.assert_close(advect_flow(flow_bwd, reach=2)[..., 22:], torch.zeros(1, 2, 20, 18))


def test_a_block_keeps_its_shape_over_many_steps() -> None:
    """The pixels of a moving square, advected for six steps, are the square in its new place."""
    frame = torch.full((1, 3, 24, 64), 0.5)
    frame[..., 6:16, 8:20] = 1.0
    flow_bwd = torch.zeros(1, 2, 24, 64)
    flow_bwd[:, 0, 6:16, 8:20] = -3.0
    shown = frame
    for k in range(1, 7):
        flow_bwd = advect_flow(flow_bwd)
        shown = backward_warp(shown, flow_bwd)
        torch.testing.assert_close(shown, frame.roll(3 * k, dims=3))


def test_advection_leaves_a_constant_field_alone() -> None:
    flow_bwd = torch.tensor([2.5, -1.0]).view(1, 2, 1, 1).expand(1, 2, 9, 9).contiguous()
    torch.testing.assert_close(advect_flow(flow_bwd), flow_bwd)
