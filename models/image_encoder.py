"""Image encoders by name: a small vision transformer that is trained here, or a frozen one from elsewhere.

``small_vit`` needs no weights. ``clip:PLACE`` and ``vit:PLACE`` (a folder or an id of the Hugging Face hub) come
through transformers, from safetensors alone; ``torchvision:vit_b_16`` from torch.hub's cache. An encoder is two parts:
`build_pretrained` gives what is frozen (nothing for ``small_vit``), `build_tokens` what is trained on top of it.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models import VisionTransformer, ViT_B_16_Weights, vit_b_16

from data.errors import WeightsError

ENCODERS = r"^(small_vit|clip:.+|vit:.+|torchvision:vit_b_16)$"
PATCH = 8
"""Pixels per side of a token's cell."""


class FrozenViT(nn.Module):
    """A pretrained vision transformer as a map from frames in [0, 1] to its last tokens, laid out as an image.

    Frames are resized to the square that it was trained on and normalised as its weights want. Gradients pass through
    to the frames; the weights have none.
    """

    def __init__(self, *, size: int, channels: int, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.size, self.channels = size, channels
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value)[:, None, None], persistent=False)

    def tokens(self, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b k c"]:
        """The last layer's tokens: that of the class, then those of the patches, row by row."""
        raise NotImplementedError

    def forward(self, frames: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c g g"]:
        patches = self.tokens(self._as_trained(frames))[:, 1:]
        side = round(patches.shape[1] ** 0.5)
        return patches.transpose(1, 2).unflatten(2, (side, side))

    def summary(self, frames: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c"]:
        """One vector for each frame: the class token."""
        return self.tokens(self._as_trained(frames))[:, 0]

    def _as_trained(self, frames: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 s s"]:
        images = F.interpolate(frames, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        return (images - self.get_buffer("mean")) / self.get_buffer("std")


class TransformersViT(FrozenViT):
    """CLIP's image tower (Radford et al. 2021) or a ViT (Dosovitskiy et al. 2021) of transformers."""

    def __init__(self, model: Any, mean: list[float], std: list[float]) -> None:
        super().__init__(size=model.config.image_size, channels=model.config.hidden_size, mean=mean, std=std)
        self.model = model.float().requires_grad_(False)

    def tokens(self, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b k c"]:
        return self.model(pixel_values=images).last_hidden_state


class TorchvisionViT(FrozenViT):
    """A VisionTransformer of torchvision."""

    def __init__(self, model: VisionTransformer, mean: list[float], std: list[float]) -> None:
        super().__init__(size=model.image_size, channels=model.hidden_dim, mean=mean, std=std)
        self.model = model.requires_grad_(False)

    def tokens(self, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b k c"]:
        patches = self.model.conv_proj(images).flatten(2).transpose(1, 2)
        first = self.model.class_token.expand(len(images), -1, -1)
        return self.model.encoder(torch.cat([first.to(patches.dtype), patches], dim=1))


def build_pretrained(name: str) -> FrozenViT | None:
    """The frozen part of the encoder called ``name``, in evaluation mode; None for ``small_vit``.

    Raises WeightsError where the weights, or the package that reads them, cannot be had, or do not fit; ValueError
    for a name that is none.
    """
    kind, _, place = name.partition(":")
    if name == "small_vit":
        return None
    if name == "torchvision:vit_b_16":
        return _from_torch_hub().eval()
    if kind in ("clip", "vit") and place:
        return _from_transformers(kind, place).eval()
    raise ValueError(f"no image encoder is called {name!r}; there are small_vit, clip:, vit:, torchvision:vit_b_16")


def build_tokens(
    pretrained: FrozenViT | None, *, height: int, width: int, dim: int, depth: int, heads: int
) -> nn.Module:
    """The trained part: from frames (a `SmallViT`) or from the features of a frozen encoder (a `Projection`) to
    ``dim`` channels on the grid of `PATCH` pixels per cell."""
    grid = (height // PATCH, width // PATCH)
    if pretrained is None:
        return SmallViT(grid, dim=dim, depth=depth, heads=heads)
    return Projection(pretrained.channels, dim, grid)


class Projection(nn.Module):
    """Features of any grid on ours: normalised per token, mapped linearly, resized."""

    def __init__(self, channels: int, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(channels)
        self.out = nn.Linear(channels, dim)

    def forward(self, features: Float[Tensor, "b c g g"]) -> Float[Tensor, "b d gh gw"]:
        mapped = self.out(self.norm(features.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return F.interpolate(mapped, self.grid, mode="bilinear", align_corners=False)


class SmallViT(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) on patches of `PATCH` pixels, with fixed positions in two
    dimensions: every token sees the whole picture, which is where the object stands that will be hit."""

    def __init__(self, grid: tuple[int, int], *, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        if dim % heads or dim % 4:
            raise ValueError(f"width {dim} must be divisible by heads={heads} and by 4")
        self.embed = nn.Conv2d(3 * PATCH**2, dim, 1)
        self.blocks = nn.Sequential(*(_Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.register_buffer("positions", positions(grid, dim), persistent=False)

    def forward(self, frames: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d gh gw"]:
        # Frames lie in [0, 1] and deviate by about 0.1.
        patches = self.embed(F.pixel_unshuffle((frames - 0.5) * 4, PATCH))
        tokens = patches.flatten(2).transpose(1, 2) + self.get_buffer("positions")
        return self.norm(self.blocks(tokens)).transpose(1, 2).unflatten(2, patches.shape[2:])


class _Block(nn.Module):
    """Attention and a perceptron, each normalised before (pre-norm) and zero at the start."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.widen, self.narrow = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        for layer in (self.out, self.narrow):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        qkv = self.qkv(self.norm_attention(tokens)).unflatten(2, (3, self.heads, -1))
        mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        tokens = tokens + self.out(mixed.transpose(1, 2).flatten(2))
        return tokens + self.narrow(F.gelu(self.widen(self.norm_mlp(tokens))))


def positions(grid: tuple[int, int], dim: int) -> Float[Tensor, "n d"]:
    """Sines and cosines of the row in the first half of ``dim`` channels, of the column in the second (Vaswani et al.
    2017, in two dimensions), tokens row by row. ``dim`` must be divisible by 4."""
    frequency = 100.0 ** (-torch.arange(dim // 4) / (dim // 4))
    ys, xs = torch.meshgrid(*(torch.arange(length).float() for length in grid), indexing="ij")
    angles = [axis.flatten()[:, None] * frequency for axis in (ys, xs)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


def _from_transformers(kind: str, place: str) -> TransformersViT:
    try:
        import transformers
    except ImportError as error:
        raise WeightsError(
            f"the encoder {kind}:{place} is read by the package transformers, which is not installed",
            remedy="pip install 'clevrcast[encoders]', or choose the encoder small_vit",
        ) from error
    local = Path(place).is_dir()
    loader: Any = transformers.CLIPVisionModel if kind == "clip" else transformers.ViTModel
    extra = {} if kind == "clip" else {"add_pooling_layer": False}
    try:
        model, report = loader.from_pretrained(
            place, local_files_only=local, use_safetensors=True, output_loading_info=True, **extra
        )
        scaling = transformers.AutoImageProcessor.from_pretrained(place, local_files_only=local)
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(
            f"the encoder {kind}:{place} cannot be loaded: {error}",
            remedy="give a folder with config.json, model.safetensors and preprocessor_config.json, or a model id of "
            "the Hugging Face hub with the network (or HF_HOME) at hand, or choose the encoder small_vit",
        ) from error
    # What a file does not hold would silently be random.
    if absent := sorted(report["missing_keys"]):
        raise WeightsError(
            f"the weights of {kind}:{place} are incomplete: {', '.join(absent[:5])}",
            remedy=f"give weights of a {loader.__name__}",
        )
    return TransformersViT(model, list(scaling.image_mean), list(scaling.image_std))


def _from_torch_hub() -> TorchvisionViT:
    weights = ViT_B_16_Weights.IMAGENET1K_V1
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    remedy = f"download {weights.url} to {path}, or set TORCH_HOME to a folder that has it, or choose small_vit"
    if not path.exists():
        raise WeightsError(f"the weights of torchvision:vit_b_16 are not at {path}", remedy=remedy)
    model = vit_b_16(weights=None)
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{path} does not hold the weights of vit_b_16: {error}", remedy=remedy) from error
    preset = weights.transforms()
    return TorchvisionViT(model, list(preset.mean), list(preset.std))
