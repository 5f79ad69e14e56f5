"""RAFT over a whole video, both ways, without the repeated work of the plain loop.

`torchvision`'s RAFT (Teed and Deng 2020, https://arxiv.org/abs/2003.12039) takes one pair in one direction. Run over
a video both ways it encodes every frame four times for matching and twice for context, multiplies every pair of
feature maps twice, and upsamples the flow after every iteration. Here every frame is encoded once, a pair's
correlation volume is multiplied once and transposed for the other direction, both directions share a batch, and only
the last flow is upsampled. `benchmarks/raft_engine.py` prints what that saves.

``float32`` is bit-equal on the CPU to ``raft(image_a, image_b, num_flow_updates=n)[-1]`` pair by pair. That dictates
the batches: PyTorch gives a convolution of a batch of one with at most 20480 inputs to another kernel than a larger
one, and with a single thread a 1x1 convolution of a batch of 16 or more. So the feature encoder, which the plain loop
feeds two images, never sees fewer here; the context encoder, which it feeds one, sees one; and the update block runs
pair by pair where its maps are that small. Sampling stays with `grid_sample`, whose rounding differs from tap to tap.

``bfloat16`` is not bound by that: encoders under autocast, update block in bfloat16 and channels_last with what the
iterations share computed once (`models.raft_recurrence`), coordinates in float32. Pooling is linear, so one product
with the features and their pooled copies is the whole pyramid, and a window of neighbours is gathered once at whole
cells and blended with the one fraction that all its taps share (under autocast `grid_sample` would first copy every
volume to float32, at every iteration).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.optical_flow.raft import RAFT, CorrBlock

from models.raft_recurrence import Recurrence

Precision = Literal["float32", "bfloat16"]

_SMALL_CONVOLUTION = 20480  # inputs; use_mkldnn in ATen/native/Convolution.cpp
_SINGLE_THREAD_BATCH = 15  # the largest batch whose 1x1 convolutions take the kernel of a batch of one


class RaftEngine:
    """Both flows of every consecutive pair of a video.

    ``iterations`` is RAFT's number of flow updates; ``memory_budget`` (bytes) bounds the pairs that are worked on at
    once, at least one, and changes the result in neither precision on the CPU in float32. ``compiled`` runs what is
    repeated at every iteration through `torch.compile` (bfloat16 only; it rounds elsewhere, and the first batch waits
    for a C++ or Triton compiler). The model is copied.

    Raises ValueError for ``compiled`` in float32, which could not be bit-equal.
    """

    def __init__(
        self,
        raft: RAFT,
        *,
        iterations: int = 12,
        precision: Precision = "float32",
        memory_budget: int = 256 * 2**20,
        compiled: bool = False,
    ) -> None:
        if compiled and precision != "bfloat16":
            raise ValueError(f"compiled goes with bfloat16, not {precision}: its rounding differs from the plain loop")
        self.raft = copy.deepcopy(raft).eval()
        self.iterations = iterations
        self.precision = precision
        self.memory_budget = memory_budget
        self.recurrence: Recurrence | None = None
        if precision == "bfloat16":
            self.raft.to(memory_format=torch.channels_last)
            self.raft.update_block.to(torch.bfloat16)
            if self.raft.mask_predictor is not None:
                self.raft.mask_predictor.to(torch.bfloat16)
            self.recurrence = Recurrence(self.raft.update_block)
        self._look_up, self._iterate = _look_up, _iterate
        if compiled:
            self._look_up, self._iterate = torch.compile(_look_up), torch.compile(_iterate)

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "t 3 h w"]
    ) -> tuple[Float[Tensor, "t-1 2 h w"], Float[Tensor, "t-1 2 h w"]]:
        """``(flow_fwd, flow_bwd)`` in pixels, float32, from images in [-1, 1] with h and w divisible by 8.

        ``flow_fwd[k]`` lives on frame k and points to k+1, ``flow_bwd[k]`` lives on k+1 and points to k.
        """
        t, _, h, w = images.shape
        if t < 2 or h % 8 or w % 8:
            raise ValueError(f"RAFT needs two frames or more, height and width divisible by 8; got {t} of {h}x{w}")
        flow_fwd = images.new_empty(t - 1, 2, h, w, dtype=torch.float32)
        flow_bwd = torch.empty_like(flow_fwd)
        step = self._pairs_at_once(h, w)
        features, context = self._encode(images[:2])
        for start in range(0, t - 1, step):
            stop = min(start + step, t - 1)
            known = start + len(features)
            if known <= stop:  # frames 0..stop take part in the pairs up to stop
                new_features, new_context = self._encode(images[known - 1 : stop + 1])
                features = torch.cat([features, new_features[1:]])
                context = torch.cat([context, new_context[1:]])
            k = stop - start
            flow_fwd[start:stop], flow_bwd[start:stop] = self._refine(features[: k + 1], context[: k + 1])
            features, context = features[k:], context[k:]
        return flow_fwd, flow_bwd

    def _pairs_at_once(self, height: int, width: int) -> int:
        """Pairs that fit into the budget: both pyramids, one volume on the way there, and two encoded frames."""
        cells = height * width // 64
        item = 4 if self.precision == "float32" else 2
        volumes = item * cells**2 * (2 * 4 / 3 + 1)
        encoders = 4 * 64 * height * width  # a few maps of half the resolution, 32 to 64 channels
        pairs = max(1, int(self.memory_budget / (volumes + encoders)))
        on_cpu = next(self.raft.parameters()).device.type == "cpu"
        return min(pairs, _SINGLE_THREAD_BATCH // 2) if on_cpu else pairs

    def _encode(self, images: Float[Tensor, "k 3 h w"]) -> tuple[Tensor, Tensor]:
        """Matching features and context of two frames or more, at 1/8 of the resolution."""
        if self.precision == "bfloat16":
            images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast(images.device.type, torch.bfloat16):
                return self.raft.feature_encoder(images), self.raft.context_encoder(images)
        context = torch.cat([self.raft.context_encoder(image[None]) for image in images])
        return self.raft.feature_encoder(images), context

    def _refine(
        self, features: Float[Tensor, "k c hz wz"], context: Float[Tensor, "k z hz wz"]
    ) -> tuple[Tensor, Tensor]:
        """Flows of the k-1 pairs of k encoded frames: first all forward, then all backward, in one batch."""
        volumes = (_FloatVolumes if self.precision == "float32" else _BfloatVolumes)(features, self.raft.corr_block)
        origin = torch.cat([context[:-1], context[1:]])
        if isinstance(volumes, _FloatVolumes) and self._batch_changes_kernel(features):
            flows = [self._updates(origin[i : i + 1], volumes.of(i)) for i in range(len(origin))]
            flow = torch.cat(flows)
        else:
            flow = self._updates(origin, volumes)
        forward, backward = flow.chunk(2)
        return forward, backward

    def _updates(self, context: Float[Tensor, "b z hz wz"], volumes: _FloatVolumes | _BfloatVolumes) -> Tensor:
        """The recurrent refinement of RAFT, then one upsampling."""
        block: nn.Module = self.raft.update_block
        hidden_size: int = block.hidden_state_size  # type: ignore[assignment]
        hidden, inputs = context.split([hidden_size, context.shape[1] - hidden_size], dim=1)
        hidden, inputs = torch.tanh(hidden), F.relu(inputs)
        iterations = self.recurrence.start(inputs) if self.recurrence is not None else partial(_plainly, block, inputs)
        origin = _cell_grid(context)
        target = origin
        for _ in range(self.iterations):
            window, flow = self._look_up(volumes, target), target - origin
            hidden, delta = self._iterate(iterations, hidden, window.to(hidden.dtype), flow.to(hidden.dtype))
            target = target + delta.float()
        return self._upsample(target - origin, hidden)

    def _upsample(self, flow: Float[Tensor, "b 2 hz wz"], hidden: Float[Tensor, "b ch hz wz"]) -> Tensor:
        """To pixels: bilinear, or the learned convex combination of nine neighbours (the paper's appendix B)."""
        b, _, h, w = flow.shape
        if self.raft.mask_predictor is None:
            return 8 * F.interpolate(flow, (8 * h, 8 * w), mode="bilinear", align_corners=True)
        mask = self.raft.mask_predictor(hidden).float().view(b, 1, 9, 8, 8, h, w).softmax(dim=2)
        around = F.unfold(8 * flow, kernel_size=3, padding=1).view(b, 2, 9, 1, 1, h, w)
        return (mask * around).sum(dim=2).permute(0, 1, 4, 2, 5, 3).reshape(b, 2, 8 * h, 8 * w)

    def _batch_changes_kernel(self, features: Float[Tensor, "k c hz wz"]) -> bool:
        """Whether PyTorch would run some convolution of the update block differently on a batch of one."""
        cells = features.shape[-2] * features.shape[-1]
        convolutions = [m for m in self.raft.update_block.modules() if isinstance(m, nn.Conv2d)]
        channels = min(m.in_channels for m in convolutions if min(m.kernel_size) <= 3)
        return features.device.type == "cpu" and channels * cells <= _SMALL_CONVOLUTION


class _FloatVolumes:
    """torchvision's own correlation pyramid and look-up, for forward pairs followed by backward pairs."""

    def __init__(self, features: Float[Tensor, "k c hz wz"], corr: CorrBlock) -> None:
        k, c, h, w = features.shape
        self.corr, self.cells = corr, h * w
        flat = features.flatten(2)
        forward = torch.matmul(flat[:-1].transpose(1, 2), flat[1:])
        forward /= torch.sqrt(torch.tensor(c, device=features.device))
        level = torch.cat([forward, forward.transpose(1, 2)]).view(2 * (k - 1) * h * w, 1, h, w)
        self.pyramid = [level]
        for _ in range(corr.num_levels - 1):
            level = F.avg_pool2d(level, kernel_size=2, stride=2)
            self.pyramid.append(level)

    def of(self, item: int) -> _FloatVolumes:
        """The volumes of one item of the batch."""
        one = copy.copy(self)
        one.pyramid = [level[item * self.cells : (item + 1) * self.cells] for level in self.pyramid]
        return one

    def look_up(self, target: Float[Tensor, "b 2 hz wz"]) -> Float[Tensor, "b taps hz wz"]:
        corr = copy.copy(self.corr)  # the pyramid is its state
        corr.corr_pyramid = self.pyramid
        return corr.index_pyramid(target)


class _BfloatVolumes:
    """The pyramid as one matrix per item: a row for each cell, a column for each cell of each level, one of zeros."""

    def __init__(self, features: Float[Tensor, "k c hz wz"], corr: CorrBlock) -> None:
        k, c, h, w = features.shape
        levels = [features]
        for _ in range(corr.num_levels - 1):
            levels.append(F.avg_pool2d(levels[-1], kernel_size=2, stride=2))
        outside = features.new_zeros(k, c, 1)
        targets = torch.cat([level.flatten(2) for level in levels] + [outside], dim=2)
        sources = (features / c**0.5).flatten(2).transpose(1, 2)
        columns = targets.shape[2]
        rows = torch.empty(2, k - 1, h * w, columns, dtype=features.dtype, device=features.device)
        torch.matmul(sources[:-1], targets[1:], out=rows[0])
        torch.matmul(sources[1:], targets[:-1], out=rows[1])
        self.rows = rows.view(-1, columns)

        device = features.device
        heights = torch.tensor([level.shape[2] for level in levels], device=device)
        widths = torch.tensor([level.shape[3] for level in levels], device=device)
        sizes = heights * widths
        self.heights, self.widths, self.starts = (x[:, None] for x in (heights, widths, sizes.cumsum(0) - sizes))
        self.outside = columns - 1
        self.scales = torch.tensor([[0.5**i] for i in range(len(levels))], device=device)
        self.taps = torch.arange(-corr.radius, corr.radius + 2, device=device)

    def look_up(self, target: Float[Tensor, "b 2 hz wz"]) -> Float[Tensor, "b taps hz wz"]:
        """(2r+1)^2 bilinear samples per level out of (2r+2)^2 whole cells; zero outside, x before y, as torchvision."""
        b, _, h, w = target.shape
        centre = target.permute(0, 2, 3, 1).reshape(-1, 1, 2) * self.scales  # (cells, levels, 2)
        corner = centre.floor()
        fraction = (centre - corner)[..., None, None]
        corner = corner.long()
        x = corner[..., 0, None] + self.taps  # (cells, levels, 2r+2)
        y = corner[..., 1, None] + self.taps
        x = torch.where((x >= 0) & (x < self.widths), x, self.outside)
        y = torch.where((y >= 0) & (y < self.heights), y * self.widths + self.starts, self.outside)
        column = (x[..., :, None] + y[..., None, :]).clamp_(max=self.outside)
        window = self.rows.gather(1, column.flatten(1)).view(column.shape).float()
        window = torch.lerp(window[..., :-1, :], window[..., 1:, :], fraction[:, :, 0])
        window = torch.lerp(window[..., :-1], window[..., 1:], fraction[:, :, 1])
        return window.reshape(b, h, w, -1).permute(0, 3, 1, 2)


def _look_up(volumes: _FloatVolumes | _BfloatVolumes, target: Tensor) -> Tensor:
    return volumes.look_up(target)


def _iterate(step: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor) -> tuple[Tensor, Tensor]:
    return step(*inputs)


def _plainly(block: nn.Module, inputs: Tensor, hidden: Tensor, window: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    return block(hidden, inputs, window, flow)


def _cell_grid(like: Float[Tensor, "b z hz wz"]) -> Float[Tensor, "b 2 hz wz"]:
    """The coordinates (x, y) of every cell."""
    b, _, h, w = like.shape
    y, x = torch.meshgrid(torch.arange(h, device=like.device), torch.arange(w, device=like.device), indexing="ij")
    return torch.stack([x, y]).float()[None].repeat(b, 1, 1, 1)
