"""How time and memory of the data stages grow with the number of videos, and what a no-op `dvc repro` then costs.

    python -m benchmarks.data_scaling [--counts 10,25,50,100,200] [--noop 2000] [--folder DIR]

For each count the stages acquire (simulated), decode, label, flow and occlusion run on the `tiny` profile in a checkout
of their own, each from nothing but acquire, which grows (a video's simulation does not depend on the others, so what it
would have cost from nothing is the sum of its steps). Printed per stage: seconds, and the greatest resident memory of
any one of its processes, read from ``wait4`` for the stage and from /proc for its workers and decoders.

``--noop`` then makes so many videos of the simulated ones under other ids, runs the whole pipeline once, and times
`dvc repro` with nothing to do.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML

from data.clevrer import annotation_path, official_split, video_path
from tests.workspace import Workspace

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("acquire", "decode", "label", "flow", "occlusion")
FRAMES = 16


@dataclass(frozen=True)
class Cost:
    seconds: float
    peak: int
    """Bytes of the largest process."""


def checkout(folder: Path) -> Path:
    """A workspace of the tiny profile with short videos."""
    folder.mkdir(parents=True)
    Workspace(ROOT, folder)
    change(folder, {"decode": {"frames": FRAMES}, "shards": {"videos": 4}})
    return folder


def change(folder: Path, overlay: dict[str, dict[str, object]]) -> None:
    yaml = YAML()
    params = yaml.load(folder / "params.yaml")
    for section, values in overlay.items():
        params[section].update(values)
    yaml.dump(params, folder / "params.yaml")


def run(folder: Path, *command: str) -> Cost:
    """Run a command in the workspace, watching the memory of everything that it starts."""
    started = time.monotonic()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # DVC calls `python`
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    peak = [0]
    watcher = threading.Thread(target=watch, args=(process, peak))
    watcher.start()
    said, _ = process.communicate()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{said}")
    return Cost(time.monotonic() - started, peak[0])


def watch(process: subprocess.Popen[str], peak: list[int]) -> None:
    while process.poll() is None:
        for pid in descendants(process.pid):
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            high = [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")]
            peak[0] = max([peak[0], *high])
        time.sleep(0.05)


def descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *(d for child in children for d in descendants(int(child)))]


def measure(folder: Path, counts: list[int]) -> dict[int, dict[str, Cost]]:
    costs: dict[int, dict[str, Cost]] = {}
    simulated = 0.0
    for count in counts:
        train = f"0-{count - 2}" if count > 2 else "0"
        change(folder, {"acquire": {"videos": {"train": train, "test": "15000"}}})
        costs[count] = {}
        for stage in STAGES:
            if stage != "acquire":
                shutil.rmtree(folder / ".work" / stage, ignore_errors=True)
            cost = run(folder, sys.executable, "-m", f"stages.{stage}")
            if stage == "acquire":
                simulated += cost.seconds
                cost = Cost(simulated, cost.peak)
            costs[count][stage] = cost
        print(f"{count} videos done", file=sys.stderr, flush=True)
    return costs


def table(costs: dict[int, dict[str, Cost]]) -> str:
    lines = [
        "| videos | " + " | ".join(f"{s}, s | {s}, MB" for s in STAGES) + " |",
        "|" + "---|" * (2 * len(STAGES) + 1),
    ]
    for count, by_stage in costs.items():
        cells = [f"{by_stage[s].seconds:.1f} | {by_stage[s].peak / 1e6:.0f}" for s in STAGES]
        lines.append(f"| {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def noop(simulated: Path, folder: Path, count: int, per_shard: int) -> float:
    """Seconds of `dvc repro` with nothing to do on ``count`` videos (copies of the simulated ones)."""
    folder = checkout(folder)
    acquired = simulated / "artifacts/acquire"
    videos = [int(f.stem.removeprefix("video_")) for f in sorted((acquired / "videos").rglob("*.mp4"))]
    source = folder / "source"
    test = max(1, min(8, count // 100))
    ids = [*range(count - test), *range(15000, 15000 + test)]
    for k, number in enumerate(ids):
        for place in (video_path, annotation_path):
            original = acquired / place(official_split(videos[k % len(videos)]), videos[k % len(videos)])
            copy = source / place(official_split(number), number)
            copy.parent.mkdir(parents=True, exist_ok=True)
            os.link(original, copy)
    change(
        folder,
        {
            "shards": {"videos": per_shard},
            "acquire": {
                "source": "local",
                "root": "source",
                "videos": {"train": f"0-{count - test - 1}", "test": f"15000-{15000 + test - 1}"},
            },
        },
    )
    whole = run(folder, sys.executable, "-m", "dvc", "repro").seconds
    files = sum(1 for f in (folder / "artifacts").rglob("*") if f.is_file())
    times = sorted(run(folder, sys.executable, "-m", "dvc", "repro").seconds for _ in range(3))
    print(
        f"\n{count} videos, {files} files in artifacts: whole run {whole:.0f} s, no-op {times[1]:.2f} s (median of 3)"
    )
    return times[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="10,25,50,100,200")
    parser.add_argument("--noop", type=int, default=0, help="videos for the no-op run; 0: leave it out")
    parser.add_argument("--noop-shard", type=int, default=4, help="videos a shard in that run")
    parser.add_argument("--folder", type=Path, help="work here instead of in a temporary folder, and keep it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        base = arguments.folder or Path(temporary)
        growing = checkout(base / "growing")
        print(table(measure(growing, [int(c) for c in arguments.counts.split(",")])), flush=True)
        if arguments.noop:
            noop(growing, base / "noop", arguments.noop, arguments.noop_shard)


if __name__ == "__main__":
    main()
