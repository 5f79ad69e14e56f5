"""How the arrays of the stores compress: size, error and speed of every codec that was considered, on real videos.

    TORCH_HOME=../shared/weights python -m benchmarks.codecs [--quick] [--markdown docs/storage.md]

Everything goes through zarr, checksum included, into a folder and back, one video a shard as in `data.store`. Speeds
are raw megabytes per second of CPU time, all threads together: medians of interleaved rounds, so that other work on
the machine weighs little. *Write* is a whole video; *read* is training clips of 16 frames from starts as a shuffled
loader draws them, so most touch two chunks. Errors are in the array's own unit.

A codec is *admitted* if it writes fast enough not to hold up its stage (`WRITE_FLOOR`), reads fast enough for a few
cores to feed a GPU (`READ_FLOOR`), and is in the zarr v3 specification, so that every reader of zarr has it. The
smallest that is admitted for every array but the latents is used for all of these, since one codec is easier to trust
than five; latents, which no codec shrinks much, take the strongest level of it that is admitted for them.
`data.store.ArraySpec.compressors` holds the choice; the tables show what the best codec of each array would save.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import BloscCodec
from zarr.errors import ZarrUserWarning

from benchmarks.codec_samples import CLIP, FIELD_GRID, KEPT, Candidate, Sample, frame_spec, latent_spec, samples
from data.store import ArraySpec
from pipeline.size_estimate import Motion, estimate
from stages.fields import flow_specs, visible_spec
from stages.label import specs as label_specs

SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "clevrer"
LABELLED_VIDEOS = 15_000  # of CLEVRER's 20,000: the test split has no annotations
COMPARED = 2  # videos that every candidate compresses; the default compresses all
SLOW = 3.0
"""A candidate whose round takes more CPU seconds than this is measured once."""

WHOLE = {
    "frames 160x240": 1,
    "instances": 1,
    "true flow": 2,
    "true visibility": 1,
    "flow, dis, gated": 2,
    "visibility, dis, gated": 1,
}
"""What a default run stores at 160x240 besides latents, and how many of each: flow is stored both ways."""

WRITE_FLOOR = {"frames": 75, "latents": 150, "flow": 250, "masks": 100}
"""MB/s a core. Frames: one and a half times what decord makes on one core of every second frame at 160x240, so that
decoding stays the longer part of its stage. Latents: 1,300 frames a second from a GPU. Flow: twice what RAFT-small
makes on a GPU at 100 pairs a second both ways. Masks: 650 pairs a second, which needs no network."""
READ_FLOOR = 250
"""MB/s a core: a clip of 16 frames at 160x240 with flow and visibility at 320x480 is 14 MB raw, so four cores load 70 a
second."""


@dataclass
class Result:
    """Bytes and errors over all videos, speeds over rounds (MB a CPU second)."""

    raw: int = 0
    stored: list[int] = field(default_factory=list)
    worst: float = 0.0
    mean: float = 0.0
    write: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    clip_ms: list[float] = field(default_factory=list)


def measure(videos: Sequence[np.ndarray], candidates: Sequence[Candidate], rounds: int) -> dict[str, Result]:
    """Every candidate on these videos, round after round; bytes and errors are those of the first."""
    results = {candidate.label: Result() for candidate in candidates}
    with tempfile.TemporaryDirectory() as folder:
        for index in range(rounds):
            for candidate in candidates:
                result = results[candidate.label]
                if index == 0 or result.raw / 1e6 / result.write[0] < SLOW:
                    one_round(Path(folder) / "array", videos, candidate, result)
    return results


def one_round(path: Path, videos: Sequence[np.ndarray], candidate: Candidate, result: Result) -> None:
    rng, first = np.random.default_rng(0), not result.write
    raw, written, read = 0, 0.0, []
    for video in videos:
        values = np.ascontiguousarray(candidate.pack(video))
        raw += values.nbytes
        start = time.process_time()
        create(path, values, candidate)[0] = values
        written += time.process_time() - start
        array = zarr.open_array(store=str(path), mode="r")
        for s in rng.integers(0, len(values) - CLIP + 1, 8):
            start = time.process_time()
            _ = array[0, s : s + CLIP]
            read.append(time.process_time() - start)
        if first:
            result.stored.append(next(path.glob("c.*")).stat().st_size)
            error = np.abs(candidate.unpack(np.asarray(array[0])) - video.astype(np.float32))
            result.worst = max(result.worst, float(error.max()))
            result.mean += float(error.mean()) / len(videos)
    result.raw = raw
    result.write.append(raw / 1e6 / written)
    result.clip_ms.append(1e3 * statistics.mean(read))
    result.read.append(raw / sum(map(len, videos)) * CLIP / 1e6 / statistics.mean(read))


def create(path: Path, values: np.ndarray, candidate: Candidate) -> zarr.Array:
    clip = min(candidate.clip, len(values))
    return zarr.create_array(
        store=str(path),
        shape=(1, *values.shape),
        chunks=(1, clip, *values.shape[1:]),
        shards=(1, -(-len(values) // clip) * clip, *values.shape[1:]),
        dtype=values.dtype,
        compressors=candidate.compressors,
        filters=candidate.filters,
        fill_value=0,
        overwrite=True,
    )


def codec_table(sample: Sample, results: dict[str, Result]) -> list[str]:
    """One kind of array: every candidate, the default in bold."""
    default = label_of(sample.spec)
    lines = [
        f"**{sample.name}**",
        "",
        "| codec | KiB a frame | ratio | max error | mean error | write MB/s | read MB/s | ms a clip |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, r in results.items():
        name = f"**{label}**" if label == default else label
        frames = len(r.stored) * len(sample.videos[0])
        speeds = [statistics.median(column) for column in (r.write, r.read, r.clip_ms)]
        lines.append(
            f"| {name} | {sum(r.stored) / frames / 1024:.2f} "
            f"| {r.raw / sum(r.stored):.1f} | {r.worst:.4f} | {r.mean:.5f} "
            f"| {speeds[0]:.0f} | {speeds[1]:.0f} | {speeds[2]:.1f} |"
        )
    return [*lines, ""]


def label_of(spec: ArraySpec) -> str:
    """The name of the store's codec among the candidates."""
    codec = spec.compressors()[0]
    if isinstance(codec, BloscCodec):
        return f"blosc {codec.cname.value} {codec.clevel} {codec.shuffle.value}"
    return f"zstd {codec.level}"


