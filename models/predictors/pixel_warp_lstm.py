"""Approach 1: the next frame is the present one moved and mended, in pixels; one recurrent state feeds every head.

``next = warp(frame, flow) + residual``, recursively. An image encoder sees each frame, a convolutional LSTM sums up the
clip, and from its hidden state come flow, residual, boxes and collision of the frame that follows. Observed frames
build the state; from then on the encoder sees *predicted* frames. The state is a grid, not a vector: where things are
is most of what there is to know, and weights shared by all places need fewer videos.

As in `latent_warp` the flow is carried along itself and only corrected by its head: with ``motion_prior: teacher`` this
predictor *is* `advect` before training, and `copy_last` with ``none``. Trained end to end, through every frame that is
fed back; there is no autoencoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from data.clips import Clip, Context
from data.errors import WeightsError
from data.world import MAX_OBJECTS
from models.augmentation import augment
from models.autoencoder import Vaes
from models.blocks import ConvLSTMCell, Matching, coordinates
from models.checkpoint import digest
from models.detection import CentreMaps, CollisionHead, DetectionHead, collision_error, decode, detection_error, link
from models.heads import FlowHead
from models.image_encoder import ENCODERS, PATCH, build_pretrained, build_tokens
from models.losses import flow_error, weigh, weighted_mean
from models.pixel_heads import FINE, FillHead, FineFeatures
from models.predictor import Predictor, Rollout
from models.warp import advect_flow, backward_warp, resize_flow

Frame = Float[Tensor, "b 3 h w"]


class Options(BaseModel):
    """Architecture and loss weights."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    encoder: str = Field(
        default="small_vit",
        pattern=ENCODERS,
        description="small_vit (trained here), clip:PLACE or vit:PLACE (frozen; a folder or an id of the Hugging Face "
        "hub; needs clevrcast[encoders]), torchvision:vit_b_16 (frozen, from torch.hub's cache)",
    )
    motion_prior: Literal["none", "matching", "teacher"] = Field(
        default="teacher",
        description="where the carried flow starts: at zero, at matches of the last two frames, at the teacher's",
    )
    matching: int = Field(
        default=4, ge=1, description="radius of the matches, in cells of 4 pixels; for motion_prior matching"
    )
    width: int = Field(default=64, ge=8, description="channels of a token")
    depth: int = Field(default=2, ge=1, description="transformer blocks of small_vit")
    heads: int = Field(default=2, ge=1, description="attention heads of small_vit")
    hidden: int = Field(default=64, ge=8, description="channels of the LSTM's state, on cells of 8 pixels")
    middle: int = Field(default=32, ge=8, description="channels of features on cells of 4 pixels")
    fine: int = Field(default=16, ge=8, description="channels of features on cells of 2 pixels")
    flow_stride: int = Field(default=1, ge=1, description="pixels per cell of the grid on which flow is carried along")
    flip: bool = Field(default=True, description="train on every other window mirrored")
    recolour: bool = Field(default=False, description="train on half of the windows with their colour channels rolled")
    frame: float = Field(default=1.0, gt=0, description="weight of the next frame's error relative to copying")
    warped: float = Field(default=0.1, ge=0, description="weight of the same of the warped frame where it is visible")
    flow: float = Field(default=0.03, ge=0, description="weight of the flow's end-point error against the teacher")
    residual: float = Field(default=0.3, ge=0, description="weight of the residual's mean size")
    boxes: float = Field(default=0.3, gt=0, description="weight of the boxes' error")
    collision: float = Field(default=0.1, gt=0, description="weight of the collisions' error")


# Mean squared error of colours in [0, 1]. Windows in which nothing moves have nothing to be relative to.
COPYING_FLOOR = 2e-5


@dataclass(frozen=True)
class State:
    """What one step hands to the next: the present frame, the flow that ended there and the one that comes next if
    nothing changes (in cells of their own grid), the LSTM's hidden state and memory, and the median of the observed
    frames."""

    frame: Frame
    flow_bwd: Float[Tensor, "b 2 hf wf"]
    prior_bwd: Float[Tensor, "b 2 hf wf"]
    hidden: Float[Tensor, "b c gh gw"]
    memory: Float[Tensor, "b c gh gw"]
    background: Frame


@dataclass(frozen=True)
class Sight:
    """What hidden states say of the next frames' objects: maps of their centres, logits of their contacts."""

    boxes: CentreMaps
    contact: Float[Tensor, "b 1 gh gw"]


@dataclass(frozen=True)
class Step:
    """One predicted frame, not clamped, and what it was made of, the hidden state among it; the flow in cells of its
    own grid."""

    frame: Frame
    warped: Frame
    residual: Frame
    flow_bwd: Float[Tensor, "b 2 hf wf"]
    hidden: Float[Tensor, "b c gh gw"]


