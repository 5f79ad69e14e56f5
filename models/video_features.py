"""Networks that turn a film into one feature vector, for FVD and JEDi. Weights are files, never a download.

Both come from the package of their authors, which is not a dependency: ``pip install 'clevrcast[fvd]'`` for I3D;
V-JEPA's packages pin old versions of ours, but need none of them for what is used here:
``pip install --no-deps vjepa==0.1.2``.
"""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from data.errors import WeightsError
from models.weights import fit_weights

FilmFeatures = Callable[[Tensor], Tensor]
"""(n, t, 3, h, w) films in [0, 1] -> (n, d)."""

_SIDE = 224
_I3D_LEAST = 9
"""Frames that I3D's last pooling needs."""
_JEPA_FRAMES = 16
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class I3D(nn.Module):
    """Logits of the I3D of Carreira and Zisserman 2017, trained on Kinetics-400: what FVD is computed from.

    Films are rounded to 8 bits, resized to 224 x 224 (bilinear, no antialiasing) and scaled to [-1, 1], as the package
    cd-fvd does. Raises ValueError for films of less than 9 frames.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, films: Float[Tensor, "n t 3 h w"]) -> Float[Tensor, "n d"]:
        if films.shape[1] < _I3D_LEAST:
            raise ValueError(f"FVD needs films of at least {_I3D_LEAST} frames, context included, got {films.shape[1]}")
        small = _square(films.mul(255).round()).transpose(1, 2) / 127.5 - 1
        return self.network(small)


class VJepa(nn.Module):
    """V-JEPA's ViT-H/16 with the attentive pooler of its probe (Bardes et al. 2024), as JEDi uses it (Luo et al. 2025).

    Films of exactly 16 frames, resized to 224 x 224 and normalised; raises ValueError for others.
    """

    def __init__(self, encoder: nn.Module, pooler: nn.Module, frames: int = _JEPA_FRAMES) -> None:
        super().__init__()
        self.encoder, self.pooler, self.frames = encoder, pooler, frames
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, films: Float[Tensor, "n t 3 h w"]) -> Float[Tensor, "n d"]:
        if films.shape[1] != self.frames:
            raise ValueError(f"JEDi needs films of {self.frames} frames, context included, got {films.shape[1]}")
        mean, std = (torch.tensor(v, device=films.device)[:, None, None] for v in (_MEAN, _STD))
        small = (_square(films, antialias=True) - mean) / std
        return self.pooler(self.encoder(small.transpose(1, 2))).squeeze(1)


def load_i3d(path: Path) -> I3D:
    """I3D with the weights of ``path`` (i3d_pretrained_400.pt of cd-fvd). Raises WeightsError."""
    module = _package("cdfvd.third_party.i3d.pytorch_i3d", "pip install 'clevrcast[fvd]'")
    network = module.InceptionI3d(400, in_channels=3)
    fit_weights(network.state_dict(), _load(path, "I3D"), source=str(path), remedy="give i3d_pretrained_400.pt")
    return I3D(network)


def load_vjepa(folder: Path, size: str = "vit_huge") -> VJepa:
    """V-JEPA from ``vith16.pth.tar`` and ``ssv2-probe.pth.tar`` in ``folder``. Raises WeightsError."""
    models = _package("vjepa.models.vision_transformer", "pip install --no-deps vjepa==0.1.2")
    pooling = _package("vjepa.models.attentive_pooler", "pip install --no-deps vjepa==0.1.2")
    encoder = getattr(models, size)(
        img_size=_SIDE,
        patch_size=16,
        num_frames=_JEPA_FRAMES,
        tubelet_size=2,
        uniform_power=True,
        use_sdpa=True,
        use_SiLU=False,
        tight_SiLU=False,
    )
    probe = pooling.AttentiveClassifier(
        embed_dim=encoder.embed_dim, num_heads=encoder.num_heads, depth=1, num_classes=174
    )
    parts = ((encoder, "vith16.pth.tar", "target_encoder"), (probe, "ssv2-probe.pth.tar", "classifier"))
    for network, name, key in parts:
        held = _load(folder / name, "V-JEPA")
        weights = {k.removeprefix("module.").removeprefix("backbone."): v for k, v in held.get(key, {}).items()}
        source, remedy = f"{folder / name}[{key!r}]", f"give V-JEPA's {name}"
        fit_weights(network.state_dict(), weights, source=source, remedy=remedy)
    return VJepa(encoder, probe.pooler)


def _square(films: Tensor, antialias: bool = False) -> Tensor:
    frames = films.flatten(0, 1)
    small = F.interpolate(frames, (_SIDE, _SIDE), mode="bilinear", align_corners=False, antialias=antialias)
    return small.unflatten(0, films.shape[:2])


def _package(name: str, remedy: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise WeightsError(f"{name} cannot be imported: {error}", remedy=remedy) from error


def _load(path: Path, what: str) -> dict[str, Any]:
    if not path.is_file():
        raise WeightsError(f"there is no file {path} with weights of {what}", remedy="download it from its authors")
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, LookupError, ValueError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{path} cannot be read: {error}", remedy="download it again") from error
    if not isinstance(held, dict):
        raise WeightsError(f"{path} holds a {type(held).__name__}, not weights", remedy="download it again")
    return held