def admitted(kind: str, results: dict[str, Result], candidates: Sequence[Candidate]) -> list[str]:
    """The candidates that are fast enough, the smallest first."""
    fast = [
        c.label
        for c in candidates
        if c.comparable
        and statistics.median(results[c.label].write) >= WRITE_FLOOR[kind]
        and statistics.median(results[c.label].read) >= READ_FLOOR
    ]
    return sorted(fast, key=lambda label: sum(results[label].stored))


class Whole:
    """The same codec for all arrays of `WHOLE`: bytes a video, and for how many of them it is fast enough."""

    def __init__(self) -> None:
        self.bytes: dict[str, float] = defaultdict(float)
        self.held: dict[str, int] = defaultdict(int)
        self.fast: dict[str, int] = defaultdict(int)

    def add(self, name: str, results: dict[str, Result], fast: Sequence[str]) -> None:
        for label, result in results.items():
            self.bytes[label] += WHOLE[name] * statistics.mean(result.stored)
            self.held[label] += 1
            self.fast[label] += label in fast

    def table(self, videos: int = 20_000) -> list[str]:
        arrays = max(self.held.values())
        sizes = {label: size for label, size in self.bytes.items() if self.held[label] == arrays}
        choice = min((label for label in sizes if self.fast[label] == arrays), key=sizes.__getitem__, default=None)
        lines = ["| codec for every array | GB | fast enough for |", "|---|---|---|"]
        for label, size in sizes.items():
            name = f"**{label}**" if label == choice else label
            lines.append(f"| {name} | {size * videos / 1e9:.1f} | {self.fast[label]} of {arrays} |")
        return lines


def chunk_rows(sample: Sample, rounds: int) -> list[str]:
    """The default codec at other numbers of frames a chunk."""
    default = Candidate("", sample.spec.compressors(), pack=sample.pack, unpack=sample.unpack)
    candidates = [replace(default, label=str(clip), clip=clip) for clip in (1, 8, 16, 64)]
    rows = []
    for label, r in measure(sample.videos[:COMPARED], candidates, rounds).items():
        frames = len(r.stored) * len(sample.videos[0])
        rows.append(
            f"| {sample.name} | {label} | {sum(r.stored) / frames / 1024:.2f} | {r.raw / sum(r.stored):.1f} "
            f"| {statistics.median(r.write):.0f} | {statistics.median(r.clip_ms):.1f} |"
        )
    return rows


