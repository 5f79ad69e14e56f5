"""Peak memory of evaluating few and many videos: it must not grow with the test set.

In a workspace whose evaluation split holds as many videos as asked for, each number of videos is evaluated by a fresh
process, alternately, and its greatest resident set is printed. For example, 40 and 400 simulated clips::

    clevrcast profile tiny       # then acquire.videos.test: 15000-15099, evaluate.window_stride: 5
    dvc repro evaluate@latent_warp
    python -m benchmarks.evaluation_memory latent_warp --videos 10 100
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path

from models.checkpoint import load_predictor, read_meta
from models.evaluation import evaluate
from models.predictor import find
from pipeline.params import load_params
from pipeline.stage import ARTIFACTS, Job
from stages.evaluate import Windows, networks_of
from stages.trained import load_vaes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("predictor")
    parser.add_argument("--videos", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        measure(arguments.predictor, arguments.videos[0])
        return
    for _ in range(arguments.rounds):
        for videos in arguments.videos:
            command = [sys.executable, "-m", "benchmarks.evaluation_memory", arguments.predictor, "--inside"]
            subprocess.run([*command, "--videos", str(videos)], check=True)


def measure(key: str, videos: int) -> None:
    """Evaluate the first ``videos`` videos of the split in this process and say how much memory it took at most."""
    job = Job("evaluate", key, load_params(Path("params.yaml")), Path.cwd(), ("cpu",))
    windows = Windows(job)
    held = len(windows.source.videos)
    if held < videos:
        raise SystemExit(f"the split holds {held} videos, {videos} were asked for: enlarge acquire.videos")
    trained = ARTIFACTS / "train" / key
    predictor = load_predictor(trained, vaes=load_vaes(find(read_meta(trained).name)[1]))
    before = _peak()
    batches = (windows.of(video) for video in windows.source.videos[:videos])
    result = evaluate(
        predictor, batches, name=key, seed=0, frame_stride=job.params.decode.stride, networks=networks_of(job)
    )
    print(f"{videos} videos, {result.windows} clips: peak {_peak():.1f} MB, of which {before:.1f} before the first")


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
