"""Teachers of optical flow: anything that turns a video into flows both ways.

Each is a `FlowTeacher` made by `build_teacher` under its name in `TEACHERS`, or under ``ptlflow:NAME`` for what
`models.ptlflow_teacher` brings. Preprocessing travels with the weights: frames come in as they were decoded (uint8
RGB), and every teacher scales, pads and crops for itself. A teacher knows the digest of its weights when it is made,
and builds its network at the first call: finished work is found again without a network.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor
from torchvision.models import WeightsEnum
from torchvision.models.optical_flow import Raft_Large_Weights, Raft_Small_Weights, raft_large, raft_small
from torchvision.models.optical_flow.raft import RAFT

from data.errors import ClevrcastError, WeightsError
from models.raft_engine import Precision, RaftEngine

Preset = Literal["ultrafast", "fast", "medium"]
PTLFLOW = "ptlflow:"

_CONNECT_SECONDS = 20.0
_RAFT_MULTIPLE, _RAFT_MINIMUM = 8, 128
_DIS_MINIMUM = 16

_RAFT: dict[str, tuple[Callable[..., RAFT], WeightsEnum]] = {
    "raft_small": (raft_small, Raft_Small_Weights.C_T_V1),
    "raft_large": (raft_large, Raft_Large_Weights.C_T_V2),
}
_PRESETS: dict[str, int] = {
    "ultrafast": cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST,
    "fast": cv2.DISOPTICAL_FLOW_PRESET_FAST,
    "medium": cv2.DISOPTICAL_FLOW_PRESET_MEDIUM,
}


@dataclass(frozen=True)
class FlowPair:
    """Both flows of the consecutive pairs of a video, dx (right) then dy (down), in pixels of (h, w).

    ``flow_fwd[k]`` lives on frame k and points to k+1; ``flow_bwd[k]`` lives on k+1 and points to k.
    """

    flow_fwd: Float[Tensor, "p 2 h w"]
    flow_bwd: Float[Tensor, "p 2 h w"]


class FlowTeacher(ABC):
    """``weights_digest`` is the sha256 of the weights file, empty for a teacher without a file of weights;
    ``warning`` is what nobody who uses the flows may overlook."""

    name: str
    licence: str
    weights_digest: str
    warning: str = ""

    @property
    def identity(self) -> str:
        """What the flows depend on besides frames, parameters and our code."""
        return self.weights_digest

    @property
    def facts(self) -> dict[str, str]:
        """What a manifest says of the teacher."""
        facts = {"name": self.name, "weights_sha256": self.weights_digest, "licence": self.licence}
        return facts | ({"warning": self.warning} if self.warning else {})

    @abstractmethod
    def __call__(self, frames: UInt8[Tensor, "t h w 3"]) -> FlowPair:
        """Flows of the t-1 consecutive pairs of RGB frames, float32 on the CPU, on the frames' own grid."""


class RaftTeacher(FlowTeacher):
    """RAFT (Teed and Deng 2020) with torchvision's weights, in pixels of the frames as given.

    Sides that are not divisible by 8 are padded by replication, evenly on both ends, and the flow is cropped.
    Raises `ClevrcastError` below 128x128, where the correlation pyramid has no top.
    """

    licence = "BSD-3-Clause (princeton-vl/RAFT, torchvision)"

    def __init__(
        self,
        name: str,
        build_engine: Callable[[], RaftEngine],
        weights: WeightsEnum,
        weights_digest: str,
        device: str,
    ) -> None:
        self.name, self.weights_digest = name, weights_digest
        self.build_engine, self.device = build_engine, device
        self.normalise = weights.transforms()

    @cached_property
    def engine(self) -> RaftEngine:
        return self.build_engine()

    def __call__(self, frames: UInt8[Tensor, "t h w 3"]) -> FlowPair:
        at_least_two(frames)
        h, w = frames.shape[1:3]
        if min(h, w) < _RAFT_MINIMUM:
            raise ClevrcastError(
                f"{self.name} needs frames of at least {_RAFT_MINIMUM}x{_RAFT_MINIMUM} (h x w), not {h}x{w}",
                remedy="give the teacher larger frames, or choose the teacher dis or scene",
            )
        images = frames.to(self.device).permute(0, 3, 1, 2)
        images, _ = self.normalise(images, images)
        top, left = -h % _RAFT_MULTIPLE // 2, -w % _RAFT_MULTIPLE // 2
        bottom, right = -h % _RAFT_MULTIPLE - top, -w % _RAFT_MULTIPLE - left
        padded = F.pad(images, (left, right, top, bottom), mode="replicate")
        flows = (flow[..., top : top + h, left : left + w].cpu() for flow in self.engine(padded))
        return FlowPair(*flows)


class DisTeacher(FlowTeacher):
    """OpenCV's dense inverse search (Kroeger et al. 2016) on greyscale: no weights, and no learned prior either.

    Raises `ClevrcastError` below 16x16, less than two of its patches.
    """

    name, licence, weights_digest = "dis", "Apache-2.0 (OpenCV)", ""

    def __init__(self, preset: Preset = "medium") -> None:
        self.search = cv2.DISOpticalFlow.create(_PRESETS[preset])

    def __call__(self, frames: UInt8[Tensor, "t h w 3"]) -> FlowPair:
        at_least_two(frames)
        h, w = frames.shape[1:3]
        if min(h, w) < _DIS_MINIMUM:
            raise ClevrcastError(
                f"dis needs frames of at least {_DIS_MINIMUM}x{_DIS_MINIMUM} (h x w), not {h}x{w}",
                remedy="give the teacher larger frames, or choose the teacher scene",
            )
        grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames.cpu().numpy()]
        pairs = list(pairwise(grey))
        flow_fwd = np.stack([self._flow(a, b) for a, b in pairs])
        flow_bwd = np.stack([self._flow(b, a) for a, b in pairs])
        return FlowPair(torch.from_numpy(flow_fwd), torch.from_numpy(flow_bwd))

    def _flow(self, here: UInt8[np.ndarray, "h w"], there: UInt8[np.ndarray, "h w"]) -> Float[np.ndarray, "2 h w"]:
        initial = np.zeros((*here.shape, 2), np.float32)
        return self.search.calc(here, there, initial).transpose(2, 0, 1).copy()