class PixelWarpLSTM(Predictor):
    """See the module. A frozen encoder is rebuilt by its name, and must have the weights of the training."""

    needs = frozenset({"frames", "flow_bwd", "visible", "boxes", "presence", "collision_pairs"})
    borrowed = frozenset({"pretrained"})

    def __init__(self, options: Options, *, vaes: Vaes, height: int, width: int, context: int) -> None:
        super().__init__(height=height, width=width, context=context)
        if context < 2:
            raise ValueError(f"pixel_warp_lstm needs the flow between two observed frames; context is {context}")
        for side, pixels in (("height", height), ("width", width)):
            if pixels % PATCH or pixels % options.flow_stride:
                raise ValueError(f"{side} {pixels} must be divisible by {PATCH} and flow_stride={options.flow_stride}")
        self.options = options
        pretrained = build_pretrained(options.encoder)
        self.pretrained = pretrained or nn.Identity()
        self.tokens = build_tokens(
            pretrained, height=height, width=width, dim=options.width, depth=options.depth, heads=options.heads
        )
        self.found = digest(pretrained) if pretrained else ""
        # Saved with the weights: another encoder of the same name is found out.
        self.register_buffer("pretrained_sha256", torch.tensor(list(bytes.fromhex(self.found)), dtype=torch.uint8))
        self.matching = Matching(options.matching) if options.motion_prior == "matching" else None
        self.lstm = ConvLSTMCell(options.width + 7, options.hidden)
        self.features = FineFeatures(options.hidden, options.middle, options.fine)
        self.flow_head = FlowHead(options.fine, cell=FINE / options.flow_stride)
        self.residual_head = FillHead(options.middle, options.fine, 2 * options.fine)
        self.detection_head = DetectionHead(options.hidden, options.hidden)
        self.collision_head = CollisionHead(options.hidden, options.hidden)

    def look(self, frames: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c gh gw"]:
        """The encoder's features of frames, observed or predicted."""
        return self.tokens(self.pretrained(frames))

    def observe(
        self, frames: Float[Tensor, "b x 3 h w"], teacher: Float[Tensor, "b x-1 2 h w"]
    ) -> tuple[State, list[Float[Tensor, "b c gh gw"]]]:
        """The state after the observed frames, and the hidden states that came before each of them but the first."""
        self._check_encoder()
        b, x = frames.shape[:2]
        looks = self.look(frames.flatten(0, 1)).unflatten(0, (b, x))
        grid = looks.shape[-2:]
        empty = frames.new_zeros(b, self.options.hidden, *grid)
        cells = (self.height // self.options.flow_stride, self.width // self.options.flow_stride)
        still = frames.new_zeros(b, 2, *cells)
        state = State(frames[:, 0], still, still, empty, empty, _median(frames))
        hidden = []
        for k in range(x):
            flow_bwd = still if k == 0 else self._observed_flow(frames, teacher, k, cells)
            state = self._remember(state, looks[:, k], frames[:, k], flow_bwd)
            if k < x - 1:
                hidden.append(state.hidden)
        return state, hidden

    def step(self, state: State) -> Step:
        """The frame after the one that the state saw last."""
        size = (self.height, self.width)
        before, prior = resize_flow(state.flow_bwd, *size), resize_flow(state.prior_bwd, *size)
        middle, fine = self.features(state.hidden, state.frame, before, prior)
        flow_bwd = self.flow_head(fine, state.prior_bwd)
        after = resize_flow(flow_bwd, *size)
        warped = backward_warp(state.frame, after)
        residual = self.residual_head(middle, fine, warped, state.background, before, after)
        return Step(warped + residual, warped, residual, flow_bwd, state.hidden)

    def sight(self, hidden: Float[Tensor, "b c gh gw"]) -> Sight:
        """The heads of objects."""
        return Sight(self.detection_head(hidden), self.collision_head(hidden))

    def unroll(self, state: State, horizon: int) -> list[Step]:
        """``horizon`` steps; every predicted frame, clamped, is what the encoder sees next."""
        steps = [self.step(state)]
        while len(steps) < horizon:
            frame = steps[-1].frame.clamp(0, 1)
            state = self._remember(state, self.look(frame), frame, steps[-1].flow_bwd)
            steps.append(self.step(state))
        return steps

    def forward(self, batch: Clip) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Mean over the predicted frames of every term; boxes and collisions count in observed frames as well.

        Frames are not weighed by where they change: a squared error relative to copying is an error of what moves.
        """
        batch = augment(batch, mirror=self.options.flip, recolour=self.options.recolour)
        frames, teacher, visible = (batch.require(name) for name in ("frames", "flow_bwd", "visible"))
        x = self.context
        state, hidden = self.observe(frames[:, :x], teacher[:, : x - 1])
        steps = self.unroll(state, frames.shape[1] - x)
        terms: dict[str, list[Tensor]] = {"frame": [], "warped": [], "flow": [], "residual": []}
        for k, step in enumerate(steps, start=x):
            target = frames[:, k]
            copying = (frames[:, x - 1] - target).square().mean() + COPYING_FLOOR
            terms["frame"].append((step.frame - target).square().mean() / copying)
            terms["warped"].append(weighted_mean((step.warped - target).square(), visible[:, k - 1]) / copying)
            terms["flow"].append(flow_error(resize_flow(step.flow_bwd, self.height, self.width), teacher[:, k - 1]))
            terms["residual"].append(step.residual.abs().mean())
        means = {name: torch.stack(values).mean() for name, values in terms.items()}
        return weigh(means | self._object_errors([*hidden, *(step.hidden for step in steps)], batch), self.options)

    def rollout(self, context: Context, horizon: int, generator: torch.Generator) -> Rollout:
        """Everything but visibility. Nothing is drawn from ``generator``."""
        steps = self.unroll(self.observe(context.frames, context.flow_bwd)[0], horizon)
        hidden = torch.stack([step.hidden for step in steps], 1)
        sight = self.sight(hidden.flatten(0, 1))
        found = decode(sight.boxes, MAX_OBJECTS, stride=PATCH)
        boxes, presence = link(*(part.unflatten(0, hidden.shape[:2]) for part in found))
        return Rollout(
            frames=torch.stack([step.frame.clamp(0, 1) for step in steps], 1),
            flow_bwd=torch.stack([resize_flow(step.flow_bwd, self.height, self.width) for step in steps], 1),
            boxes=boxes,
            presence=presence,
            collision=sight.contact.amax((1, 2, 3)).sigmoid().unflatten(0, hidden.shape[:2]),
        )

    def _remember(
        self, state: State, look: Float[Tensor, "b c gh gw"], frame: Frame, flow_bwd: Float[Tensor, "b 2 hf wf"]
    ) -> State:
        """The LSTM's step on a new frame, of which ``look`` is the encoder's view, and the flow that ended there."""
        grid, prior_bwd = look.shape[-2:], advect_flow(flow_bwd)
        before, prior = resize_flow(flow_bwd, *grid), resize_flow(prior_bwd, *grid)
        seen = torch.cat([look, before, prior, prior.square().sum(1, keepdim=True), coordinates(prior)], dim=1)
        hidden, memory = self.lstm(seen, state.hidden, state.memory)
        return State(frame, flow_bwd, prior_bwd, hidden, memory, state.background)

    def _observed_flow(
        self, frames: Float[Tensor, "b x 3 h w"], teacher: Float[Tensor, "b x-1 2 h w"], k: int, cells: tuple[int, int]
    ) -> Float[Tensor, "b 2 hf wf"]:
        """The flow that ended in observed frame k, on the grid on which it is carried."""
        if self.options.motion_prior == "none":
            return frames.new_zeros(len(frames), 2, *cells)
        if self.matching is None:
            return resize_flow(teacher[:, k - 1], *cells)
        # Blocks of 2x2 pixels as channels; with this gain their squares add up to the mean over block and colours.
        present, previous = (F.pixel_unshuffle(frames[:, i], FINE) for i in (k, k - 1))
        gain = torch.full((present.shape[1],), present.shape[1] ** -0.5, device=frames.device)
        return resize_flow(self.matching(present, previous, gain)[:, :2], *cells)

    def _object_errors(self, hidden: list[Float[Tensor, "b c gh gw"]], batch: Clip) -> dict[str, Tensor]:
        """Of the frames from the second on, all as one batch: objects are rare in any one of them."""
        boxes, presence, pairs = (batch.require(name)[:, 1:] for name in ("boxes", "presence", "collision_pairs"))
        labelled, shape = batch.require("labelled"), boxes.shape[:2]
        sight = self.sight(torch.stack(hidden, 1).flatten(0, 1))
        each = labelled[:, None].expand(shape).flatten()
        return {
            "boxes": detection_error(sight.boxes, boxes.flatten(0, 1), presence.flatten(0, 1), each, stride=PATCH),
            "collision": collision_error(
                sight.contact.unflatten(0, shape), boxes, presence, pairs, labelled, stride=PATCH
            ),
        }

    def _check_encoder(self) -> None:
        expected = bytes(self.get_buffer("pretrained_sha256").tolist()).hex()
        if expected != self.found:
            raise WeightsError(
                f"the encoder {self.options.encoder} has the digest {self.found}, expected {expected}",
                remedy="give the weights that this predictor was trained with, or train it again",
            )


def _median(frames: Float[Tensor, "b x 3 h w"]) -> Frame:
    """Over time; of an even number of frames the mean of the middle two, where torch.median takes the darker."""
    ordered, middle = frames.sort(dim=1).values, frames.shape[1] // 2
    return (ordered[:, middle] + ordered[:, (frames.shape[1] - 1) // 2]) / 2
