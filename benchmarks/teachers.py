"""How right the teachers are on released videos: estimated flow against rigid flow cast from the annotations.

    TORCH_HOME=../shared/weights python -m benchmarks.teachers [--every N] [--teachers raft_small,dis] [--pictures DIR]

For each teacher, image size and gate: end-point error in pixels of that size, both directions pooled, over all pixels,
over moving ones (truth above 0.5 px a pair) and over the rest; visibility F1, precision and recall of the non-visible
class at the default thresholds. The first row of each size, no motion anywhere, is what a teacher has to beat.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.clevrer import annotation_path, official_split, read_annotation, video_path
from data.labels import VideoLabels, label_video
from data.picture import flow_picture, occlusion_overlay, panel, write_png
from data.video import VideoReader
from models.flow_teachers import FlowPair, build_teacher
from models.occlusion import visibility
from models.static_gate import RADIUS, static_gate
from models.statistics import Statistic, flow_statistics, visibility_statistics

SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "clevrer"
VIDEOS = (0, 1000, 2000, 10000)
STRIDE = 2
FRAMES = 128
GATE_ROWS = 320  # the default radius of the gate is meant for this many rows
REGIONS = ("epe", "epe_moving", "epe_background")


@dataclass(frozen=True)
class Video:
    """The kept frames of one video on one grid, their labels, and the pairs that are measured."""

    id: int
    frames: Tensor
    labels: VideoLabels
    pairs: list[int]


class Tally:
    """Sums of statistics over pairs, directions and videos."""

    def __init__(self) -> None:
        self.total: dict[str, float] = defaultdict(float)
        self.count: dict[str, float] = defaultdict(float)

    def add(self, statistics: dict[str, Statistic]) -> None:
        for name, statistic in statistics.items():
            self.total[name] += float(statistic.total.sum())
            self.count[name] += float(statistic.count.sum())

    def row(self) -> str:
        errors = "".join(f"{self.total[name] / self.count[name]:12.3f}" for name in REGIONS)
        hit, false, miss = (self.total[f"nonvisible_{kind}"] for kind in ("hit", "false", "miss"))
        ratios = (2 * hit / (2 * hit + false + miss), hit / max(hit + false, 1), hit / max(hit + miss, 1))
        return errors + "".join(f"{ratio:12.3f}" for ratio in ratios)


def read(reader: VideoReader, root: Path, video: int, height: int, width: int, every: int) -> Video:
    split, kept = official_split(video), range(0, FRAMES, STRIDE)
    path = root / video_path(split, video)
    frames = reader.read(path, kept, height=height, width=width, expected_frames=FRAMES)
    labels = label_video(read_annotation(root / annotation_path(split, video)), kept, height, width)
    return Video(video, torch.from_numpy(frames), labels, list(range(0, len(kept) - 1, every)))


def measure(tally: Tally, flows: FlowPair, video: Video) -> None:
    labels = video.labels
    truth = FlowPair(*(torch.from_numpy(flow[video.pairs]) for flow in (labels.flow_fwd, labels.flow_bwd)))
    tally.add(flow_statistics(flows.flow_fwd[None], truth.flow_fwd[None]))
    tally.add(flow_statistics(flows.flow_bwd[None], truth.flow_bwd[None]))
    visible = visibility(flows.flow_fwd, flows.flow_bwd)[None, :, None]
    true_visible = torch.from_numpy(labels.visible[video.pairs]).float()[None, :, None]
    tally.add(visibility_statistics(visible, true_visible))


def draw(path: Path, raw: FlowPair, gated: FlowPair, video: Video, index: int) -> None:
    """Frame, truth, teacher, gated teacher; true and estimated visibility of one pair."""
    k, labels = video.pairs[index], video.labels
    frame, scale = video.frames[k + 1].numpy(), video.frames.shape[1] / 32
    visible = visibility(gated.flow_fwd[index, None], gated.flow_bwd[index, None])[0].numpy()
    raw_visible = visibility(raw.flow_fwd[index, None], raw.flow_bwd[index, None])[0].numpy()
    images = [
        frame,
        *(flow_picture(flow, scale) for flow in (labels.flow_bwd[k], raw.flow_bwd[index].numpy())),
        flow_picture(gated.flow_bwd[index].numpy(), scale),
        *(occlusion_overlay(frame, v) for v in (labels.visible[k].astype(np.float32), raw_visible, visible)),
    ]
    captions = ["frame t+1", "true flow_bwd", "teacher", "gated", "true visibility", "teacher's", "gated teacher's"]
    write_png(path, panel(images, captions, columns=4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=SAMPLE, help="a folder in CLEVRER's layout")
    parser.add_argument("--every", type=int, default=12, help="measure every N-th pair of the kept frames")
    parser.add_argument("--teachers", default="raft_small,dis")
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--pictures", type=Path, help="write one sheet per video, teacher and size here")
    args = parser.parse_args()
    names = args.teachers.split(",")
    teachers = {n: build_teacher(n, iterations=args.iterations, precision=args.precision) for n in names}
    print(f"videos {VIDEOS}, every {STRIDE}nd frame, every {args.every}th pair")
    for height, width in ((320, 480), (160, 240)):
        print(f"{height}x{width}".ljust(26) + "".join(c.rjust(12) for c in (*REGIONS, "F1", "precision", "recall")))
        tallies: dict[str, Tally] = defaultdict(Tally)
        with VideoReader() as reader:
            videos = [read(reader, args.root, i, height, width, args.every) for i in VIDEOS]
        for video in videos:
            gate = static_gate(video.frames, radius=RADIUS * height // GATE_ROWS)
            fwd, bwd = (keep[video.pairs][:, None] for keep in (gate.fwd, gate.bwd))
            nothing = torch.zeros(len(video.pairs), 2, height, width)
            measure(tallies["no motion"], FlowPair(nothing, nothing), video)
            labels = video.labels
            exact = FlowPair(*(torch.from_numpy(f[video.pairs]) for f in (labels.flow_fwd, labels.flow_bwd)))
            measure(tallies["truth"], exact, video)
            for name, teacher in teachers.items():
                both = [teacher(video.frames[k : k + 2]) for k in video.pairs]
                raw = FlowPair(torch.cat([f.flow_fwd for f in both]), torch.cat([f.flow_bwd for f in both]))
                gated = FlowPair(raw.flow_fwd * fwd, raw.flow_bwd * bwd)
                measure(tallies[name], raw, video)
                measure(tallies[f"{name} gated"], gated, video)
                if args.pictures is not None:
                    sheet = args.pictures / f"{name}_{height}_{video.id:05d}.png"
                    draw(sheet, raw, gated, video, len(video.pairs) // 2)
        for name, tally in tallies.items():
            print(name.ljust(26) + tally.row(), flush=True)


if __name__ == "__main__":
    main()
