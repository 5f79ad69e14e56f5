"""Which flow teacher to choose: accuracy and speed of every teacher against truth, as one table.

    clevrcast teachers [--teachers raft_small,dis,ptlflow:sea_raft_s=things] [--videos FOLDER] [--sizes 320x480,...]

On simulated scenes, and on the annotated videos of a folder in CLEVRER's layout, where the truth is rigid flow cast
from the annotations. Errors are those of the backward flow in pixels of the size, `moving` where the truth exceeds
half a pixel; F1 is that of the pixels that were not visible in the frame before, at the default thresholds; a pair is
both directions. Row one of each size, no motion anywhere, is what a teacher has to beat; the last is what true flow
would score. Teachers that cannot be had here are listed with the reason and the way out.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data.clevrer import FRAMES, discover, read_annotation
from data.errors import ClevrcastError, EmptyError
from data.labels import VideoLabels, label_video
from data.picture import flow_picture, occlusion_overlay, panel, write_png
from data.video import VideoReader
from data.world import Annotation
from models.flow_teachers import PTLFLOW, TEACHERS, FlowPair, FlowTeacher, build_teacher
from models.occlusion import visibility
from models.static_gate import RADIUS, static_gate
from models.statistics import State
from pipeline.devices import device
from pipeline.errors import PipelineError
from stages.teacher_accuracy import SHOWN, accuracy, state_of_pairs

STRIDE = 2
GATE_ROWS = 320
"""The default radius of the gate is meant for this many rows."""
SAMPLE = Path("../shared/clevrer")
NOTHING, TRUTH = "no motion", "truth"
COLUMNS = ("EPE px", "moving", "background", "visible", "F1 hidden")


@dataclass(frozen=True)
class Sample:
    """The kept frames of one video on one grid, their labels, and the pairs (k, k+1) that are measured."""

    id: int
    frames: UInt8[Tensor, "t h w 3"]
    labels: VideoLabels
    pairs: list[int]


@dataclass(frozen=True)
class Row:
    """One line of the table; ``figures`` are those of `SHOWN` that are defined."""

    data: str
    resolution: tuple[int, int]
    teacher: str
    gated: bool
    figures: dict[str, float]
    pairs_per_second: float | None = None
    weights_sha256: str = ""
    licence: str = ""


@dataclass(frozen=True)
class Absent:
    """A teacher that could not be had, or could not take a size."""

    teacher: str
    reason: str
    remedy: str


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns 0, or 1 if a setting is wrong or no teacher could be measured."""
    arguments = _parser().parse_args(argv)
    try:
        rows, absent = compare(arguments)
    except (ClevrcastError, PipelineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.json is not None:
        body = {"rows": [asdict(row) for row in rows], "unavailable": [asdict(a) for a in absent]}
        arguments.json.write_text(json.dumps(body, indent=1) + "\n")
    _print(rows, absent)
    return 0 if any(row.weights_sha256 or row.licence for row in rows) else 1


def _parser() -> argparse.ArgumentParser:
    everything = [*TEACHERS, f"{PTLFLOW}sea_raft_s=things"]
    parser = argparse.ArgumentParser(
        prog="clevrcast teachers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--teachers",
        type=lambda text: text.split(","),
        default=everything,
        help=f"names by commas, ptlflow's as ptlflow:NAME=WEIGHTS (default {','.join(everything)})",
    )
    parser.add_argument("--videos", type=Path, help=f"a folder in CLEVRER's layout (default {SAMPLE}, where it exists)")
    parser.add_argument("--most", type=_positive, default=4, help="annotated videos of the folder, at most (default 4)")
    parser.add_argument("--simulated", type=int, default=2, help="simulated videos (default 2)")
    parser.add_argument("--every", type=_positive, default=12, help="measure every N-th pair (default 12)")
    parser.add_argument("--sizes", type=_sizes, default=_sizes("320x480,160x240"), help="HxW by commas")
    parser.add_argument("--iterations", type=_positive, default=12, help="RAFT's refinements (default 12)")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--pictures", type=Path, help="write one sheet per video, teacher and size into this folder")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    return parser


def _positive(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _sizes(text: str) -> list[tuple[int, int]]:
    found = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part) for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 320x480,160x240 (height x width)")
    return [(int(m[1]), int(m[2])) for m in found if m]


def compare(arguments: argparse.Namespace) -> tuple[list[Row], list[Absent]]:
    """All rows of the table, and what could not be measured.

    Raises:
        SourceError: the folder is absent or holds no video. EmptyError: there is nothing to measure on.
    """
    where, rows = device(), []
    teachers, absent = _build(arguments, where)
    samples = list(_samples(arguments, where))
    if not samples:
        raise EmptyError(
            f"no annotated video in {arguments.videos} and --simulated {arguments.simulated}",
            remedy="simulate some, or name a folder that has annotations",
        )
    for data, size, videos in samples:
        rows.append(_nothing(data, size, videos))
        for name, teacher in teachers.items():
            try:
                rows += _measure(data, size, videos, name, teacher, arguments.pictures)
            except ClevrcastError as error:
                absent.append(Absent(f"{name} at {size[0]}x{size[1]}", error.message, error.remedy))
        rows.append(_truth(data, size, videos))
    return rows, absent


def _build(arguments: argparse.Namespace, where: str) -> tuple[dict[str, FlowTeacher], list[Absent]]:
    built: dict[str, FlowTeacher] = {}
    absent = []
    for label in arguments.teachers:
        name, _, weights = label.partition("=")
        if name.startswith(PTLFLOW) and not weights:
            remedy = f"write {name}=things for the published checkpoint of that name, or {name}=PATH, or {name}=random"
            absent.append(Absent(label, "no weights are named", remedy))
            continue
        if not name.startswith(PTLFLOW) and name not in TEACHERS:
            absent.append(
                Absent(label, "there is no such teacher", f"choose from {', '.join(TEACHERS)}, ptlflow:NAME=WEIGHTS")
            )
            continue
        options = {"device": where, "iterations": arguments.iterations, "precision": arguments.precision}
        try:
            built[label] = build_teacher(name, **options, weights=weights or None)
        except ClevrcastError as error:
            absent.append(Absent(label, error.message, error.remedy))
    return built, absent


def _samples(arguments: argparse.Namespace, where: str) -> Iterator[tuple[str, tuple[int, int], list[Sample]]]:
    """(what, size, videos) of everything that is measured; one size of one source in memory at a time."""
    kept = range(0, FRAMES, STRIDE)
    pairs = list(range(0, len(kept) - 1, arguments.every))

    def sample(video: int, frames: np.ndarray, annotation: Annotation, h: int, w: int) -> Sample:
        labels = label_video(annotation, kept, h, w, device=where)
        return Sample(video, torch.from_numpy(frames), labels, pairs)

    if arguments.simulated > 0:
        from data.physics import simulate  # Bullet and the renderer are loaded only where they are used
        from data.shading import render

        scenes = [simulate(np.random.default_rng((0, i)), scene_index=i) for i in range(arguments.simulated)]
        for h, w in arguments.sizes:
            drawn = (render(scene, kept, h, w, device=where) for scene in scenes)
            videos = [sample(i, f, scene, h, w) for i, (f, scene) in enumerate(zip(drawn, scenes, strict=True))]
            yield f"{len(videos)} simulated", (h, w), videos
    folder = arguments.videos or (SAMPLE if SAMPLE.is_dir() else None)
    found = [v for v in discover(folder) if v.annotation is not None] if folder else []
    if not found:
        return
    with VideoReader() as reader:
        for h, w in arguments.sizes:
            videos = []
            for v in found[: arguments.most]:
                frames = reader.read(v.video, kept, height=h, width=w, expected_frames=FRAMES)
                videos.append(sample(v.id, frames, read_annotation(str(v.annotation)), h, w))
            yield f"{len(videos)} real", (h, w), videos


def _measure(
    data: str, size: tuple[int, int], videos: list[Sample], name: str, teacher: FlowTeacher, pictures: Path | None
) -> list[Row]:
    """Two rows: the teacher's flows as they are, and behind the gate."""
    states: dict[bool, list[State]] = {False: [], True: []}
    teacher(videos[0].frames[:2])  # what a first call costs (networks are built, memory is mapped) is not speed
    seconds = 0.0
    for video in videos:
        started = time.monotonic()
        both = [teacher(video.frames[k : k + 2]) for k in video.pairs]
        seconds += time.monotonic() - started
        raw = FlowPair(torch.cat([f.flow_fwd for f in both]), torch.cat([f.flow_bwd for f in both]))
        gate = static_gate(video.frames, radius=RADIUS * size[0] // GATE_ROWS)
        gated = FlowPair(raw.flow_fwd * gate.fwd[video.pairs][:, None], raw.flow_bwd * gate.bwd[video.pairs][:, None])
        for flows, kind in ((raw, False), (gated, True)):
            states[kind].append(_state(flows, video))
        if pictures is not None:
            file = f"{re.sub(r'[^A-Za-z0-9_.]+', '-', name)}_{size[0]}_{data.split()[1]}_{video.id:05d}.png"
            _draw(pictures / file, raw, gated, video)
    speed = round(sum(len(v.pairs) for v in videos) / seconds, 3)
    licence = f"{teacher.warning}; {teacher.licence}" if teacher.warning else teacher.licence
    return [
        Row(data, size, name, gated, accuracy(states[gated]), speed, teacher.weights_digest, licence)
        for gated in (False, True)
    ]


def _nothing(data: str, size: tuple[int, int], videos: list[Sample]) -> Row:
    states = []
    for video in videos:
        still = torch.zeros(len(video.pairs), 2, *size)
        states.append(_state(FlowPair(still, still), video))
    return Row(data, size, NOTHING, False, accuracy(states))


def _truth(data: str, size: tuple[int, int], videos: list[Sample]) -> Row:
    return Row(data, size, TRUTH, False, accuracy([_state(_true_flows(video), video) for video in videos]))


def _true_flows(video: Sample) -> FlowPair:
    return FlowPair(*(torch.from_numpy(f[video.pairs]) for f in (video.labels.flow_fwd, video.labels.flow_bwd)))


def _state(flows: FlowPair, video: Sample) -> State:
    true_visible = torch.from_numpy(video.labels.visible[video.pairs]).float()
    seen = visibility(flows.flow_fwd, flows.flow_bwd)
    return state_of_pairs(video.id, flows.flow_bwd, _true_flows(video).flow_bwd, seen, true_visible)


def _draw(path: Path, raw: FlowPair, gated: FlowPair, video: Sample) -> None:
    """Of the middle pair: frame, truth, teacher, gated teacher; true and estimated visibility."""
    index = len(video.pairs) // 2
    k, labels = video.pairs[index], video.labels
    frame, scale = video.frames[k + 1].numpy(), video.frames.shape[1] / 32
    seen, raw_seen = (visibility(f.flow_fwd[[index]], f.flow_bwd[[index]])[0].numpy() for f in (gated, raw))
    images = [
        frame,
        *(flow_picture(flow, scale) for flow in (labels.flow_bwd[k], raw.flow_bwd[index].numpy())),
        flow_picture(gated.flow_bwd[index].numpy(), scale),
        *(occlusion_overlay(frame, v) for v in (labels.visible[k].astype(np.float32), raw_seen, seen)),
    ]
    captions = ["frame t+1", "true flow_bwd", "teacher", "gated", "true visibility", "teacher's", "gated teacher's"]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, panel(images, captions, columns=4))


def _print(rows: Sequence[Row], absent: Sequence[Absent]) -> None:
    table = Table(title=f"flow teachers against truth, every {STRIDE}nd frame")
    for title in ("videos", "size", "teacher"):
        table.add_column(title, no_wrap=True)
    for title in (*COLUMNS, "pairs/s"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("weights", no_wrap=True)
    for row in rows:
        cells = [f"{row.figures[name]:.3f}" if name in row.figures else "-" for name in SHOWN]
        speed = f"{row.pairs_per_second:.2f}" if row.pairs_per_second is not None else ""
        name = row.teacher + (", gated" if row.gated else "")
        size = f"{row.resolution[0]}x{row.resolution[1]}"
        table.add_row(row.data, size, name, *cells, speed, row.weights_sha256[:8], end_section=row.teacher == TRUTH)
    console = Console()
    console.width = max(console.width, 140)  # a log has no width: names and figures are not cut
    console.print(table)
    for name, licence in {row.teacher: row.licence for row in rows if row.licence}.items():
        console.print(f"{name}: {licence}", markup=False, soft_wrap=True)
    for item in absent:
        console.print(
            f"not available: {item.teacher}: {item.reason}\n  what to do: {item.remedy}", markup=False, soft_wrap=True
        )


if __name__ == "__main__":
    raise SystemExit(main())
