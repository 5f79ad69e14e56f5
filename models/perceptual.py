"""LPIPS, the learned perceptual distance of two pictures (Zhang et al. 2018, arXiv 1801.03924), by the lpips package.

Small networks trained on ImageNet see textures and edges as people do: two pictures are as far apart as their
features are, weighted by how much people minded. The weights are a file, never a download.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data.errors import WeightsError
from models.weights import fit_weights

Net = Literal["squeeze", "alex", "vgg"]


class Perceptual(nn.Module):
    """LPIPS on SqueezeNet 1.1 (or ``net`` alex, vgg), frozen and in evaluation mode. `load_lpips` gives it weights.

    It holds no gradient of its own, but passes those of the pictures. Computed in float32 under autocast too.
    """

    def __init__(self, net: Net = "squeeze") -> None:
        super().__init__()
        import lpips  # here, not above: it brings scipy and a trainer, and few runs need it

        # Its weights are drawn (and torchvision's old spelling warned about) only to be overwritten.
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore", UserWarning)
            self.lpips = lpips.LPIPS(net=net, pnet_rand=True, pretrained=False, verbose=False)
        self.lpips.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Perceptual:
        """Stays in evaluation mode whatever the module that it is part of does: its dropout is not for users."""
        return super().train(False)

    def forward(self, a: Float[Tensor, "n 3 h w"], b: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
        """The distance of each pair of pictures in [0, 1] (0: the same), of at least 32 x 32 pixels."""
        with torch.autocast(device_type=a.device.type, enabled=False):
            shown = [self.lpips.scaling_layer(2 * x.float() - 1) for x in (a, b)]
            features = zip(*(self.lpips.net(x) for x in shown), strict=True)
            layers = [
                linear((_unit_length(of_a) - _unit_length(of_b)).square()).mean((1, 2, 3))
                for linear, (of_a, of_b) in zip(self.lpips.lins, features, strict=True)
            ]
            return torch.stack(layers).sum(0)


def load_lpips(path: Path, net: Net = "squeeze") -> Perceptual:
    """LPIPS with the weights of ``path``: the state dict of ``lpips.LPIPS(net=net)``, trunk included.

    Nothing but tensors is unpickled. Raises WeightsError if the file is absent, unreadable or of another network.
    """
    remedy = f'save the state dict of lpips.LPIPS(net="{net}") there, or leave the perceptual weights out'
    if not path.is_file():
        raise WeightsError(f"there is no file {path} with the weights of LPIPS", remedy=remedy)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{path} cannot be read: {error}", remedy=remedy) from error
    if not isinstance(weights, dict):
        raise WeightsError(f"{path} holds a {type(weights).__name__}, not a state dict", remedy=remedy)
    perceptual = Perceptual(net)
    fit_weights(perceptual.lpips.state_dict(), weights, source=f"{path} (for LPIPS on {net})", remedy=remedy)
    return perceptual


def _unit_length(features: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    # As lpips.normalize_tensor, but for 1e-20: where no feature is active its gradient is 0 * infinity.
    return features / ((features.square().sum(1, keepdim=True) + 1e-20).sqrt() + 1e-10)
