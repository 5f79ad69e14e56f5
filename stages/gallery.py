"""Pictures for the report: flow beside truth, occlusion overlays, reconstructions from easy to hard."""

from __future__ import annotations

import numpy as np
import torch

from data.page_content import Figure, Gallery
from data.picture import error_legend, error_picture, flow_legend, flow_picture, occlusion_overlay, panel, to_uint8
from data.resize import resize_field, resize_flow
from data.store import Store
from models.autoencoder import LatentVAE
from pipeline.stage import ARTIFACTS, Job
from stages.evaluate import Windows
from stages.windows_shown import LEAST_SCALE_PX

DIFFICULTIES = (("easiest", 0.0), ("median", 0.5), ("hardest", 1.0))


def flow_gallery(job: Job, windows: Windows) -> tuple[Gallery, ...]:
    """The pair of the evaluation split whose teacher flow moves most in each of the first three videos."""
    flow, occlusion, labels = (Store(ARTIFACTS / name) for name in ("flow", "occlusion", "label"))
    frames = windows.source.stores["frames"]
    figures = []
    for video in windows.source.videos[:3]:
        estimate = torch.from_numpy(flow.read_flow("flow_bwd", video))
        pair = int(estimate.norm(dim=1).mean(dim=(1, 2)).argmax())
        picture = frames.read("frames", video, pair + 1, pair + 2)[0]
        h, w = picture.shape[:2]
        mine = resize_flow(estimate[pair : pair + 1], h, w)[0].numpy()
        scale = max(LEAST_SCALE_PX, float(np.linalg.norm(mine, axis=0).max()))
        images = [picture, flow_picture(mine, scale)]
        labels_of = [f"frame {pair + 1}", f"teacher, full colour {scale:.1f} px"]
        if video in labels.ids:
            truth = torch.from_numpy(labels.read_flow("flow_bwd", video, pair, pair + 1))
            images.append(flow_picture(resize_flow(truth, h, w)[0].numpy(), scale))
            labels_of.append("truth")
        for name, store in (("visible: teacher", occlusion), ("visible: truth", labels)):
            if video in store.ids:
                seen = torch.from_numpy(store.read("visible", video, pair, pair + 1)).float()[:, None] / 255
                images.append(occlusion_overlay(picture, resize_field(seen, h, w)[0, 0].numpy()))
                labels_of.append(name)
        caption = f"video_{video:05d}, pair {pair} to {pair + 1}: backward flow and what it cannot explain"
        figures.append(Figure(caption, panel(images, labels_of, columns=3, scale=2)))
    if not figures:
        return ()
    note = (
        f"Backward flow of {job.params.flow.teacher}: hue is direction, saturation is speed. Pixels marked in the "
        "overlays were hidden in the frame before."
    )
    return (Gallery("Flow and occlusion", note, (*figures, Figure("The colour wheel", flow_legend(96)))),)


@torch.inference_mode()
def reconstruction_gallery(windows: Windows, vae: LatentVAE, device: str) -> Gallery:
    """Frames of the evaluation split with the smallest, the median and the largest reconstruction error."""
    best: list[tuple[float, int, int, np.ndarray, np.ndarray]] = []
    for window in windows:
        pictures = window.frames[:, 0].to(device)
        decoded = vae.to_frames(vae.to_latents(pictures))
        errors = (decoded - pictures).square().mean(dim=(1, 2, 3)).tolist()
        shown = zip(
            errors,
            window.start.tolist(),
            to_uint8(pictures.cpu().numpy()),
            to_uint8(decoded.cpu().numpy()),
            strict=True,
        )
        best += [(e, int(window.video[0]), s + windows.context, truth, guess) for e, s, truth, guess in shown]
        best = _keep(best)
    figures = []
    for name, quantile in DIFFICULTIES:
        error, video, frame, truth, guess = best[round(quantile * (len(best) - 1))]
        images = [truth, guess, error_picture(guess, truth)]
        psnr = -10 * np.log10(max(error, 1e-12))
        sheet = panel(images, ["truth", f"reconstruction, {psnr:.1f} dB", "error"], columns=3, scale=2)
        figures.append(Figure(f"{name}: video_{video:05d}, frame {frame}", sheet))
    legend = Figure("Scale of the error", error_legend(24, 192))
    return Gallery("Reconstructions of the frame VAE", "The ceiling of every latent predictor.", (*figures, legend))


def _keep(found: list[tuple[float, int, int, np.ndarray, np.ndarray]], most: int = 101) -> list:
    """Sorted by error and thinned evenly, extremes kept, so that memory does not grow with the split."""
    found = sorted(found, key=lambda item: item[0])
    if len(found) <= most:
        return found
    return [found[i] for i in np.linspace(0, len(found) - 1, most).round().astype(int)]