def default_row(sample: Sample, result: Result) -> str:
    """Stored bytes per 1000 raw bytes: all videos, the smallest and the largest of them."""
    each = [1000 * stored * len(result.stored) / result.raw for stored in result.stored]
    return f"| {sample.name} | {len(each)} | {statistics.mean(each):.2f} | {min(each):.2f} | {max(each):.2f} |"


def clevrer_table(videos: int = 20_000) -> list[str]:
    """What the whole of CLEVRER takes, by `pipeline.size_estimate`, every second frame."""
    t, grid = len(KEPT), FIELD_GRID
    both, visible = flow_specs(t - 1, *grid, CLIP), [visible_spec(t - 1, *grid, CLIP)]
    rows: list[tuple[str, list[ArraySpec], Motion]] = [
        ("decode, 128x192", [frame_spec(128, 192)], "gated"),
        ("decode, 160x240", [frame_spec(160, 240)], "gated"),
        ("label, 320x480", label_specs(t, *grid, CLIP), "true"),
        ("flow, 320x480", both, "gated"),
        ("flow, 320x480, no gate", both, "ungated"),
        ("occlusion, 320x480", visible, "gated"),
        ("occlusion, 320x480, no gate", visible, "ungated"),
        ("encode, 128x192", [latent_spec(64, 96)], "gated"),
        ("encode, 160x240", [latent_spec(80, 120)], "gated"),
    ]
    lines = ["| stage | raw GB | stored GB | from | to |", "|---|---|---|---|---|"]
    for name, specs, motion in rows:
        size = estimate(specs, LABELLED_VIDEOS if name.startswith("label") else videos, motion=motion)
        raw, stored, low, high = (n / 1e9 for n in (size.raw, size.bytes, size.low, size.high))
        lines.append(f"| {name} | {raw:,.0f} | {stored:,.1f} | {low:,.1f} | {high:,.1f} |")
    return lines


def put(path: Path, name: str, lines: Sequence[str]) -> None:
    """Replace what stands between ``<!-- name:begin -->`` and ``<!-- name:end -->``."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    body = "\n".join([begin, *lines, end])
    text, count = re.subn(f"{begin}.*?{end}", lambda _: body, path.read_text(), flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{path} has {count} pairs of markers {begin} and {end}, needed is one")
    path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=SAMPLE, help="a folder in CLEVRER's layout")
    parser.add_argument("--quick", action="store_true", help="one video, few codecs, no RAFT: a minute")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=8, help="flow updates of RAFT-small (bfloat16)")
    parser.add_argument("--markdown", type=Path, help="replace the tables between the markers of this file")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=ZarrUserWarning)  # delta and packbits are outside the specification
    codecs: list[str] = []
    defaults = ["| array | videos | stored bytes per 1000 raw | smallest | largest |", "|---|---|---|---|---|"]
    chunks = ["| array | frames a chunk | KiB a frame | ratio | write MB/s | ms a clip |", "|---|---|---|---|---|---|"]
    whole = Whole()
    choices = ["| array | default | smallest that is admitted |", "|---|---|---|"]
    for sample in samples(args.root, quick=args.quick, iterations=args.iterations):
        candidates = sample.candidates(quick=args.quick)
        results = measure(sample.videos[:COMPARED], candidates, args.rounds)
        table = codec_table(sample, results)
        print("\n".join(table), flush=True)
        codecs += table
        fast = admitted(sample.kind, results, candidates)
        if sample.name in WHOLE:
            whole.add(sample.name, results, fast)
        default = label_of(sample.spec)
        chain = next(c for c in candidates if c.label == default)
        defaults.append(default_row(sample, measure(sample.videos, [chain], 1)[default]))
        choices.append(f"| {sample.name} | {default} | {fast[0] if fast else 'none'} |")
        if sample.name in ("frames 160x240", "flow, dis, gated", "visibility, dis, gated"):
            chunks += chunk_rows(sample, args.rounds)
    tables = {
        "totals": whole.table(),
        "choices": choices,
        "defaults": defaults,
        "chunks": chunks,
        "clevrer": clevrer_table(),
        "codecs": codecs,
    }
    for name, lines in tables.items():
        if name != "codecs":
            print("\n".join(lines), end="\n\n")
        if args.markdown is not None:
            put(args.markdown, name, lines)


if __name__ == "__main__":
    main()
