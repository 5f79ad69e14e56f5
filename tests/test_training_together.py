"""Several processes with their shares of every batch train what one does with the whole; facts of their machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.training_state import TrainingState, load_state
from pipeline.devices import save_seconds
from pipeline.errors import PipelineError
from pipeline.ranks import own_devices
from tests.ddp_training import STEPS

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def trained(root: Path, path: Path, *launcher: str) -> TrainingState:
    done = subprocess.run(
        [sys.executable, *launcher, "tests/ddp_training.py", str(path)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    state = load_state(path)
    assert state is not None
    return state


@pytest.mark.slow
def test_two_processes_train_as_one(root: Path, tmp_path: Path) -> None:
    alone, together = trained(root, tmp_path / "one"), trained(root, tmp_path / "two", *TORCHRUN)
    assert alone.step == together.step == STEPS
    assert alone.curves["loss"][-1] < alone.curves["loss"][0]
    for name, curve in alone.curves.items():
        torch.testing.assert_close(torch.tensor(together.curves[name]), torch.tensor(curve), rtol=1e-4, atol=1e-6)
    # Adam divides by the size of the gradient, so where that is nothing but rounding the difference is one of steps.
    for name, value in alone.average.items():
        torch.testing.assert_close(together.average[name], value, rtol=1e-3, atol=1e-4)


def test_every_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = ["cuda:0", "cuda:1"]
    assert own_devices(gpus) == ("cuda:0", "cuda:1")
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert own_devices(gpus) == ("cuda:1",)
    assert own_devices(["cpu"]) == ("cpu",)
    with pytest.raises(PipelineError, match="2 processes here, for 1 devices"):
        own_devices(["cuda:0"])


def test_how_often_a_run_is_saved_is_asked_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLEVRCAST_SAVE_SECONDS", raising=False)
    assert save_seconds() == 60
    monkeypatch.setenv("CLEVRCAST_SAVE_SECONDS", "2.5")
    assert save_seconds() == 2.5
    for wrong in ("often", "-1", "nan"):
        monkeypatch.setenv("CLEVRCAST_SAVE_SECONDS", wrong)
        with pytest.raises(PipelineError, match=f"CLEVRCAST_SAVE_SECONDS={wrong} is no number of seconds"):
            save_seconds()
