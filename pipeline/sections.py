"""The sections of ``params.yaml``: every key with its type, bounds, default and meaning, and what must fit together.

`pipeline.params` reads the file and tells what is wrong with it.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.protocols import deviations

Resolution = tuple[int, int]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Acquire(Section):
    source: Literal["simulated", "local", "clevrer"]
    """Where videos come from: Bullet and our ray caster, a folder, or the official archives."""
    root: str | None = None
    """The folder in CLEVRER's layout, for `local`; relative to the checkout."""
    url: Annotated[str, Field(pattern=r"^https?://[^\s?#]+$")] = "http://data.csail.mit.edu/clevrer"
    """Where the archives are, for `clevrer`: the official address, or a mirror's."""
    videos: dict[Literal["train", "validation", "test"], str | int] | Literal["official"]
    """Split -> ids such as 0-8,10; a listed video that is missing is quarantined. `official`: CLEVRER's own splits."""
    proposals: bool = False
    """Whether to bring the published object proposals too, for `clevrer`; no stage reads them."""
    seed: int = 0
    """Of the simulation; every video has a generator of its own."""

    @model_validator(mode="after")
    def _check(self) -> Acquire:
        if self.source == "local" and not self.root:
            raise ValueError("acquire.source is local and acquire.root is empty: name the folder")
        if self.source == "simulated" and self.videos == "official":
            raise ValueError(
                "acquire.source is simulated and acquire.videos is official: list the ids to simulate, "
                "for example {train: 0-39, test: 15000-15007}"
            )
        if self.proposals and self.source != "clevrer":
            raise ValueError(f"acquire.proposals is true and acquire.source is {self.source}: only clevrer has them")
        return self


class Shards(Section):
    videos: Annotated[int, Field(ge=1, le=1000)]
    """Videos per shard: the unit of work, of writing and of loss at a crash."""
    clip: Annotated[int, Field(ge=1, le=128)]
    """Frames per chunk: the unit of reading."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)]
    """A stage stops when more than this share of its videos is quarantined."""


class NoEntry(Section):
    context: Annotated[int, Field(ge=2)]
    """Observed frames of the window: that of evaluate."""
    horizon: Annotated[int, Field(ge=1)]
    """Predicted frames of the window: that of evaluate."""


class Decode(Section):
    resolution: Resolution
    """Height and width at which every model works; multiples of 8."""
    stride: Annotated[int, Field(ge=1, le=64)]
    """Every stride-th frame is kept."""
    frames: Annotated[int, Field(ge=2, le=128)] = 128
    """Frames of the source video that are used, counted before the stride."""
    resize: Literal["swscale", "bilinear"] = "swscale"
    """How frames come to the resolution: while decoding, from all pixels; or bilinear, without antialiasing."""
    no_entry: NoEntry | None = None
    """Videos start on the parity of their first window in which nothing comes into view (protocol slotformer)."""
    timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds after which a decoder that hangs is killed, per video."""

    @model_validator(mode="after")
    def _check(self) -> Decode:
        _divisible("decode.resolution", self.resolution, 8)
        if self.steps < 2:
            raise ValueError(f"decode.frames {self.frames} at decode.stride {self.stride} leaves fewer than 2 frames")
        if self.no_entry is not None and self.frames % self.stride:
            raise ValueError(
                f"with decode.no_entry a video may start at any of its first decode.stride {self.stride} frames: "
                f"decode.frames {self.frames} must be divisible by that"
            )
        return self

    @property
    def steps(self) -> int:
        """Frames kept of each video."""
        return len(range(0, self.frames, self.stride))


class Label(Section):
    resolution: Resolution
    """Height and width at which boxes, masks, true flow and visibility are cast; CLEVRER's own is 320, 480."""


class Gate(Section):
    enabled: bool
    """Objects that stand still, found by frame difference, and the background get zero flow."""
    threshold: Annotated[float, Field(gt=0, le=255)]
    """Grey levels by which a pixel has to change between the frames of a pair to count as moving."""
    contrast: Annotated[float, Field(gt=0, le=255)]
    """Grey levels by which an object differs from the background, the median over the video."""
    radius: Annotated[int, Field(ge=0, le=64)]
    """Pixels of flow.resolution: gaps of twice this are closed; 16 suits 320 rows, 8 suits 160."""


TEACHERS = ("raft_small", "raft_large", "dis", "scene")


