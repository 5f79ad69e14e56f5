"""What autoencoders and predictors made of a video, as pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from data.clevrer import FPS
from data.errors import EmptyError, StoreError
from data.overlay import flow_footer, legend
from data.picture import Image, error_legend, error_picture, flow_picture, to_uint8
from data.store import Store
from models.autoencoder import load_vae
from models.examples import Example
from models.latent_colours import latent_colours
from models.latent_vae import LatentVAE
from models.reconstruction import QUALITY, psnr, reconstruct
from models.results import read_examples
from pipeline.devices import device
from pipeline.params import Params
from stages.images import SOURCES, Images
from stages.shelf import Progress, is_finished, output, shelf
from stages.view import Footer, Tiles, View, enlarged, flow_scale

FLOW_ERROR_PX = 1.0
"""The error of a flow that is drawn in full colour."""
_BATCH = 16


def vae(key: str, video: int, params: Params) -> View:
    """Each image of a video, what the autoencoder gives back, and the error."""
    images = _images(key, video, params)
    network = _network(key)
    decoded = reconstruct(network, images)
    shown = _Shown(key, images, decoded.clamp(0, 1) if key == "frame" else decoded)

    def tiles(k: int) -> Tiles:
        return [
            (f"video_{video:05d}, {shown.step} {k}", shown.original(k)),
            (f"reconstruction, {shown.quality(k)}", shown.decoded(k)),
            ("error", shown.error(k)),
        ]

    said = f"vae@{key} on video {video}: {shown.told()}; {len(images)} {shown.step}s"
    return View(len(images), tiles, 3, FPS / params.decode.stride, shown.footers(), (said,), shown.step)


@torch.inference_mode()
def encode(key: str, video: int, params: Params) -> View:
    """The latents as colours, between what was encoded and what they decode to."""
    found = shelf(f"encode@{key}", video)
    latents, images, network = torch.from_numpy(found["latents"]).float(), _images(key, video, params), _network(key)
    colours, explained = latent_colours(latents)
    parts = [network.from_latents(part.to(network.latent_mean.device)).cpu() for part in latents.split(_BATCH)]
    decoded = torch.cat(parts)
    shown = _Shown(key, images, decoded.clamp(0, 1) if key == "frame" else decoded)
    t, z, hz, wz = latents.shape
    shares = " + ".join(f"{share:.1%}" for share in explained.tolist())
    pictures = to_uint8(colours.numpy())

    def tiles(k: int) -> Tiles:
        return [
            (f"video_{video:05d}, {shown.step} {k}", shown.original(k)),
            (f"latents, 3 components: {shares}", enlarged(pictures[k], *images.shape[-2:])),
            (f"decoded, {shown.quality(k)}", shown.decoded(k)),
        ]

    said = (
        f"{t} latents of {z} channels on {hz}x{wz}; red, green and blue are their first three principal components, "
        f"which explain {shares} = {explained.sum():.1%} of the variance. Decoded: {shown.told()}"
    )
    notes = (found.note,) if found.note else ()
    footers = shown.footers() if key == "flow" else ()
    return View(t, tiles, 3, FPS / params.decode.stride, footers, (said, *notes), shown.step)


def evaluate(key: str, video: int, params: Params) -> View:
    """The windows of a video that were kept as examples, all of them one below the other."""
    title = f"evaluate@{key}"
    folder = folder_of(title)
    examples = read_examples(folder)
    mine = [e for e in examples if e.video == video]
    if not mine:
        raise EmptyError(
            f"{title} kept no window of video {video}",
            remedy=f"choose one of those that it kept: {kept_windows(examples)}",
        )
    context, steps = len(mine[0].context), len(mine[0].context) + len(mine[0].truth)

    def tiles(k: int) -> Tiles:
        shown: Tiles = []
        for e in mine:
            name = f"{', '.join(e.rules)}: frame {e.start + k}"
            if k < context:
                seen = e.context[k]
                shown += [(f"{name}, observed", seen), ("observed", seen), ("no error", np.zeros_like(seen))]
                continue
            truth, said, error = e.truth[k - context], e.prediction[k - context], e.mse[k - context]
            ahead = k - context + 1
            shown += [
                (f"{name}, truth +{ahead}", truth),
                (f"{key} +{ahead}, {-10 * np.log10(max(error, 1e-12)):.1f} dB", said),
                ("error", error_picture(said, truth)),
            ]
        return shown

    skill = [1 - e.mse.mean() / max(e.mse_copy.mean(), 1e-12) for e in mine]
    told = ", ".join(
        f"{' and '.join(e.rules)} from frame {e.start} (skill {s:.3f})" for e, s in zip(mine, skill, strict=True)
    )
    said = f"kept windows of video {video}: {told}"
    return View(steps, tiles, 3, FPS / params.decode.stride, (_error_key,), (said,), "step")


def kept_windows(examples: tuple[Example, ...]) -> str:
    """Which windows are kept, with the rules that chose them."""
    return "; ".join(f"video {e.video} from frame {e.start} ({', '.join(e.rules)})" for e in examples)


def folder_of(title: str) -> Path:
    """The files of a stage that makes one folder. Raises WorkspaceError or EmptyError where they are not there yet."""
    if is_finished(title):
        return output(title)
    for _, built in Progress.of(title).units:
        if built is not None:
            return built.folder
    raise EmptyError(f"{title} is not finished", remedy=f"run `dvc repro {title}`, or `clevrcast inspect {title}`")


class _Shown:
    """Images and what a VAE made of them, frames or flow, as pictures with figures."""

    def __init__(self, key: str, images: torch.Tensor, decoded: torch.Tensor) -> None:
        self.key, self.images, self.made = key, images, decoded
        self.step = "frame" if key == "frame" else "pair"
        self.scale = flow_scale(images.numpy()) if key == "flow" else 1.0

    def original(self, k: int) -> Image:
        return self._picture(self.images, k)

    def decoded(self, k: int) -> Image:
        return self._picture(self.made, k)

    def error(self, k: int) -> Image:
        if self.key == "frame":
            return error_picture(self.decoded(k), self.original(k))
        return flow_picture((self.made[k] - self.images[k]).numpy(), FLOW_ERROR_PX)

    def quality(self, k: int) -> str:
        if self.key == "frame":
            return f"{psnr(self.made[k : k + 1], self.images[k : k + 1])[0]:.1f} dB"
        return f"EPE {(self.made[k] - self.images[k]).norm(dim=0).mean():.3f} px"

    def told(self) -> str:
        units = {"psnr": "dB", "psnr_foreground": "dB", "epe": "px", "epe_moving": "px"}
        quality = QUALITY[self.key](self.made, self.images)
        return ", ".join(f"{name} {v:.3f} {units[name]}" for name, v in quality.items() if v is not None)

    def footers(self) -> tuple[Footer, ...]:
        if self.key == "frame":
            return (_error_key,)
        text = (
            f"backward flow: full colour {self.scale:g} px per step, of the error {FLOW_ERROR_PX:g} px; darker is more"
        )
        return (lambda k, width: flow_footer(width, text),)

    def _picture(self, of: torch.Tensor, k: int) -> Image:
        return to_uint8(of[k].numpy()) if self.key == "frame" else flow_picture(of[k].numpy(), self.scale)


def _error_key(k: int, width: int) -> Image:
    return legend(width, error_legend(24, 192), "mean absolute error of the colours")


def _images(key: str, video: int, params: Params) -> torch.Tensor:
    stage, array = SOURCES[key]
    shelf(stage, video)  # says why where the video is not there
    if not is_finished(stage):
        raise StoreError(
            f"{stage} is not finished, and what was encoded comes from it", remedy=f"run `dvc repro {stage}`"
        )
    height, width = params.decode.resolution
    return Images(Store(output(stage)), array, [video], height=height, width=width).of(video)


def _network(key: str) -> LatentVAE:
    network = load_vae(folder_of(f"vae@{key}"))
    torch.nn.Module.to(network, device())
    return network


VIEWS = {"vae": vae, "encode": encode, "evaluate": evaluate}
