"""The autoencoders by name: made from options, read from folders.

``block`` is `BlockVAE` and ``kl`` is `KLVAE`. What is encoded decides on channels and scaling: ``frame`` stands for
RGB frames in [0, 1], ``flow`` for optical flow in pixels. Folders are in diffusers' layout (``config.json`` and
``diffusion_pytorch_model.safetensors``); pickled weights are never read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError

from data.errors import WeightsError
from models.block_vae import BlockVAE
from models.latent_vae import LatentVAE, Vaes, encode_windows
from models.weights import refuse_misfits

__all__ = ["BlockVAE", "LatentVAE", "Vaes", "encode_windows", "load_vae"]

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
INPUTS: Mapping[str, Mapping[str, Any]] = {
    "frame": {"in_channels": 3, "shift": 0.5, "scale": 0.5},
    "flow": {"in_channels": 2, "shift": 0.0, "scale": 8.0},
}
"""What a VAE of this key encodes: channels, and units of the networks as ``(x - shift) / scale``."""
_ARCHITECTURES = {"BlockVAE": "block", "KLVAE": "kl", "AutoencoderKL": "kl"}
"""Class, as a folder names it -> architecture."""
_STATISTICS = {"latent_mean", "latent_std", "latent_gain"}


class BlockOptions(BaseModel):
    """Of `BlockVAE`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    latent_channels: int = Field(default=6, ge=1, description="channels of the latent, at most those of a block")
    stride: int = Field(default=2, ge=1, description="pixels per cell of the latent grid")
    width: int = Field(default=32, ge=1, description="channels of the refining networks")
    blocks: int = Field(default=1, ge=0, description="residual blocks of each refining network")


class KLOptions(BaseModel):
    """Of `KLVAE`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    latent_channels: int = Field(default=4, ge=1, description="channels of the latent")
    block_out_channels: tuple[int, ...] = Field(
        default=(32, 64), min_length=1, description="width of each level; every further level halves the grid"
    )
    layers_per_block: int = Field(default=1, ge=1, description="residual blocks per level")
    norm_num_groups: int = Field(default=8, ge=1, description="groups of GroupNorm; divides every width")
    mid_block_add_attention: bool = Field(default=True, description="self-attention on the latent grid")


OPTIONS: Mapping[str, type[BlockOptions | KLOptions]] = {"block": BlockOptions, "kl": KLOptions}


def _class(architecture: str) -> type[LatentVAE]:
    if architecture == "block":
        return BlockVAE
    from models.kl_vae import KLVAE  # half of diffusers comes with it: seconds that only its users should wait

    return KLVAE


def build_vae(architecture: str, key: str, options: BaseModel) -> LatentVAE:
    """An untrained VAE for ``key``, with weights by torch's global generator. Raises ValueError where options clash."""
    return _class(architecture)(**options.model_dump(), **INPUTS[key])


def load_vae(folder: Path) -> LatentVAE:
    """The VAE saved in ``folder``, frozen and in evaluation mode.

    Raises WeightsError if it is absent, damaged, of a class not known here, or has no statistics of its latents.
    """
    vae, calibrated = read_vae(folder)
    if not calibrated:
        raise WeightsError(
            f"{folder} holds no statistics of its latents", remedy="name it as vae.KEY.pretrained and run that stage"
        )
    return vae


def read_vae(folder: Path) -> tuple[LatentVAE, bool]:
    """The VAE of a folder saved here or of a plain `AutoencoderKL` of diffusers, frozen and in evaluation mode.

    The second value says whether the latents' statistics came with it. Raises WeightsError if the folder holds none,
    if it is damaged, or naming what of its weights does not fit.
    """
    name = str(_read_config(folder).get("_class_name"))
    if name not in _ARCHITECTURES:
        raise WeightsError(
            f"{folder / CONFIG} says _class_name {name!r}, known are {', '.join(_ARCHITECTURES)}",
            remedy="give the folder of an autoencoder (of a whole pipeline, its subfolder vae)",
        )
    if not (folder / WEIGHTS).is_file():
        raise WeightsError(f"{folder} has no {WEIGHTS}", remedy="save it as safetensors: nothing else is loaded")
    remedy = "train or fetch it again"
    loud = logging.get_verbosity()
    logging.set_verbosity_error()  # it would call for training where only our statistics are missing
    try:
        loaded: Any = _class(_ARCHITECTURES[name]).from_pretrained(
            str(folder),
            low_cpu_mem_usage=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        raise WeightsError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:400]}", remedy=remedy) from error
    finally:
        logging.set_verbosity(loud)
    vae, info = loaded
    missing = set(info["missing_keys"])
    calibrated = not missing & _STATISTICS
    source = str(folder / WEIGHTS)
    refuse_misfits(missing - _STATISTICS, info["unexpected_keys"], source=source, remedy=remedy)
    return vae.eval().requires_grad_(False), calibrated


def read_pretrained(folder: Path, architecture: str, key: str, options: BaseModel) -> tuple[LatentVAE, bool]:
    """As `read_vae`, of this architecture and for this key, and with every option that is set. Else WeightsError."""
    vae, calibrated = read_vae(folder)
    kind = "block" if type(vae) is BlockVAE else "kl"
    wanted = {"architecture": architecture, **options.model_dump(mode="json", exclude_unset=True), **INPUTS[key]}
    found = {**vae.config, "architecture": kind}
    wrong = [f"{name} is {_plain(found[name])} instead of {value}" for name, value in wanted.items()
             if _plain(found[name]) != value]  # fmt: skip
    if wrong:
        raise WeightsError(
            f"{folder} is not the {key} VAE asked for: {', '.join(wrong)}",
            remedy=f"set vae.{key}.architecture and vae.{key}.options as they are in the folder (options may be left "
            "out), or give another folder",
        )
    return vae, calibrated


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        raise WeightsError(f"there is no autoencoder in {folder} ({CONFIG} is absent)", remedy="train it, or fetch it")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise WeightsError(f"{file} is not JSON: {error}", remedy="train or fetch it again") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{file} holds no mapping", remedy="train or fetch it again")
    return config
