"""`clevrcast run` against plain `dvc repro`: the same ``dvc.lock`` and outputs, the time of each, errors of locks.

The real graph of the profile ``tiny`` with five predictors, whose stages only sleep (tests/stub_stage.py): what is
measured is scheduling, on as many cores as one likes. Every round edits parameters of several branches, and takes both
ways from the same state, in turn. Half of the rounds lease four made-up GPUs, half run on the CPU.

    python -m benchmarks.side_by_side --rounds 50 --seconds 1.0 --jobs 4
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import statistics
import tempfile
import time
from copy import copy
from pathlib import Path

from tests.workspace import Workspace, stub_workspace

ROOT = Path(__file__).resolve().parents[1]
BRANCHES = ("latent_warp", "more_1", "more_2", "more_3")
LOCKED = r"Unable to acquire lock|it is being blocked by|RWLock"


def edit(workspace: Workspace, rng: random.Random) -> None:
    """New parameters for both VAEs and some predictors, on as many independent branches."""
    for key in ("frame", "flow"):
        if rng.random() < 0.5:
            workspace.set(f"vae.{key}.training.steps", rng.randrange(10, 10**6))
    for key in rng.sample(BRANCHES, rng.randint(2, len(BRANCHES))):
        workspace.set(f"predictors.{key}.training.steps", rng.randrange(10, 10**6))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=1.0, help="that every stage sleeps")
    parser.add_argument("--jobs", type=int, default=4)
    arguments = parser.parse_args()
    rng = random.Random(0)
    ratios: list[float] = []
    different = locked = 0
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "ours").mkdir()
        ours = stub_workspace(ROOT, Path(folder) / "ours")
        for key in BRANCHES[1:]:
            ours.set(f"predictors.{key}", {"model": "latent_warp", "training": {"steps": 3}})
        ours.dvc("repro", "-q")
        for number in range(arguments.rounds):
            edit(ours, rng)
            theirs = copy(ours)
            theirs.folder = Path(folder) / "theirs"
            shutil.rmtree(theirs.folder, ignore_errors=True)
            shutil.copytree(ours.folder, theirs.folder, symlinks=True)
            gpus = ",".join(f"fake:{k}" for k in range(arguments.jobs)) if number % 2 else ""
            began = time.monotonic()
            theirs.module("dvc", "repro", STUB_SECONDS=str(arguments.seconds))
            middle = time.monotonic()
            said = ours.module(
                "pipeline.cli", "run", "--jobs", str(arguments.jobs), CLEVRCAST_GPUS=gpus,
                STUB_SECONDS=str(arguments.seconds),
            )  # fmt: skip
            repro, run = middle - began, time.monotonic() - middle
            logs = "".join(file.read_text() for file in (ours.folder / ".work/logs").glob("*.log*"))
            locked += bool(re.search(LOCKED, said + logs))
            same = [(w.folder / "dvc.lock").read_text() for w in (ours, theirs)]
            different += same[0] != same[1] or ours.digests(".") != theirs.digests(".")
            ratios.append(run / repro)
            print(
                f"round {number + 1}: {said.count(': ran')} stages ran; repro {repro:.1f} s, run {run:.1f} s, "
                f"{'leases' if gpus else 'CPU'}, locked {locked}, different {different}",
                flush=True,
            )
    print(
        f"{arguments.rounds} rounds: {different} with another dvc.lock or other outputs, {locked} with an error of "
        f"locks; run / repro: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}"
    )


if __name__ == "__main__":
    main()
