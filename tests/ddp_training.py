"""What the processes of a torchrun do in `test_training_together`: train on their shares; the first writes the result.

``torchrun tests/ddp_training.py FILE``; without torchrun it trains alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from data.clips import Clip
from models.training import TrainingOptions, train
from models.training_state import Keeping, save_state
from pipeline.ranks import process_group, rank, world_size
from tests.drift_predictor import Drift, Options

BATCH, STEPS = 4, 8


def batches() -> Iterator[Clip]:
    """This process' share of batches of random frames."""
    generator, share = torch.Generator().manual_seed(1), BATCH // world_size()
    numbers = torch.arange(BATCH)
    while True:
        whole = Clip(numbers, numbers, frames=torch.rand(BATCH, 5, 3, 8, 8, generator=generator))
        mine = slice(rank() * share, (rank() + 1) * share)
        yield replace(whole, video=numbers[mine], start=numbers[mine], frames=whole.require("frames")[mine])


def main(path: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Drift(Options(noise=0.0), vaes={}, height=8, width=8, context=2)
    options = TrainingOptions(steps=STEPS, learning_rate=0.01, warmup=2, precision="float32")
    save = None if rank() else lambda state: save_state(path, state)
    with process_group("cpu"):
        train(model, batches(), options, keeping=Keeping(save=save, every_steps=STEPS))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
