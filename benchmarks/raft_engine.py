"""How much the whole-video engine saves: plain torchvision loop : engine, both ways, in one run.

    TORCH_HOME=../shared/weights python -m benchmarks.raft_engine

Prints ratios of times alone (larger is faster than the plain loop; the median of rounds that take turns) and, as the
proof that nothing was bought with accuracy, the difference to the plain loop (0 means bit-equal). The last row of each
size is how the flow stage uses the cores: as many workers as the plain loop has threads, with one thread and a video
each.
The frames are of the real sample beside the checkout, every second one; elsewhere a drifting texture with a faster
square (RAFT takes the same time on any picture).
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.models.optical_flow import raft_large, raft_small
from torchvision.models.optical_flow.raft import RAFT

from data.clevrer import FRAMES, video_path
from data.video import VideoReader
from models.flow_teachers import load_raft_weights
from models.raft_engine import RaftEngine

SAMPLE = Path(__file__).resolve().parents[2] / "shared/clevrer" / video_path("train", 0)


def frames_of_the_sample(count: int, height: int, width: int) -> Tensor:
    """Consecutive kept frames of a real video, in [-1, 1]."""
    with VideoReader() as reader:
        kept = range(40, 40 + 2 * count, 2)
        frames = reader.read(SAMPLE, kept, height=height, width=width, expected_frames=FRAMES)
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1


def drifting_frames(count: int, height: int, width: int) -> Tensor:
    """A rolled smooth texture and a square that moves three pixels a frame, in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=generator)
    texture = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0]
    frames = torch.stack([texture.roll(k, dims=2) for k in range(count)])
    for k in range(count):
        frames[k, :, height // 3 : height // 2, 20 + 3 * k : 60 + 3 * k] = texture[:, :1, :1]
    return frames * 2 - 1


@torch.no_grad()
def plain_loop(raft: RAFT, images: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    def one(a: Tensor, b: Tensor) -> Tensor:
        return raft(a[None], b[None], num_flow_updates=iterations)[-1]

    pairs = list(pairwise(images))
    return torch.cat([one(a, b) for a, b in pairs]), torch.cat([one(b, a) for a, b in pairs])


@cache
def engine_of_a_worker(model: str, iterations: int) -> RaftEngine:
    torch.set_num_threads(1)
    raft = (raft_small if model == "raft_small" else raft_large)(weights=None).eval()
    return RaftEngine(raft, iterations=iterations)


def one_video(task: tuple[str, int, np.ndarray]) -> None:
    model, iterations, images = task
    engine_of_a_worker(model, iterations)(torch.from_numpy(images))


def workers_ratio(model: str, iterations: int, images: Tensor, plain: Callable[[], object], rounds: int) -> float:
    """Seconds of the plain loop : seconds a video of as many single-threaded workers as it has threads."""
    count = torch.get_num_threads()
    tasks = [(model, iterations, images.numpy())] * count
    ratios = []
    with multiprocessing.get_context("spawn").Pool(count) as pool:
        pool.map(one_video, tasks, chunksize=1)
        for _ in range(rounds):
            seconds = timed(plain)
            ratios.append(count * seconds / timed(lambda: pool.map(one_video, tasks, chunksize=1)))
    return statistics.median(ratios)


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["raft_small", "raft_large"], default="raft_small")
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5, help="the median of their ratios counts")
    parser.add_argument("--compiled", action="store_true", help="measure bfloat16 through torch.compile, too")
    parser.add_argument("--random-weights", action="store_true", help="ratios do not depend on the weights")
    args = parser.parse_args()
    raft = (raft_small if args.model == "raft_small" else raft_large)(weights=None).eval()
    if not args.random_weights:
        load_raft_weights(raft, args.model)
    print(
        f"{args.model}, {args.iterations} iterations, {args.frames} frames both ways, {torch.get_num_threads()} threads"
    )
    for height, width in ((160, 240), (320, 480)):
        make = frames_of_the_sample if SAMPLE.exists() else drifting_frames
        images = make(args.frames, height, width)
        exact = RaftEngine(raft, iterations=args.iterations)
        quick = RaftEngine(raft, iterations=args.iterations, precision="bfloat16")
        runs: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
            "plain": lambda images=images: plain_loop(raft, images, args.iterations),
            "float32": lambda images=images, exact=exact: exact(images),
            "bfloat16": lambda images=images, quick=quick: quick(images),
        }
        if args.compiled:
            built = RaftEngine(raft, iterations=args.iterations, precision="bfloat16", compiled=True)
            runs["bfloat16, compiled"] = lambda images=images, built=built: built(images)
        results = {name: torch.cat(run()) for name, run in runs.items()}
        ratios: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.rounds):
            seconds = {name: timed(run) for name, run in runs.items()}
            for name in runs:
                ratios[name].append(seconds["plain"] / seconds[name])
        for name in list(results)[1:]:
            difference = results[name] - results["plain"]
            print(
                f"{height}x{width}  plain : {name} = {statistics.median(ratios[name]):.2f}  end-point difference "
                f"mean {difference.norm(dim=1).mean():.4f} px, greatest component {difference.abs().max():.2g}"
            )
        as_stage = workers_ratio(args.model, args.iterations, images, runs["plain"], args.rounds)
        print(f"{height}x{width}  plain : float32 in {torch.get_num_threads()} workers = {as_stage:.2f}")


if __name__ == "__main__":
    main()
