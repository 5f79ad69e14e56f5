"""RAFT over a whole video, both ways, without the repeated work of the plain loop.

`torchvision`'s RAFT (Teed and Deng 2020, https://arxiv.org/abs/2003.12039) takes one pair in one direction. Run over
a video both ways it encodes every frame four times for matching and twice for context, multiplies every pair of
feature maps twice, and upsamples the flow after every iteration. Here every frame is encoded once, a pair's
correlation volume is multiplied once and transposed for the other direction, and only the last flow is upsampled.
`benchmarks/raft_engine.py` prints what that saves.

``float32`` is bit-equal on the CPU to ``raft(image_a, image_b, num_flow_updates=n)[-1]`` pair by pair. That dictates
the batches: PyTorch gives a convolution of a batch of one to another kernel than a larger one where the input is small
(at most 20480 numbers), or its kernel is 1x1, there is a single thread and the batch has 16 or more. So the feature
encoder, which the plain loop feeds two images, never sees fewer here; the context encoder, which it feeds one, sees
one; and the iterations run direction by direction, which also keeps the volume that they sample in the processor's
cache. What is left to save there stands in `models.raft_recurrence` and `models.raft_volumes`.

``bfloat16`` is not bound by that: encoders under autocast, update block in bfloat16 and channels_last, all pairs that
fit into memory in one batch, coordinates in float32 (under autocast `grid_sample` would copy every volume to float32,
at every iteration).
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torchvision.models.optical_flow.raft import RAFT

from models.raft_recurrence import Iterations, Recurrence
from models.raft_volumes import ExactVolumes, FastVolumes, Volumes, products

Precision = Literal["float32", "bfloat16"]

_LEAST_PAIRS_ENCODED = 4
"""So that the frame that two chunks share costs little."""
_SINGLE_THREAD_BATCH = 15  # the largest batch whose 1x1 convolutions take the kernel of a batch of one


class RaftEngine:
    """Both flows of every consecutive pair of a video.

    ``iterations`` is RAFT's number of flow updates; ``memory_budget`` (bytes) bounds what is worked on at once, a few
    pairs at least, and changes the result in neither precision on the CPU in float32. ``compiled`` runs what is
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
        self.raft = copy.deepcopy(raft).eval().requires_grad_(False)
        self.iterations = iterations
        self.precision = precision
        self.memory_budget = memory_budget
        if precision == "bfloat16":
            self.raft.to(memory_format=torch.channels_last)
            self.raft.update_block.to(torch.bfloat16)
            if self.raft.mask_predictor is not None:
                self.raft.mask_predictor.to(torch.bfloat16)
        self.recurrence = Recurrence(self.raft.update_block, exact=precision == "float32")
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
        features, context = self._encode(images[:2], 0)
        for start in range(0, t - 1, step):
            stop = min(start + step, t - 1)
            known = start + len(features)
            if known <= stop:  # frames 0..stop take part in the pairs up to stop
                new_features, new_context = self._encode(images[: stop + 1], known)
                features = torch.cat([features, new_features])
                context = torch.cat([context, new_context])
            k = stop - start
            refine = self._refine_in_turn if self.precision == "float32" else self._refine_together
            flow_fwd[start:stop], flow_bwd[start:stop] = refine(features[: k + 1], context[: k + 1])
            features, context = features[k:], context[k:]
        return flow_fwd, flow_bwd

    def _pairs_at_once(self, height: int, width: int) -> int:
        """Pairs that fit into the budget: encoded frames, and in bfloat16 the volumes of all of them."""
        cells = height * width // 64
        encoders = 4 * 64 * height * width  # a few maps of half the resolution, 32 to 64 channels
        if self.precision == "float32":
            return max(_LEAST_PAIRS_ENCODED, int(self.memory_budget / encoders))
        volumes = 2 * cells**2 * (2 * 4 / 3 + 1)
        pairs = max(1, int(self.memory_budget / (volumes + encoders)))
        on_cpu = next(self.raft.parameters()).device.type == "cpu"
        return min(pairs, _SINGLE_THREAD_BATCH // 2) if on_cpu else pairs

    def _encode(self, images: Float[Tensor, "k 3 h w"], known: int) -> tuple[Tensor, Tensor]:
        """Matching features and context, at 1/8 of the resolution, of the frames after the first ``known`` ones."""
        new = images[known:]
        if self.precision == "bfloat16":
            new = new.contiguous(memory_format=torch.channels_last)
            with torch.autocast(new.device.type, torch.bfloat16):
                return self.raft.feature_encoder(new), self.raft.context_encoder(new)
        context = torch.cat([self.raft.context_encoder(image[None]) for image in new])
        # In twos, as the plain loop does; an odd one out goes with the frame before it, which is known already.
        twos = [images[end - 2 : end] for end in range(len(images), known, -2)][::-1]
        features = torch.cat([self.raft.feature_encoder(pair) for pair in twos])
        return features[-len(new) :], context

    def _refine_in_turn(
        self, features: Float[Tensor, "k c hz wz"], context: Float[Tensor, "k z hz wz"]
    ) -> tuple[Tensor, Tensor]:
        """Flows of the k-1 pairs of k encoded frames, direction by direction, with one volume at a time."""
        flow_fwd, flow_bwd = [], []
        _, _, h, w = features.shape
        for here, there in zip(range(len(features) - 1), range(1, len(features)), strict=True):
            volume = products(features[here : here + 1], features[there : there + 1])
            exact = ExactVolumes(volume, h, w, self.raft.corr_block)
            flow_fwd.append(self._updates(context[here : here + 1], exact))
            exact = ExactVolumes(volume.t(), h, w, self.raft.corr_block)
            flow_bwd.append(self._updates(context[there : there + 1], exact))
        return torch.cat(flow_fwd), torch.cat(flow_bwd)

    def _refine_together(
        self, features: Float[Tensor, "k c hz wz"], context: Float[Tensor, "k z hz wz"]
    ) -> tuple[Tensor, Tensor]:
        """The same in one batch: first all forward, then all backward."""
        flow = self._updates(torch.cat([context[:-1], context[1:]]), FastVolumes(features, self.raft.corr_block))
        forward, backward = flow.chunk(2)
        return forward, backward

    def _updates(self, context: Float[Tensor, "b z hz wz"], volumes: Volumes) -> Tensor:
        """The recurrent refinement of RAFT, then one upsampling."""
        hidden_size: int = self.raft.update_block.hidden_state_size
        hidden, inputs = context.split([hidden_size, context.shape[1] - hidden_size], dim=1)
        hidden, inputs = torch.tanh(hidden), F.relu(inputs)
        iterations = self.recurrence.start(inputs)
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


def _look_up(volumes: Volumes, target: Tensor) -> Tensor:
    return volumes.look_up(target)


def _iterate(iterations: Iterations, hidden: Tensor, window: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    return iterations(hidden, window, flow)


def _cell_grid(like: Float[Tensor, "b z hz wz"]) -> Float[Tensor, "b 2 hz wz"]:
    """The coordinates (x, y) of every cell."""
    b, _, h, w = like.shape
    y, x = torch.meshgrid(torch.arange(h, device=like.device), torch.arange(w, device=like.device), indexing="ij")
    return torch.stack([x, y]).float()[None].repeat(b, 1, 1, 1)
