"""The autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752) with our scaling and statistics."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from jaxtyping import Float
from torch import Tensor

from models.latent_vae import Decoded, Encoded, LatentVAE, Posterior


class KLVAE(LatentVAE, AutoencoderKL):  # pyright: ignore[reportIncompatibleMethodOverride]
    """diffusers' `AutoencoderKL` as a `LatentVAE`; ``stride`` is ``2 ** (len(block_out_channels) - 1)``.

    Images come in their own units and go into the networks as ``(x - shift) / scale``: the default 0.5 and 0.5 turn
    frames in [0, 1] into the [-1, 1] of diffusers' checkpoints. All else is `AutoencoderKL`'s, the names of the
    weights too, so either reads the other's folders. What it says of latents (``scaling_factor``, ``shift_factor``,
    ``latents_mean``, ``latents_std``) is carried along and not used: the statistics of `calibrate` take its place.
    Raises ValueError where the output has other channels than the input, or ``norm_num_groups`` divides no width.
    """

    @register_to_config
    def __init__(
        self,
        *,
        in_channels: int = 3,
        out_channels: int | None = None,
        down_block_types: Sequence[str] | None = None,
        up_block_types: Sequence[str] | None = None,
        block_out_channels: Sequence[int] = (32, 64),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 8,
        sample_size: int = 32,
        scaling_factor: float = 1.0,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
        shift: float = 0.5,
        scale: float = 0.5,
    ) -> None:
        levels = len(block_out_channels)
        if out_channels not in (None, in_channels):
            raise ValueError(f"out_channels={out_channels} is not in_channels={in_channels}")
        if wrong := [width for width in block_out_channels if width % norm_num_groups]:
            raise ValueError(f"norm_num_groups={norm_num_groups} does not divide block_out_channels {wrong}")
        super().__init__(
            in_channels=in_channels,
            out_channels=in_channels,
            down_block_types=down_block_types or ("DownEncoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
            up_block_types=up_block_types or ("UpDecoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
            block_out_channels=block_out_channels,  # pyright: ignore[reportArgumentType]
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            sample_size=sample_size,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            latents_mean=latents_mean,  # pyright: ignore[reportArgumentType]
            latents_std=latents_std,  # pyright: ignore[reportArgumentType]
            force_upcast=force_upcast,
            use_quant_conv=use_quant_conv,
            use_post_quant_conv=use_post_quant_conv,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.stride, self.shift, self.scale = 2 ** (levels - 1), shift, scale
        self.latent_channels = latent_channels
        self._register_statistics()

    def encode(self, x: Float[Tensor, "b c h w"]) -> Encoded:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.check_grid(x)
        (posterior,) = AutoencoderKL.encode(self, (x - self.shift) / self.scale, return_dict=False)
        return Encoded(Posterior(posterior.parameters.float()))

    def decode(self, z: Float[Tensor, "b z hz wz"]) -> Decoded:  # pyright: ignore[reportIncompatibleMethodOverride]
        (sample,) = AutoencoderKL.decode(self, z, return_dict=False)  # pyright: ignore[reportArgumentType]
        return Decoded(sample.float() * self.scale + self.shift)