def build_teacher(
    name: str,
    *,
    device: str = "cpu",
    iterations: int = 12,
    precision: Precision = "float32",
    memory_budget: int | None = None,
    compiled: bool = False,
    preset: Preset = "medium",
    weights: str | None = None,
) -> FlowTeacher:
    """The teacher called ``name``: a key of `TEACHERS`, or ``ptlflow:NAME``.

    ``iterations``, ``memory_budget`` and ``compiled`` are RAFT's (`models.raft_engine.RaftEngine`; the default budget
    is 256 MiB on a CPU and an eighth of a GPU's memory), ``preset`` is that of dis, ``weights`` (which it has to have)
    ptlflow's, ``precision`` that of RAFT and ptlflow; each teacher ignores the others'. Raises
    `WeightsError` where weights cannot be had, KeyError for an unknown name, and what `PtlflowTeacher` raises. Weights
    that are damaged are found out at the first call.
    """
    if name.startswith(PTLFLOW) and weights is not None:
        from models.ptlflow_teacher import PtlflowTeacher  # it imports the contract from here

        return PtlflowTeacher(name.removeprefix(PTLFLOW), weights, device=device, precision=precision)
    if name not in TEACHERS:
        raise KeyError(f"no teacher is called {name!r}; there are {sorted(TEACHERS)} and {PTLFLOW}NAME with weights")
    budget = memory_budget or _memory_budget(device)
    options = _Options(device, iterations, precision, budget, compiled, preset)
    return TEACHERS[name](options)


def raft_weights_file(name: str) -> Path:
    """The file of torchvision's weights for ``raft_small`` or ``raft_large``, downloaded if absent.

    It is looked for where torch.hub keeps such files (``$TORCH_HOME/hub/checkpoints``). A download must match the
    digest in the file's name; raises `WeightsError` if that fails.
    """
    url = _RAFT[name][1].url
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not path.exists():
        try:
            with _connect_timeout(_CONNECT_SECONDS):
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(path), _published_digest(path), progress=False)
        except (OSError, RuntimeError) as error:  # no network; or not the published file, as torch.hub says it
            raise WeightsError(
                f"the weights of {name} are not at {path} and {url} cannot be downloaded: {error}",
                remedy="connect to the network, or set TORCH_HOME to a folder that has hub/checkpoints/"
                f"{path.name}, or choose a teacher without weights (dis, scene)",
            ) from error
    return path


def load_raft_weights(raft: RAFT, name: str, file: Path | None = None) -> str:
    """Load torchvision's weights for ``raft_small`` or ``raft_large`` and return the sha256 of their file.

    ``file`` defaults to `raft_weights_file`. Raises `WeightsError` if it is damaged or belongs to another model.
    """
    path = file or raft_weights_file(name)
    content = path.read_bytes()
    try:
        raft.load_state_dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    except (
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        AttributeError,
        TypeError,
        LookupError,
        ValueError,
    ) as error:
        raise WeightsError(
            f"{path} ({len(content)} bytes) does not hold the weights of {name}: {error}",
            remedy="delete the file, and it will be downloaded again",
        ) from error
    return hashlib.sha256(content).hexdigest()


def _memory_budget(device: str) -> int:
    """Of the kind of device, never of what is free at the moment: batches decide the last bits on a GPU."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory // 8
    return 256 * 2**20


@dataclass(frozen=True)
class _Options:
    device: str
    iterations: int
    precision: Precision
    memory_budget: int
    compiled: bool
    preset: Preset


def _raft(name: str) -> Callable[[_Options], FlowTeacher]:
    create, weights = _RAFT[name]

    def build(options: _Options) -> FlowTeacher:
        file = raft_weights_file(name)
        promised = hashlib.sha256(file.read_bytes()).hexdigest()

        def build_engine() -> RaftEngine:
            raft = create(weights=None)
            if (found := load_raft_weights(raft, name, file)) != promised:
                raise WeightsError(
                    f"the weights of {name} changed while they were in use: sha256 {promised}, now {found}",
                    remedy="run the stage again",
                )
            return RaftEngine(
                raft.to(options.device),
                iterations=options.iterations,
                precision=options.precision,
                memory_budget=options.memory_budget,
                compiled=options.compiled,
            )

        return RaftTeacher(name, build_engine, weights, promised, options.device)

    return build


TEACHERS: dict[str, Callable[[_Options], FlowTeacher]] = {
    "raft_small": _raft("raft_small"),
    "raft_large": _raft("raft_large"),
    "dis": lambda options: DisTeacher(options.preset),
}


def _published_digest(path: Path) -> str:
    """The first eight digits of the sha256, which torchvision writes into the name of the file."""
    return path.stem.rsplit("-", 1)[1]


@contextmanager
def _connect_timeout(seconds: float) -> Iterator[None]:
    """torch.hub opens its connection without a limit, so a silent network would hang for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def at_least_two(frames: UInt8[Tensor, "t h w 3"]) -> None:
    if len(frames) < 2:
        raise ValueError(f"flow needs two frames or more, not {len(frames)}")
