"""Several processes with their shares of every batch train what one does with the whole; facts of their machine."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from models.training_state import TrainingState, load_state
from pipeline.devices import save_seconds
from pipeline.errors import PipelineError
from pipeline.peers import Watch, compare, lost_seconds
from pipeline.ranks import interface_towards, own_devices
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


def view(units: str) -> dict[str, str]:
    return {"fingerprint": "f", "units": units}


def test_processes_that_see_different_stores_are_told_at_once() -> None:
    store, said = HashStore(), dict[int, str]()

    def see(me: int, units: str) -> None:
        try:
            compare(store, me, 3, view(units), "share it")
        except PipelineError as error:
            said[me] = str(error)

    threads = [threading.Thread(target=see, args=(me, units)) for me, units in enumerate(["a", "a", "b"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(said) == {0, 1, 2}
    assert "process 2" in said[0]
    assert "units is b there and a here" in said[0]
    assert "what to do: share it" in said[0]


def test_processes_that_see_the_same_go_on() -> None:
    store = HashStore()
    other = threading.Thread(target=compare, args=(store, 1, 2, view("a"), ""))
    other.start()
    compare(store, 0, 2, view("a"), "")
    other.join()


def test_a_process_that_falls_silent_or_fails_is_lost_and_one_that_leaves_is_not() -> None:
    store = HashStore()
    heard: dict[int, str] = {}
    ended = {me: threading.Event() for me in range(3)}

    def lost(me: int) -> Callable[[str], None]:
        def tell(what: str) -> None:
            heard[me] = what
            ended[me].set()

        return tell

    watches = [Watch(store, me, 3, silence=0.8, lost=lost(me)) for me in range(3)]
    for watch in watches:
        watch.start()
    time.sleep(0.5)
    watches[2].leave()  # it has nothing left to do
    assert not ended[0].wait(1.5)
    watches[1].leave("ParamsError: a made-up one")
    assert ended[0].wait(5)
    assert "process 1 on " in heard[0]
    assert "ended with ParamsError: a made-up one" in heard[0]
    assert 2 not in heard

    store = HashStore()
    watches = [Watch(store, me, 2, silence=0.8, lost=lost(me)) for me in range(2)]
    for event in ended.values():
        event.clear()
    for watch in watches:
        watch.start()
    time.sleep(0.5)
    watches[1]._left.set()  # as a power cut would have it
    assert ended[0].wait(5)
    assert "process 1 has not been heard of" in heard[0]


def test_seconds_until_a_process_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLEVRCAST_LOST_SECONDS", raising=False)
    assert lost_seconds() == 30
    for wrong in ("soon", "0", "nan"):
        monkeypatch.setenv("CLEVRCAST_LOST_SECONDS", wrong)
        with pytest.raises(PipelineError, match=f"CLEVRCAST_LOST_SECONDS={wrong} is no number of seconds"):
            lost_seconds()


def test_the_interface_towards_another_machine() -> None:
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no.such.name.invalid") == ""
