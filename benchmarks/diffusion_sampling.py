"""What sampling costs and gives: quality of a trained `latent_diffusion` against sampling steps and samples.

    python -m benchmarks.diffusion_sampling [KEY] [--steps 1,2,4,8,16] [--samples 1,2,4,8] [--videos N]

KEY names the predictor in params.yaml (default latent_diffusion), trained in artifacts/train/KEY. It is rolled out on
the evaluation windows of params.yaml, first with each number of sampling steps and one sample, then with the steps of
its own options and the mean picture of k samples. *Spread* is the standard deviation of samples around their mean, in
[0, 1] colours. Best of k chooses the sample nearest to the truth in every window: no prediction can do that.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from models.autoencoder import load_vae
from models.checkpoint import load_predictor, read_meta
from models.evaluation import Window
from models.metrics import score
from models.predictors.latent_diffusion import LatentDiffusion
from models.statistics import State, merge, picture_statistics, state_of
from pipeline.devices import devices
from pipeline.params import load_params
from pipeline.stage import ARTIFACTS, Job
from stages.evaluate import Windows

Samples = Float[Tensor, "b s y 3 h w"]


@dataclass
class Figures:
    """Running totals of one column of one table."""

    states: list[State]
    squares: float = 0.0
    freedom: int = 0

    def add(self, frames: Float[Tensor, "b y 3 h w"], window: Window) -> None:
        tables = picture_statistics(frames, window.frames, window.context.frames[:, -1], window.foreground)
        self.states.append(state_of(window.video.numpy(), tables))

    def spread(self, samples: Samples) -> None:
        deviation = samples - samples.mean(1, keepdim=True)
        self.squares += float(deviation.square().sum(dtype=torch.float64))
        self.freedom += deviation[:, 1:].numel()

    def skill_and_psnr(self) -> str:
        scores = score(merge(*self.states), np.random.default_rng(0), resamples=1)
        found = [scores[name].overall.value if name in scores else float("nan") for name in ("skill", "fg_psnr")]
        return f"{found[0]:.3f} | {found[1]:.2f}"


def best(samples: Samples, truth: Float[Tensor, "b y 3 h w"]) -> Float[Tensor, "b y 3 h w"]:
    """The sample of every window whose whole future is nearest to the truth."""
    errors = (samples - truth[:, None]).square().mean((2, 3, 4, 5))
    return samples[torch.arange(len(samples)), errors.argmin(1)]


def draw(
    predictor: LatentDiffusion, windows: list[Window], samples: int, steps: int, device: str
) -> Iterator[tuple[Window, Samples, float]]:
    """Every window with its samples and the seconds that they took."""
    for window in windows:
        context = type(window.context)(**{k: v.to(device) for k, v in vars(window.context).items()})
        generator = torch.Generator(device).manual_seed(int(window.video[0]))
        began = time.perf_counter()
        with torch.inference_mode():
            drawn = predictor.sample(context, window.frames.shape[1], generator, samples, steps=steps).cpu()
        yield window, drawn, time.perf_counter() - began


def against_steps(predictor: LatentDiffusion, windows: list[Window], steps: list[int], device: str) -> str:
    lines = ["| sampling steps | skill | objects, PSNR dB | frames/s |", "|---|---|---|---|"]
    for count in steps:
        figures, frames, seconds = Figures([]), 0, 0.0
        for window, drawn, took in draw(predictor, windows, 1, count, device):
            figures.add(drawn[:, 0], window)
            frames, seconds = frames + drawn.shape[0] * drawn.shape[2], seconds + took
        lines.append(f"| {count} | {figures.skill_and_psnr()} | {frames / seconds:.1f} |")
    return "\n".join(lines)


def against_samples(predictor: LatentDiffusion, windows: list[Window], counts: list[int], device: str) -> str:
    means, chosen = {k: Figures([]) for k in counts}, {k: Figures([]) for k in counts}
    for window, drawn, _ in draw(predictor, windows, max(counts), predictor.options.sampling_steps, device):
        for k in counts:
            means[k].add(drawn[:, :k].mean(1), window)
            means[k].spread(drawn[:, :k])
            chosen[k].add(best(drawn[:, :k], window.frames), window)
    lines = [
        "| samples k | skill of the mean | its objects, PSNR dB | spread | skill, best of k, needs the truth "
        "| its objects, PSNR dB |",
        "|---|---|---|---|---|---|",
    ]
    for k in counts:
        spread = f"{(means[k].squares / means[k].freedom) ** 0.5:.4f}" if means[k].freedom else "-"
        lines.append(f"| {k} | {means[k].skill_and_psnr()} | {spread} | {chosen[k].skill_and_psnr()} |")
    return "\n".join(lines)


def numbers(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("key", nargs="?", default="latent_diffusion")
    parser.add_argument("--steps", type=numbers, default=[1, 2, 4, 8, 16])
    parser.add_argument("--samples", type=numbers, default=[1, 2, 4, 8])
    parser.add_argument("--videos", type=int, help="the first so many videos only")
    arguments = parser.parse_args()
    job = Job("evaluate", arguments.key, load_params(Path("params.yaml")), Path.cwd(), tuple(devices()))
    read_meta(ARTIFACTS / "train" / arguments.key)  # says what is missing before the VAE is looked for
    predictor = load_predictor(ARTIFACTS / "train" / arguments.key, vaes={"frame": load_vae(ARTIFACTS / "vae/frame")})
    if not isinstance(predictor, LatentDiffusion):
        raise SystemExit(f"{arguments.key} is a {type(predictor).__name__}; this is about latent_diffusion")
    predictor.to(job.device)
    protocol = Windows(job)
    windows = [protocol.of(video) for video in protocol.source.videos[: arguments.videos]]
    print(against_steps(predictor, windows, arguments.steps, job.device), end="\n\n", flush=True)
    steps = predictor.options.sampling_steps
    print(f"With {steps} sampling step{'s' if steps > 1 else ''}:\n")
    print(against_samples(predictor, windows, arguments.samples, job.device))


if __name__ == "__main__":
    main()