class Flow(Section):
    teacher: str
    """raft_small or raft_large (torchvision's weights), dis (OpenCV), scene (the truth from the labels), or
    ptlflow:NAME, a model of ptlflow (sea_raft_s, flowformer_pp, waft_dav2_a2, neuflow2, ...)."""
    weights: str | None = None
    """For ptlflow:NAME, which has no default: the path of a checkpoint (with a slash or a dot in it), the name of a
    published one (such as things), or random (untrained, to try the machinery)."""
    resolution: Resolution
    """Height and width that the teacher sees, decoded from the source video."""
    iterations: Annotated[int, Field(ge=1, le=64)]
    """RAFT's refinements; models of ptlflow make their own number."""
    precision: Literal["float32", "bfloat16"]
    """Arithmetic of the networks; bfloat16 is autocast."""
    compiled: bool = False
    """RAFT's iterations through torch.compile: faster after a first wait, bfloat16 only, needs a compiler."""
    gate: Gate

    @model_validator(mode="after")
    def _check(self) -> Flow:
        ptlflow = re.fullmatch(r"ptlflow:[A-Za-z]\w*", self.teacher) is not None
        if not ptlflow and self.teacher not in TEACHERS:
            near = difflib.get_close_matches(self.teacher, TEACHERS, n=1)
            raise ValueError(
                f"flow.teacher = {self.teacher!r}: it is one of {', '.join(TEACHERS)} or ptlflow:NAME"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
        if ptlflow and not self.weights:
            raise ValueError(
                f"flow.weights is missing: {self.teacher} needs the path of a checkpoint, the name of a published one "
                "(such as things) or random, which is untrained and only tries the machinery"
            )
        if not ptlflow and self.weights is not None:
            raise ValueError(
                f"flow.weights = {self.weights!r} is for ptlflow:NAME, flow.teacher is {self.teacher}: leave it out"
            )
        if self.compiled and (not self.teacher.startswith("raft") or self.precision != "bfloat16"):
            raise ValueError(
                f"flow.compiled is for raft_small and raft_large in bfloat16, flow.teacher is {self.teacher} and "
                f"flow.precision {self.precision}"
            )
        if self.teacher.startswith("raft") and min(self.resolution) < 128:
            raise ValueError(
                f"flow.resolution {list(self.resolution)} has a side below 128, the least that {self.teacher} takes"
            )
        return self


class Occlusion(Section):
    relative: Annotated[float, Field(ge=0)]
    """alpha1: tolerated mismatch of the two flows as a share of their squared lengths."""
    absolute: Annotated[float, Field(gt=0)]
    """alpha2: tolerated mismatch in squared pixels of flow.resolution."""
    softness: Annotated[float, Field(gt=0)]
    """Width of the sigmoid around the threshold, in tolerances."""


class Trainable(Section):
    options: dict[str, Any] = {}
    """Of the architecture and its losses; checked by the model's own schema."""
    training: dict[str, Any] = {}
    """Of the training loop (steps, learning_rate, ...); checked by its schema."""
    batch: Annotated[int, Field(ge=1)] = 8
    """Frames (VAE) or clips (predictor) per optimiser step."""
    seed: int = 0
    """Of the weights, the order of the data and the noise."""


VaeKey = Literal["frame", "flow"]
"""What an autoencoder encodes."""


class Vae(Trainable):
    architecture: Literal["block", "kl"] = "block"
    """A block transform with small networks, or diffusers' AutoencoderKL."""
    pretrained: str | None = None
    """The folder of a VAE of ours or of diffusers' AutoencoderKL to start from; with training.steps: 0, to use."""


class PredictorBlock(Trainable):
    model: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """The file of models/predictors/ (several blocks may use one)."""
    pretrained: str | None = None
    """A checkpoint folder of the same model whose weights the training starts from; relative to the checkout."""
    frozen: list[str] = []
    """Modules of the model, by name, that keep their pretrained weights."""
    adaptation: dict[str, Any] | None = None
    """Test-time training of the flow head before each window (steps, learning_rate): measured too, beside without."""
    horizon: Annotated[int, Field(ge=1)] = 4
    """Predicted frames in the training loss, at most; the clip adds evaluate.context before them."""

    @model_validator(mode="after")
    def _check(self) -> PredictorBlock:
        if self.frozen and self.pretrained is None:
            raise ValueError(f"frozen is {self.frozen} and pretrained is absent: random weights would never be trained")
        return self


class Evaluate(Section):
    protocol: str
    """demo, slotformer, pfi (what these fix is checked), or a name of your own: what figures may be compared with."""
    split: Literal["train", "validation", "test"]
    """Whose videos are predicted."""
    context: Annotated[int, Field(ge=2)]
    """Observed frames of each window."""
    horizon: Annotated[int, Field(ge=1)]
    """Predicted frames of each window."""
    window_stride: Annotated[int, Field(ge=1)]
    """Windows start at multiples of this."""
    seed: int = 0
    """Of the predictors' randomness and of the bootstrap."""
    lpips: str | None = None
    """A file with the state dict of `lpips.LPIPS(net=lpips_net)`; without one LPIPS is not measured."""
    lpips_net: Literal["squeeze", "alex", "vgg"] = "squeeze"
    """The network of LPIPS."""
    smoothness: bool = False
    """Whether motion smoothness is measured: optical flow of every film, some hundred frames a second."""
    subject_encoder: Annotated[str, Field(pattern=r"^(clip|vit):.+$")] | None = None
    """Frozen encoder for subject consistency, as vit:FOLDER (VBench: DINO); without one it is not measured."""
    background_encoder: Annotated[str, Field(pattern=r"^(clip|vit):.+$")] | None = None
    """Frozen encoder for background consistency, as clip:FOLDER (VBench: CLIP)."""
    fvd: str | None = None
    """The file i3d_pretrained_400.pt of cd-fvd; without it FVD is not measured."""
    jedi: str | None = None
    """The folder with V-JEPA's vith16.pth.tar and ssv2-probe.pth.tar; without it JEDi is not measured."""

    @model_validator(mode="after")
    def _check(self) -> Evaluate:
        if self.split == "train":
            raise ValueError("evaluate.split is train: models would be scored on what they were trained on")
        return self


class Report(Section):
    examples: Annotated[int, Field(ge=1, le=3)]
    """Shared windows that are shown moving, beside the best predictor's best and worst."""


class Params(Section):
    """The whole of ``params.yaml``."""

    acquire: Acquire
    shards: Shards
    decode: Decode
    label: Label
    flow: Flow
    occlusion: Occlusion
    vae: dict[VaeKey, Vae]
    predictors: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], PredictorBlock]
    evaluate: Evaluate
    report: Report

    @model_validator(mode="after")
    def _check(self) -> Params:
        for name, use in (
            ("frame", "its reconstruction is the ceiling of every comparison"),
            ("flow", "stages read it: two_stream works on it"),
        ):
            if name not in self.vae:
                raise ValueError(f"vae.{name} is missing: {use}")
        for name in ("copy_last", "advect"):
            if name not in self.predictors:
                raise ValueError(f"predictors.{name} is missing: every comparison starts from it")
        if self.flow.teacher == "scene" and self.label.resolution != self.flow.resolution:
            raise ValueError(
                f"flow.teacher is scene, which copies the labels: label.resolution {list(self.label.resolution)} "
                f"and flow.resolution {list(self.flow.resolution)} must be equal"
            )
        for name, block in self.predictors.items():
            if self.evaluate.context + block.horizon > self.decode.steps:
                raise ValueError(
                    f"evaluate.context {self.evaluate.context} + predictors.{name}.horizon {block.horizon} is more "
                    f"than the {self.decode.steps} frames that decode keeps"
                )
        window = self.evaluate.context + self.evaluate.horizon
        if window > self.decode.steps:
            raise ValueError(
                f"evaluate.context {self.evaluate.context} + evaluate.horizon {self.evaluate.horizon} = {window} "
                f"frames, decode keeps {self.decode.steps} of each video"
            )
        skipping = self.decode.no_entry
        if skipping is not None and (skipping.context, skipping.horizon) != (
            self.evaluate.context,
            self.evaluate.horizon,
        ):
            raise ValueError(
                f"decode.no_entry looks for windows of {skipping.context} + {skipping.horizon} frames, and evaluate "
                f"has {self.evaluate.context} + {self.evaluate.horizon}: they must be equal"
            )
        if wrong := deviations(self.evaluate.protocol, self.model_dump(mode="json")):
            raise ValueError(
                f"evaluate.protocol is {self.evaluate.protocol}, but {'; '.join(wrong)}. Keep to the protocol, or give "
                "evaluate.protocol a name of your own"
            )
        if isinstance(self.acquire.videos, dict) and self.evaluate.split not in self.acquire.videos:
            raise ValueError(
                f"evaluate.split is {self.evaluate.split}, acquire.videos has only {sorted(self.acquire.videos)}"
            )
        return self


def _divisible(name: str, resolution: tuple[int, int], by: int) -> None:
    bad = [n for n in resolution if n % by or n <= 0]
    if bad:
        near = [max(by, round(n / by) * by) for n in resolution]
        raise ValueError(f"{name} {list(resolution)}: both must be positive multiples of {by}, for example {near}")
